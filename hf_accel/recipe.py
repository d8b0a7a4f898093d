"""A recipe: every setting of a run, flat, from a YAML file and `key=value` overrides; each error names key and fix."""

import difflib
import inspect
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from .compression import Schedule, Strategy
from .compression.schedule import STAGE_KEYS
from .compression.search import SYMMETRIES
from .data import AUGMENTATIONS
from .evaluation import FineTuneConfig, LinearConfig
from .models import PRESETS, AccelViTConfig
from .objectives import OBJECTIVES
from .recipe_values import RecipeError, as_type, check_settings, fail, settings_of, type_name

EVALUATIONS = ("knn", "linear", "logistic", "finetune")
EVALUATION_CONFIGS: dict[str, type] = {"linear_config": LinearConfig, "finetune_config": FineTuneConfig}


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
    label_column: str | None = _key(None, "column of labels (evaluation only); default: the one of type ClassLabel")
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
        None, f"stages of {', '.join(STAGE_KEYS)}, a YAML file of them, or auto; default: uncompressed"
    )
    auto_share: float = _key(0.03, "schedule=auto: share of the budget that probes may spend")
    auto_draws: int = _key(8, "schedule=auto: paired gradients of a probe, or up to 64 if the share pays for them")
    cost: Literal["analytic", "measured"] = _key("analytic", "units from FLOPs, or timed on this device")

    batch_size: int = _key(256, "images a step, over all processes and accumulated micro-batches", "optimisation")
    gradient_accumulation_steps: int = _key(1, "micro-batches a step")
    learning_rate: float = _key(1.5e-4, "peak, for this batch size")
    lr_schedule: Literal["cosine", "poly"] = _key("cosine", "after the warm-up; poly: base x (1 - progress^2)")
    warmup: float = _key(0.1, "progress over which the learning rate rises linearly")
    weight_decay: float = _key(0.1, "of matrices; none on biases and norms")
    weight_decay_end: float | None = _key(
        None, "value at the end, reached along a cosine of progress; default: constant"
    )
    max_grad_norm: float = _key(0.0, "clip gradients to this norm; 0: never")
    mixed_precision: Literal["no", "bf16", "fp16"] = _key("no", "autocast")
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
    search_parameters: Literal["all", "encoder"] = _key("all", "whose gradient: all that is trained, or the encoder's")
    search_metric: Literal["plain", "adam"] = _key("plain", "adam: divided by the root of AdamW's second moments")
    search_criterion: Literal["ca_mse", "gain"] = _key(
        "ca_mse",
        "what a strategy is chosen by, in auto, too; gain: first-order decrease of the loss a unit, not the paper's",
    )
    search_horizon: float = _key(1.0, "batches an optimizer averages over; above 1 bias weighs more than variance")
    search_memory: float = _key(4.0, "GB for sums of gradients; fewer cost passes more")

    def __post_init__(self):
        for key in ("output_dir", "checkpoint", "pilot", "baseline"):  # no shell has seen what a file says
            if str(getattr(self, key)).startswith("~"):
                setattr(self, key, os.path.expanduser(getattr(self, key)))
        for check in (_check_choices, _check_objective, _check_evaluation, _check_numbers, _check_model):
            check(self)

    def encoder_config(self) -> AccelViTConfig:
        defaults = OBJECTIVES[self.objective].encoder_defaults
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        return PRESETS[self.model](**{**defaults, **sizes, **self.model_config})

    def compression_schedule(self) -> Schedule:
        return Schedule.parse(None if self.schedule == "auto" else self.schedule, self.patch_size)

    def precision(self) -> torch.dtype | None:
        """What autocast computes in; None without it."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)

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
        settings = {key: parameter.default for key, parameter in objective_settings(self.objective).items()}
        settings |= self.objective_config
        return settings["local_crop_size"] if settings.get("num_local_crops") else None

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)


def _check_choices(recipe: Recipe) -> None:
    tables = {"model": PRESETS, "objective": OBJECTIVES, "augmentation": AUGMENTATIONS}
    for key, table in tables.items():
        value = getattr(recipe, key)
        if value not in table:
            close = difflib.get_close_matches(str(value), list(table), 1, 0.4)
            fail(key, value, f"must be one of {list(table)}" + (f"; did you mean {close[0]!r}?" if close else ""))
    names = {f.name for f in fields(AccelViTConfig)}
    for name in recipe.model_config:
        if name not in names or name in ("image_size", "patch_size"):
            close = difflib.get_close_matches(name, list(names), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            own = name in ("image_size", "patch_size")
            fail(
                f"model_config.{name}",
                recipe.model_config[name],
                "is a key of its own" if own else f"no such field{hint}",
            )


def objective_settings(name: str) -> dict[str, inspect.Parameter]:
    """The keys of `objective_config`: the keyword arguments of the objective, with type and default."""
    return settings_of(OBJECTIVES[name])


def _check_objective(recipe: Recipe) -> None:
    check_settings("objective_config", recipe.objective_config, objective_settings(recipe.objective), recipe.objective)
    least = OBJECTIVES[recipe.objective].least_batch
    if 0 < recipe.batch_size < least * recipe.gradient_accumulation_steps:
        fail("batch_size", recipe.batch_size, f"{recipe.objective} needs at least {least} images in each micro-batch")
    if recipe.cost == "measured" and recipe.local_crop_size():
        fail("cost", "measured", "local crops have analytic costs only")


def _check_evaluation(recipe: Recipe) -> None:
    for name, kind in EVALUATION_CONFIGS.items():
        values = getattr(recipe, name)
        check_settings(name, values, settings_of(kind), name.removesuffix("_config"))
        try:
            kind(**values)
        except ValueError as error:
            raise RecipeError(f"{name}: {error}") from None
    for name in recipe.evaluations:
        if name not in EVALUATIONS:
            close = difflib.get_close_matches(str(name), EVALUATIONS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            fail("evaluations", recipe.evaluations, f"must be a list of {', '.join(EVALUATIONS)}{hint}")
    for key, least in (("eval_patch_sizes", 1), ("eval_seeds", 0)):
        if any(type(value) is not int or not least <= value < 2**32 for value in getattr(recipe, key)):
            fail(key, getattr(recipe, key), f"must be a list of whole numbers from {least} on")
    if not recipe.evaluations or not recipe.eval_seeds:
        fail("evaluations", recipe.evaluations, "name at least one, and at least one seed in eval_seeds")


def _check_numbers(recipe: Recipe) -> None:
    positive = (
        "image_size",
        "patch_size",
        "batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "knn_k",
        "search_horizon",
        "search_memory",
        "knn_temperature",
        "logging_steps",
        "save_steps",
    )
    for key in positive:
        if getattr(recipe, key) <= 0:
            fail(key, getattr(recipe, key), "must be above 0")
    if not 0 <= recipe.seed < 2**32:
        fail("seed", recipe.seed, "must be a whole number from 0 to 2^32 - 1")
    if not 0 <= recipe.warmup <= 1:
        fail("warmup", recipe.warmup, "must lie in [0, 1]")
    for key in ("weight_decay", "max_grad_norm", "num_workers", "budget"):
        if getattr(recipe, key) < 0:
            fail(key, getattr(recipe, key), "must not be negative")
    if recipe.task == "pretrain" and recipe.budget == 0:
        fail("budget", recipe.budget, "a pretraining run needs a budget in units, e.g. budget=400000")
    if recipe.task in ("evaluate", "export", "card") and not recipe.checkpoint:
        fail(
            "checkpoint",
            recipe.checkpoint,
            f"task={recipe.task} needs the folder of an encoder, e.g. checkpoint=RUN/final",
        )
    if recipe.task == "search" and not recipe.pilot:
        fail("pilot", recipe.pilot, "task=search needs the output_dir of a pilot run, e.g. pilot=runs/moco")
    for key in ("search_draws", "auto_draws"):
        if getattr(recipe, key) < 3:
            fail(key, getattr(recipe, key), "an estimate with an interval needs at least 3")
    if not 0 < recipe.auto_share < 1:
        fail("auto_share", recipe.auto_share, "must lie between 0 and 1")
    if recipe.schedule == "auto" and recipe.view_resolution == "matched":
        fail("view_resolution", "matched", "needs a schedule known beforehand; schedule=auto makes full views")
    if recipe.schedule == "auto" and recipe.task == "pretrain" and recipe.search_metric != "plain":
        fail("search_metric", recipe.search_metric, "schedule=auto compares plain gradients; leave it out")
    if recipe.save_total_limit < 2:
        fail("save_total_limit", recipe.save_total_limit, "must be at least 2, so that a kill during a save loses none")
    for key in ("eval_points", "keep_points"):
        if any(not isinstance(p, int | float) or not 0 <= p <= 1 for p in getattr(recipe, key)):
            fail(key, getattr(recipe, key), "must be numbers in [0, 1]")
    if recipe.batch_size % recipe.gradient_accumulation_steps:
        fail(
            "batch_size",
            recipe.batch_size,
            f"must be a multiple of gradient_accumulation_steps={recipe.gradient_accumulation_steps}",
        )


def _check_model(recipe: Recipe) -> None:
    if recipe.image_size % recipe.patch_size:
        fail("patch_size", recipe.patch_size, f"must divide image_size={recipe.image_size}")
    try:
        recipe.encoder_config()
    except Exception as error:  # the config's own checks raise several types; all are about the recipe's values
        raise RecipeError(f"model_config={recipe.model_config!r}: {error}") from error
    try:
        recipe.compression_schedule().validate(recipe.image_size, recipe.patch_size, recipe.local_crop_size())
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"schedule={recipe.schedule!r}: {error}") from None


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides (values in YAML; `a.b=value` sets an entry of a mapping).

    Raises:
        RecipeError: unknown key, wrong type, impossible value or combination.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise RecipeError(f"no recipe at {str(path)!r}; give the path of a YAML file, e.g. recipes/moco.yaml")
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(loaded, Mapping | None):
            raise RecipeError(f"{path}: expected `key: value` lines, got {type(loaded).__name__}")
        values.update(loaded or {})
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"{override!r}: overrides are written key=value, e.g. seed=1")
        head, *rest = key.split(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise RecipeError(f"{override!r}: the value is not valid YAML ({problem}); is it in quotes?") from None
        if rest:
            entries = values.get(head) or {}
            if not isinstance(entries, Mapping):
                fail(key, value, f"{head} is no mapping but {entries!r}: it has no such entry")
            values[head] = {**entries, ".".join(rest): value}
        else:
            values[head] = value
    return Recipe(**{key: _typed(key, value) for key, value in values.items()})


def _typed(key: str, value: Any) -> Any:
    """`value` as the type of `key`, or a RecipeError."""
    hints = typing.get_type_hints(Recipe)
    if key not in hints:
        close = difflib.get_close_matches(str(key), list(hints), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"{key}={value!r}: there is no such key{hint} (--help lists them)")
    return as_type(key, value, hints[key])


def describe_keys() -> str:
    """Every key with type, default and one line, by group: the text of --help."""
    hints, lines = typing.get_type_hints(Recipe), []
    defaults = Recipe(budget=1.0)
    for key in fields(Recipe):
        if key.metadata["group"]:
            lines.append(f"\n{key.metadata['group']}:")
        default = None if key.name == "budget" else getattr(defaults, key.name)
        lines.append(f"  {key.name} ({type_name(hints[key.name])}; default {default!r})")
        lines.append(f"      {key.metadata['help']}")
    kinds = {f"objective_config of {name}": objective for name, objective in OBJECTIVES.items()} | EVALUATION_CONFIGS
    for name, kind in kinds.items():
        lines.append(f"\n{name}:")
        for setting, parameter in settings_of(kind).items():
            lines.append(f"  {setting} ({type_name(parameter.annotation)}; default {parameter.default!r})")
        described = inspect.getdoc(kind) or ""
        about = described.partition("Args:\n")[2].partition("\n\n")[0].splitlines()
        lines += [f"  {line}" for line in about if not line.lstrip().startswith("config:")]
    return "\n".join(lines)
