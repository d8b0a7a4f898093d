"""The recipe of each task: a dataclass of the keys that the task reads, and of no others."""

import os
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

from ..compression import Schedule
from ..utils.pretrain_settings import PretrainSettings, Rule, fixed, free
from .checks import EVALUATIONS, SYMMETRIES, auto_learning_rate, check_recipe, objective_settings
from .groups import (
    DataKeys,
    HubKeys,
    LoggingKeys,
    ModelKeys,
    ObjectiveKeys,
    OptimizerKeys,
    RunKeys,
    SavingKeys,
    StepKeys,
    WorkerKeys,
    take,
)

if TYPE_CHECKING:
    from ..models import AccelViTConfig


@dataclass
class Recipe:
    """What every recipe can do. A subclass declares the keys of one task, and RECIPES lists the subclasses.

    Raises:
        RecipeError: a value, or a combination of values, that is not possible.
    """

    task: ClassVar[str]
    named = frozenset[str]()
    """The keys that a file or a command gives. The others have their defaults."""
    files: ClassVar[Mapping[str, str]] = {}
    """The file that the value of a key was read from when the recipe was made."""

    def __post_init__(self):
        for key in (
            "output_dir",
            "init_from",
            "continue_from",
            "checkpoint",
            "pilot",
            "baseline",
        ):  # no shell has seen what a file says
            if self.reads(key) and str(getattr(self, key)).startswith("~"):
                setattr(self, key, os.path.expanduser(getattr(self, key)))
        check_recipe(self)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the keys of a subclass

    @classmethod
    def summary(cls) -> str:
        """What the task does, in a line: the first one of the class's docstring."""
        return (cls.__doc__ or "").partition("\n")[0]

    @classmethod
    def reads(cls, key: str) -> bool:
        """Whether the recipe's task reads this key."""
        return key == "task" or key in cls.types()

    @classmethod
    @cache
    def types(cls) -> dict[str, Any]:
        """The type of each key."""
        hints = typing.get_type_hints(cls)
        return {key.name: hints[key.name] for key in fields(cls)}

    @classmethod
    def resume_rule(cls, key: str) -> Rule:
        """What a resumed run may do with a key: leave it as it was, change it, or correct a divergence with it."""
        return "free" if key == "task" else cls.__dataclass_fields__[key].metadata["resume"]

    def used(self) -> dict[str, Any]:
        """The task and its keys, with their values, and the number that learning_rate=auto stands for."""
        values = {"task": self.task, **asdict(self)}
        if values.get("learning_rate") == "auto":
            values["learning_rate"] = auto_learning_rate(self)
        return values

    def to_yaml(self) -> str:
        """The recipe as `load_recipe` reads it back."""
        return yaml.safe_dump(self.used(), sort_keys=False)

    def encoder_config(self) -> "AccelViTConfig":
        from ..models import PRESETS, AccelViTConfig
        from ..objectives import OBJECTIVES

        defaults = OBJECTIVES[self.objective].encoder_defaults if self.reads("objective") else {}
        sizes = {key: getattr(self, key) for key in ("image_size", "patch_size", "num_channels")}
        make: Any = PRESETS[self.model] if self.model else AccelViTConfig
        return make(**{**defaults, **sizes, **self.model_config})

    def compression_schedule(self) -> Schedule:
        value = None if self.schedule == "auto" else self.schedule
        released = bool(self.init_from)
        return Schedule.parse(value, self.patch_size, image_size=self.image_size, one_patch_size=released)

    def local_crop_size(self) -> int | None:
        """Pixels of the local crops, None where the objective makes none."""
        settings = {key: setting.default for key, setting in objective_settings(self.objective).items()}
        settings |= self.objective_config
        return settings["local_crop_size"] if settings.get("num_local_crops") else None


# The keys of a dataclass come in the reverse order of its bases: the first base is last in --help and in recipe.yaml.


@dataclass
class PretrainRecipe(
    Recipe,
    HubKeys,
    SavingKeys,
    LoggingKeys,
    OptimizerKeys,
    StepKeys,
    PretrainSettings,
    ObjectiveKeys,
    ModelKeys,
    WorkerKeys,
    DataKeys,
    RunKeys,
):
    """Train an encoder, or go on with an interrupted run."""

    task: ClassVar[str] = "pretrain"


@dataclass
class SearchRecipe(
    Recipe,
    StepKeys,
    take(PretrainSettings, "schedule", "cost", "batch_size", "augmentation", "normalisation", "view_resolution"),
    take(PretrainSettings, "search_criterion", resume="free"),  # a search chooses from the table that it has
    ObjectiveKeys,
    ModelKeys,
    DataKeys,
    RunKeys,
):
    """Search a compression schedule in the checkpoints of a pilot run."""

    task: ClassVar[str] = "search"

    pilot: str | None = fixed(None, "output_dir of a finished run that has checkpoints of keep_points", "search")
    search_draws: int | Literal["auto"] = fixed(
        "auto",
        "paired gradients of each estimate of a search; auto: 16, or as many as the noise of the gradients asks for "
        "and 5% of the pilot's units pay for",
    )
    search_token_dropout: list[float] = fixed(
        [tenth / 10 for tenth in range(10)], "token dropout ratios that a search compares"
    )
    search_patch_size: list[int] | None = fixed(None, "patch sizes that a search compares; default: every possible one")
    search_symmetry: list[str] = fixed(
        ["paper"], f"which compression the target branch shares: {', '.join(SYMMETRIES)}"
    )
    search_memory: float = free(4.0, "GB for the sums of gradients of a search; a smaller number needs more passes")


@dataclass
class EvaluateRecipe(
    Recipe,
    LoggingKeys,
    take(PretrainSettings, "knn_k", "knn_temperature"),
    take(StepKeys, "mixed_precision"),
    ObjectiveKeys,
    take(ModelKeys, "model", "model_config", "num_channels", "image_size", "patch_size"),
    WorkerKeys,
    DataKeys,
    RunKeys,
):
    """Measure how good the features of an encoder are."""

    task: ClassVar[str] = "evaluate"

    checkpoint: str | None = free(
        None, "folder or Hub id of the encoder to evaluate, or random: the recipe's model, untrained", "evaluation"
    )
    evaluations: list[str] = free(["knn"], f"evaluations to run: any of {', '.join(EVALUATIONS)}")
    eval_patch_sizes: list[int] = free(
        [], "patch sizes in pixels to evaluate at, in turn; default: the base patch size"
    )
    eval_seeds: list[int] = free([0], "seeds of linear, logistic and finetune, each in turn")
    linear_config: dict[str, Any] = free({}, "settings of the linear probe, listed below")
    finetune_config: dict[str, Any] = free({}, "settings of fine-tuning, listed below")


@dataclass
class ExportRecipe(Recipe, take(ModelKeys, "model_config"), take(RunKeys, "output_dir")):
    """Convert an encoder to another architecture or format."""

    task: ClassVar[str] = "export"

    checkpoint: str | None = free(None, "folder or Hub id of the encoder to export", "export")
    export_format: Literal["accel_vit", "vit", "dinov2", "timm", "onnx"] = free(
        "vit", "architecture or format to export the encoder to"
    )
    eval_patch_sizes: list[int] = free([], "patch size in pixels that the export has; default: the base patch size")


@dataclass
class CardRecipe(Recipe, HubKeys):
    """Write the model card of a finished run again."""

    task: ClassVar[str] = "card"

    checkpoint: str | None = free(
        None, "folder of the finished run, or of its encoder, to write the model card of", "card"
    )
    baseline: str | None = free(None, "output_dir of the uncompressed run to compare with")


@dataclass
class CostRecipe(Recipe, take(StepKeys, "mixed_precision"), ModelKeys, take(RunKeys, "output_dir")):
    """Measure what a forward pass costs under every compression."""

    task: ClassVar[str] = "cost"


@dataclass
class EmbedRecipe(
    Recipe,
    take(ModelKeys, "image_size"),
    WorkerKeys,
    take(DataKeys, "data", "data_config", "streaming", "image_column", "label_column"),
    take(RunKeys, "output_dir"),
):
    """Write the features of images to a Parquet file, for other programs."""

    task: ClassVar[str] = "embed"

    checkpoint: str | None = free(None, "folder or Hub id of the encoder to embed images with", "embed")
    train_split: str | None = fixed(
        None, "split to embed, or a part of it as train[:1000] or train[:10%]; default: train"
    )
    eval_patch_sizes: list[int] = free([], "patch size in pixels to embed at; default: the base patch size")
    embedding_dtype: Literal["fp32", "fp16"] = fixed("fp32", "precision of the numbers that are stored")


@dataclass
class PackRecipe(
    Recipe,
    take(PretrainSettings, "augmentation"),
    take(ObjectiveKeys, "objective", "objective_config"),
    take(ModelKeys, "image_size"),
    WorkerKeys,
    DataKeys,
    RunKeys,
):
    """Write a dataset to Parquet shards, with images shrunk to what their crops need."""

    task: ClassVar[str] = "pack"


@dataclass
class ViewsRecipe(PretrainRecipe):
    """Draw the views of a pretraining run, and the patches that each stage keeps of them."""

    task: ClassVar[str] = "views"

    def run(self) -> PretrainRecipe:
        """The recipe of the run itself."""
        return PretrainRecipe(**asdict(self))


@dataclass
class ExploreRecipe(
    Recipe,
    take(ModelKeys, "image_size"),
    WorkerKeys,
    take(DataKeys, "data", "data_config", "streaming", "image_column", "label_column"),
    take(RunKeys, "output_dir", "seed"),
):
    """Draw what an encoder has learnt: neighbours, patches, attention, a map, duplicates and outliers."""

    task: ClassVar[str] = "explore"

    checkpoint: str | None = free(None, "folder or Hub id of the encoder to explore", "exploration")
    train_split: str | None = fixed(
        None, "split to explore, or a part of it as train[:1000] or train[:10%]; default: train"
    )
    eval_patch_sizes: list[int] = free(
        [], "patch sizes in pixels to look at, the first for all features; default: the base patch size and the next"
    )


_KINDS = (
    *(PretrainRecipe, SearchRecipe, EvaluateRecipe, ExportRecipe, CardRecipe, CostRecipe, EmbedRecipe, PackRecipe),
    *(ViewsRecipe, ExploreRecipe),
)
RECIPES: dict[str, type[Recipe]] = {kind.task: kind for kind in _KINDS}


def default_of(kind: type[Recipe], key: str) -> Any:
    """The default of a key. Lists and dictionaries are new ones each time."""
    field: Field = kind.__dataclass_fields__[key]
    return field.default if field.default_factory is MISSING else field.default_factory()


def tasks_that_read(key: str) -> list[str]:
    return [task for task, kind in RECIPES.items() if kind.reads(key)]
