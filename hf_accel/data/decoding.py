"""Decode one image of any format to upright RGB pixels of 8 bits."""

import contextlib

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from PIL.Image import Image
from torch import Tensor

ORIENTATION = PIL.ExifTags.Base.Orientation
TURNED = (5, 6, 7, 8)
"""The values of the orientation tag that swap width and height."""


DEEP_RANGE = 2**16
"""Pixels of 16 or 32 bits are taken to lie in [0, DEEP_RANGE)."""


def image_tensor(image: Image) -> Tensor:
    """uint8 (3, H, W) of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: what Pillow gives is read-only


def upright_size(image: Image) -> tuple[int, int]:
    """Return the (width, height) that `upright_rgb` gives, from the header only."""
    turned = False
    with contextlib.suppress(Exception):  # broken metadata beside a good image
        # Pillow itself swaps the sides of a TIFF when it reads this tag, but not for the same value in XMP.
        swapped = getattr(image, "tag_v2", {}).get(ORIENTATION) in TURNED
        turned = image.getexif().get(ORIENTATION) in TURNED and not swapped
    return (image.height, image.width) if turned else (image.width, image.height)


def is_deep(image: Image) -> bool:
    """Whether pixels have 16 or 32 bits, from the header only."""
    return image.mode.startswith("I")


def loses_contrast(image: Image) -> bool:
    """Whether `upright_rgb` makes an image of 16 or 32 bits nearly black, or clips it. Raises Pillow's errors."""
    image.load()
    low, high = np.asarray(image).min(), np.asarray(image).max()
    return bool(low < 0 or 0 < high < DEEP_RANGE // 8 or high >= DEEP_RANGE)


def upright_rgb(image: Image) -> Image:
    """Return 8-bit RGB, upright by EXIF. Raises Pillow's errors, and ValueError for floating-point pixels."""
    image.load()
    if image.mode == "F":  # they may have any range, and Pillow would clip them at 0 and 255
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    with contextlib.suppress(Exception):  # broken metadata beside a good image
        PIL.ImageOps.exif_transpose(image, in_place=True)
    if is_deep(image):  # 16 or 32 bits; Pillow would clip them at 255
        image = PIL.Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # Pillow asks for this step
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
