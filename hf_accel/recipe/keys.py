"""A recipe: every setting of a run, flat, from a YAML file and `key=value` overrides; each error names key and fix."""

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..compression import Schedule, Strategy
from ..compression.schedule import list_stage_keys
from ..utils.strict_yaml import load_yaml
from .checks import (
    AUGMENTATIONS,
    EVALUATIONS,
    OBJECTIVES,
    PRESETS,
    SYMMETRIES,
    check_recipe,
    configured_classes,
    contrastive_objectives,
    objective_settings,
)
from .task_keys import task_reads, tasks_that_read
from .values import RecipeError, as_type, did_you_mean, fail, type_name

if TYPE_CHECKING:
    import torch

    from ..models import AccelViTConfig


def _key(default: Any, text: str, group: str = "") -> Any:
    metadata = {"help": text, "group": group}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """One field a key; `python hf_accel/run.py --help` prints them."""

    task: Literal["pretrain", "search", "evaluate", "export", "card", "cost"] = _key("pretrain", "what to do", "run")
    output_dir: str = _key("runs/default", "folder of everything the run writes; an interrupted run resumes from it")
    seed: int = _key(0, "every random draw is a function of it")

    data: str = _key(
        "bundled", "'bundled' digits, Hub dataset id, image folder, or parquet/arrow file or folder", "data"
    )
    data_config: str | None = _key(
        None, "configuration of a data set that has several, as its page on the Hub names them"
    )
    train_split: str | None = _key(None, "split to train on, or a part as train[:1000] or train[:10%]; default: train")
    validation_split: str | None = _key(
        None, "split for kNN accuracy; default: validation, val, test or a held-out tenth"
    )
    image_column: str | None = _key(None, "column of images; default: the one of type Image")
    label_column: str | None = _key(
        None,
        "column of labels (evaluation only), or none: no labels, folders are no classes; default: the one of type "
        "ClassLabel, or the names of the folders",
    )
    augmentation: str = _key("moco", f"views: one of {', '.join(AUGMENTATIONS)}")
    view_resolution: Literal["full", "matched"] = _key(
        "full",
        "matched: make the views of larger patches at a proportionally lower resolution, same tokens, less data work",
    )
    num_workers: int = _key(0, "processes that decode images; 0 for data held in memory")

    model: str = _key("vit_small", f"preset: one of {', '.join(PRESETS)}", "model")
    model_config: dict[str, Any] = _key(
        {}, "AccelViTConfig fields over the preset's, e.g. model_config.num_hidden_layers=6"
    )
    image_size: int = _key(224, "side of a view in pixels")
    patch_size: int = _key(16, "base patch size in pixels; must divide image_size")
    attn_implementation: str | None = _key(None, "sdpa (default), eager or flash_attention_2")
    gradient_checkpointing: bool = _key(False, "trade compute for memory")

    objective: str = _key("moco", f"one of {', '.join(OBJECTIVES)}", "objective")
    objective_config: dict[str, Any] = _key({}, "the objective's own settings, listed below")

    budget: float = _key(
        0.0,
        "units to spend; N uncompressed epochs cost N x images x units an image (moco 4, simclr 6)",
        "budget",
    )
    schedule: list[Any] | str | None = _key(
        None, f"stages of {', '.join(list_stage_keys())}, a YAML file of them, or auto; default: uncompressed"
    )
    auto_share: float = _key(0.03, "schedule=auto: share of the budget that probes may spend")
    auto_draws: int = _key(8, "schedule=auto: paired gradients of a probe, or up to 64 if the share pays for them")
    cost: Literal["analytic", "measured"] = _key("analytic", "units from FLOPs, or timed on this device")

    batch_size: int = _key(256, "images a step, over all processes and accumulated micro-batches", "optimisation")
    gradient_accumulation_steps: int = _key(
        1, f"micro-batches a step; {' and '.join(contrastive_objectives())} contrast the images of a micro-batch only"
    )
    learning_rate: float = _key(1.5e-4, "peak, for this batch size")
    lr_schedule: Literal["cosine", "poly"] = _key("cosine", "after the warm-up; poly: base x (1 - progress^2)")
    warmup: float = _key(0.1, "progress over which the learning rate rises linearly")
    weight_decay: float = _key(0.1, "of matrices; none on biases and norms")
    weight_decay_end: float | None = _key(
        None, "value at the end, reached along a cosine of progress; default: constant"
    )
    max_grad_norm: float = _key(0.0, "clip gradients to this norm; 0: never")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _key(
        "auto", "autocast; auto: what accelerate launch names, else bf16 on a GPU that has it, else no, which is fp32"
    )
    torch_compile: bool = _key(False, "compile the model; one compilation per shape of the schedule")

    eval_points: list[float] = _key(
        [0.0, 0.25, 0.5, 0.75, 1.0], "progress at which kNN accuracy is taken", "evaluation"
    )
    knn_k: int = _key(20, "neighbours")
    knn_temperature: float = _key(0.07, "of their votes")
    checkpoint: str | None = _key(
        None, "task=evaluate, export, card: folder or Hub id; for evaluate also random: the recipe's model, untrained"
    )
    evaluations: list[str] = _key(["knn"], f"task=evaluate: any of {', '.join(EVALUATIONS)}")
    eval_patch_sizes: list[int] = _key(
        [], "task=evaluate: patch sizes in pixels, in turn; task=export: the one of the export; default: the base"
    )
    eval_seeds: list[int] = _key([0], "task=evaluate: seeds of linear, logistic and finetune, each in turn")
    linear_config: dict[str, Any] = _key({}, "settings of the linear probe, listed below")
    finetune_config: dict[str, Any] = _key({}, "settings of fine-tuning, listed below")

    logging_steps: int = _key(50, "steps between log lines", "logging and saving")
    save_steps: float = _key(0.1, "steps between checkpoints, or below 1 a fraction of the run")
    save_total_limit: int = _key(2, "checkpoints kept; at least 2, so that a kill during a save loses none")
    keep_points: list[float] = _key([], "progress at which a checkpoint is kept for good, in kept/, for task=search")
    report_to: list[str] = _key(["tensorboard"], "trackers of the Trainer: tensorboard, trackio, ...")

    push_to_hub: bool = _key(False, "upload at checkpoints, in the background, and at the end", "Hub and export")
    hub_model_id: str | None = _key(None, "user/name on the Hub; default: the name of output_dir, in your account")
    hub_private: bool = _key(False, "make the repository private, when it is created")
    hub_optimizer: bool = _key(False, "upload the optimizer's state, too, from which others can resume")
    license: str = _key("apache-2.0", "of the model, for its card")
    baseline: str | None = _key(None, "task=card: output_dir of the uncompressed run to compare with")
    export_format: Literal["accel_vit", "vit", "dinov2", "timm", "onnx"] = _key(
        "vit", "task=export: what to turn the checkpoint into"
    )

    pilot: str | None = _key(None, "task=search: output_dir of a run with keep_points", "search")
    search_draws: int = _key(16, "paired gradients for each estimate")
    search_token_dropout: list[float] = _key([tenth / 10 for tenth in range(10)], "ratios of the grid")
    search_patch_size: list[int] | None = _key(None, "patch sizes of the grid; default: every possible one")
    search_symmetry: list[str] = _key(["paper"], f"what the target branch shares: {', '.join(SYMMETRIES)}")
    search_criterion: Literal["ca_mse", "gain"] = _key(
        "ca_mse",
        "what a strategy is chosen by, in auto, too; gain: first-order decrease of the loss a unit, not the paper's",
    )
    search_memory: float = _key(4.0, "GB for sums of gradients; fewer cost passes more")

    def __post_init__(self):
        for key in ("output_dir", "checkpoint", "pilot", "baseline"):  # no shell has seen what a file says
            if str(getattr(self, key)).startswith("~"):
                setattr(self, key, os.path.expanduser(getattr(self, key)))
        check_recipe(self)

    def reads(self, key: str) -> bool:
        """Whether the recipe's task reads this key. Of the others, the values have no effect."""
        return task_reads(self.task, key)

    def used(self) -> dict[str, Any]:
        """The keys that the recipe's task reads, with their values."""
        return {key: value for key, value in asdict(self).items() if self.reads(key)}

    def encoder_config(self) -> "AccelViTConfig":
        from ..models import PRESETS
        from ..objectives import OBJECTIVES

        defaults = OBJECTIVES[self.objective].encoder_defaults
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        return PRESETS[self.model](**{**defaults, **sizes, **self.model_config})

    def compression_schedule(self) -> Schedule:
        return Schedule.parse(None if self.schedule == "auto" else self.schedule, self.patch_size)

    def precision(self) -> "torch.dtype | None":
        """What autocast computes in; None without it. A launch settles `auto` first: `engine.settle_precision`."""
        import torch

        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]

    def view_size(self, strategy: Strategy) -> int:
        """Pixels of a step's views.

        Matched: the resized kernel sees p0 x p0 numbers of each patch only, so the view may be made with p0 pixels a
        patch; where the branches' patches differ, both need the full view.
        """
        online, target = strategy.online.patch_size, strategy.target_branch.patch_size
        if self.view_resolution == "full" or online != target:
            return self.image_size
        return self.image_size // online * self.patch_size

    def local_crop_size(self) -> int | None:
        """Pixels of the local crops, None where the objective makes none."""
        settings = {key: setting.default for key, setting in objective_settings(self.objective).items()}
        settings |= self.objective_config
        return settings["local_crop_size"] if settings.get("num_local_crops") else None

    def to_yaml(self) -> str:
        """The keys that the recipe's task reads, as `load_recipe` reads them back."""
        return yaml.safe_dump(self.used(), sort_keys=False)


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides (values in YAML; `a.b=value` sets an entry of a mapping).

    A recipe may serve several tasks: what the file gives to keys that its task does not read is left out.

    Raises:
        RecipeError: unknown key, wrong type, impossible value or combination, or an override of a key that the task
            does not read.
    """
    values = _read_file(path) if path is not None else {}
    given: list[str] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"{override!r}: overrides are written key=value, e.g. seed=1")
        head, *rest = key.split(".")
        try:
            value = load_yaml(text)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise RecipeError(f"{override!r}: the value is not valid YAML ({problem}); is it in quotes?") from None
        if rest:
            entries = values.get(head) or {}
            if not isinstance(entries, Mapping):
                fail(key, value, f"{head} is no mapping but {entries!r}: it has no such entry")
            value = {**entries, ".".join(rest): value}
        values[head] = value
        given.append(head)
    typed = {key: _typed(key, value) for key, value in values.items()}
    task = typed.get("task", Recipe.task)
    for key in given:
        if not task_reads(task, key):
            others = ", ".join(tasks_that_read(key))
            fail(key, typed[key], f"task={task} does not read this key; leave it out (task={others} would read it)")
    return Recipe(**{key: value for key, value in typed.items() if task_reads(task, key)})


def _read_file(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise RecipeError(f"no recipe at {str(path)!r}; give the path of a YAML file, e.g. recipes/moco.yaml")
    try:
        loaded = load_yaml(Path(path).read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, Mapping | None):
        raise RecipeError(f"{path}: expected `key: value` lines, got {type(loaded).__name__}")
    return dict(loaded or {})


def _typed(key: str, value: Any) -> Any:
    """`value` as the type of `key`, or a RecipeError."""
    hints = recipe_types()
    if key not in hints:
        raise RecipeError(f"{key}={value!r}: there is no such key{did_you_mean(key, hints)} (--help lists them)")
    return as_type(key, value, hints[key])


def recipe_types() -> dict[str, Any]:
    """The type of each key."""
    return {key: hint for key, hint in typing.get_type_hints(Recipe).items() if key in Recipe.__dataclass_fields__}


def describe_keys() -> str:
    """Every key with type, default and one line, by group: the text of --help."""
    hints, lines = recipe_types(), []
    for key in fields(Recipe):
        if key.metadata["group"]:
            lines.append(f"\n{key.metadata['group']}:")
        readers = ", ".join(tasks_that_read(key.name))
        lines.append(f"  {key.name} ({type_name(hints[key.name])}; default {_default(key)!r}; read by {readers})")
        lines.append(f"      {key.metadata['help']}")
    for name, declared in configured_classes().items():
        lines.append(f"\n{name}:")
        for setting, (annotation, default) in declared.settings.items():
            lines.append(f"  {setting} ({type_name(annotation)}; default {default!r})")
        about = declared.description.partition("Args:\n")[2].partition("\n\n")[0].splitlines()
        lines += [f"  {line}" for line in about if not line.lstrip().startswith("config:")]
    return "\n".join(lines)


def _default(key: Field) -> Any:
    return key.default_factory() if key.default_factory is not MISSING else key.default
