"""What an encoder gives for each patch: its features, their colours, and what the CLS token attends to."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .features import eval_mode
from .pooling import has_cls_token, is_hierarchical


class PatchMaps(NamedTuple):
    """`features` (B, h, w, D) of each patch, and the `attention` (B, heads, h, w) of the CLS token, if there is one."""

    features: Tensor
    attention: Tensor | None


@torch.no_grad()
def look_at_patches(model: PreTrainedModel, pixel_values: Tensor, patch_size: int | None = None) -> PatchMaps | None:
    """Return the last layer's features and attention by patch, on the CPU; None if tokens cannot be told from patches.

    Args:
        pixel_values: (B, C, H, W) on the model's device.
        patch_size: pixels, for encoders that take a patch size.
    """
    options: dict[str, Any] = {} if patch_size is None else {"patch_size": patch_size}
    attends = has_cls_token(model) and not is_hierarchical(model.config)
    before = model.config._attn_implementation or "sdpa"
    if attends:
        model.set_attn_implementation("eager")  # The only one that returns its weights.
        options["output_attentions"] = True
    try:
        with eval_mode(model):
            outputs = model(pixel_values=pixel_values, **options)
    finally:
        if attends:
            model.set_attn_implementation(before)
    hidden = outputs.last_hidden_state.float().cpu()
    if hidden.ndim == 4:
        return PatchMaps(hidden.permute(0, 2, 3, 1), None)
    grid = _find_grid(model, hidden.shape[1], pixel_values.shape[-2:], patch_size)
    if grid is None:
        return None
    features = hidden[:, -math.prod(grid) :].unflatten(1, grid)
    attention = outputs.attentions[-1] if attends and outputs.attentions else None
    if attention is not None:
        attention = attention[:, :, 0, -math.prod(grid) :].float().cpu().unflatten(2, grid)
    return PatchMaps(features, attention)


def _find_grid(
    model: PreTrainedModel, tokens: int, image_size: Sequence[int], patch_size: int | None
) -> tuple[int, int] | None:
    """Return the rows and columns of patches among so many tokens."""
    size: Any = patch_size or getattr(model.config, "patch_size", None)
    if is_hierarchical(model.config) or not isinstance(size, int):
        side = math.isqrt(tokens)
        return (side, side) if side**2 == tokens else None
    # An image that its patches do not divide is resized to the nearest multiple by encoders that take a patch size.
    rows, columns = (max(1, (2 * side + size) // (2 * size)) for side in image_size)
    return (rows, columns) if rows * columns <= tokens else None


def attention_is_trained(model: PreTrainedModel) -> bool:
    """Whether the feature of an image comes from the CLS token, so that its attention says what is in the feature."""
    return has_cls_token(model) and getattr(model.config, "pooling", "cls") == "cls"


def color_patches(maps: Sequence[Tensor]) -> list[Tensor]:
    """Turn feature maps (B, h, w, D) of the same images into colours (B, h, w, 3) in [0, 1].

    Red, green and blue are the first three principal components of all patches. Each map is centred by itself first,
    so that maps of several patch sizes share their colours.
    """
    rows = [features.flatten(0, 2).double() for features in maps]
    rows = [part - part.mean(0) for part in rows]
    together = torch.cat([part / len(part) ** 0.5 for part in rows])
    _, vectors = torch.linalg.eigh(together.T @ together)
    axes = vectors.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    colors = []
    for features, part in zip(maps, rows, strict=True):
        values = part @ axes
        values = torch.nn.functional.pad(values, (0, 3 - values.shape[1]))
        low, high = (values.quantile(q, dim=0) for q in (0.01, 0.99))
        scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        colors.append(scaled.unflatten(0, features.shape[:3]).float())
    return colors
