"""Decode one image of any format to upright RGB pixels of 8 bits."""

import contextlib
from typing import Any, cast

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from PIL.Image import Image
from torch import Tensor

try:
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:
    simplejpeg = None

ORIENTATION = PIL.ExifTags.Base.Orientation
TURNED = (5, 6, 7, 8)
"""The values of the orientation tag that swap width and height."""


TURNS = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}
"""For each orientation, counter-clockwise quarter turns, and whether left and right are exchanged after them."""

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


def image_pixels(image: Image, shrink: float = 1.0) -> Tensor:
    """Decode an opened image to upright RGB: uint8 (3, H, W). Raises the errors of `upright_rgb`.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster, but never smaller than 1/`shrink`. The
    package simplejpeg does so in two thirds of Pillow's time, and gives the same pixels.
    """
    factor = next((factor for factor in (8, 4, 2) if shrink >= factor), 1)
    if simplejpeg is not None and image.format == "JPEG" and image.mode == "RGB":
        with contextlib.suppress(Exception):  # what it refuses, Pillow may be able to read
            return _decode_jpeg(image, factor)
    if factor > 1:
        image.draft("RGB", (int(image.width / shrink), int(image.height / shrink)))
    return image_tensor(upright_rgb(image))


def _decode_jpeg(image: Image, factor: int) -> Tensor:
    """Decode by simplejpeg at 1/`factor` of the size."""
    content = cast(Any, image).fp.getvalue()
    least = {"min_width": -(-image.width // factor), "min_height": -(-image.height // factor), "min_factor": factor}
    pixels = torch.from_numpy(cast(Any, simplejpeg).decode_jpeg(content, **(least if factor > 1 else {})))
    turn, mirror = TURNS[image.getexif().get(ORIENTATION, 1)]
    pixels = pixels.rot90(turn) if turn else pixels
    return (pixels.flip(1) if mirror else pixels).permute(2, 0, 1)


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
