"""The views of a batch in a few passes over memory, for `torch.compile` to fuse.

`augment.py` applies each operation to the rows that drew it, which takes hundreds of passes over parts of the batch.
Here all images go through one chain of formulas, and what an image did not draw has parameters that change nothing.

Colour jitter comes in an order of its own for each image, so the chain offers a place for every order. Contrast needs
the mean of what precedes it and cuts the chain into two halves. A half holds two slots, the hue, and two more slots.
Brightness and saturation each take one slot, `clip(gain * x + gray_gain * gray(x))`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.transfer import send
from .augment import CACHE_BYTES, DrawnView, ViewConfig, crop_and_resize, rotate_and_shear

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Columns of the draws of colour jitter."""

GRAPHS = 256
"""Graphs that the chain may have in one process, one for each size and number of images."""


def chain_parameters(config: ViewConfig, draws: dict[str, Tensor], channels: int, size: int) -> dict[str, Tensor]:
    """Turn the draws of B images into what `run_chain` takes for a view of `size` pixels: float32 (B, ...) each."""
    count = len(draws["jitter"])
    parameters = _jitter_parameters(config, draws["jitter"], channels)
    if config.rotation or config.shear:
        limits = torch.tensor([math.radians(config.rotation), math.radians(config.shear)])
        parameters["angles"] = (2 * draws["rotate"] - 1) * limits
    gray = draws["grayscale"][:, 0] < (config.grayscale if channels == 3 else 0)
    parameters["gray"] = gray.float().view(count, 1, 1)
    if config.blur:
        low, high = (sigma * size / 224 for sigma in config.blur_sigma)
        taps = torch.arange(math.ceil(3 * high) + 1)
        kernel = torch.exp(-0.5 * (taps / (low + (high - low) * draws["blur"][:, 1:])) ** 2)
        kernel = kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1])
        kernel = torch.where(draws["blur"][:, :1] < config.blur, kernel, (taps == 0).float())
        parameters["kernel"] = kernel.view(count, -1, 1, 1, 1)
    if config.solarize:
        parameters["solarize"] = (draws["solarize"] < config.solarize).float().view(count, 1, 1, 1)
    return parameters


def _jitter_parameters(config: ViewConfig, draws: Tensor, channels: int) -> dict[str, Tensor]:
    """Place the operations of each image in its halves and slots. Images that are not RGB keep saturation and hue."""
    count, rows = len(draws), torch.arange(len(draws))
    colour = float(channels == 3)
    strengths = torch.tensor([config.brightness, config.contrast, config.saturation * colour, config.hue * colour])
    amounts = (draws[:, :1] < config.jitter) * (2 * draws[:, 5:] - 1) * strengths
    place = draws[:, 1:5].argsort(1).argsort(1)
    half, behind = (place > place[:, [CONTRAST]]).long(), (place > place[:, [HUE]]).long()
    gains, gray_gains, turns = torch.ones(count, 2, 2, 2), torch.zeros(count, 2, 2, 2), torch.zeros(count, 2)
    for operation, other in ((BRIGHTNESS, SATURATION), (SATURATION, BRIGHTNESS)):
        together = (half[:, operation] == half[:, other]) & (behind[:, operation] == behind[:, other])
        slot = (together & (place[:, operation] > place[:, other])).long()
        where = (rows, half[:, operation], behind[:, operation], slot)
        gains[where] = 1 + amounts[:, operation]
        if operation == SATURATION:
            gray_gains[where] = -amounts[:, operation]
    turns[rows, half[:, HUE]] = amounts[:, HUE]
    contrast = (1 + amounts[:, CONTRAST]).view(count, 1, 1)
    return {
        "gains": gains.view(count, 2, 2, 2, 1, 1),
        "gray_gains": gray_gains.view(count, 2, 2, 2, 1, 1),
        "turns": turns.view(count, 2, 1, 1),
        "contrast": contrast,
    }


Planes = tuple[Tensor, ...]
"""The channels of images, (B, S, S) each."""


def run_chain(images: Tensor, parameters: dict[str, Tensor], mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Augment and normalise cropped images, uint8 or float in [0, 1] (B, C, S, S): `dtype` (B, 3, S, S).

    `mean` and `std` are (3, 1, 1). One or three channels; one is repeated.
    """
    if not images.is_floating_point():
        images = images / 255
    if "angles" in parameters:
        images = rotate_and_shear(images, *parameters["angles"].unbind(1))
    planes = _half(images.unbind(1), parameters, 0)
    average, contrast = _gray(planes).mean((1, 2), keepdim=True), parameters["contrast"]
    planes = tuple(_clip(average + contrast * (plane - average)) for plane in planes)
    planes = _half(planes, parameters, 1)
    gray = _gray(planes)
    images = torch.stack([plane + parameters["gray"] * (gray - plane) for plane in planes], 1)
    if "kernel" in parameters:
        images = _blur(images, parameters["kernel"])
    if "solarize" in parameters:
        images = images + parameters["solarize"] * (torch.minimum(images, 1 - images) - images)
    return ((images - mean) / std).to(dtype)


def _half(planes: Planes, parameters: dict[str, Tensor], half: int) -> Planes:
    """Brightness, saturation and hue of one half."""
    gains, gray_gains = parameters["gains"][:, half], parameters["gray_gains"][:, half]
    for behind in range(2):
        for slot in range(2):
            added = gray_gains[:, behind, slot] * _gray(planes)
            planes = tuple(_clip(gains[:, behind, slot] * plane + added) for plane in planes)
        if not behind and len(planes) == 3:
            planes = _turn_hue(planes, parameters["turns"][:, half])
    return planes


def _turn_hue(planes: Planes, turns: Tensor) -> Planes:
    """As `augment.hue`, where the formulas are explained; `turns` (B, 1, 1)."""
    red, green, blue = planes
    value, least = torch.maximum(red, torch.maximum(green, blue)), torch.minimum(red, torch.minimum(green, blue))
    chroma = 6 * (value - least)
    scale = 1 / chroma.clamp(min=1e-12)
    hue = torch.where(value == green, (blue - red) * scale + 2 / 6, (red - green) * scale + 4 / 6)
    hue = torch.where(value == red, (green - blue) * scale, hue) + turns + 1
    hue = hue - hue.floor()
    low, high = least - chroma / 6, least + chroma / 3
    return (
        _clip(low + chroma * (hue - 3 / 6).abs().clamp(1 / 6, 2 / 6)),
        _clip(high - chroma * (hue - 2 / 6).abs().clamp(1 / 6, 2 / 6)),
        _clip(high - chroma * (hue - 4 / 6).abs().clamp(1 / 6, 2 / 6)),
    )


def _blur(images: Tensor, kernel: Tensor) -> Tensor:
    """Blur along both axes by half a symmetric `kernel` (B, radius + 1, 1, 1, 1) from its centre, edges repeated."""
    radius = kernel.shape[1] - 1
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded, length = F.pad(images, padding, mode="replicate"), images.shape[axis]
        images = padded.narrow(axis, radius, length) * kernel[:, 0]
        for tap in range(1, radius + 1):
            pair = padded.narrow(axis, radius - tap, length) + padded.narrow(axis, radius + tap, length)
            images = images + pair * kernel[:, tap]
    return images


def _gray(planes: Planes) -> Tensor:
    """(B, S, S): ITU-R 601 luma of RGB."""
    if len(planes) == 1:
        return planes[0]
    red, green, blue = planes
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _clip(plane: Tensor) -> Tensor:
    return plane.clamp(0, 1)


class FusedViews:
    """Makes the views that `make_views` has drawn: the renderer for a GPU, and for large views on a CPU.

    One graph is compiled for each size and number of images, when they first come.

    Args:
        dtype: of the views. A model under autocast reads its own dtype at half the memory traffic.
        compiled: False runs the chain without a compiler, which is slow and for tests.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, compiled: bool = True):
        self.dtype = dtype
        self.chain = torch.compile(run_chain, dynamic=False, fullgraph=True) if compiled else run_chain

    def __call__(self, views: Sequence[DrawnView], mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
        device = views[0].source.device
        told: list[Tensor] = [torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)]
        names: list[list[str]] = []
        for view in views:
            parameters = chain_parameters(view.config, view.draws, view.source.shape[1], view.size)
            parameters |= {"boxes": view.draws["boxes"]} if "boxes" in view.draws else {}
            names.append(list(parameters))
            told += parameters.values()
        arrived = iter(send(told, device))
        mean_there, std_there = next(arrived), next(arrived)
        parts = [{name: next(arrived) for name in each} for each in names]
        return [self._render(*part, mean_there, std_there) for part in zip(views, parts, strict=True)]

    def _render(self, view: DrawnView, parameters: dict[str, Tensor], mean: Tensor, std: Tensor) -> Tensor:
        source, boxes = view.source, parameters.pop("boxes", None)
        output = torch.empty(len(source), 3, view.size, view.size, dtype=self.dtype, device=source.device)
        length = (
            run_length(len(source), 4 * source.shape[1] * view.size**2) if output.device.type == "cpu" else len(source)
        )
        for start in range(0, len(source), length):
            part = slice(start, start + length)
            images = source[part] if boxes is None else crop_and_resize(source[part], boxes[part], view.size)
            mine = {name: values[part] for name, values in parameters.items()}
            # A chain of many sizes has many graphs, each of which is wanted.
            with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
                output[part] = self.chain(images, mine, mean, std, self.dtype)
        return output


def run_length(count: int, image_bytes: int) -> int:
    """Images of one run on a CPU: a run fits into the cache, and all are equal, so that one graph serves them."""
    most = max(16, CACHE_BYTES // image_bytes)
    length = next(length for length in range(min(most, count), 0, -1) if count % length == 0)
    return length if length >= most // 4 else count
