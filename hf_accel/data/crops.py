"""Random crops of a batch, and their resizing: on the device of the images, or image by image on a CPU."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_ATTEMPTS = 10
"""Boxes to draw per image before a centre crop is taken instead, as in torchvision's RandomResizedCrop."""

LARGEST_PRODUCT = 48
"""On a CPU, crops of more pixels are resized one by one; for smaller ones matrix products are faster."""


def crop_boxes(
    heights: Tensor, widths: Tensor, scale: tuple[float, float], ratio: tuple[float, float], draws: Tensor
) -> Tensor:
    """Random crops after Inception (Szegedy et al., CVPR 2015, arXiv 1409.4842), with torchvision's rejection rule.

    `heights`, `widths`: (B,) pixels; `draws`: (B, attempts, 4) uniform in [0, 1) for area, aspect ratio, top, left.
    Returns (B, 4) float boxes `left, top, right, bottom` on whole pixels: the first attempt that fits into its image,
    or otherwise the largest central box with an allowed ratio.
    """
    draws, heights, widths = draws.double(), heights.double()[:, None], widths.double()[:, None]
    area = heights * widths * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    log_ratio = math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draws[..., 1]
    box_width = (area * log_ratio.exp()).sqrt().round()
    box_height = (area / log_ratio.exp()).sqrt().round()
    fits = (box_width >= 1) & (box_width <= widths) & (box_height >= 1) & (box_height <= heights)
    top = (draws[..., 2] * (heights - box_height + 1)).floor()
    left = (draws[..., 3] * (widths - box_width + 1)).floor()
    attempts = torch.stack([left, top, left + box_width, top + box_height], -1)
    first = fits.int().argmax(1)
    chosen = attempts[torch.arange(len(draws)), first]
    return torch.where(fits.any(1, keepdim=True), chosen, _centre_boxes(heights[:, 0], widths[:, 0], ratio)).float()


def _centre_boxes(heights: Tensor, widths: Tensor, ratio: tuple[float, float]) -> Tensor:
    """(B, 4): the largest central box of each image whose width / height lies within `ratio`."""
    box_width = torch.minimum(widths, (heights * ratio[1]).round()).clamp(min=1)
    box_height = torch.minimum(heights, (widths / ratio[0]).round()).clamp(min=1)
    left, top = ((widths - box_width) / 2).floor(), ((heights - box_height) / 2).floor()
    return torch.stack([left, top, left + box_width, top + box_height], -1)


def _triangle_filter(start: Tensor, stop: Tensor, length: int, size: int) -> Tensor:
    """(B, size, length): weights that resample the pixels from `start` to `stop` (B,) of `length` into `size`.

    This is the rule of Pillow's BILINEAR: a triangle as wide as the shrink factor, at least one pixel, around the
    centre of each output pixel. Weights beyond the box are cut off, and the rest sums to one.
    """
    step = ((stop - start) / size)[:, None, None]
    centres = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    pixels = torch.arange(length, device=start.device) + 0.5
    weights = (1 - (pixels - centres).abs() / step.abs().clamp(min=1)).clamp_(min=0)
    first, last = torch.minimum(start, stop), torch.maximum(start, stop)
    weights *= (pixels > first[:, None, None]) & (pixels < last[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


def crop_and_resize(images: Tensor, boxes: Tensor, size: int, turned: Tensor | None = None) -> Tensor:
    """Cut `boxes` (B, 4) of whole pixels out of `images` (B, C, H, W): float (B, C, size, size) in [0, 1].

    The images are uint8, or uint16 where 16 bits are kept.

    A box is cut out first, so that pixels around it play no part, and resized with antialiasing: Pillow's
    `image.crop(box).resize((size, size), BILINEAR)` without its rounding. A box with left > right gives the mirror
    image, and one with top > bottom is turned upside down. In the crops of `turned` (B,) images rows and columns are
    exchanged. On a CPU, crops of more than LARGEST_PRODUCT pixels have the bits of the images.
    """
    if images.device.type == "cpu" and size > LARGEST_PRODUCT:
        return to_unit(crop_one_by_one(images, boxes, size, turned))
    batch, channels, height, width = images.shape
    left, top, right, bottom = boxes.unbind(1)
    across = _triangle_filter(left, right, width, size).div_(torch.iinfo(images.dtype).max)
    down = _triangle_filter(top, bottom, height, size)
    lines = images.reshape(batch, channels * height, width).to(across.dtype) @ across.transpose(1, 2)
    crops = down[:, None] @ lines.view(batch, channels, height, size)
    return crops if turned is None else torch.where(turned[:, None, None, None], crops.transpose(2, 3), crops)


def crop_one_by_one(images: Tensor, boxes: Tensor, size: int, turned: Tensor | None = None) -> Tensor:
    """`crop_and_resize` without products with filters that are almost all zeros, of the images' bits."""
    exchanged = [False] * len(images) if turned is None else turned.tolist()
    crops = images.new_empty(len(images), size, size, images.shape[1])
    for image, box, output, turn in zip(images, boxes.tolist(), crops, exchanged, strict=True):
        crop = cut_and_resize(image, box, size)
        output.copy_(crop.permute(2, 1, 0) if turn else crop.permute(1, 2, 0))
    return crops.permute(0, 3, 1, 2).contiguous()


def cut_and_resize(image: Tensor, box: Sequence[float], size: int) -> Tensor:
    """`crop_and_resize` of one image (C, H, W), with a result of its bits: uint8 or uint16 (C, size, size).

    Edges of the box are rounded to whole pixels. Torch resizes 8-bit images in channels-last order several times
    faster than floats, with Pillow's own filter: values differ from Pillow's by at most 1.
    """
    left, top, right, bottom = (round(edge) for edge in box)
    rows, columns = slice(*sorted((top, bottom))), slice(*sorted((left, right)))
    cut = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
    resized = resize(cut, size, size)[0]
    mirrored = [axis for axis, first, last in ((1, top, bottom), (2, left, right)) if first > last]
    return flip(resized, mirrored) if mirrored else resized


def to_unit(images: Tensor) -> Tensor:
    """Return images of 8 or 16 bits as floats in [0, 1]. Accelerators divide no uint16."""
    return images / 255 if images.dtype == torch.uint8 else images.float() / torch.iinfo(images.dtype).max


def resize(images: Tensor, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """Resize images (B, C, H, W) of 8 or 16 bits with antialiasing. Torch itself resizes those of 8 bits only."""
    if images.dtype == torch.uint8:
        return F.interpolate(images, (height, width), mode=mode, antialias=True)
    resized = F.interpolate(images.float(), (height, width), mode=mode, antialias=True)
    return resized.round_().clamp_(0, torch.iinfo(images.dtype).max).to(images.dtype)


def flip(images: Tensor, axes: list[int]) -> Tensor:
    """Flip images of 8 or 16 bits. Torch flips no uint16 along the last axis."""
    return images.flip(axes) if images.dtype == torch.uint8 else images.view(torch.int16).flip(axes).view(images.dtype)
