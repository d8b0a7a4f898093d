"""Two-view augmentation of a batch, as in MoCo-v3, in batched torch on the device of the images.

The augmentation is that of Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021
(arXiv 2104.02057), who take it from BYOL (Grill et al., NeurIPS 2020, arXiv 2006.07733). The order is that of the
original code: crop, colour jitter, grayscale, blur, solarize, flip, normalise.

Draws are made on the CPU for the whole global batch, each from its own `generator(seed, purpose, step, micro_step,
view)`, and every process takes its rows. The host therefore knows which images an operation touches without asking the
device, and an operation is computed for these rows only. The parameters of all views are copied to the device at once.

Images are float (B, 3, S, S) in [0, 1] between the operations; `rows` are positions in the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..distributed.transfer import send
from ..utils.seeding import generator
from .crops import CROP_ATTEMPTS, crop_and_resize, crop_boxes, to_unit

CACHE_BYTES = 2**22
"""On a CPU, images are augmented in runs of this size, which stay in the cache between operations."""


@dataclass(frozen=True)
class ViewConfig:
    """How one view is drawn; the defaults are MoCo-v3's first view.

    `jitter`, `grayscale`, `blur`, `solarize` and `flip` are probabilities.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the box, as a fraction of the image's
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the box
    rotation: float = 0.0  # largest angle, degrees
    shear: float = 0.0  # largest horizontal shear, degrees
    jitter: float = 0.8
    brightness: float = 0.4  # strengths: factors from [1 - strength, 1 + strength]
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # largest shift, in turns of the colour circle
    grayscale: float = 0.2
    blur: float = 1.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of a 224 px view
    solarize: float = 0.0
    flip: float = 0.5
    size: int | None = None  # side of the view in pixels; None means the run's


_DIGIT = ViewConfig(
    crop_scale=(0.4, 1.0), rotation=15, shear=15, saturation=0, hue=0, grayscale=0, blur_sigma=(0.8, 8.0), flip=0
)

AUGMENTATIONS: dict[str, tuple[ViewConfig, ...]] = {
    "moco": (ViewConfig(), ViewConfig(blur=0.1, solarize=0.2)),
    "digits": (_DIGIT, _DIGIT),  # a mirrored digit has another meaning, or none, and there is no colour to jitter
}


# Operations on (B, C, S, S) in [0, 1]; parameters are (B,) or (B, 1, 1, 1)


def _gray(images: Tensor) -> Tensor:
    """(B, 1, S, S): ITU-R 601 luma, Pillow's mode L."""
    red, green, blue = images.unbind(1)
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Colour jitter after SimCLR (Chen et al., ICML 2020, arXiv 2002.05709, appendix A), as are the next three."""
    return (images * factor).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean gray or, where channels are no colours, each with its own mean."""
    mean = images.mean((2, 3), keepdim=True)
    return torch.lerp(_gray(mean) if images.shape[1] == 3 else mean, images, factor).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image."""
    return torch.lerp(_gray(images), images, factor).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns, and keep value and saturation of the HSV model (Smith, SIGGRAPH 1978).

    With the hue h in turns and the chroma c = max - min, red is `min + c * clip(|6 h - 3| - 1, 0, 1)`, green and blue
    are `min + c * clip(2 - |6 h - 2|, 0, 1)` and `min + c * clip(2 - |6 h - 4|, 0, 1)`. Masks are floats: on a CPU,
    torch's comparisons to booleans and its `where` take ten times as long as arithmetic.
    """
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = (value - least).mul_(6)
    scale = chroma.clamp(min=1e-12).reciprocal_()
    turns = (red - green).mul_(scale).add_(4 / 6)  # where blue is largest
    turns.lerp_((blue - red).mul_(scale).add_(2 / 6), (value - green).eq_(0))
    turns.lerp_((green - blue).mul_(scale), (value - red).eq_(0))
    turns.add_(shift[:, :, 0] + 1).frac_()
    turned = torch.empty_like(images)
    base = torch.add(least, chroma, alpha=-1 / 6)
    torch.addcmul(base, chroma, (turns - 3 / 6).abs_().clamp_(1 / 6, 2 / 6), out=turned[:, 0])
    base = least.add_(chroma, alpha=2 / 6)
    torch.addcmul(base, chroma, (turns - 2 / 6).abs_().clamp_(1 / 6, 2 / 6), value=-1, out=turned[:, 1])
    torch.addcmul(base, chroma, (turns - 4 / 6).abs_().clamp_(1 / 6, 2 / 6), value=-1, out=turned[:, 2])
    return turned.clamp_(0, 1)


def grayscale(images: Tensor) -> Tensor:
    """Gray in all three channels."""
    return _gray(images).repeat(1, 3, 1, 1)


def solarize(images: Tensor) -> Tensor:
    """Invert what is brighter than half (BYOL, arXiv 2006.07733, appendix B)."""
    return torch.minimum(images, 1 - images)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur (SimCLR, arXiv 2002.05709, appendix A) of each image by its own `sigma` (B,) pixels.

    The kernel ends at `radius` pixels, and edges are repeated. On a CPU, adding shifted copies is faster than a grouped
    convolution or a product with banded matrices, up to the 13 taps of a 224 px view.
    """
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, radius:, None, None, None]
    return blur_by(images, kernel)


def blur_by(images: Tensor, kernel: Tensor) -> Tensor:
    """Blur both ways by half a symmetric `kernel` (B, radius + 1, 1, 1, 1) from its centre, with edges repeated."""
    radius = kernel.shape[1] - 1
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded, length = F.pad(images, padding, mode="replicate"), images.shape[axis]
        images = padded.narrow(axis, radius, length) * kernel[:, 0]
        for distance in range(radius, 0, -1):  # both neighbours at a distance have the same weight
            before, behind = (padded.narrow(axis, radius + side * distance, length) for side in (-1, 1))
            images.addcmul_(before + behind, kernel[:, distance])
    return images


def rotate_and_shear(images: Tensor, angle: Tensor, shear: Tensor) -> Tensor:
    """Rotate and shear about the centre by `angle` and `shear` (B,) radians, bilinearly and with edges repeated."""
    cos, sin, slant = angle.cos(), angle.sin(), shear.tan()
    zero = torch.zeros_like(cos)
    matrix = torch.stack([cos, sin + cos * slant, zero, -sin, cos - sin * slant, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


# Views


class _Change(NamedTuple):
    """An operation on some rows, or on all if `rows` is None; its parameters have one entry for each of these rows."""

    operation: Callable[..., Tensor]
    rows: Tensor | None
    parameters: tuple[Tensor, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the changed images. This may write into `images`."""
        if self.rows is None:
            return self.operation(images, *self.parameters)
        return images.index_copy_(0, self.rows, self.operation(images.index_select(0, self.rows), *self.parameters))


def _select_change(chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> list[_Change]:
    """Apply `operation` to the `chosen` (B,) rows, or not at all if there are none. `parameters` are (B, ...)."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == len(chosen):
        return [_Change(operation, None, parameters)]
    return [_Change(operation, rows, tuple(parameter[rows] for parameter in parameters))] if len(rows) else []


def _jitter(config: ViewConfig, draws: Tensor, colours: bool) -> list[_Change]:
    """List the operations in an order drawn per image, from uniform `draws` (B, 9). Without `colours` hues stay."""
    chosen, order, factors = draws[:, 0] < config.jitter, draws[:, 1:5].argsort(1), 2 * draws[:, 5:] - 1
    operations = (brightness, contrast, saturation, hue)
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    changes: list[_Change] = []
    for position in range(4):
        for number, (operation, strength) in enumerate(zip(operations, strengths, strict=True)):
            if strength == 0 or (not colours and operation in (saturation, hue)):
                continue
            amount = factors[:, number] * strength + (0 if operation is hue else 1)
            rows = chosen & (order[:, position] == number)
            changes += _select_change(rows, operation, amount[:, None, None, None])
    return changes


def _list_changes(config: ViewConfig, draws: dict[str, Tensor], channels: int, size: int) -> list[_Change]:
    """List the operations between crop and normalisation, in order. `draws` hold the rows of these images."""
    changes: list[_Change] = []
    if config.rotation or config.shear:
        limits = torch.tensor([math.radians(config.rotation), math.radians(config.shear)])
        angle, shear = ((2 * draws["rotate"] - 1) * limits).unbind(1)
        changes += _select_change(torch.ones(len(angle), dtype=torch.bool), rotate_and_shear, angle, shear)
    changes += _jitter(config, draws["jitter"], colours=channels == 3)
    if channels == 3:
        changes += _select_change(draws["grayscale"][:, 0] < config.grayscale, grayscale)
    low, high = (sigma * size / 224 for sigma in config.blur_sigma)
    sigma, radius = low + (high - low) * draws["blur"][:, 1], math.ceil(3 * high)
    changes += _select_change(draws["blur"][:, 0] < config.blur, partial(gaussian_blur, radius=radius), sigma)
    return changes + _select_change(draws["solarize"][:, 0] < config.solarize, solarize)


def view_boxes(
    config: ViewConfig,
    heights: Tensor,
    widths: Tensor,
    seed: int,
    step: int,
    micro_step: int,
    view: int,
    rows: slice,
    global_batch: int,
) -> Tensor:
    """Draw (B, 4) boxes for one view of images of these sizes (B,); mirrored views have left and right swapped."""
    uniform = torch.rand(global_batch, CROP_ATTEMPTS, 4, generator=generator(seed, "crop", step, micro_step, view))
    mirrored = torch.rand(global_batch, generator=generator(seed, "flip", step, micro_step, view)) < config.flip
    boxes = crop_boxes(heights, widths, config.crop_scale, config.crop_ratio, uniform[rows])
    return torch.where(mirrored[rows, None], boxes[:, [2, 1, 0, 3]], boxes)


_DRAWS = {"rotate": 2, "jitter": 9, "grayscale": 1, "blur": 2, "solarize": 1}


def make_views(
    batch: dict,
    configs: Sequence[ViewConfig],
    size: int,
    seed: int,
    step: int,
    micro_step: int = 0,
    rows: slice | None = None,
    global_batch: int | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    render: "Renderer | None" = None,
) -> list[Tensor]:
    """Make one normalised float (B, C, S, S) per config on the device of the batch. S is the config's size or `size`.

    `batch` holds "images", (B, C, H, W) of uint8 or uint16, which are cropped here, or "crops", a list of (B, C, S, S)
    that a loader has cut with the same draws, which are resized where they are larger than the view. Gray images, of
    one channel, are augmented once and then repeated to the channels of `mean`. Only 3 channels are colours, with hue,
    saturation and a gray version. "stored" (`cache.StoredSizes`), if given, says where in "images"
    the images lie.
    `rows` are this process's among the `global_batch` rows of the micro-batch (default: the batch is the whole).
    The result is a pure function of the arguments. `render` makes the views of what was drawn (default: operation by
    operation); a `FusedViews` does so in fewer passes.
    """
    count = len(batch["images"]) if "images" in batch else len(batch["crops"][0])
    rows, global_batch = rows or slice(0, count), global_batch or count
    views: list[DrawnView] = []
    for view, config in enumerate(configs):
        draws = {
            name: torch.rand(global_batch, width, generator=generator(seed, name, step, micro_step, view))[rows]
            for name, width in _DRAWS.items()
        }
        if "images" in batch:
            source, stored = batch["images"], batch.get("stored")
            own = torch.tensor(source.shape[-2:]).expand(count, 2) if stored is None else stored.own
            heights, widths = own.unbind(1)
            boxes = view_boxes(config, heights, widths, seed, step, micro_step, view, rows, global_batch)
            draws |= {"boxes": boxes} if stored is None else {"boxes": stored.place(boxes), "turned": stored.turned}
        else:
            source = batch["crops"][view]
            if source.shape[-1] != (config.size or size):
                draws["boxes"] = torch.tensor([[0.0, 0.0, *source.shape[:-3:-1]]]).expand(count, 4)
        views.append(DrawnView(source, config, config.size or size, draws))
    return (render or render_by_operation)(views, mean, std)


class DrawnView(NamedTuple):
    """A view before it is made: its images (B, C, H, W), and what each of them drew, (B, ...) by name.

    Without "boxes" among the draws the images are the crops. "turned", beside boxes, is explained at `crop_and_resize`.
    """

    source: Tensor
    config: ViewConfig
    size: int
    draws: dict[str, Tensor]


Renderer = Callable[[Sequence[DrawnView], Sequence[float], Sequence[float]], list[Tensor]]
"""Makes drawn views, with a mean and a deviation of each channel."""


def render_by_operation(views: Sequence[DrawnView], mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
    """Apply each operation to the images that drew it: float32 (B, C, S, S) for each view, C channels as in `mean`."""
    shapes = [(len(view.source), len(mean), view.size, view.size) for view in views]
    made = [torch.empty(shape, device=view.source.device) for shape, view in zip(shapes, views, strict=True)]
    _render_runs([run for pair in zip(views, made, strict=True) for run in _split_into_runs(*pair)], mean, std)
    return made


class _Run(NamedTuple):
    """Consecutive images of a view, for which `boxes`, if given, are cut out of `source` (B, C, H, W)."""

    source: Tensor
    boxes: tuple[Tensor, Tensor | None] | None  # with what is turned
    changes: list[_Change]
    output: Tensor  # (B, C, S, S), a part of the view


def _split_into_runs(drawn: DrawnView, view: Tensor) -> list[_Run]:
    """Split what is to be written into `view` into runs; a GPU gets one run."""
    source, config, size, draws = drawn
    count, channels = source.shape[:2]
    length = max(16, CACHE_BYTES // (4 * channels * size**2)) if source.device.type == "cpu" else count
    runs = []
    for part in (slice(start, start + length) for start in range(0, count, length)):
        mine = {name: values[part] for name, values in draws.items()}
        changes = _list_changes(config, mine, channels, size)
        boxes = (mine["boxes"], mine.get("turned")) if "boxes" in mine else None
        runs.append(_Run(source[part], boxes, changes, view[part]))
    return runs


def _render_runs(runs: list[_Run], mean: Sequence[float], std: Sequence[float]) -> None:
    """Write the outputs of these runs, on the device of their source."""
    device = runs[0].source.device
    scale = (torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1))
    leaves, structure = tree_flatten((*scale, [(run.boxes, run.changes) for run in runs]))
    sent = iter(send([leaf for leaf in leaves if isinstance(leaf, Tensor)], device))
    there = [next(sent) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    mean_there, std_there, parts = tree_unflatten(there, structure)
    for run, (boxes, changes) in zip(runs, parts, strict=True):
        size = run.output.shape[-1]
        images = to_unit(run.source) if boxes is None else crop_and_resize(run.source, boxes[0], size, boxes[1])
        for change in changes:
            images = change(images)
        torch.sub(images, mean_there, out=run.output).div_(std_there)
