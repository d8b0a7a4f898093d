"""Images of any channels and bits as pictures to look at."""

import numpy as np
import PIL.Image
from PIL.Image import Image

from .arrays import AnyImage


def show_channels(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, C) in [0, 1] as RGB (H, W, 3).

    One channel is gray, and of more than three the first three are shown. Other channels than RGB are stretched between
    their 1st and 99th percentile, as images of 16 bits often use a part of their range.
    """
    if image.shape[2] == 3:
        return image
    shown = image[..., :3]
    low, high = np.percentile(shown, [1, 99], axis=(0, 1))
    shown = ((shown - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    if shown.shape[2] == 1:
        return shown.repeat(3, 2)
    return np.pad(shown, ((0, 0), (0, 0), (0, 3 - shown.shape[2])))


def to_picture(image: AnyImage) -> Image:
    """Return a decoded image as one of Pillow, in RGB."""
    if isinstance(image, Image):
        return image
    pixels = np.asarray(image)
    shown = show_channels(pixels / np.iinfo(pixels.dtype).max)
    return PIL.Image.fromarray((255 * shown).round().astype(np.uint8))
