"""Turn the outputs of any vision encoder into one feature per image, or raise an error if they hold none."""

from typing import Any

import torch
from torch import Tensor, nn

from ..utils.causes import reason

CLS_NAMES = ("cls_token", "class_token", "class_embedding", "cls_embedding")
"""Endings of the names that transformers' encoders give to a learnt CLS token."""

SAME = 1e-3
"""Two forwards of one image may differ by this much, relative to the largest feature, because of rounding."""


class NoFeature(ValueError):
    """The outputs of a model hold no feature of an image."""


def pool(outputs: Any, model: nn.Module, image_size: tuple[int, int]) -> Tensor:
    """Return features (B, D) of images of `image_size` (height, width) in pixels, from the outputs of `model`.

    The feature is `pooler_output` if there is one. Otherwise it is the mean of a feature map, the CLS token of a
    sequence that has one, or the mean of a sequence of patches only.

    Raises:
        NoFeature: no feature of an image, or a sequence that neither begins with a CLS token nor is all patches.
    """
    name = type(model).__name__
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None or hidden.ndim not in (2, 3, 4):
        raise NoFeature(f"{name} gives neither pooler_output nor last_hidden_state of an image: {ENCODERS_ONLY}")
    if hidden.ndim == 4:
        _, second, third, last = hidden.shape
        channels_last = second == third != last and image_size[0] == image_size[1]
        return hidden.mean((1, 2) if channels_last else (2, 3))
    if hidden.ndim == 2:
        return hidden
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cls_token", True):
        return hidden.mean(1)
    patches = None if (merges := is_hierarchical(config)) else _count_patches(config, image_size)
    has_cls = has_cls_token(model)
    if has_cls and (patches is None or hidden.shape[1] > patches):
        return hidden[:, 0]
    if not has_cls and (merges or patches == hidden.shape[1]):
        return hidden.mean(1)
    raise NoFeature(
        f"{name} gives {hidden.shape[1]} tokens for an image of "
        f"{'unknown' if patches is None else patches} patches, and what they stand for is not known: {ENCODERS_ONLY}"
    )


ENCODERS_ONLY = (
    "evaluation takes encoders with a pooler_output, a feature map, a CLS token, or one token for each patch; name "
    "one, or save a model whose pooler_output is the feature"
)


def has_cls_token(model: nn.Module) -> bool:
    """Whether an encoder's sequence begins with a learnt CLS token."""
    used = getattr(getattr(model, "config", None), "use_cls_token", True)
    return used and any(parameter.endswith(CLS_NAMES) for parameter, _ in model.named_parameters())


def is_hierarchical(config: Any) -> bool:
    """Whether an encoder halves its map in stages, so that its tokens are not patches of the image.

    The patch_size of its config is then a setting of its first layers, or has no meaning.
    """
    return hasattr(config, "depths") or isinstance(getattr(config, "hidden_sizes", None), list | tuple)


def _count_patches(config: Any, image_size: tuple[int, int]) -> int | None:
    """Return the number of patches of an image, or None if the encoder does not state their size."""
    sides = getattr(config, "patch_size", None)
    if isinstance(sides, int):
        sides = (sides, sides)
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    return (image_size[0] // sides[0]) * (image_size[1] // sides[1])


def check_encoder(encode: Any, model: nn.Module, pixel_values: Tensor) -> None:
    """Check that `encode(pixel_values)`, with (1, C, H, W), works and returns the same feature twice.

    Raises:
        ValueError: the model cannot be called with only an image, or its result depends on a random draw.
    """
    try:
        first, second = encode(pixel_values), encode(pixel_values)
    except (NoFeature, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        name, shape = type(model).__name__, tuple(pixel_values.shape[1:])
        if hasattr(getattr(model, "config", None), "num_frames"):
            raise ValueError(f"{name} takes videos, not single images: name an image encoder") from error
        raise ValueError(f"{name} gives no feature of a single image {shape}: {reason(error)}") from error
    if (first - second).abs().max() > SAME * first.abs().max():  # not where both are NaN
        raise ValueError(
            f"{type(model).__name__} gives other features of the same image each time, as it draws at random in eval "
            "mode: turn this off in its config.json, or name another encoder"
        )
