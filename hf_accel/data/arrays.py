"""Images that Pillow has no mode for: arrays of 1 to 16 channels with 8 or 16 bits, from NumPy's or TIFF files."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
from PIL.Image import Image

MOST_CHANNELS = 16
NUMPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277
"""Tags of TIFF."""


class NeedsTifffile(Exception):
    """A TIFF file needs the package tifffile, which is not installed."""


class ArrayImage:
    """An image in the place of one of Pillow's. Its pixels are read when `np.asarray` asks for them.

    Args:
        shape: (height, width, channels).
        dtype: uint8 or uint16.
        read: returns the pixels in this shape, or without the axis of a single channel.
        content: the bytes of the file, if there is one.

    Raises:
        ValueError: pixels of another type, or more than 16 channels.
    """

    format = None

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray], content: bytes = b""):
        self.height, self.width, self.channels = shape
        self.dtype, self._read, self.fp = np.dtype(dtype).newbyteorder("="), read, io.BytesIO(content)
        self.info: dict[str, Any] = {}
        if self.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"its pixels are {self.dtype}: rescale them to the whole range of 8 or 16 bits, and save them as "
                "uint8 or uint16"
            )
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise ValueError(f"it has {self.channels} channels, and at most {MOST_CHANNELS} are possible")

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        pixels = self._read().reshape(self.height, self.width, self.channels)
        return pixels.astype(dtype or self.dtype, copy=bool(copy))


AnyImage = Image | ArrayImage


def open_array(array: np.ndarray, content: bytes = b"") -> ArrayImage:
    """Take an array (H, W) or (H, W, C) for an image. Raises ValueError for another shape or type."""
    if array.ndim not in (2, 3):
        raise ValueError(f"an array of the shape {array.shape} is no image: it must be (H, W) or (H, W, C)")
    if array.ndim == 3 and array.shape[2] > MOST_CHANNELS >= array.shape[0]:
        raise ValueError(
            f"an array of the shape {array.shape} has its channels first: save numpy.moveaxis(array, 0, -1), which is "
            "(H, W, C)"
        )
    height, width, channels = (*array.shape, 1)[:3]
    return ArrayImage((height, width, channels), array.dtype, lambda: array, content)


def open_image(content: bytes, channels: int = 3) -> AnyImage:
    """Open the content of an image file, of which only the header is read, to decode it to so many channels.

    Raises:
        NeedsTifffile: a TIFF file of which Pillow would lose channels or bits, or that it cannot open.
    """
    if content.startswith(NUMPY_MAGIC):
        return open_array(np.load(io.BytesIO(content), allow_pickle=False), content)
    try:
        image = PIL.Image.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError:
        if content.startswith(TIFF_MAGIC):
            return _open_tiff(content)
        raise
    return image if channels == 3 or _is_whole(image) else _open_tiff(content)


def _is_whole(image: Image) -> bool:
    """Whether Pillow keeps all channels and bits. Of 16 bits it keeps those of gray images, and it drops channels."""
    tags = getattr(image, "tag_v2", {})
    samples, bits = tags.get(SAMPLES_PER_PIXEL, 1), max(tags.get(BITS_PER_SAMPLE, (1,)))
    return samples == 1 or (bits <= 8 and samples == len(image.getbands()))


def _open_tiff(content: bytes) -> ArrayImage:
    """Open the first page of a TIFF file by tifffile."""
    try:
        import tifffile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise NeedsTifffile(
            "a TIFF file of these channels or bits is read by the package tifffile: pip install tifffile"
        ) from None
    page: Any = tifffile.TiffFile(io.BytesIO(content)).pages[0]
    order = [page.axes.index(axis) for axis in "YXS" if axis in page.axes]
    if len(order) != len(page.axes):
        raise ValueError(f"the axes of its first page are {page.axes}: save one image (H, W, C) a page")
    shape = [page.shape[axis] for axis in order] + [1] * (3 - len(order))
    return ArrayImage(tuple(shape), page.dtype, lambda: page.asarray().transpose(order), content)


def count_channels(image: AnyImage) -> int:
    """Count the channels of an opened image: 3 where a palette stands for colours."""
    if isinstance(image, ArrayImage):
        return image.channels
    return 3 if image.mode in ("P", "PA") else len(image.getbands())


def channels_and_bits(path: str) -> tuple[int, int]:
    """Return the number of channels of an image file, and 8, 16 or 32 bits of each, from its header.

    Raises:
        NeedsTifffile: a TIFF file of channels or bits that Pillow does not have.
        ValueError, OSError: no image, or one that cannot be read.
    """
    with open(path, "rb") as file:
        image = open_image(file.read(), channels=0)
    if isinstance(image, ArrayImage):
        return image.channels, 8 * image.dtype.itemsize
    bits = 16 if image.mode.startswith("I;16") else 32 if image.mode in ("I", "F") else 8
    return count_channels(image), bits
