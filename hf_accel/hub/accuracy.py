"""The accuracies of a run as rows of one table, and as the `model-index` of a model card."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult

from ..compression import Compression, forward_cost
from ..models import AccelViTConfig

METHODS = {
    "knn": "kNN",
    "linear": "linear probe",
    "logistic": "logistic regression",
    "finetune": "fine-tuning",
    "random": "kNN, random initialisation",
    "pixels": "kNN on raw pixels",
}
REFERENCES = ("random", "pixels")
"""Rows to compare with, which are not of the model."""

FINAL = "final"
"""Folder of a run that holds the exported encoder."""


@dataclass(frozen=True)
class Accuracy:
    """One row. Accuracies are fractions; `cost` is that of a forward in units, None where there is no patch size."""

    method: str
    data: str
    split: str | None
    top1: float
    top5: float | None = None
    std: float | None = None
    seeds: int = 1
    patch_size: int | None = None
    cost: float | None = None

    @property
    def name(self) -> str:
        return METHODS.get(self.method, self.method)


def accuracies(
    results: Mapping[str, Any], config: AccelViTConfig, data: Mapping[str, str], own: tuple[str, ...] = ()
) -> list[Accuracy]:
    """What the run measured of itself, `results["evaluations"]`, and what to compare with, in the order of a table.

    Args:
        data: what the run was trained on, as an evaluation may call it -> its name.
        own: names by which an evaluation's "checkpoint" can mean this run, beside its final/.
    """
    split = results.get("data", {}).get("validation_split")
    base, rows = {"patch_size": config.patch_size, "data": next(iter(data.values())), "split": split}, []
    if results.get("knn_top1") is not None:
        rows.append({**base, "top1": results["knn_top1"], "top5": results.get("knn_top5")})
    for entry in results.get("evaluations", []):
        if _is_own(entry, own):
            rows.append({**entry, "data": data.get(entry.get("data"), entry.get("data"))})
    if results.get("knn_top1_random_init") is not None:
        rows.append({**base, "evaluation": "random", "top1": results["knn_top1_random_init"]})
    if results.get("knn_top1_raw_pixels") is not None:
        pixels = {"evaluation": "pixels", "patch_size": None, "top1": results["knn_top1_raw_pixels"]}
        rows.append({**base, **pixels})
    # An evaluation at the end of training and one after it are the same one
    found = {_key(row): row for row in (_accuracy(entry, base, config) for entry in rows)}
    order = {method: number for number, method in enumerate(METHODS)}
    return sorted(found.values(), key=lambda row: (order.get(row.method, 0), row.data, row.patch_size or 0))


def _key(row: Accuracy) -> tuple:
    return row.method, row.data, row.split, row.patch_size


def _is_own(entry: Mapping[str, Any], own: tuple[str, ...]) -> bool:
    """Whether an evaluation is of the run's encoder and not, say, of a random one."""
    checkpoint = str(entry.get("checkpoint", FINAL))
    return checkpoint in own or PurePath(checkpoint).name in (FINAL, *own)


def _accuracy(entry: Mapping[str, Any], base: Mapping[str, Any], config: AccelViTConfig) -> Accuracy:
    """An entry of `evaluations`: "top1" and "top5" are numbers or lists of one a seed. `base` is what it may lack."""
    top1, top5 = (list(_numbers(entry.get(name))) for name in ("top1", "top5"))
    patch_size = entry.get("patch_size", config.patch_size)
    shortened = None if patch_size is None else forward_cost(config, Compression(patch_size))
    data = entry.get("data") or base["data"]
    data = PurePath(data).name if _is_local(data) else data
    return Accuracy(
        method=entry.get("evaluation", "knn"),
        data=data,
        split=entry.get("split") or (base["split"] if data == base["data"] else None),
        top1=statistics.fmean(top1),
        top5=statistics.fmean(top5) if top5 else None,
        std=statistics.stdev(top1) if len(top1) > 1 else None,
        seeds=len(top1),
        patch_size=patch_size,
        cost=shortened,
    )


def _is_local(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or "\\" in data


def _numbers(value: Any) -> Iterator[float]:
    if value is not None:
        yield from (value if isinstance(value, list) else [value])


def eval_results(rows: list[Accuracy]) -> list[EvalResult]:
    """The `model-index`: the model's own rows, top-1 and top-5."""
    found = []
    for row in rows:
        if row.method in REFERENCES:
            continue
        at = f", patches of {row.patch_size} px" if row.patch_size else ""
        for rank, value in (("top-1", row.top1), ("top-5", row.top5)):
            if value is None:
                continue
            seeds = f", mean of {row.seeds} seeds" if row.seeds > 1 else ""
            found.append(
                EvalResult(
                    task_type="image-classification",
                    dataset_type=_identifier(row.data),
                    dataset_name=row.data,
                    dataset_split=row.split,
                    metric_type="accuracy",
                    metric_name=f"{row.name} {rank} accuracy{at}{seeds}",
                    metric_value=round(value, 4),
                )
            )
    return found


def _identifier(name: str) -> str:
    """What is no data set of the Hub still needs an identifier there."""
    return "".join(letter if letter.isalnum() or letter in "-_./" else "-" for letter in name).strip("-")
