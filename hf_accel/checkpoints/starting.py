"""The encoder that training starts from, at the sizes that training asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed.sharding import loading_whole
from ..models import AccelViTConfig
from ..models.conversion import Interpolation, State, split_state, with_learned_positions
from .processor import normalisation_of
from .reading import read_checkpoint

LARGEST_DEFAULT = 224
"""Encoders whose positions are laid out for larger images start at these pixels unless another size is asked for."""

INTERPOLATIONS: dict[str, Interpolation] = {
    **dict.fromkeys(("vit", "vit_mae", "dinov2"), "bicubic"),
    **dict.fromkeys(("dinov2_with_registers", "timm"), "antialiased bicubic"),
}
"""What the original samples its positions by at another image size. AccelViT's own way is bilinear."""


@dataclass(frozen=True)
class Start:
    """An encoder to start from.

    Args:
        config, state: the encoder; `config.init_from` says where it comes from.
        description: a line about what was read and what was left out.
    """

    config: AccelViTConfig
    state: State
    description: str


def read_start(checkpoint: str, image_size: int | None = None, patch_size: int | None = None, **fields: Any) -> Start:
    """Read the encoder of a folder, a Hub id or a file of timm's weights, to train it further.

    Args:
        checkpoint: what `read_checkpoint` reads. Only its encoder is taken.
        image_size: pixels of the images, for which the positions are sampled. Default: the encoder's own, and 224 if
            that is larger.
        patch_size: base patch size, to which the kernel is resized. Default: the encoder's own.
        fields: of `AccelViTConfig`, among those that do not change what the weights compute.

    Raises:
        ValueError: nothing that can be read, sizes that do not fit, or a field that the weights do not allow.
    """
    with loading_whole():
        read = read_checkpoint(checkpoint, fields.get("num_attention_heads"), encoder_only=True)
    encoder, head = split_state(read.config, read.state)
    base, left_out = read.config, [*read.left_out, *["classifier"] * bool(head)]
    patch_size = patch_size or base.patch_size
    image_size = image_size or min(base.image_size, LARGEST_DEFAULT)
    if image_size % patch_size:
        raise ValueError(f"its patches of {patch_size} pixels do not divide image_size={image_size}: choose a multiple")
    of_classifier = ("id2label", "label2id", "num_labels", "architectures", "auto_map")
    config = AccelViTConfig.from_dict({k: value for k, value in base.to_dict().items() if k not in of_classifier})
    if (image_size, patch_size) != (base.image_size, base.patch_size):
        way = INTERPOLATIONS.get(read.kind, "bilinear")
        config, encoder = with_learned_positions(config, encoder, patch_size, image_size, way)
    if read.processor is not None:
        config.image_mean, config.image_std = normalisation_of(read.processor)
    is_on_hub = not Path(checkpoint).exists()
    path = Path(checkpoint).resolve()
    start = {
        "name": checkpoint if is_on_hub else "/".join(path.parts[-2:]),
        "is_on_hub": is_on_hub,
        "kind": read.kind,
        "license": (read.licence or {}).get("license"),
    }
    config = AccelViTConfig.from_dict(config.to_dict(), **{**fields, "init_from": start})
    sizes = f"{config.image_size} px in patches of {config.patch_size}"
    if config.image_size != base.image_size or config.patch_size != base.patch_size:
        sizes += f" (stored: {base.image_size} px in patches of {base.patch_size})"
    about = f"Starting from {checkpoint} ({read.kind}): {len(encoder)} tensors of its encoder, {sizes}"
    about += f"; left out: {', '.join(left_out)}" if left_out else "; nothing is left out"
    if not start["license"]:
        unread = read.licence is None
        why = "its card, which may state a licence, cannot be read" if unread else "no licence is stated"
        about += f"; {why}: the card of the run says license: unknown, unless the key license names one"
    if read.processor is None and config.image_mean is None:
        about += "; it has no image processor, so that views are normalised as the data alone would be"
    return Start(config, encoder, about)
