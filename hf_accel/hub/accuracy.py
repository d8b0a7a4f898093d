"""The accuracies of a run as rows of one table, and as the `model-index` of a model card."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult

from ..compression import Compression, forward_cost
from ..models import AccelViTConfig
from ..report import describe_differences

METHODS = {
    "knn": "kNN",
    "linear": "linear probe",
    "logistic": "logistic regression",
    "finetune": "fine-tuning",
    "pixels": "kNN on raw pixels",
}

RANDOM = "random"
"""What an evaluation calls the encoder as it was before training."""


@dataclass(frozen=True)
class Accuracy:
    """One row of the table. Accuracies are fractions, and `cost` is that of a forward pass in units, if known."""

    method: str
    data: str
    split: str | None
    top1: float
    top5: float | None = None
    std: float | None = None
    interval: tuple[float, float] | None = None
    seeds: int = 1
    labels: int | None = None
    patch_size: int | None = None
    cost: float | None = None
    is_reference: bool = False
    """Whether the row is a baseline, and no accuracy of the model."""
    settings: str = ""
    """The settings in which it differs from other rows of its method."""

    @property
    def name(self) -> str:
        method = METHODS[self.method] + f" ({self.settings})" * bool(self.settings)
        return f"{method}, random initialisation" if self.is_reference and self.method != "pixels" else method


def accuracies(
    results: Mapping[str, Any], config: AccelViTConfig, data: Mapping[str, str], knn: Mapping[str, Any]
) -> list[Accuracy]:
    """Return the accuracies of a run and its baselines in the order of a table.

    Of `results["evaluations"]` it takes those of the run's own weights and of the encoder at random initialisation.

    Args:
        data: what the run was trained on, as an evaluation may call it -> its name.
        knn: the settings of the run's own kNN, as an evaluation has them.
    """
    about = results.get("data", {})
    base = {
        "evaluation": "knn",
        "settings": knn,
        "patch_size": config.patch_size,
        "data": next(iter(data.values())),
        "validation": about.get("validation_split") or "",
        "train_images": about.get("labelled_images", about.get("images")),
    }
    random, pixels = results.get("knn_top1_random_init"), results.get("knn_top1_raw_pixels")
    entries = []
    if results.get("knn_top1") is not None:
        entries.append({**base, "top1": results["knn_top1"], "top5": results.get("knn_top5")})
    if random is not None:
        entries.append({**base, "checkpoint": RANDOM, "top1": random})
    for entry in results.get("evaluations", []):
        if entry["weights"] == results.get("weights") or entry["checkpoint"] == RANDOM:
            entries.append({**entry, "data": data.get(entry["data"], entry["data"])})
    if pixels is not None:
        entries.append({**base, "evaluation": "pixels", "patch_size": None, "top1": pixels})
    rows = [_accuracy(entry, config, describe_differences(entry, entries)) for entry in entries]
    # The evaluation at the end of training and a later one with the same settings make one row.
    found = {(row.name, row.data, row.split, row.patch_size, row.labels): row for row in rows}
    return sorted(found.values(), key=_rank)


def _rank(row: Accuracy) -> tuple[Any, ...]:
    """Return the place of a row in the table."""
    method = list(METHODS).index(row.method)
    return method, row.data, row.labels or 0, row.is_reference, row.patch_size or 0, row.settings


def _accuracy(entry: Mapping[str, Any], config: AccelViTConfig, settings: str) -> Accuracy:
    """Build the row of an entry of `evaluations`, as `report.add_run` writes them."""
    patch_size, seeds = entry["patch_size"], entry.get("seeds", [None])
    return Accuracy(
        method=entry["evaluation"],
        data=PurePath(entry["data"]).name if _is_local(entry["data"]) else entry["data"],
        split=entry["validation"].rpartition("/")[2] or None,
        top1=entry["top1"],
        top5=entry.get("top5"),
        std=entry.get("top1_std"),
        interval=tuple(entry["top1_ci95"]) if "top1_ci95" in entry else None,
        seeds=len(seeds),
        labels=entry["train_images"],
        patch_size=patch_size,
        cost=None if patch_size is None else forward_cost(config, Compression(patch_size)),
        is_reference=entry["evaluation"] == "pixels" or entry.get("checkpoint") == RANDOM,
        settings=settings,
    )


def _is_local(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or "\\" in data


def eval_results(rows: list[Accuracy]) -> list[EvalResult]:
    """Return the accuracies of the model itself for the `model-index`, top-1 and top-5."""
    found = []
    for row in rows:
        at = f", patches of {row.patch_size} px" if row.patch_size else ""
        seeds = f", mean of {row.seeds} seeds" if row.seeds > 1 else ""
        for rank, value in (("top-1", row.top1), ("top-5", row.top5)):
            if value is None or row.is_reference:
                continue
            result = EvalResult(
                task_type="image-classification",
                dataset_type=re.sub(r"[^\w./-]", "-", row.data).strip("-"),  # Also for data that are not on the Hub.
                dataset_name=row.data,
                dataset_split=row.split,
                metric_type="accuracy",
                metric_name=f"{row.name} {rank} accuracy{at}{seeds}",
                metric_value=round(value, 4),
            )
            found.append(result)
    return found
