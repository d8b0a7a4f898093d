"""What every objective shares: how a view is encoded under a compression, and what the Trainer may ask of it."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import ModelOutput

from ..checkpoints import read_start
from ..compression.cost import ForwardCost
from ..compression.strategy import Compression, Strategy
from ..data import ViewConfig
from ..distributed import rank, say
from ..distributed.sharding import is_sharded
from ..models import AccelViTConfig, AccelViTModel
from ..models.modeling_accel_vit import AccelViTPreTrainedModel
from ..utils.seeding import rows_generator
from .casting import weights_cast_together

logger = logging.getLogger(__name__)

POINT = 0.02
"""An `embedding_std` below this is a point; a random initialisation has ten times as much."""

POINT_REMEDY = "a lower learning_rate, a longer warmup, model_config.freeze_patch_projection=true"
"""What usually helps (arXiv 2104.02057, section 4.2)."""


GRAPHS = 256
"""Graphs that compiled encoders may have in one process."""

REPLAYED = ("reduce-overhead", "max-autotune")
"""Modes of `torch.compile` in which a GPU replays CUDA graphs."""


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


class Checked(type):
    """Checks what every objective needs, once its whole `__init__` has run."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        model.check_modules()
        return model


class ObjectiveForPreTraining(AccelViTPreTrainedModel, metaclass=Checked):
    """Base of the `...ForPreTraining` models.

    `self.encoder` is the encoder that is evaluated and saved in `final/`, under the prefix by which a training
    checkpoint opens as an `AccelViTModel` directly. A subclass has `forward` and `units_per_image`, and overrides what
    else it needs; the keyword arguments of its `__init__` are the keys of a recipe's `objective_config`.

    Attributes:
        settings: the keyword arguments that the model was made with, defaults included.
    """

    _keys_to_ignore_on_load_unexpected = None
    encoder: AccelViTModel
    settings: dict[str, Any]
    _replays_graphs = False
    _initialised = 0
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
    base_learning_rate: ClassVar[float | None] = None
    """Published learning rate for 256 images, which `learning_rate=auto` scales with the batch; None: there is none."""
    least_batch: ClassVar[int] = 1
    """Images that a micro-batch of all processes must have; 2 where the loss of an image depends on the others."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name") or cls.__name__
        cls.display_name = cls.__dict__.get("display_name") or cls.name

    def __new__(cls, *args: Any, **kwargs: Any):
        model = super().__new__(cls)
        if args or kwargs:  # A copy is made without arguments, and takes over the attributes of its original.
            bound = inspect.signature(cls.__init__).bind(model, *args, **kwargs)
            bound.apply_defaults()
            config = [*bound.arguments.values()][1]
            if not isinstance(config, AccelViTConfig):
                raise TypeError(
                    f"config: {cls.__name__} takes an AccelViTConfig, e.g. vit_small(), and not a "
                    f"{type(config).__name__}; {cls.__name__}.from_pretrained opens an encoder's folder"
                )
            model.settings = dict([*bound.arguments.items()][2:])
        return model

    def post_init(self) -> None:
        """Draw the first weights. A subclass calls it in `__init__`, once all of its modules are there."""
        super().post_init()
        self._initialised = sum(1 for _ in self.modules())

    def check_modules(self) -> None:
        """Raise TypeError if `__init__` has made no `encoder`, or has left modules at torch's initialisation."""
        kind = type(self).__name__
        if not isinstance(getattr(self, "encoder", None), AccelViTModel):
            raise TypeError(f"{kind}.__init__: set self.encoder to the AccelViTModel that is to be evaluated and saved")
        if self._initialised != sum(1 for _ in self.modules()):
            raise TypeError(f"{kind}.__init__: call self.post_init() after the last module; it draws the first weights")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model, and in its config.json its settings, with which `from_pretrained` makes it again."""
        config: Any = self.config  # The encoders share it, and are saved without settings.
        config.objective_config = self.settings
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del config.objective_config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """Open a checkpoint of this objective, or start the objective at the encoder of another checkpoint.

        A checkpoint of this class brings its settings; those in the call replace them. From any other checkpoint all
        branches get the encoder, and the heads are new. The other arguments are those of transformers'.

        Raises:
            ValueError: the checkpoint's weights are not those of a model with these settings.
        """
        checkpoint, with_report = str(pretrained_model_name_or_path), kwargs.pop("output_loading_info", False)
        names = [*inspect.signature(cls.__init__).parameters][2:]
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        written = cast(Any, cls.config_class).get_config_dict(checkpoint, **kwargs)[0]
        kind = (written.get("architectures") or ["no named model"])[0]
        kwargs["output_loading_info"] = True
        whole: Any
        if kind == cls.__name__:
            saved = written.get("objective_config")
            kwargs |= {**(saved or {}), **given, "ignore_mismatched_sizes": True}
            with quiet_loading():
                whole, report = cast(Any, super()).from_pretrained(checkpoint, *args, **kwargs)
            if problem := find_difference(report):
                remedy = "leave out the settings that it was not trained with" if given else "copy or save it again"
                remedy = "give the settings that it was trained with" if saved is None else remedy
                raise ValueError(f"{checkpoint}: {problem}; {remedy}")
            if saved is None:
                rest = ", ".join(f"{name}={value!r}" for name, value in whole.settings.items() if name not in given)
                logger.warning("%s was saved without its settings: it is opened with %s", checkpoint, rest)
            with torch.random.fork_rng(devices=[]):  # This initialisation is thrown away.
                model: Any = cls(whole.config, **whole.settings)
            # Loading leaves requires_grad and buffers outside of a checkpoint undefined: only the weights are taken.
            model.load_state_dict(whole.state_dict())
        else:
            whole, report = cast(Any, AccelViTModel).from_pretrained(checkpoint, *args, **kwargs)
            model = cls(whole.config, **given)
            for branch in model.children():
                if isinstance(branch, AccelViTModel):
                    branch.load_state_dict(whole.state_dict())
            logger.warning("%s holds %s: %s takes its encoder, and the heads are new", checkpoint, kind, cls.__name__)
        model = model.to(device=whole.device, dtype=whole.dtype).eval()
        return (model, report) if with_report else model

    @classmethod
    def from_encoder(
        cls, model: str | Path, objective_config: Mapping[str, Any] | None = None, **config_overrides: Any
    ):
        """Start the objective at a released encoder: every branch gets its weights, and the heads are new.

        A line says what was read and what was left out, such as a classifier. Views are normalised as the encoder's
        image processor does it.

        Args:
            model: Folder or Hub id of an AccelViT, a ViT, DINO, ViT-MAE or DINOv2 of transformers, or a plain ViT of
                timm, or a file of timm's weights.
            objective_config: The keyword arguments of this class.
            config_overrides: Fields of [`AccelViTConfig`]. `image_size` (default: the encoder's own, at most 224) and
                `patch_size` (default: the encoder's own) resize positions and patch kernel. Others must not change
                what the weights compute, as `pooling`, `drop_path_rate` and `freeze_patch_projection` do not.

        Raises:
            ValueError: a model that cannot be read, or an override that its weights do not allow.

        Example:
            >>> model = MoCoForPreTraining.from_encoder("facebook/dinov2-small", {"temperature": 0.2}, image_size=112)
        """
        start = read_start(str(model), **config_overrides)
        objective: Any = cls(start.config, **(objective_config or {}))
        for encoder in objective._encoders():
            encoder.load_state_dict(start.state)
        say(start.description)
        return objective

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

    def compile_encoders(self, backend: Any = "inductor", mode: str | None = None) -> None:
        """Compile in place, one graph for each shape: names in checkpoints stay, and draws are no part of the graphs.

        Args:
            backend, mode: those of `torch.compile`. In the mode "reduce-overhead" a GPU replays whole graphs, and
                gradients stay valid until the next forward: it cannot accumulate them over micro-batches.
        """
        import torch._dynamo  # takes seconds

        # The shapes of a schedule are few, and each is worth its graph. Beyond the limit a call would be eager.
        limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.config.accumulated_recompile_limit = max(limit, torch._dynamo.config.accumulated_recompile_limit)
        for encoder in self._encoders():
            encoder.compile(dynamic=False, backend=backend, mode=mode)
        self._replays_graphs = mode in REPLAYED

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._replays_graphs:  # What the graphs returned at the last call may be overwritten.
            torch.compiler.cudagraph_mark_step_begin()
        # Weights that an engine shards are cast by the engine, and those of a graph within the graph.
        eager = [encoder for encoder in self._encoders() if encoder._compiled_call_impl is None]
        with weights_cast_together([] if is_sharded(self) else eager):
            return super().__call__(*args, **kwargs)

    def _encoders(self) -> list[AccelViTModel]:
        return [module for module in self.modules() if isinstance(module, AccelViTModel)]

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

    def skip_warmup(self) -> None:
        """Leave out what only random weights need at the start, as a run before has trained these."""

    def before_optimizer_step(self, progress: float) -> None:
        """Change the gradients of an optimizer step, once all of them are complete."""

    def update_target(self, progress: float) -> None:
        """Move the target branch after each optimizer step. Objectives without one have nothing to do."""

    def encode(
        self,
        encoder: AccelViTModel,
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
        # The pixels are fitted and the tokens drawn here, so that a compiled encoder is one graph without a break.
        view, patch_size = encoder.fit_to_patches(view, view.shape[-1] // grid)
        generator = None
        if compression.token_dropout > 0:
            first_row = rank() * view.shape[0]
            generator = rows_generator(first_row, grid**2, draw.seed, "tokens", draw.step, draw.micro_step, branch)
        kept_tokens = encoder.draw_kept_tokens(view, patch_size, compression.token_dropout, generator)
        return encoder(view, patch_size, kept_tokens=kept_tokens).pooler_output

    def encode_views(
        self,
        encoder: AccelViTModel,
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


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' table of the weights that differ: an error names the first of them."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def find_difference(report: Mapping[str, Any]) -> str:
    """Describe the first weight in which a checkpoint and a model differ; empty if there is none."""
    for name, there, here in sorted(report["mismatched_keys"]):
        return f"{name} is {tuple(there)} there and {tuple(here)} here"
    for name in sorted(report["missing_keys"]):
        return f"it lacks {name}"
    for name in sorted(report["unexpected_keys"]):
        return f"it holds {name}, which this model lacks"
    return ""


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
