"""The model card of a run, from what the run wrote: valid metadata, and code that can be executed."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from ..compression import Compression, Schedule, Strategy, forward_cost
from ..compression.schedule import Stage
from ..compression.strategy import possible_patch_sizes
from ..models import PRESETS, AccelViTConfig
from ..objectives import OBJECTIVES
from ..run_folder import RunFolder
from ..utils.redact import without_local_paths
from ..utils.weight_files import opening
from .accuracy import Accuracy, accuracies, eval_results

MARK = "<!-- Written by hf_accel. Remove this line, and it leaves the file alone. -->"
FIGURES = ("schedule.png", "curves.png")
BUNDLED = "bundled digits"

HERE = "its Hub id, once it is uploaded"
"""The end of the code line that names the folder of the card, and that a push replaces."""

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MODELS = {"vit_tiny": "ViT-Ti", "vit_small": "ViT-S", "vit_base": "ViT-B", "vit_large": "ViT-L"}


@dataclass(frozen=True)
class Run:
    """The run that a card describes.

    Args:
        name: the name of the model, for the title and the metadata.
        recipe: the settings of the run, as its recipe.yaml holds them.
        results: what results.json holds.
        config: the configuration of the encoder.
        parameters: the number of the encoder's parameters, or None if they were not counted.
        figures: which of FIGURES will lie beside the card.
        is_complete: whether the training has ended.
    """

    name: str
    recipe: Mapping[str, Any]
    results: Mapping[str, Any]
    config: AccelViTConfig
    parameters: int | None = None
    figures: tuple[str, ...] = ()
    is_complete: bool = True

    @property
    def data(self) -> str:
        """The name of the training data without a path of this machine."""
        return self.results.get("data", {}).get("name") or BUNDLED

    @property
    def dataset(self) -> str | None:
        """The Hub id of the training data, if they are from the Hub."""
        return self.data if self.results.get("data", {}).get("is_on_hub") else None

    def accuracies(self) -> list[Accuracy]:
        knn = {"k": self.recipe.get("knn_k"), "temperature": self.recipe.get("knn_temperature")}
        return accuracies(self.results, self.config, {self.recipe.get("data", self.data): self.data}, knn)


def read_run(folder: RunFolder, results: Mapping[str, Any], config: AccelViTConfig) -> Run:
    """Return the run in a folder whose final/ is written.

    Args:
        results: what its results.json holds, or will hold.
        config: the configuration in final/.
    """
    final = folder.final
    with opening(str(final)), safe_open(final / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    figures = tuple(name for name in FIGURES if (final / name).exists())
    name, parameters = folder.path.resolve().name, sum(map(math.prod, shapes))
    return Run(name, folder.read_recipe(), results, config, parameters, figures)


def card_text(run: Run, repo_id: str | None) -> str:
    """Return the card, with its metadata.

    Args:
        repo_id: the repository that the code of the card loads; None for the folder of the card.
    """
    rows, objective = run.accuracies(), OBJECTIVES.get(run.results["objective"])
    base, size = run.config.patch_size, run.config.image_size
    larger = next((patch for patch in possible_patch_sizes(size, base) if patch > base), None)
    return render(
        "card.md.jinja",
        metadata=_metadata(run, rows).to_yaml(),
        mark=MARK,
        run=run,
        recipe=without_local_paths(run.recipe),
        recipe_text=yaml.safe_dump(without_local_paths(run.recipe), sort_keys=False, allow_unicode=True, width=100),
        results=run.results,
        baseline=run.results.get("baseline"),
        start=run.results.get("init_from"),
        best=run.results.get("best"),
        data=run.results.get("data"),
        origin=without_local_paths(run.results.get("environment", {})),
        objective=objective.display_name if objective else run.results["objective"],
        citation=objective.citation.strip() if objective else "",
        architecture=_architecture(run),
        model_id=json.dumps(repo_id or "."),  # A name such as "photos/final" could be a stranger's repository.
        hub_id="" if repo_id else HERE,
        larger=larger,
        larger_cost=larger and forward_cost(run.config, Compression(larger)),
        rows=rows,
        several_data=len({(row.data, row.split) for row in rows}) > 1,
        stages=_stages(run),
        uncompressed=_uncompressed(run),
    )


def render(template: str, **values: Any) -> str:
    """Return a card from a template of this folder.

    Raises:
        ValueError: the metadata are not valid.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)
    environment.filters |= {"percent": _percent, "duration": _duration, "number": "{:,.0f}".format}
    return str(ModelCard(environment.get_template(template).render(**values)))  # This parses the metadata.


def folder_name(path: Path) -> str:
    """Return the last two parts of a path, such as "RUN/final", as "final" alone is the name of every run's encoder."""
    path = path.resolve()
    return path.name if path.parent in (Path.home(), Path(path.anchor)) else f"{path.parent.name}/{path.name}"


def write_card(run: Run, path: Path, repo_id: str | None) -> bool:
    """Write the card, unless somebody has taken over the one that lies there by removing its mark.

    Returns:
        Whether it was written.
    """
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return False
    path.write_text(card_text(run, repo_id), encoding="utf-8")
    return True


def _architecture(run: Run) -> str:
    """Return the name of the preset with the encoder's sizes, or these sizes if no preset has them."""
    config = run.config
    for name, display_name in MODELS.items():
        preset = PRESETS[name]()
        if all(getattr(preset, size) == getattr(config, size) for size in SIZES):
            return display_name
    return f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads"


def _metadata(run: Run, rows: list[Accuracy]) -> ModelCardData:
    index, start = eval_results(rows), run.results.get("init_from")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license=run.recipe.get("license"),
        base_model=start["name"] if start and start["is_on_hub"] else None,
        tags=["hf_accel", "self-supervised-learning", "vision-transformer", run.results["objective"]],
        datasets=[run.dataset] if run.dataset else None,
        metrics=["accuracy"] if index else None,
        model_name=run.name if index else None,
        eval_results=index or None,
    )


def schedule_of(results: Mapping[str, Any], config: AccelViTConfig) -> Schedule:
    """Return the schedule that the run followed, with a target branch only if its objective is known to have one."""
    schedule, objective = Schedule.parse(results["schedule"], config.patch_size), OBJECTIVES.get(results["objective"])
    if objective and objective.has_target_branch:
        return schedule
    stages = [(stage.until, stage.strategy) for stage in schedule.stages]
    return Schedule(tuple(Stage(until, Strategy(both.online, both.online, both.local)) for until, both in stages))


def _stages(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the schedule: progress and compressions, tokens of a view, cost of a training image."""
    written = run.results["schedule"]
    costs = run.results.get("units_per_image", [None] * len(written))
    size, start, rows = run.config.image_size, 0.0, []
    for stage, cost in zip(schedule_of(run.results, run.config).stages, costs, strict=True):
        online, target, local = stage.strategy.online, stage.strategy.target_branch, stage.strategy.local
        row = {"start": start, "end": stage.until, "cost": cost, "online": _compression(online, size)}
        row["target"] = None if target == online else _compression(target, size)
        row["local"] = local and str(local)
        rows.append(row)
        start = stage.until
    return rows


def _compression(compression: Compression, image_size: int) -> str:
    dropped = f", {compression.token_dropout:.0%} of tokens dropped" if compression.token_dropout else ""
    return f"{compression.patch_size} px{dropped}: {compression.kept_tokens(image_size)} tokens"


def _uncompressed(run: Run) -> dict[str, Any] | None:
    """Return what the same units would buy without compression; None if nothing was compressed, or it is not known."""
    unit = run.results.get("units_per_image_uncompressed")
    if unit is None or all(cost == unit for cost in run.results["units_per_image"]):
        return None
    batch = run.recipe["batch_size"]
    steps = int(run.results["units"] / (batch * unit) + 1e-9)
    return {"steps": steps, "images": steps * batch, "units_for_as_many": run.results["images_seen"] * unit}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _duration(seconds: float) -> str:
    if seconds >= 360:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
