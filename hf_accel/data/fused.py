"""The views of a batch in a few passes over memory, for `torch.compile` to fuse.

`augment.py` applies each operation to the rows that drew it, which takes hundreds of passes over parts of the batch.
Here all images go through one chain of formulas, and what an image did not draw has parameters that change nothing.

Colour jitter comes in an order of its own for each image, so the chain offers a place for every order. Contrast needs
the mean of what precedes it and cuts the chain into two halves. A half holds two slots, the hue, and two more slots.
Brightness and saturation each take one slot, `clip(gain * x + gray_gain * gray(x))`.
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.transfer import send
from .augment import CACHE_BYTES, DrawnView, ViewConfig, blur_by, rotate_and_shear
from .crops import LARGEST_PRODUCT, crop_and_resize, crop_one_by_one

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Columns of the draws of colour jitter."""

GRAPHS = 256
"""Graphs that the chain may have in one process, one for each size and number of images."""

LEAST_RUN = 16
"""On a CPU, images of one run, also of those whose views are so large that they do not fit into the cache."""

IN_RUNS = True
"""On a CPU, views are made in runs of images, by stages that write into tensors that all runs share."""

FRESH_BYTES = 2**22
"""On a CPU, the memory of larger views is new to the process each time, and is asked for in huge pages."""

CONTRACT: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
"""A CPU multiplies and adds by one instruction."""

INDUCTOR = CONTRACT | dict.fromkeys(("realize_reads_threshold", "realize_acc_reads_threshold"), 100)
INDUCTOR["realize_opcount_threshold"] = 1000
"""Otherwise inductor writes half of a blur's sum to memory, and reads it again for the other half."""


def chain_parameters(config: ViewConfig, draws: dict[str, Tensor], channels: int, size: int) -> dict[str, Tensor]:
    """Turn the draws of B images into what the chain takes for a view of `size` pixels: float32 (B, ...) each."""
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


Stage = Callable[..., Tensor]
Planes = tuple[Tensor, ...]
"""The channels of images, (B, S, S) each."""


# The chain: three stages, each of which torch.compile makes one pass, or two where a mean or a product is in between.
# Each writes its result into `out`, if given.


def mix_colours(images: Tensor, parameters: dict[str, Tensor], size: int, out: Tensor | None = None) -> Tensor:
    """Crop `images` (B, C, H, W) if "boxes" are given, and change their colours: float (B, C, size, size)."""
    if "boxes" in parameters:
        images = crop_and_resize(images, parameters["boxes"], size)
    elif not images.is_floating_point():
        images = images.float() * (1 / torch.iinfo(images.dtype).max)
    if "angles" in parameters:
        images = rotate_and_shear(images, *parameters["angles"].unbind(1))
    planes = _half(images.unbind(1), parameters, 0)
    contrast = parameters["contrast"]
    averages = [plane.mean((1, 2), keepdim=True) for plane in ([_gray(planes)] if len(planes) == 3 else planes)]
    averages = averages * (len(planes) // len(averages))
    planes = tuple(
        _clip(average + contrast * (plane - average)) for plane, average in zip(planes, averages, strict=True)
    )
    planes = _half(planes, parameters, 1)
    if len(planes) == 3:
        gray = _gray(planes)
        planes = tuple(plane + parameters["gray"] * (gray - plane) for plane in planes)
    return _write(torch.stack(planes, 1), out)


def _write(images: Tensor, out: Tensor | None) -> Tensor:
    return images if out is None else out.copy_(images)


def repeat_edges(axis: int, images: Tensor, radius: int) -> Tensor:
    """Add `radius` copies of the first and the last row (axis 2) or column (axis 3)."""
    return F.pad(images, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), mode="replicate")


def blur_along(axis: int, images: Tensor, kernel: Tensor, out: Tensor | None = None) -> Tensor:
    """Blur by half a symmetric `kernel` (B, radius + 1, 1, 1, 1) from its centre, edges repeated.

    The images are square, or longer along the axis by edges that have been repeated already.
    """
    radius, length = kernel.shape[1] - 1, images.shape[5 - axis]
    padded = images if images.shape[axis] > length else repeat_edges(axis, images, radius)
    images = padded.narrow(axis, radius, length) * kernel[:, 0]
    for tap in range(1, radius + 1):
        pair = padded.narrow(axis, radius - tap, length) + padded.narrow(axis, radius + tap, length)
        images = images + pair * kernel[:, tap]
    return _write(images, out)


def finish(
    images: Tensor,
    parameters: dict[str, Tensor],
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    blur: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Blur along the last axis, solarize, and normalise by (C, 1, 1) `mean` and `std`: `dtype` (B, C, S, S)."""
    if blur:
        images = blur_along(3, images, parameters["kernel"])
    if "solarize" in parameters:
        images = images + parameters["solarize"] * (torch.minimum(images, 1 - images) - images)
    return _write(((images - mean) / std).to(dtype), out)


def _half(planes: Planes, parameters: dict[str, Tensor], half: int) -> Planes:
    """Brightness of one half, and saturation and hue of colours."""
    gains, gray_gains = parameters["gains"][:, half], parameters["gray_gains"][:, half]
    for behind in range(2):
        for slot in range(2):
            added = gray_gains[:, behind, slot] * _gray(planes) if len(planes) == 3 else 0
            planes = tuple(_clip(gains[:, behind, slot] * plane + added) for plane in planes)
        if not behind and len(planes) == 3:
            planes = _turn_hue(planes, parameters["turns"][:, half])
    return planes


def _turn_hue(planes: Planes, turns: Tensor) -> Planes:
    """As `augment.hue`, where the formulas are explained; `turns` (B, 1, 1)."""
    red, green, blue = planes
    value, least = torch.maximum(red, torch.maximum(green, blue)), torch.minimum(red, torch.minimum(green, blue))
    chroma = 6 * (value - least)
    scale = 1 / (chroma + 1e-12)
    hue = torch.where(value == green, (blue - red) * scale + 2 / 6, (red - green) * scale + 4 / 6)
    hue = torch.where(value == red, (green - blue) * scale, hue) + (turns + 1)
    hue = hue - hue.floor()

    def distance(centre: float) -> Tensor:
        """(B, S, S): from `hue` to `centre`, clipped to a sixth and a third of a turn, less a sixth."""
        return 1 / 6 - F.relu(1 / 6 - F.relu((hue - centre).abs() - 1 / 6))

    return least + chroma * distance(3 / 6), value - chroma * distance(2 / 6), value - chroma * distance(4 / 6)


def _gray(planes: Planes) -> Tensor:
    """(B, S, S): ITU-R 601 luma of RGB."""
    red, green, blue = planes
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _clip(plane: Tensor) -> Tensor:
    """Clip to [0, 1]. By inductor, `clamp` takes twice as many instructions, since it passes NaN on."""
    return 1 - F.relu(1 - F.relu(plane))


class FusedViews:
    """Makes the views that `make_views` has drawn: the renderer for a GPU, and for large views on a CPU.

    Graphs are compiled for each size and number of images, when they first come. An accelerator takes the whole batch
    at once. A CPU takes runs of images that fit into its cache, crops them outside of the graphs, and where only some
    of them are blurred, blurs these.

    Args:
        dtype: of the views. A model under autocast reads its own dtype at half the memory traffic.
        backend: of `torch.compile`; None runs the chain without a compiler.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, backend: str | None = "inductor"):
        self.dtype = dtype
        options = INDUCTOR if backend == "inductor" else None

        def compiled(stage: Stage, options: dict[str, Any] | None = None) -> Stage:
            if backend is None:
                return stage
            return torch.compile(stage, dynamic=False, fullgraph=True, backend=backend, options=options)

        self.mix_colours = compiled(mix_colours, CONTRACT if backend == "inductor" else None)
        self.blur_down = compiled(partial(blur_along, 2), options)
        self.finish = compiled(finish, options)

    def __call__(self, views: Sequence[DrawnView], mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
        device = views[0].source.device
        told: list[Tensor] = [torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)]
        names: list[list[str]] = []
        for view in views:
            parameters = chain_parameters(view.config, view.draws, view.source.shape[1], view.size)
            parameters |= {name: view.draws[name] for name in ("boxes", "turned") if name in view.draws}
            names.append(list(parameters))
            told += parameters.values()
        arrived = iter(send(told, device))
        normalisation = next(arrived), next(arrived)
        parts = [{name: next(arrived) for name in each} for each in names]
        # Views of many sizes have many graphs, each of which is wanted.
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
            return [self._render(*part, *normalisation) for part in zip(views, parts, strict=True)]

    def _render(self, view: DrawnView, parameters: dict[str, Tensor], mean: Tensor, std: Tensor) -> Tensor:
        if IN_RUNS and view.source.device.type == "cpu":
            return self._render_in_runs(view, parameters, mean, std)
        images = view.source
        if "turned" in parameters:
            images = crop_and_resize(images, parameters.pop("boxes"), view.size, parameters.pop("turned"))
        images = self.mix_colours(images, parameters, view.size)
        if "kernel" in parameters:
            images = self.blur_down(images, parameters["kernel"])
        return self.finish(images, parameters, mean, std, self.dtype, "kernel" in parameters)

    def _render_in_runs(self, view: DrawnView, parameters: dict[str, Tensor], mean: Tensor, std: Tensor) -> Tensor:
        source, size, channels = view.source, view.size, view.source.shape[1]
        length = run_length(len(source), 4 * channels * size**2)
        some_blurred = 0 < view.config.blur < 1
        blur = "kernel" in parameters and not some_blurred
        edge = parameters["kernel"].shape[1] - 1 if blur else 0
        high = torch.empty(length, channels, size + 2 * edge, size)
        wide = high if not blur else torch.empty(length, channels, size, size + 2 * edge)
        mixed, output = high.narrow(2, edge, size), empty_views(len(source), len(mean), size, self.dtype)
        for start in range(0, len(source), length):
            part = slice(start, start + length)
            images, mine = source[part], {name: values[part] for name, values in parameters.items()}
            # Stored images come in many shapes, of which each would have a graph of its own.
            one_by_one = size > LARGEST_PRODUCT
            if "turned" in mine or (one_by_one and "boxes" in mine):
                crop = crop_one_by_one if one_by_one else crop_and_resize
                images = crop(images, mine.pop("boxes"), size, mine.pop("turned", None))
            self.mix_colours(images, mine, size, mixed)
            if blur:
                fill_edges(2, high, edge)
                self.blur_down(high, mine["kernel"], wide.narrow(3, edge, size))
                fill_edges(3, wide, edge)
            elif some_blurred:
                for row in (view.draws["blur"][part, 0] < view.config.blur).nonzero()[:, 0].tolist():
                    mixed[row] = blur_by(mixed[row : row + 1], mine["kernel"][row : row + 1])[0]
            self.finish(wide, mine, mean, std, self.dtype, blur, output[part])
        return output


def empty_views(count: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
    """(count, channels, size, size) in memory of the CPU, without values.

    Writing to large tensors that are new to a process takes longer by the page faults than by the writing: Linux gives
    memory in pages of 4 kB unless larger ones are asked for.
    """
    shape = (count, channels, size, size)
    needed = math.prod(shape) * dtype.itemsize
    if needed < FRESH_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def fill_edges(axis: int, images: Tensor, edge: int) -> None:
    """Fill the first and the last `edge` rows (axis 2) or columns (axis 3) with their nearest neighbours."""
    length = images.shape[axis]
    for start, nearest in ((0, edge), (length - edge, length - edge - 1)):
        images.narrow(axis, start, edge).copy_(images.narrow(axis, nearest, 1))


def run_length(count: int, image_bytes: int) -> int:
    """Images of one run on a CPU: a run fits into the cache, and all are equal, so that one graph serves them."""
    most = max(LEAST_RUN, CACHE_BYTES // image_bytes)
    length = next(length for length in range(min(most, count), 0, -1) if count % length == 0)
    return length if length >= most // 4 else count
