"""The image processor of a checkpoint: how its images are sized and normalised."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from transformers import AutoImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.utils.hub import cached_file

from ..utils.causes import reason
from ..utils.weight_files import FAILURES


def load_processor(checkpoint: str) -> Any | None:
    """Load the checkpoint's image processor, or None if it has none. Raises ValueError if it cannot be opened."""
    try:
        if cached_file(checkpoint, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False) is None:
            return None
        return AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    except FAILURES as error:
        raise ValueError(f"its image processor cannot be opened: {reason(error)}") from error


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


def input_of(processor: Any) -> tuple[int, Sequence[float], Sequence[float]]:
    """Return the side in pixels of the images that a processor makes, and the channels' mean and std that it removes.

    Raises ValueError if the images are not square, or if their size depends on the shape of the photograph.
    """
    made = _made_by(processor)
    if made[0].shape != made[1].shape or made[0].shape[1] != made[0].shape[2]:
        raise ValueError(
            f"its image processor makes {made[0].shape[1:]} of a wide image and {made[1].shape[1:]} of a tall one; "
            "a batch needs one square size: set crop_size and do_center_crop in its preprocessor_config.json"
        )
    return made[0].shape[-1], *normalisation_of(processor)


def normalisation_of(processor: Any) -> tuple[list[float], list[float]]:
    """Return the mean and std that a processor removes from the channels of pixels in [0, 1].

    They are inferred from its output for a black and a white image, whatever its settings are called.
    """
    low, high = (image.mean((1, 2), dtype=np.float64) for image in _made_by(processor))
    std = 1 / (high - low)
    return (-low * std).tolist(), std.tolist()


def _made_by(processor: Any) -> list[np.ndarray]:
    """What it makes of a wide black image and of a tall white one, (C, H, W) each."""
    black, white = (PIL.Image.new("RGB", size, colour) for size, colour in (((96, 64), "black"), ((64, 96), "white")))
    return [np.asarray(processor(images=image)["pixel_values"][0]) for image in (black, white)]
