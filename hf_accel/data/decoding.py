"""Decode one image of any format to upright pixels: RGB of 8 bits, or other channels of 8 or 16 bits."""

import contextlib
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from PIL.Image import Image
from torch import Tensor

from .arrays import AnyImage, ArrayImage, count_channels, open_array, open_image

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


def read_image(image: str | Path | bytes) -> Image:
    """Read an image file as training and `hf-accel embed` do, for the image processor of an encoder of three channels.

    The image is upright by its EXIF orientation and RGB of 8 bits. 16 bits are scaled to 8; Pillow's `convert` would
    clip them.

    Args:
        image: the path of a file, or its content.

    Raises:
        ValueError, OSError: it is no image, or one that cannot be read. The message names the path.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from hf_accel import read_image
        >>> Image.new("I;16", (40, 30), 200 * 257).save(file := io.BytesIO(), "png")  # gray, of 16 bits
        >>> image = read_image(file.getvalue())
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (40, 30), (200, 200, 200))
    """
    if isinstance(image, bytes):
        return _read_content(image)
    content = Path(image).read_bytes()
    try:
        return _read_content(content)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise _with_path(error, image, content) from error


def _read_content(content: bytes) -> Image:
    opened = open_image(content)
    if isinstance(opened, ArrayImage) and opened.dtype == np.uint16:
        opened = open_array((np.asarray(opened) // 257).astype(np.uint8))
    return cast(Image, upright(opened))


def _with_path(error: Exception, path: str | Path, content: bytes) -> Exception:
    """Return an error of the same type whose message names the file."""
    why = str(error) or type(error).__name__
    if not content:
        why = "the file is empty"
    elif isinstance(error, PIL.UnidentifiedImageError):  # Pillow names the object in memory that holds the content.
        why = "it is no image that Pillow can open"
    try:
        return type(error)(f"{path}: {why}")
    except TypeError:  # The type takes other arguments.
        return ValueError(f"{path}: {why}")


def image_tensor(image: AnyImage) -> Tensor:
    """uint8 (3, H, W) of an RGB image, or (C, H, W) of another one that `upright` has returned."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: what Pillow gives is read-only


def upright_size(image: AnyImage) -> tuple[int, int]:
    """Return the (width, height) that `upright_rgb` gives, from the header only."""
    turned = False
    if isinstance(image, ArrayImage):
        return image.size
    with contextlib.suppress(Exception):  # broken metadata beside a good image
        # Pillow itself swaps the sides of a TIFF when it reads this tag, but not for the same value in XMP.
        swapped = getattr(image, "tag_v2", {}).get(ORIENTATION) in TURNED
        turned = image.getexif().get(ORIENTATION) in TURNED and not swapped
    return (image.height, image.width) if turned else (image.width, image.height)


def image_pixels(image: AnyImage, shrink: float = 1.0, channels: int = 3, deep: bool = False) -> Tensor:
    """Decode an opened image: uint8 (C, H, W), or uint16 if `deep`. Raises the errors of `upright`.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster, but never smaller than 1/`shrink`. The
    package simplejpeg does so in two thirds of Pillow's time, and gives the same pixels.
    """
    if channels != 3 or deep or isinstance(image, ArrayImage):
        return image_tensor(upright(image, channels, deep))
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


def is_deep(image: AnyImage) -> TypeGuard[Image]:
    """Whether pixels of an image of Pillow have 16 or 32 bits, from the header only."""
    return isinstance(image, Image) and image.mode.startswith("I")


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


def has_deep_pixels(image: AnyImage, channels: int) -> bool:
    """Whether 16 bits of an opened image are kept. Pillow's gray images of 16 bits have 8 bits as RGB."""
    return image.dtype == np.uint16 if isinstance(image, ArrayImage) else channels != 3 and is_deep(image)


def channels_fit(image: AnyImage, channels: int) -> bool:
    """Whether an opened image can be decoded to so many channels."""
    found = count_channels(image)
    if isinstance(image, Image):
        return channels in (1, 3, found)
    return found == channels or (found, channels) in ((1, 3), (3, 1))


def upright(image: AnyImage, channels: int = 3, deep: bool = False) -> AnyImage:
    """Return an image of so many channels, upright by EXIF: RGB of Pillow, or an `ArrayImage`, of 16 bits if `deep`.

    Gray is repeated to three channels, and three channels become gray by ITU-R 601, as in Pillow.

    Raises Pillow's errors, and ValueError for pixels that do not fit.
    """
    if isinstance(image, Image) and channels == 3 and not deep:
        return upright_rgb(image)
    if not channels_fit(image, channels):
        raise ValueError(f"it has {count_channels(image)} channels, and num_channels is {channels}")
    pixels = _pillow_pixels(image, channels) if isinstance(image, Image) else np.asarray(image)
    if (pixels.shape[2], channels) == (1, 3):
        pixels = pixels.repeat(3, 2)
    elif (pixels.shape[2], channels) == (3, 1):
        weighted = pixels.astype(np.int64) @ np.array([19595, 38470, 7471])
        pixels = ((weighted + 2**15) >> 16).astype(pixels.dtype)[..., None]
    if deep and pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * 257
    elif not deep and pixels.dtype == np.uint16:
        raise ValueError("it has 16 bits, and the first images that were looked at have 8: save all with 16 bits")
    if channels == 3 and not deep:
        return PIL.Image.fromarray(pixels)
    return open_array(pixels)


def _pillow_pixels(image: Image, channels: int) -> np.ndarray:
    """Return the pixels (H, W, C) of an image of Pillow, upright, with all channels and bits that it holds."""
    image.load()
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    with contextlib.suppress(Exception):  # broken metadata beside a good image
        PIL.ImageOps.exif_transpose(image, in_place=True)
    if is_deep(image):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= DEEP_RANGE:
            raise ValueError(f"its pixels exceed 0 to {DEEP_RANGE - 1}: rescale them to 16 bits")
        return pixels.astype(np.uint16)[..., None]
    if channels == 1:
        image = image.convert("L")
    elif channels == 3 or image.mode == "P":
        image = upright_rgb(image)
    return np.atleast_3d(np.asarray(image))
