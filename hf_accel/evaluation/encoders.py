"""Load any vision encoder that `AutoModel` opens, with the image processor that belongs to it."""

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..checkpoints import ArrayProcessor, input_of, load_processor, refuse_run_folder
from ..checkpoints.reading import turn_masking_off
from ..data import ImageSource, image_processor
from ..data.loader import ReportingLoader
from ..data.sources import Bad
from ..utils.weight_files import opening
from .pooling import is_hierarchical


def load_encoder(checkpoint: str) -> PreTrainedModel:
    """Load the encoder of a folder or Hub id in fp32, with every weight from there.

    If the checkpoint has no weights for its pooling layer, transformers would initialise that layer at random, so it is
    removed. Random masking, as in ViT-MAE, is turned off.

    Raises:
        ValueError: nothing that can be opened, a model that takes no images, or weights of another model.
    """
    refuse_run_folder(checkpoint)
    with opening(checkpoint):
        # Foreign code is refused, as transformers would otherwise ask on the terminal. Mismatches are reported below.
        options: dict[str, Any] = {"trust_remote_code": False, "ignore_mismatched_sizes": True}
        model, info = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True, **options)
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, not images: name the folder or Hub id of a vision "
            "encoder (of a model of images and text, its vision part saved alone)"
        )
    missing = sorted(info["missing_keys"])
    if missing and not info["mismatched_keys"] and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
    elif missing or info["mismatched_keys"]:
        names = sorted({*missing, *(name for name, *_ in info["mismatched_keys"])})
        raise ValueError(
            f"{len(names)} of the {len(model.state_dict())} weights of {type(model).__name__} are missing or of "
            f"another shape ({', '.join(names[:3])}, ...): name a checkpoint of this architecture"
        )
    turn_masking_off(model)
    return model.eval()


def open_encoder(checkpoint: str, source: ImageSource, image_size: int) -> tuple[PreTrainedModel, Any]:
    """Load the encoder of a checkpoint and its image processor, or make one for the images of `source`.

    Args:
        image_size: pixels of the images of a processor that is made, if the encoder does not state them.

    Raises:
        ValueError: the checkpoint is no vision encoder.
    """
    encoder, processor = load_encoder(checkpoint), load_processor(checkpoint)
    if processor is None:
        size = getattr(encoder.config, "image_size", None)
        processor = image_processor(source, size if isinstance(size, int) else image_size)
    return encoder, processor_for(source, processor)


def processor_for(source: ImageSource, processor: Any) -> Any:
    """Return what makes inputs of these images: the image processor, or one for arrays by its settings."""
    return processor if source.channels == 3 and not source.deep else ArrayProcessor(processor)


def count_input_channels(checkpoint: str) -> int:
    """Return the number of channels of the images that a checkpoint's encoder takes, from its configuration.

    Raises:
        ValueError: nothing that can be opened.
    """
    refuse_run_folder(checkpoint)
    with opening(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    channels = getattr(config, "num_channels", None)
    return channels if isinstance(channels, int) else 3


def base_patch_size(encoder: PreTrainedModel) -> int | None:
    """Return the patch size in pixels that an encoder has without choosing one, or None if it has none."""
    size = getattr(encoder.config, "patch_size", None)
    return size if isinstance(size, int) and not is_hierarchical(encoder.config) else None


def takes_patch_size(model: torch.nn.Module) -> bool:
    """Whether the patch size can be chosen with each call."""
    return "patch_size" in inspect.signature(model.forward).parameters


def weights_digest(model: torch.nn.Module) -> str:
    """Return twelve hexadecimal digits that identify these weights."""
    digest = hashlib.blake2b(digest_size=6)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_input(processor: Any) -> dict[str, Any]:
    """Describe what `input_of` finds in plain values, rounded, for a record of what an encoder has seen."""
    size, mean, std = input_of(processor)
    return {"image_size": size, "mean": [round(x, 4) for x in mean], "std": [round(x, 4) for x in std]}


class ProcessedImages(Dataset):
    """Batches by index, as an image processor makes them. The next image replaces one that cannot be read."""

    def __init__(self, source: ImageSource, processor: Any):
        self.source, self.processor = source, processor

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        bad: list[Bad] = []
        read = [self.source.next_readable(number, bad) for number in indices]
        pixels: Tensor = self.processor(images=[image for _, image in read], return_tensors="pt")["pixel_values"]
        batch = {"pixel_values": pixels, "bad": bad}
        if self.source.labels is not None:
            batch["labels"] = self.source.labels[torch.tensor([number for number, _ in read])]
        return batch


def processed_loader(source: ImageSource, processor: Any, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Load the images in order, as dictionaries with "pixel_values" (B, C, H, W), "labels" (B,) if any, and "bad".

    This is `data.eval_loader` for encoders whose own processor chooses size, crop and normalisation.
    """
    dataset = ProcessedImages(source, processor)
    # a sampler instead of shuffle=False, so that an accelerator can distribute the batches over processes
    return ReportingLoader(source, dataset, 0, num_workers, sampler=range(len(source)), batch_size=batch_size)
