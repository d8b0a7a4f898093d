"""Mix the images of a batch on its device, each with its own partner and ratio, by mixup or CutMix.

Zhang et al., "mixup", ICLR 2018 (arXiv 1710.09412); Yun et al., "CutMix", ICCV 2019 (arXiv 1905.04899). Half of the
images get mixup and half CutMix, as in DeiT (arXiv 2012.12877).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.seeding import generator


def mixup(images: Tensor, partners: Tensor, ratio: Tensor) -> Tensor:
    """Blend `ratio` (B,) of each image with the rest of its partner, both (B, C, H, W)."""
    return torch.lerp(partners, images, ratio.view(-1, 1, 1, 1))


def cutmix_boxes(ratio: Tensor, centres: Tensor, height: int, width: int) -> Tensor:
    """Return (B, 4) boxes `left, top, right, bottom` in pixels, which cover 1 - `ratio` of the image before clipping.

    `centres`: (B, 2), across and down, uniform in [0, 1). The sides are those of the image times sqrt(1 - ratio).
    """
    sides = torch.tensor([width, height], dtype=ratio.dtype)
    half = sides * (1 - ratio).clamp(min=0).sqrt()[:, None] / 2
    middle = centres * sides
    first, last = (middle - half).round().clamp(min=0), torch.minimum((middle + half).round(), sides)
    return torch.cat([first, last], 1).long()


def cutmix(images: Tensor, partners: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return images (B, C, H, W) with the `boxes` (B, 4) of their partners, and the share (B,) that each keeps."""
    height, width = images.shape[-2:]
    left, top, right, bottom = boxes.to(images.device)[:, :, None, None].unbind(1)
    across, down = (torch.arange(side, device=images.device) for side in (width, height))
    inside = ((across >= left) & (across < right)) & ((down[:, None] >= top) & (down[:, None] < bottom))
    area = ((right - left) * (bottom - top))[:, 0, 0]
    return torch.where(inside[:, None], partners, images), 1 - area.to(images.dtype) / (height * width)


def mix_batch(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    seed: int,
    step: int,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Return mixed images (B, C, H, W) and their targets (B, num_classes), whose rows sum to one.

    An alpha of 0 turns that method off; with both 0 the images stay as they are. Ratios follow Beta(alpha, alpha). This
    is a pure function of its arguments, and partners come from the same process.
    """
    targets = F.one_hot(labels, num_classes).to(images.dtype)
    if not (mixup_alpha or cutmix_alpha):
        return images, targets
    source = generator(seed, "mix", step, rank)
    count, device = len(images), images.device
    partner = torch.randperm(count, generator=source).to(device)
    share = 0.0 if not cutmix_alpha else 1.0 if not mixup_alpha else 0.5
    cut = torch.rand(count, generator=source) < share
    centres = torch.rand(count, 2, generator=source)
    beta = np.random.default_rng(source.initial_seed())  # torch's Beta takes no generator
    ratios = [
        torch.from_numpy(beta.beta(alpha or 1, alpha or 1, count)).float() for alpha in (mixup_alpha, cutmix_alpha)
    ]
    mixed = mixup(images, images[partner], ratios[0].to(device))
    pasted, left = cutmix(images, images[partner], cutmix_boxes(ratios[1], centres, *images.shape[-2:]))
    cut = cut.to(device)
    own = torch.where(cut, left, ratios[0].to(device))[:, None]
    return torch.where(cut.view(-1, 1, 1, 1), pasted, mixed), own * targets + (1 - own) * targets[partner]
