"""What a recipe may say beyond the type of each key: names, settings, ranges, and what goes together.

What needs torch, which takes seconds to import, is checked last. Each check raises RecipeError.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..compression.schedule import Schedule, names_file
from ..utils.errors import SettingError as RecipeError
from ..utils.errors import fail
from ..utils.pretrain_settings import PretrainSettings, scale_learning_rate
from .declarations import Declaration, Setting, inspect_class, read_class, read_classes, read_table
from .values import check_settings, did_you_mean, join_names

AUGMENTATIONS = read_table("data/augment.py", "AUGMENTATIONS")
PRESETS = read_table("models/configuration_accel_vit.py", "PRESETS")
SYMMETRIES = read_table("schedule_search/choose.py", "SYMMETRIES")
OBJECTIVES = read_classes("objectives/__init__.py", "OBJECTIVES")
EVALUATIONS = ("knn", "linear", "logistic", "finetune")
EVALUATION_CONFIGS = {
    "linear_config": ("evaluation/linear.py", "LinearConfig"),
    "finetune_config": ("evaluation/finetune.py", "FineTuneConfig"),
}
MOST_CHANNELS = 16
OWN_KEYS = ("image_size", "patch_size", "num_channels")
"""Fields of the encoder's configuration that are keys of a recipe themselves."""


def objective_names() -> list[str]:
    """Every objective: those of the package, and those that a program has added to its `OBJECTIVES`."""
    return list(dict.fromkeys([*OBJECTIVES, *_registered()]))


def _registered() -> dict[str, type]:
    return getattr(sys.modules.get("hf_accel.objectives"), "OBJECTIVES", {})


def read_objective(name: str) -> Declaration:
    """Read what an objective declares.

    Raises:
        RecipeError: its source cannot be read, or its class has no `__init__`.
    """
    if name not in OBJECTIVES:
        return inspect_class(_registered()[name])
    declared = read_class(*OBJECTIVES[name])
    if not declared.has_init:
        problem = (
            "neither the class nor a base class in this package has an `__init__`, whose arguments are the settings"
        )
        raise RecipeError(f"{declared.place}: {problem}; write one")
    return declared


def objective_settings(name: str) -> dict[str, Setting]:
    """The keys of `objective_config`: the keyword arguments of the objective, with type and default."""
    return read_objective(name).settings


def least_batch(objective: str) -> int:
    """Images that a micro-batch must have; 2 or more where the loss of an image depends on the others."""
    return read_objective(objective).attribute("least_batch", int, 1)


def base_learning_rate(objective: str) -> float | None:
    """The objective's learning rate for 256 images, if it has one."""
    return read_objective(objective).attribute("base_learning_rate", int | float | None, None)


def auto_learning_rate(recipe: Any) -> float:
    """The number that learning_rate=auto stands for in a recipe. Raises RecipeError if its objective has none."""
    base = base_learning_rate(recipe.objective)
    continues = bool(recipe.init_from or recipe.model_config.get("init_from"))  # or `continue_from` a run that did
    return scale_learning_rate(recipe.objective, base, recipe.batch_size, continues)


def objectives_of_batches() -> str:
    """Name those in whose loss an image depends on the others of its micro-batch, by contrast or by BatchNorm.

    It is a part of a help text, so an objective that cannot be read is left out here. Who chooses it gets the error.
    """
    names = []
    for name in OBJECTIVES:
        with suppress(RecipeError):
            names += [name] * (least_batch(name) > 1)
    return join_names(names)


def configured_classes() -> dict[str, Callable[[], Declaration]]:
    """What reads the classes that the mappings of a recipe configure, by a name for --help."""
    evaluations = {name: partial(read_class, *declared) for name, declared in EVALUATION_CONFIGS.items()}
    return {f"objective_config of {name}": partial(read_objective, name) for name in objective_names()} | evaluations


ABOVE_0 = (
    *("image_size", "patch_size", "gradient_accumulation_steps", "learning_rate"),
    *("search_memory", "logging_steps", "save_steps"),
)
AT_LEAST = {
    **{key: (0, "must not be negative") for key in ("weight_decay", "max_grad_norm", "num_workers")},
    "save_total_limit": (2, "must be at least 2, so that a kill during a save loses none"),
    "search_draws": (3, "an estimate with an interval needs at least 3"),
}
NOT_EMPTY = ("evaluations", "eval_seeds", "search_token_dropout", "search_patch_size", "search_symmetry")
NEEDED = {
    "checkpoint": "needs the folder of an encoder, e.g. checkpoint=RUN/final",
    "pilot": "needs the output_dir of a pilot run, e.g. pilot=runs/moco",
}


def check_recipe(recipe: Any) -> None:
    """Check a recipe, and first what needs no torch.

    Raises:
        RecipeError: a name, setting, value or combination that is not possible.
    """
    _check_presence(recipe)
    _check_choices(recipe)
    _check_numbers(recipe)
    if recipe.reads("objective"):
        _check_objective(recipe)
    if recipe.reads("evaluations"):
        _check_evaluation(recipe)
    if recipe.reads("schedule"):
        _check_schedule(recipe)
    _check_classes(recipe)


def _check_presence(recipe: Any) -> None:
    for key, value in asdict(recipe).items():
        if isinstance(value, str) and not value.strip():
            fail(key, value, "is empty; give a value, or leave it out")
    for key in NOT_EMPTY:
        if recipe.reads(key) and getattr(recipe, key) == []:
            fail(key, [], "must name at least one")


def _check_choices(recipe: Any) -> None:
    tables = {"model": PRESETS, "objective": objective_names(), "augmentation": AUGMENTATIONS}
    for key, table in tables.items():
        optional = (None,) if key == "model" else ()
        if recipe.reads(key) and getattr(recipe, key) not in (*table, *optional):
            value = getattr(recipe, key)
            fail(key, value, f"must be one of {list(table)}{did_you_mean(value, table, 0.4)}")
    if recipe.reads("model_config"):
        for name in OWN_KEYS:
            if name in recipe.model_config:
                fail(f"model_config.{name}", recipe.model_config[name], "is a key of its own")
        known = read_class("models/configuration_accel_vit.py", "AccelViTConfig").settings
        check_settings("model_config", recipe.model_config, known, "AccelViTConfig")
    for key, problem in NEEDED.items():
        if recipe.reads(key) and not getattr(recipe, key):
            fail(key, getattr(recipe, key), f"task={recipe.task} {problem}")


def _check_numbers(recipe: Any) -> None:
    if recipe.task == "pretrain":
        recipe.check_pretraining()
    else:  # the same checks, of those settings that the task reads
        taken = {key.name: getattr(recipe, key.name) for key in fields(PretrainSettings) if recipe.reads(key.name)}
        settings = PretrainSettings(**{"budget": 1.0, **taken})
        settings.check_pretraining()
        for key in taken:
            setattr(recipe, key, getattr(settings, key))
    for key in filter(recipe.reads, ABOVE_0):
        value = getattr(recipe, key)
        if not isinstance(value, str) and value <= 0:
            fail(key, value, "must be above 0")
    for key, (least, problem) in AT_LEAST.items():
        value = getattr(recipe, key) if recipe.reads(key) else least
        if not isinstance(value, str) and value < least:
            fail(key, value, problem)
    for key, least in (("eval_patch_sizes", 1), ("eval_seeds", 0)):
        values = getattr(recipe, key) if recipe.reads(key) else []
        if any(type(value) is not int or not least <= value < 2**32 for value in values):
            fail(key, values, f"must be a list of whole numbers from {least} on")
    if recipe.reads("seed") and not 0 <= recipe.seed < 2**32:
        fail("seed", recipe.seed, "must be a whole number from 0 to 2^32 - 1")
    if recipe.reads("num_channels") and not 1 <= recipe.num_channels <= MOST_CHANNELS:
        fail("num_channels", recipe.num_channels, f"must be a whole number from 1 to {MOST_CHANNELS}")
    if recipe.reads("patch_size") and recipe.image_size % recipe.patch_size:
        fail("patch_size", recipe.patch_size, f"must divide image_size={recipe.image_size}")


def _check_objective(recipe: Any) -> None:
    check_settings("objective_config", recipe.objective_config, objective_settings(recipe.objective), recipe.objective)
    if not recipe.reads("batch_size"):
        return
    if recipe.reads("learning_rate") and recipe.learning_rate == "auto":
        auto_learning_rate(recipe)
    least, micro_batches = least_batch(recipe.objective), recipe.gradient_accumulation_steps
    if recipe.batch_size < least * micro_batches:
        fail("batch_size", recipe.batch_size, f"{recipe.objective} needs at least {least} images in each micro-batch")
    if recipe.batch_size % micro_batches:
        problem = f"must be a multiple of gradient_accumulation_steps={micro_batches}"
        fail("batch_size", recipe.batch_size, problem)
    if recipe.task == "search" and recipe.cost == "measured" and recipe.local_crop_size():
        fail("cost", "measured", "local crops have analytic costs only in a search")


def _check_evaluation(recipe: Any) -> None:
    for name, declared in EVALUATION_CONFIGS.items():
        check_settings(name, getattr(recipe, name), read_class(*declared).settings, name.removesuffix("_config"))
    for name in recipe.evaluations:
        if name not in EVALUATIONS:
            hint = did_you_mean(name, EVALUATIONS)
            fail("evaluations", recipe.evaluations, f"must be a list of {', '.join(EVALUATIONS)}{hint}")


def _check_schedule(recipe: Any) -> None:
    """Check the schedule, and take the stages of its file, so that what is recorded is what is followed."""
    given = recipe.schedule
    try:
        schedule: Schedule = recipe.compression_schedule()
        schedule.validate(recipe.image_size, recipe.patch_size, recipe.local_crop_size())
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"schedule={given!r}: {error}{_recorded_stages(recipe)}") from None
    if names_file(given):
        recipe.files, recipe.schedule = {"schedule": given}, schedule.to_list()


def _recorded_stages(recipe: Any) -> str:
    """Say where a run that has begun holds the stages of a file that is gone or broken."""
    if not (names_file(recipe.schedule) and Path(recipe.output_dir).is_dir()):
        return ""
    from ..run_folder import RunFolder  # imports torch

    return RunFolder(recipe.output_dir).offer_stages()


def _check_classes(recipe: Any) -> None:
    """What the configured classes check themselves; they need torch."""
    if recipe.reads("model"):
        from .. import objectives  # noqa: F401  # Outside of the try: a fault in a file there is no value of the recipe.

        try:
            recipe.encoder_config()
        except Exception as error:  # the config's own checks raise several types; all are about the recipe's values
            raise RecipeError(f"model_config={recipe.model_config!r}: {error}") from error
    if not recipe.reads("evaluations"):
        return
    from ..evaluation import FineTuneConfig, LinearConfig

    for name, kind in {"linear_config": LinearConfig, "finetune_config": FineTuneConfig}.items():
        try:
            kind(**getattr(recipe, name))
        except ValueError as error:
            raise RecipeError(f"{name}: {error}") from None
