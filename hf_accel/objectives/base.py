"""What every objective shares: how a view is encoded under a compression, and what the Trainer may ask of it."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from ..compression.cost import ForwardCost
from ..compression.strategy import Compression, Strategy
from ..data import ViewConfig
from ..distributed import rank
from ..models import AccelViTModel
from ..models.modeling_accel_vit import AccelViTPreTrainedModel
from ..utils.seeding import rows_generator

POINT = 0.02
"""An `embedding_std` below this is a point; a random initialisation has ten times as much."""

POINT_REMEDY = "a lower learning_rate, a longer warmup, model_config.freeze_patch_projection=true"
"""What usually helps (arXiv 2104.02057, section 4.2)."""


class Draw(NamedTuple):
    """What the random draws of a micro-batch are a function of."""

    seed: int
    step: int
    micro_step: int = 0


@dataclass
class ObjectiveOutput(ModelOutput):
    """`loss`: scalar, to be minimised. `metrics`: detached scalars worth logging, by name."""

    loss: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None


class ObjectiveForPreTraining(AccelViTPreTrainedModel):
    """Base of the `...ForPreTraining` models.

    `self.encoder` is the encoder that is evaluated and saved in `final/`, under the prefix by which a training
    checkpoint opens as an `AccelViTModel` directly. A subclass has `forward` and `units_per_image`, and overrides what
    else it needs; the keyword arguments of its `__init__` are the keys of a recipe's `objective_config`.

    Attributes:
        settings: the keyword arguments that the model was made with, defaults included.
    """

    encoder: AccelViTModel
    settings: dict[str, Any]
    name: ClassVar[str] = ""
    """The name in recipes and results; default: the class's."""
    display_name: ClassVar[str] = ""
    """The name on a model card; default: `name`."""
    citation: ClassVar[str] = ""
    """The paper as BibTeX, for the model card."""
    has_target_branch: ClassVar[bool] = True
    """Whether a second branch, which gets no gradient, encodes views under `Strategy.target_branch`."""
    encoder_defaults: ClassVar[dict[str, Any]] = {}
    """AccelViTConfig fields over the preset's, unless a recipe's `model_config` says otherwise."""
    least_batch: ClassVar[int] = 1
    """Images that a micro-batch of all processes must have; 2 where they are contrasted with each other."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name") or cls.__name__
        cls.display_name = cls.__dict__.get("display_name") or cls.name

    def __new__(cls, *args: Any, **kwargs: Any):
        model = super().__new__(cls)
        if args or kwargs:  # A copy is made without arguments, and takes over the attributes of its original.
            bound = inspect.signature(cls.__init__).bind(model, *args, **kwargs)
            bound.apply_defaults()
            model.settings = dict([*bound.arguments.items()][2:])
        return model

    def view_configs(self, augmentation: Sequence[ViewConfig]) -> list[ViewConfig]:
        """The views to be made of an image; `augmentation` holds how the first and the second one are drawn."""
        return list(augmentation[:2])

    def matched_view_size(self, strategy: Strategy) -> int:
        """Pixels of views that hold no more than the patches of `strategy` see.

        A resized kernel sees p0 x p0 numbers of each patch, so a view may be made with p0 pixels a patch. Where the
        patches of the branches differ, both need the full view.
        """
        online, target = strategy.online.patch_size, strategy.target_branch.patch_size
        size, base = self.config.image_size, self.config.patch_size
        return size if online != target else size // online * base

    def compile_encoders(self) -> None:
        """Compile in place: names in checkpoints stay, and the draws around the encoders are no part of the graphs."""
        for module in self.modules():
            if isinstance(module, AccelViTModel):
                module.compile()

    def forward(
        self, views: list[torch.Tensor], strategy: Strategy, draw: Draw, progress: float = 0.0
    ) -> ObjectiveOutput:
        """`views`: one (B, C, S, S) for each of `view_configs`."""
        raise NotImplementedError

    def units_per_image(self, strategy: Strategy, forward_cost: ForwardCost) -> float:
        """Cost of training on one image under `strategy`, in units; the backward counts as two forwards."""
        raise NotImplementedError

    def collapse_symptoms(self, logs: Mapping[str, float]) -> dict[str, tuple[str, str]]:
        """Find the signs of collapse in a log line.

        Args:
            logs: with "loss" and the objective's own metrics.

        Returns:
            For each kind of collapse that shows, a sentence that says what was seen, and the settings that may help.
        """
        if logs.get("embedding_std", 1.0) >= POINT:
            return {}
        seen = f"embedding_std stays at {logs['embedding_std']:.2g}: every image has the same embedding"
        return {"point": (seen, POINT_REMEDY)}

    def frozen_parameters(self, progress: float) -> list[nn.Parameter]:
        """Return the parameters that the step at `progress` leaves as they are; at 0, all that are ever frozen."""
        return []

    def before_optimizer_step(self, progress: float) -> None:
        """Change the gradients of an optimizer step, once all of them are complete."""

    def update_target(self, progress: float) -> None:
        """Move the target branch after each optimizer step. Objectives without one have nothing to do."""

    def encode(
        self,
        encoder: nn.Module,
        view: torch.Tensor,
        compression: Compression,
        draw: Draw,
        branch: str,
        image_size: int | None = None,
    ) -> torch.Tensor:
        """(B, C, S, S) -> pooled features (B, hidden_size) under `compression`.

        `compression.patch_size` is in pixels of a view of `image_size` (default: the config's); a view made at another
        resolution is cut into the same grid. Each branch of each micro-batch keeps its own tokens, and two processes
        keep the ones that one process with the same global batch would.
        """
        grid = (image_size or self.config.image_size) // compression.patch_size
        generator = None
        if compression.token_dropout > 0:
            first_row = rank() * view.shape[0]
            generator = rows_generator(first_row, grid**2, draw.seed, "tokens", draw.step, draw.micro_step, branch)
        options = {**compression.to_dict(), "patch_size": view.shape[-1] // grid}
        return encoder(view, generator=generator, **options).pooler_output

    def encode_views(
        self,
        encoder: nn.Module,
        views: Sequence[torch.Tensor],
        compression: Compression,
        draw: Draw,
        branch: str,
        image_size: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As `encode`, for views of one size (B, C, S, S) in a single forward: one (B, hidden_size) each."""
        # An image's views stand side by side, so that each process's rows follow one another in the global batch.
        rows = torch.stack(list(views), dim=1).flatten(0, 1)
        features = self.encode(encoder, rows, compression, draw, branch, image_size)
        return features.unflatten(0, (-1, len(views))).unbind(1)


def check_range(low: float, high: float | None = None, **settings: float) -> None:
    """Raises ValueError for a setting, given by its name, that is not from `low` to `high`, both included."""
    for name, value in settings.items():
        if not (value >= low and (high is None or value <= high)):
            upper = "" if high is None else f" and at most {high}"
            raise ValueError(f"{name}={value} must be at least {low}{upper}")


def keep_default_init(*modules: nn.Module) -> None:
    """Exempt heads from the ViT's initialisation: the original implementations leave theirs at torch's default."""
    for module in modules:
        for child in module.modules():
            cast(Any, child)._is_hf_initialized = True


@torch.no_grad()
def embedding_std(embeddings: torch.Tensor) -> torch.Tensor:
    """Spread of (N, D) embeddings: sqrt(D) times the mean over D of the std over N of the normalised rows.

    About 1 when they fill the sphere and 0 when they have collapsed to a point, whatever D.
    """
    normalised = nn.functional.normalize(embeddings.float(), dim=1)
    return normalised.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5
