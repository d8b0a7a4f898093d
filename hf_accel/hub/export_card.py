"""The README of an exported encoder: where it comes from, its licence, what its feature is, and code that runs."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils.hub import cached_file

from ..models import AccelViTConfig
from .card import CARD_NAME
from .redact import without_local_paths

logger = logging.getLogger(__name__)

LICENCE_KEYS = ("license", "license_name", "license_link")

LIBRARIES = {"accel_vit": "transformers", "vit": "transformers", "dinov2": "transformers", "timm": "timm"}
CLASSES = {"accel_vit": "AccelViT", "vit": "transformers' ViT", "dinov2": "transformers' DINOv2", "timm": "timm's ViT"}


@dataclass(frozen=True)
class Export:
    """What the README of an export says.

    Args:
        export_format: the key of the recipe.
        checkpoint: what was exported, as the recipe names it.
        kind: the format that it had.
        licence: LICENCE_KEYS of the source's own card, as far as it states them.
        config: the encoder's.
        patch_size: in pixels, of the export.
        classifies: whether there is a classifier on top.
        has_processor: whether an image processor lies beside the weights.
        difference: the largest one of any feature, relative.
        folder: where the export will lie.
    """

    export_format: str
    checkpoint: str
    kind: str
    licence: Mapping[str, str]
    config: AccelViTConfig
    patch_size: int
    classifies: bool
    has_processor: bool
    difference: float
    folder: Path


def stated_licence(checkpoint: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The licence that the card of a folder or Hub id states, or timm's configuration; empty if none is stated."""
    found = Path(checkpoint) / CARD_NAME
    if not Path(checkpoint).exists():
        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = Path(cached_file(checkpoint, CARD_NAME, **options) or found)
    metadata: Any = None
    if found.is_file():
        header = re.match(r"---\n(.*?)\n---", found.read_text(encoding="utf-8"), re.DOTALL)
        try:
            metadata = yaml.safe_load(header[1]) if header else None
        except yaml.YAMLError as error:
            logger.warning("The licence of %s is not known: its card has no valid metadata (%s)", checkpoint, error)
    for source in (metadata, config.get("pretrained_cfg"), config):
        if isinstance(source, Mapping) and isinstance(source.get("license"), str):
            return {key: str(source[key]) for key in LICENCE_KEYS if key in source}
    return {}


def export_card(export: Export) -> str:
    """The text of the README, with its metadata."""
    origin = without_local_paths(export.checkpoint)
    is_on_hub = not Path(export.checkpoint).exists()
    licences: dict[str, Any] = dict(export.licence)
    metadata = ModelCardData(
        library_name=LIBRARIES.get(export.export_format),
        pipeline_tag="image-classification" if export.classifies else "image-feature-extraction",
        tags=["hf_accel", "vision-transformer"],
        base_model=origin if is_on_hub else None,
        **licences,
    )
    source = f"[{origin}](https://huggingface.co/{origin})" if is_on_hub else f"`{origin}`"
    size = export.config.image_size
    licence = export.licence.get("license_link") or export.licence.get("license_name") or export.licence.get("license")
    text = f"""---
{metadata.to_yaml()}
---

# {Path(origin).name} as {CLASSES.get(export.export_format, "ONNX")}

## Origin

Converted by hf_accel (`task=export`) from {source}, which is in the format of {CLASSES[export.kind]}.
For images of {size} x {size} pixels in patches of {export.patch_size} its features differ from the original's by
{export.difference:.0e} at most, relative to the largest.

## Licence

{_licence_line(licence)}

## Feature

{_pooling(export)}

## How to use

```python
{_code(export)}
```
"""
    return str(ModelCard(text))


def _licence_line(licence: str | None) -> str:
    if licence is None:
        return "The original states none, so ask its authors before you use or share these weights."
    return f"That of the original: {licence}."


def _pooling(export: Export) -> str:
    """What stands for an image."""
    config, fmt = export.config, export.export_format
    prefix, mean = config.num_prefix_tokens, config.pooling == "mean"
    what = "the mean of the patch tokens" if mean else "the CLS token"
    if export.classifies:
        return f"A classifier of {config.num_labels} classes stands on {what}: take its logits."
    if fmt == "timm":
        pool = "avg" if mean else "token"
        return f'The output of the model is {what} (`global_pool="{pool}"`).'
    if fmt in ("vit", "dinov2") and mean:
        return (
            "The encoder was trained with the mean of the patch tokens as its feature: take "
            f"`last_hidden_state[:, {prefix}:].mean(1)`. `pooler_output` is the CLS token here, which was not trained "
            "for this."
        )
    return f"`pooler_output` is {what}, as in training."


def _code(export: Export) -> str:
    """Python that turns an image into its feature in a fresh process, wherever it is pasted."""
    config, fmt, here = export.config, export.export_format, json.dumps(export.folder.as_posix())
    shape = f"{config.num_channels}, {config.image_size}, {config.image_size}"
    blank = f'image = Image.new("RGB", ({config.image_size}, {config.image_size}))  # or Image.open(...)'
    if fmt == "onnx":
        name = "logits" if export.classifies else "pooler_output"
        return "\n".join(
            [
                "import numpy as np",
                "import onnxruntime",
                "",
                f'session = onnxruntime.InferenceSession({here} + "/model.onnx")',
                f"pixel_values = np.zeros((1, {shape}), np.float32)  # a batch of normalised images",
                f'(features,) = session.run(["{name}"], {{"pixel_values": pixel_values}})',
            ]
        )
    if fmt == "timm":
        return "\n".join(
            [
                "import timm",
                "import torch",
                "",
                f'model = timm.create_model("local-dir:" + {here}, pretrained=True).eval()',
                f"pixel_values = torch.zeros(1, {shape})  # a batch of normalised images",
                "with torch.no_grad():",
                "    features = model(pixel_values)",
            ]
        )
    auto = "AutoModelForImageClassification" if export.classifies else "AutoModel"
    trust = ", trust_remote_code=True" if fmt == "accel_vit" else ""
    feature = "outputs.logits" if export.classifies else "outputs.pooler_output"
    if config.pooling == "mean" and fmt in ("vit", "dinov2") and not export.classifies:
        feature = f"outputs.last_hidden_state[:, {config.num_prefix_tokens}:].mean(1)"
    lines = [f"from transformers import {auto}", "", f"model_id = {here}  # its Hub id, once it is uploaded"]
    lines.append(f"model = {auto}.from_pretrained(model_id{trust}).eval()")
    if export.has_processor:
        lines[0] = f"from PIL import Image\nfrom transformers import AutoImageProcessor, {auto}"
        lines += [
            f"processor = AutoImageProcessor.from_pretrained(model_id{trust})",
            blank,
            'pixel_values = processor(image, return_tensors="pt")["pixel_values"]',
        ]
    else:
        lines.append(f"pixel_values = torch.zeros(1, {shape})  # a batch of normalised images")
    lines += ["with torch.no_grad():", "    outputs = model(pixel_values)", f"features = {feature}"]
    return "\n".join(["import torch", *lines])
