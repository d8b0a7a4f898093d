"""The image processor of a checkpoint: how its images are sized and normalised."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.utils.hub import cached_file

from ..utils.caches import explain_download
from ..utils.causes import reason
from ..utils.weight_files import FAILURES


def load_processor(checkpoint: str) -> Any | None:
    """Load the checkpoint's image processor, or None if it has none. Raises ValueError if it cannot be opened."""
    try:
        if cached_file(checkpoint, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False) is None:
            return None
        return AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    except FAILURES as error:
        why = explain_download(error, reason(error))
        raise ValueError(f"its image processor cannot be opened: {why}") from error


def timm_processor(config: dict[str, Any]) -> BitImageProcessorPil | None:
    """Build the image processor of a timm configuration, if the configuration describes its images."""
    values = config.get("pretrained_cfg", config)
    if not {"input_size", "mean", "std"} <= values.keys():
        return None
    side = values["input_size"][-1]
    return BitImageProcessorPil(
        size={"shortest_edge": int(side / values.get("crop_pct", 1.0) + 1e-6)},  # timm rounds down
        crop_size={"height": side, "width": side},
        resample=PILImageResampling[values.get("interpolation", "bicubic").upper()].value,
        image_mean=list(values["mean"]),
        image_std=list(values["std"]),
    )


class ArrayProcessor:
    """Makes inputs of images of any channels and bits, as an image processor makes those of RGB images.

    Args:
        processor: its sizes, mean and deviation are used.

    Raises:
        ValueError: it states none.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        size = getattr(processor, "size", None) or {}
        self.edge: int | None = size.get("shortest_edge")
        crops = self.edge and getattr(processor, "do_center_crop", False)
        made = (getattr(processor, "crop_size", None) or {}) if crops else size
        found: list[Any] = [made.get("height"), made.get("width")]
        found += [getattr(processor, name, None) for name in ("image_mean", "image_std")]
        if None in found:
            raise ValueError(
                "its image processor states no image_mean, image_std and size, or shortest_edge and crop_size, so that "
                "images other than RGB of 8 bits cannot be prepared for it: set them in its preprocessor_config.json"
            )
        height, width, mean, std = found
        self.size: tuple[int, int] = height, width
        self.mean: Sequence[float] = mean
        self.std: Sequence[float] = std
        self.mode = "bicubic" if getattr(processor, "resample", None) == PIL.Image.Resampling.BICUBIC else "bilinear"

    def __call__(self, images: Sequence[Any], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Return "pixel_values", float (B, C, H, W), of arrays (H, W, C) of uint8 or uint16."""
        return {"pixel_values": torch.stack([self._prepare(np.array(image)) for image in images])}

    def _prepare(self, image: np.ndarray) -> torch.Tensor:
        if image.shape[2] != len(self.mean):
            raise ValueError(f"images have {image.shape[2]} channels, and its image processor {len(self.mean)} means")
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / np.iinfo(image.dtype).max
        own, (height, width) = image.shape[:2], self.size
        resized = [int(self.edge * side / min(own)) for side in own] if self.edge else [height, width]
        if resized != [*own]:
            pixels = F.interpolate(pixels, resized, mode=self.mode, antialias=True).clamp(0, 1)
        top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels[0, :, top : top + height, left : left + width] - mean) / std

    def save_pretrained(self, folder: Any) -> None:
        self.processor.save_pretrained(folder)


def input_of(processor: Any) -> tuple[int, Sequence[float], Sequence[float]]:
    """Return the side in pixels of the images that a processor makes, and the channels' mean and std that it removes.

    Raises ValueError if the images are not square, or if their size depends on the shape of the photograph.
    """
    if isinstance(processor, ArrayProcessor) or _takes_no_rgb(processor):
        arrays = processor if isinstance(processor, ArrayProcessor) else ArrayProcessor(processor)
        if arrays.size[0] != arrays.size[1]:
            raise ValueError(f"its image processor makes images of {arrays.size}; a batch needs one square size")
        return arrays.size[0], list(arrays.mean), list(arrays.std)
    made = _made_by(processor)
    if made[0].shape != made[1].shape or made[0].shape[1] != made[0].shape[2]:
        raise ValueError(
            f"its image processor makes {made[0].shape[1:]} of a wide image and {made[1].shape[1:]} of a tall one; "
            "a batch needs one square size: set crop_size and do_center_crop in its preprocessor_config.json"
        )
    return made[0].shape[-1], *normalisation_of(processor)


def normalisation_of(processor: Any) -> tuple[list[float], list[float]]:
    """Return the mean and std that a processor removes from the channels of pixels in [0, 1].

    They are inferred from its output for a black and a white image, whatever its settings are called. Where the images
    are not RGB, they are those of its settings.
    """
    if _takes_no_rgb(processor):
        return list(processor.image_mean), list(processor.image_std)
    low, high = (image.mean((1, 2), dtype=np.float64) for image in _made_by(processor))
    std = 1 / (high - low)
    return (-low * std).tolist(), std.tolist()


def _takes_no_rgb(processor: Any) -> bool:
    mean = getattr(processor, "image_mean", None)
    return isinstance(mean, list | tuple) and len(mean) != 3


def _made_by(processor: Any) -> list[np.ndarray]:
    """What it makes of a wide black image and of a tall white one, (C, H, W) each."""
    black, white = (PIL.Image.new("RGB", size, colour) for size, colour in (((96, 64), "black"), ((64, 96), "white")))
    return [np.asarray(processor(images=image)["pixel_values"][0]) for image in (black, white)]
