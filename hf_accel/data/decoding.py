"""The pixels of one image, whatever its format: upright, RGB, 8 bits."""

import contextlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from PIL.Image import Image
from torch import Tensor


def image_tensor(image: Image) -> Tensor:
    """uint8 (3, H, W) of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: what Pillow gives is read-only


def upright_size(image: Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation, from the header."""
    turned = False
    with contextlib.suppress(Exception):  # broken metadata beside a good image
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)


def upright_rgb(image: Image) -> Image:
    """8-bit RGB, turned as EXIF says. Raises what Pillow does of broken files; ValueError of floating-point pixels."""
    image.load()
    if image.mode == "F":  # in any range: Pillow would clip them at 0 and 255
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    with contextlib.suppress(Exception):  # broken metadata beside a good image
        PIL.ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them at 255
        image = PIL.Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # Pillow asks for this step
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
