"""What the tasks have in common: images, objective and arguments that a recipe describes, built and checked."""

import os
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..data import CorruptDataError, ImageSource, count_workers, describe_labels, load_sources
from ..data.tables import NO_LABELS
from ..distributed import say
from ..distributed.launch import autocast_arguments, check_launch, choose_precision, on_cpu, start_processes
from ..evaluation import NotFineTunable
from ..models import AccelViTModel
from ..objectives import OBJECTIVES, ObjectiveForPreTraining
from ..recipe import Recipe, RecipeError
from ..run_folder import RunFolder
from ..training.config import PretrainConfig
from ..utils.causes import reason
from ..utils.errors import SettingError, fail
from ..utils.pretrain_settings import PretrainSettings


@contextmanager
def naming(subject: str):
    """Turn a ValueError into a RecipeError that begins with what it is about."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, RecipeError | NotFineTunable):
            raise
        raise RecipeError(f"{subject}: {error}") from error


def output_of(recipe: Recipe) -> Path:
    """Return `output_dir`, which is created if it is missing.

    Raises:
        RecipeError: nothing can be written there, or it lies in the folder of the images, where the figures of a run
            would become images of its next launch.
    """
    output = Path(recipe.output_dir)
    if recipe.reads("data"):
        images = Path(str(recipe.data)).expanduser()
        if images.is_dir() and output.resolve().is_relative_to(images.resolve()):
            inside = f"it lies in data={recipe.data}, where its figures would be read as images"
            fail(
                "output_dir",
                recipe.output_dir,
                f"{inside}; choose a folder outside it, and move a run that has begun to that folder",
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise RecipeError(f"output_dir={recipe.output_dir!r}: nothing can be written there: {error}") from error
    return output


def start(recipe: Recipe) -> TrainingArguments:
    """Return the arguments of a Trainer for a task that does not pretrain, and set up processes and random state."""
    check_launch()
    precision = "no"
    if recipe.reads("mixed_precision"):
        recipe.mixed_precision = precision = choose_precision(recipe.mixed_precision)  # pyright: ignore
    arguments = TrainingArguments(
        output_dir=recipe.output_dir,
        use_cpu=on_cpu(),
        seed=recipe.seed if recipe.reads("seed") else 0,
        report_to=recipe.report_to if recipe.reads("report_to") else "none",
        **autocast_arguments(precision),
    )
    start_processes(arguments, precision)
    return arguments


PRECISIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "no": {"bf16": False},
    "bf16": {"bf16": True},
    "fp16": {"bf16": False, "fp16": True},
}
"""The arguments of a Trainer that mean a recipe's `mixed_precision`."""


def pretrain_config(recipe: Recipe) -> PretrainConfig:
    """Return the `PretrainConfig` that a recipe describes. A search takes batches and views from it, and no budget."""
    shared = {key.name: getattr(recipe, key.name) for key in fields(PretrainSettings) if recipe.reads(key.name)}
    mine: dict[str, Any] = {"budget": 1.0}
    if recipe.task == "pretrain":
        same = ("weight_decay", "max_grad_norm", "logging_steps", "save_total_limit", "report_to")
        mine = {
            **{key: getattr(recipe, key) for key in (*same, "push_to_hub", "hub_model_id")},
            "learning_rate": None if recipe.learning_rate == "auto" else recipe.learning_rate,
            "activation_checkpointing": recipe.gradient_checkpointing,
            "save_steps": int(recipe.save_steps) if recipe.save_steps >= 1 else recipe.save_steps,
            "dataloader_num_workers": choose_workers(recipe),
            "hub_private_repo": recipe.hub_private,
            "hub_strategy": "checkpoint" if recipe.hub_optimizer else "every_save",
        }
    return PretrainConfig(
        output_dir=recipe.output_dir,
        seed=recipe.seed,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        torch_compile=recipe.torch_compile,
        **{"report_to": "none", **shared, **PRECISIONS[recipe.mixed_precision], **mine},
    )


EVALUATED_BATCH = 256
"""Images of a batch of an evaluation."""


def choose_workers(recipe: Recipe) -> int:
    """Return how many processes decode images for this one."""
    if recipe.num_workers != "auto":
        return recipe.num_workers
    images = EVALUATED_BATCH
    if recipe.task == "pretrain":
        images = recipe.batch_size // recipe.gradient_accumulation_steps // int(os.environ.get("WORLD_SIZE", 1))
    # An evaluated image has three floats a pixel. Two views of 8 bits and local crops take less.
    return count_workers(images * 12 * recipe.image_size**2)


def build_objective(recipe: Recipe) -> ObjectiveForPreTraining:
    config = recipe.encoder_config()
    if recipe.attn_implementation:
        config._attn_implementation = recipe.attn_implementation
        try:
            with torch.device("meta"):
                AccelViTModel(config)
        except (ValueError, ImportError) as error:
            raise RecipeError(f"attn_implementation={recipe.attn_implementation!r}: {error}") from None
    objective: Any = OBJECTIVES[recipe.objective]
    starts = recipe.task == "pretrain" and recipe.init_from
    with naming(f"objective_config={recipe.objective_config!r}"):
        if starts and RunFolder(recipe.output_dir).last_complete_checkpoint() is None:
            fields = {"image_size": recipe.image_size, "patch_size": recipe.patch_size, **recipe.model_config}
            if recipe.attn_implementation:
                fields["attn_implementation"] = recipe.attn_implementation
            return objective.from_encoder(recipe.init_from, recipe.objective_config, **fields)
        return objective(config, **recipe.objective_config)


def images_of(recipe: Recipe, num_channels: int | None = None) -> tuple[ImageSource, ImageSource | None]:
    """Load training and validation images as `load_images` does, and say where their labels come from."""
    source, validation = load_images(recipe, num_channels=num_channels)
    say(describe_labels(source, validation))
    return source, validation


def load_images(
    recipe: Recipe, in_memory: bool = True, num_channels: int | None = None
) -> tuple[ImageSource, ImageSource | None]:
    """Load training and validation images, and decode small sets `in_memory`.

    They have the `num_channels` of an encoder, or by default those of the recipe. A task that reads no
    `validation_split` gets all images of `train_split`, and no validation images.

    Raises:
        RecipeError: what cannot be read, or fewer images than a batch takes.
    """
    for key in ("data_config", "train_split", "validation_split", "image_column", "label_column"):
        value = getattr(recipe, key) if recipe.reads(key) else None
        if recipe.data == "bundled" and value and (key, value) != ("label_column", NO_LABELS):
            kind = "no columns to choose from" if key.endswith("column") else "only their split by seed"
            raise RecipeError(f"{key}={value!r}: the bundled digits have {kind}; leave it out")
    if recipe.streaming and recipe.data == "bundled":
        fail("streaming", True, "it reads Parquet and tar files, and the bundled digits are none; leave it out")
    only_train = not recipe.reads("validation_split")
    validation_split, seed = (None, 0) if only_train else (recipe.validation_split, recipe.seed)
    splits, columns = (recipe.train_split, validation_split), (recipe.image_column, recipe.label_column)
    channels: int = num_channels or (recipe.num_channels if recipe.reads("num_channels") else 3)
    options = recipe.data_config, in_memory, recipe.streaming, only_train, channels
    try:
        return load_sources(recipe.data, *splits, *columns, seed, *options)
    except (CorruptDataError, SettingError):  # They say enough.
        raise
    except (ValueError, OSError, RuntimeError) as error:  # datasets' own errors become one of these
        said = reason(error).removeprefix(f"data={recipe.data}: ")
        raise RecipeError(f"data={recipe.data!r}: {said}") from error


EARLIER_DEFAULTS = {"view_resolution": "full", "cache": "none", "schedule": None, "search_draws": 16}
"""Defaults of earlier versions. Runs that were started with them keep them where a recipe does not name the key."""


def earlier_defaults(recipe: Recipe, begun: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a run which `begun` describes keeps, of keys that the recipe reads and does not name."""
    kept = {key: value for key, value in EARLIER_DEFAULTS.items() if key in begun and begun[key] == value}
    return {key: value for key, value in kept.items() if recipe.reads(key) and key not in recipe.named}


def continue_recipe(recipe: Recipe) -> list[str]:
    """Settle the precision as the run in `output_dir` has it, and refuse to continue it under other settings.

    Returns:
        What to say about settings that change from its last checkpoint on.

    Raises:
        RecipeError: the run there was started with another value of a key that its result depends on.
    """
    run = RunFolder(recipe.output_dir)
    begun = run.read_recipe()
    precision = choose_precision(recipe.mixed_precision, begun.get("mixed_precision"))
    recipe.mixed_precision = precision  # pyright: ignore
    for key, earlier in earlier_defaults(recipe, begun).items():
        setattr(recipe, key, earlier)
    now = recipe.used()
    return run.compare_settings(now, {key: recipe.resume_rule(key) for key in now}, recipe.files)
