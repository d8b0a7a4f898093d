"""MoCo-v3's two views as other libraries make them, with the probabilities and strengths of its original code."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
BLUR, SOLARIZE = (1.0, 0.1), (0.0, 0.2)
"""Probabilities of the two views."""

Views = Callable[[Any], Any]
"""Makes the two views of images: of one uint8 tensor (B, 3, H, W) on the device, or of an image after another."""


def kornia(size: int, device: torch.device) -> Views:
    """The whole batch at once, on the device."""
    import kornia.augmentation as K  # pyright: ignore[reportMissingImports]

    taps = 2 * round(6 * size / 224) + 1

    def view(number: int) -> torch.nn.Module:
        sigma = (0.1 * size / 224, 2.0 * size / 224)
        return torch.nn.Sequential(
            K.RandomResizedCrop((size, size), scale=SCALE, ratio=RATIO),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((taps, taps), sigma, p=BLUR[number]),
            K.RandomSolarize(0.0, 0.0, p=SOLARIZE[number]),
            K.RandomHorizontalFlip(p=0.5),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )

    both = [view(number).to(device) for number in range(2)]
    return lambda images: [view(images / 255) for view in both]


def torchvision_v2(size: int, device: torch.device) -> Views:
    """One uint8 tensor (3, H, W) after another."""
    from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]

    taps = 2 * round(6 * size / 224) + 1

    def view(number: int) -> Any:
        sigma = (0.1 * size / 224, 2.0 * size / 224)
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=SCALE, ratio=RATIO, antialias=True),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(taps, sigma)], p=BLUR[number]),
                v2.RandomSolarize(128, p=SOLARIZE[number]),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    both = [view(number) for number in range(2)]
    return lambda images: [torch.stack([view(image) for image in images]).to(device) for view in both]


def albumentations(size: int, device: torch.device) -> Views:
    """One uint8 array (H, W, 3) after another."""
    import albumentations as A  # pyright: ignore[reportMissingImports]

    def view(number: int) -> Any:
        sigma = (0.1 * size / 224, 2.0 * size / 224)
        return A.Compose(
            [
                A.RandomResizedCrop((size, size), scale=SCALE, ratio=RATIO),
                A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur(blur_limit=0, sigma_limit=sigma, p=BLUR[number]),
                A.Solarize((0.5, 0.5), p=SOLARIZE[number]),
                A.HorizontalFlip(p=0.5),
                A.Normalize(MEAN, STD),
            ]
        )

    both = [view(number) for number in range(2)]

    def views(images: Sequence[np.ndarray]) -> list[Tensor]:
        made = [np.stack([view(image=image)["image"] for image in images]) for view in both]
        return [torch.from_numpy(each).permute(0, 3, 1, 2).contiguous().to(device) for each in made]

    return views


def pillow(size: int, device: torch.device) -> Views:
    """One Pillow image after another, as MoCo-v3's own loader does it."""
    mean, std = np.array(MEAN, dtype=np.float32), np.array(STD, dtype=np.float32)

    def view(image: Image.Image, number: int) -> Tensor:
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=_box(*image.size))
        if random.random() < 0.8:
            image = _jitter(image)
        if random.random() < 0.2:
            image = image.convert("L").convert("RGB")
        if random.random() < BLUR[number]:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0) * size / 224))
        if random.random() < SOLARIZE[number]:
            image = ImageOps.solarize(image)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
        return torch.from_numpy(array).permute(2, 0, 1)

    return lambda images: [torch.stack([view(image, number) for image in images]).to(device) for number in range(2)]


def _box(width: int, height: int) -> tuple[float, float, float, float]:
    while True:
        area, ratio = width * height * random.uniform(*SCALE), np.exp(random.uniform(*np.log(RATIO)))
        across, down = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < across <= width and 0 < down <= height:
            left, top = random.randint(0, width - across), random.randint(0, height - down)
            return left, top, left + across, top + down


def _jitter(image: Image.Image) -> Image.Image:
    operations: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: ImageEnhance.Brightness(image).enhance(random.uniform(0.6, 1.4)),
        lambda image: ImageEnhance.Contrast(image).enhance(random.uniform(0.6, 1.4)),
        lambda image: ImageEnhance.Color(image).enhance(random.uniform(0.8, 1.2)),
        _turn_hue,
    ]
    random.shuffle(operations)
    for operation in operations:
        image = operation(image)
    return image


def _turn_hue(image: Image.Image) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(round(random.uniform(-0.1, 0.1) * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


PEERS = {"kornia": kornia, "torchvision v2": torchvision_v2, "albumentations": albumentations, "pillow": pillow}
"""What makes the views of images, `size` pixels wide, on a device."""


def images_for(name: str, pixels: Tensor, device: torch.device) -> Any:
    """What a peer takes of uint8 `pixels` (B, 3, H, W)."""
    if name == "kornia":
        return pixels.to(device)
    if name == "torchvision v2":
        return pixels
    arrays = list(pixels.permute(0, 2, 3, 1).contiguous().numpy())
    return arrays if name == "albumentations" else [Image.fromarray(array) for array in arrays]
