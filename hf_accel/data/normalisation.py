"""The mean and the deviation of the channels of a dataset, from a fixed sample of its images."""

import contextlib
from collections.abc import Sequence

import torch

from .decoding import upright_size
from .sources import IMAGENET_MEAN, IMAGENET_STD, CorruptImage, ImageSource

MEASURED, SIDE = 128, 256
"""Images that are measured, and the short side in pixels to which JPEG files may be decoded for it."""

NEAR_MEAN, NEAR_STD = 0.1, 1.5
"""Images are like those of ImageNet if each channel's mean differs by less, and its deviation by a smaller factor."""


def measure_normalisation(source: ImageSource) -> tuple[list[float], list[float]]:
    """Return mean and deviation of each channel of pixels in [0, 1], the same on all processes, rounded to 1e-4.

    The images are spread over the dataset, and each counts the same. A channel that never varies gets the deviation 1.

    Raises:
        ValueError: none of the images can be read.
    """
    means, squares = [], []
    for index in source.sample(MEASURED):
        with contextlib.suppress(CorruptImage):
            image = source.open(index)
            pixels = source.decode_pixels(index, image, min(upright_size(image)) / SIDE)
            values = pixels.flatten(1).float() / torch.iinfo(pixels.dtype).max
            mean = values.mean(1).double()
            means.append(mean)
            squares.append(values.var(1, correction=0).double() + mean**2)
    if not means:
        raise ValueError(f"{source.title}: none of the images that were looked at can be read")
    mean = torch.stack(means).mean(0)
    std = (torch.stack(squares).mean(0) - mean**2).clamp(min=0).sqrt()
    deviations = [round(value, 4) or 1.0 for value in std.tolist()]
    return [round(value, 4) for value in mean.tolist()], deviations


def is_like_imagenet(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether mean and deviation of RGB images are near those of ImageNet."""
    near = [abs(m - known) < NEAR_MEAN for m, known in zip(mean, IMAGENET_MEAN, strict=True)]
    return all(near) and all(1 / NEAR_STD < s / known < NEAR_STD for s, known in zip(std, IMAGENET_STD, strict=True))
