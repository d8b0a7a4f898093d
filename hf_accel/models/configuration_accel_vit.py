"""AccelViT model configuration."""

import difflib
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig, strict  # pyright: ignore[reportPrivateImportUsage]
from transformers.utils import logging

if TYPE_CHECKING:
    # Only the name is needed at run time. With `trust_remote_code=True`, transformers caches this file under a hash of
    # it and of the files that it imports by a relative path, and `AutoModel` keeps one model class per configuration
    # class. As this line reaches every model file, checkpoints share these classes only if all their code agrees.
    from .modeling_accel_vit import AccelViTModel  # noqa: F401

logger = logging.get_logger(__name__)

CHANGEABLE_AT_LOAD = (
    *("default_patch_size", "pooling", "drop_path_rate", "freeze_patch_projection", "initializer_range", "init_from"),
)
"""Fields of a checkpoint that `from_pretrained` may change. None of them alters what the weights compute."""

AUTO_MAP = {
    "AutoConfig": "configuration_accel_vit.AccelViTConfig",
    "AutoModel": "modeling_accel_vit.AccelViTModel",
    "AutoModelForImageClassification": "modeling_accel_vit.AccelViTForImageClassification",
    "AutoBackbone": "modeling_accel_vit.AccelViTBackbone",
}
"""Where transformers finds the classes in the files beside a checkpoint, under `trust_remote_code=True`."""


@strict
class AccelViTConfig(BackboneConfigMixin, PreTrainedConfig):  # pyright: ignore[reportIncompatibleMethodOverride]
    r"""
    Configuration of an [`AccelViTModel`]. The defaults are ViT-B/16 as in MoCo-v3 (arXiv 2104.02057).

    Args:
        hidden_size (`int`, *optional*, defaults to 768):
            Width D of a token. A multiple of `num_attention_heads`, and of 4 with sin-cos positions.
        image_size (`int`, *optional*, defaults to 224):
            Side in pixels of the images that the positions are laid out for. Images of any size are accepted.
        patch_size (`int`, *optional*, defaults to 16):
            Base patch size p0 in pixels, which is that of the stored kernel. It divides `image_size`.
        default_patch_size (`int`, *optional*):
            Patch size in pixels of calls that name none; `None` means the base. `from_pretrained(..., patch_size=32)`
            sets it, and the stored kernel keeps its base patch size.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        use_cls_token (`bool`, *optional*, defaults to `True`):
            Whether the sequence opens with a CLS token.
        num_register_tokens (`int`, *optional*, defaults to 0):
            Register tokens after CLS (arXiv 2309.16588). They have no position.
        position_embedding_type (`str`, *optional*, defaults to `"sincos"`):
            `"sincos"` (fixed) or `"learned"`. Either is evaluated at continuous positions, relative to the image.
        pooling (`str`, *optional*, defaults to `"cls"`):
            What `pooler_output` is: the `"cls"` token or the `"mean"` of the patch tokens, after the last LayerNorm.
        layerscale_value (`float`, *optional*):
            Initial value of LayerScale (arXiv 2103.17239); `None` means no LayerScale.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth (arXiv 1603.09382) of the last layer in [0, 1); it grows linearly from 0 at the first.
        freeze_patch_projection (`bool`, *optional*, defaults to `False`):
            Keep the patch projection at its random initialisation, which is MoCo-v3's remedy for unstable training.
        image_mean (`list[float]`, *optional*), image_std (`list[float]`, *optional*):
            What pixels in [0, 1] are normalised with in training, for each channel. `None` leaves it to the data.
        init_from (`dict`, *optional*):
            The released encoder that training started from: its `name`, `is_on_hub`, `kind` and `license`.
        out_features (`list[str]`, *optional*), out_indices (`list[int]`, *optional*):
            Stages that a backbone returns, out of `"stem"`, `"stage1"`, ... `"stageN"`. The default is the last.

    Raises:
        ValueError: an impossible combination; the message names the fields, their values and the fix.

    Example:
        >>> config = AccelViTConfig(hidden_size=192, num_attention_heads=3, image_size=240, pooling="mean")
        >>> encoder = AccelViTModel(config)
    """

    model_type = "accel_vit"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    image_size: int = 224
    patch_size: int = 16
    default_patch_size: int | None = None
    num_channels: int = 3
    qkv_bias: bool = True
    use_cls_token: bool = True
    num_register_tokens: int = 0
    position_embedding_type: Literal["sincos", "learned"] = "sincos"
    pooling: Literal["cls", "mean"] = "cls"
    layerscale_value: float | int | None = None
    drop_path_rate: float | int = 0.0
    freeze_patch_projection: bool = False
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    init_from: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens: CLS and registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def grid_size(self) -> int:
        """Patches along a side of the base grid, G = image_size / p0."""
        return self.image_size // self.patch_size

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("stage_names", None)
        kwargs.pop("objective_config", None)  # A training checkpoint's objective reads this itself.
        self.stage_names = ["stem"] + [f"stage{number + 1}" for number in range(self.num_hidden_layers)]
        stages = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        self.set_output_features_output_indices(**stages)
        super().__post_init__(**kwargs)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}")
        at_least_one = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*at_least_one, "patch_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.position_embedding_type == "sincos" and self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 for sin-cos positions; change it or use "
                "position_embedding_type='learned'"
            )
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}: the base grid is "
                "whole. Images of other sizes can still be passed to the model"
            )
        if self.default_patch_size is not None and self.default_patch_size < 1:
            raise ValueError(
                f"default_patch_size must be a positive whole number of pixels, got {self.default_patch_size}; None is "
                f"the base patch size, {self.patch_size}"
            )
        if self.pooling == "cls" and not self.use_cls_token:
            raise ValueError("pooling='cls' needs use_cls_token=True; without a CLS token use pooling='mean'")
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens must be 0 or more, got {self.num_register_tokens}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {self.drop_path_rate}")
        given = [values for values in (self.image_mean, self.image_std) if values is not None]
        if given and [len(values) for values in given] != [self.num_channels] * 2:
            raise ValueError(
                f"image_mean={self.image_mean} and image_std={self.image_std} must both have num_channels="
                f"{self.num_channels} numbers, or both be left out"
            )
        if min(self.image_std or [1.0]) <= 0:
            raise ValueError(f"image_std={self.image_std} must be above 0")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "AccelViTConfig":
        """Build the configuration of a checkpoint. The keywords are those of `from_pretrained`.

        `patch_size` sets the patch size of calls and not the kernel's. `image_size` changes nothing: the positions stay
        those of the training images, and the model takes images of any size.

        Raises:
            ValueError: a keyword redefines what the weights were trained as, or a number of pixels is not a positive
                whole number.
        """
        for name in ("patch_size", "image_size"):
            size = kwargs.get(name)
            if size is not None and (type(size) is not int or size < 1):
                base = config_dict.get(name, getattr(cls, name))
                raise ValueError(
                    f"{name} must be a positive whole number of pixels, got {size!r}; leave it out, or give None, for "
                    f"the checkpoint's own, {base}"
                )
        image_size = kwargs.pop("image_size", None)
        if image_size not in (None, trained_size := config_dict.get("image_size", cls.image_size)):
            logger.warning(
                f"image_size={image_size} has no effect: the model takes images of any size, and its positions stay "
                f"those of the {trained_size} pixels that it was trained with"
            )
        if "patch_size" in kwargs:
            kwargs["default_patch_size"] = kwargs.pop("patch_size")
        changes = {name: kwargs.pop(name) for name in [*kwargs] if name in AccelViTConfig.__annotations__}
        trained = {name: config_dict.get(name, getattr(cls, name)) for name in changes}
        changeable = {*CHANGEABLE_AT_LOAD}
        if any("Classification" in name for name in config_dict.get("architectures") or []):
            changeable.remove("pooling")  # The classifier was trained on this pooling.
        refused = [name for name in changes if name not in changeable and changes[name] != trained[name]]
        if refused:
            raise ValueError(
                f"{', '.join(f'{name}={changes[name]!r}' for name in refused)}: the checkpoint's weights were trained "
                f"with {', '.join(f'{name}={trained[name]!r}' for name in refused)}, and would compute something else. "
                f"Leave {' and '.join(refused)} out. For a new model, load the configuration and set its attributes"
            )
        return super().from_dict({**config_dict, **changes}, **kwargs)  # pyright: ignore[reportReturnType]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration and the model's code, with which a checkpoint opens without this package."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(__file__).parent.glob("*_accel_vit.py"):
            shutil.copyfile(path, folder / path.name)
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


def changed_fields(config: AccelViTConfig) -> dict[str, Any]:
    """Return the fields that differ from their defaults, without those that are settings of a run themselves."""
    others = ("model_type", "transformers_version", "architectures", "auto_map", "dtype")
    others += ("image_size", "patch_size", "num_channels")
    return {name: value for name, value in config.to_diff_dict().items() if name not in others}


def make_config(**settings: Any) -> AccelViTConfig:
    """Make a configuration of these fields. Raises TypeError for others, which `AccelViTConfig` would keep unused."""
    known = [*(field.name for field in fields(AccelViTConfig)), "attn_implementation"]
    for name, value in settings.items():
        if name not in known and not hasattr(AccelViTConfig, name):
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{name}={value!r}: AccelViTConfig has no such field{hint}")
    return AccelViTConfig(**settings)


def vit_tiny(**overrides: Any) -> AccelViTConfig:
    """ViT-Ti, 5.5 M parameters at patch 16.

    Example:
        >>> encoder = AccelViTModel(vit_tiny(image_size=32, patch_size=4))
    """
    return make_config(**{"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, **overrides})


def vit_small(**overrides: Any) -> AccelViTConfig:
    """ViT-S, 22 M parameters, with the 12 heads that MoCo-v3 gives it (others give it 6).

    Example:
        >>> encoder = AccelViTModel(vit_small(image_size=240, patch_size=16))
    """
    return make_config(**{"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, **overrides})


def vit_base(**overrides: Any) -> AccelViTConfig:
    """ViT-B, 86 M parameters.

    Example:
        >>> vit_base(image_size=240, pooling="mean").hidden_size
        768
    """
    return make_config(**overrides)


def vit_large(**overrides: Any) -> AccelViTConfig:
    """ViT-L, 303 M parameters.

    Example:
        >>> vit_large(drop_path_rate=0.1).num_hidden_layers
        24
    """
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return make_config(**{**sizes, **overrides})


PRESETS: dict[str, Callable[..., AccelViTConfig]] = {
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
}

__all__ = ["PRESETS", "AccelViTConfig", "vit_base", "vit_large", "vit_small", "vit_tiny"]
