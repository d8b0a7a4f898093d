"""What a recipe may say beyond the type of each key: names, settings, ranges, and what goes together.

What needs torch, which takes seconds to import, is checked last. Each check raises RecipeError.
"""

from typing import Any

import yaml

from ..compression.schedule import Schedule
from .declarations import Declaration, Setting, read_class, read_classes, read_table
from .values import RecipeError, check_settings, did_you_mean, fail

AUGMENTATIONS = read_table("data/augment.py", "AUGMENTATIONS")
PRESETS = read_table("models/configuration_accel_vit.py", "PRESETS")
SYMMETRIES = read_table("schedule_search/choose.py", "SYMMETRIES")
OBJECTIVES = read_classes("objectives/__init__.py", "OBJECTIVES")
EVALUATIONS = ("knn", "linear", "logistic", "finetune")
EVALUATION_CONFIGS = {
    "linear_config": ("evaluation/linear.py", "LinearConfig"),
    "finetune_config": ("evaluation/finetune.py", "FineTuneConfig"),
}
OWN_KEYS = ("image_size", "patch_size")
"""Fields of the encoder's configuration that are keys of a recipe themselves."""


def objective_settings(name: str) -> dict[str, Setting]:
    """The keys of `objective_config`: the keyword arguments of the objective, with type and default."""
    return read_class(*OBJECTIVES[name]).settings


def least_batch(objective: str) -> int:
    """Images that a micro-batch must have; 2 or more where its images are contrasted with each other."""
    base, own = read_class("objectives/base.py", "ObjectiveForPreTraining"), read_class(*OBJECTIVES[objective])
    return (base.attributes | own.attributes)["least_batch"]


def contrastive_objectives() -> list[str]:
    """Those that contrast the images of a micro-batch with each other."""
    return [name for name in OBJECTIVES if least_batch(name) > 1]


def configured_classes() -> dict[str, Declaration]:
    """What the mappings of a recipe configure, by a name for --help."""
    objectives = {f"objective_config of {name}": declared for name, declared in OBJECTIVES.items()}
    return {name: read_class(*declared) for name, declared in (objectives | EVALUATION_CONFIGS).items()}


def check_recipe(recipe: Any) -> None:
    """All checks of a `Recipe`, those that need no torch first.

    Raises:
        RecipeError: a name, setting, value or combination that is not possible.
    """
    for check in (_check_choices, _check_objective, _check_evaluation, _check_numbers, _check_schedule, _check_classes):
        check(recipe)


def _check_choices(recipe: Any) -> None:
    tables = {"model": PRESETS, "objective": OBJECTIVES, "augmentation": AUGMENTATIONS}
    for key, table in tables.items():
        value = getattr(recipe, key)
        if value not in table:
            fail(key, value, f"must be one of {list(table)}{did_you_mean(value, table, 0.4)}")
    for name in OWN_KEYS:
        if name in recipe.model_config:
            fail(f"model_config.{name}", recipe.model_config[name], "is a key of its own")
    fields = read_class("models/configuration_accel_vit.py", "AccelViTConfig").settings
    check_settings("model_config", recipe.model_config, fields, "AccelViTConfig")


def _check_objective(recipe: Any) -> None:
    check_settings("objective_config", recipe.objective_config, objective_settings(recipe.objective), recipe.objective)
    least = least_batch(recipe.objective)
    if 0 < recipe.batch_size < least * recipe.gradient_accumulation_steps:
        fail("batch_size", recipe.batch_size, f"{recipe.objective} needs at least {least} images in each micro-batch")
    if recipe.cost == "measured" and recipe.local_crop_size():
        fail("cost", "measured", "local crops have analytic costs only")


def _check_evaluation(recipe: Any) -> None:
    for name, declared in EVALUATION_CONFIGS.items():
        check_settings(name, getattr(recipe, name), read_class(*declared).settings, name.removesuffix("_config"))
    for name in recipe.evaluations:
        if name not in EVALUATIONS:
            hint = did_you_mean(name, EVALUATIONS)
            fail("evaluations", recipe.evaluations, f"must be a list of {', '.join(EVALUATIONS)}{hint}")
    for key, least in (("eval_patch_sizes", 1), ("eval_seeds", 0)):
        if any(type(value) is not int or not least <= value < 2**32 for value in getattr(recipe, key)):
            fail(key, getattr(recipe, key), f"must be a list of whole numbers from {least} on")
    if not recipe.evaluations or not recipe.eval_seeds:
        fail("evaluations", recipe.evaluations, "name at least one, and at least one seed in eval_seeds")


def _check_numbers(recipe: Any) -> None:
    positive = (
        "image_size",
        "patch_size",
        "batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "knn_k",
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


def _check_schedule(recipe: Any) -> None:
    if recipe.image_size % recipe.patch_size:
        fail("patch_size", recipe.patch_size, f"must divide image_size={recipe.image_size}")
    try:
        schedule: Schedule = recipe.compression_schedule()
        schedule.validate(recipe.image_size, recipe.patch_size, recipe.local_crop_size())
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"schedule={recipe.schedule!r}: {error}") from None


def _check_classes(recipe: Any) -> None:
    """What the configured classes check themselves; they need torch."""
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
