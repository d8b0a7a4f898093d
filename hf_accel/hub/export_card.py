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
        weights: a digest that tells its weights from others.
        date: of the export.
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
    weights: str
    date: str
    kind: str
    licence: Mapping[str, str | list[str]]
    config: AccelViTConfig
    patch_size: int
    classifies: bool
    has_processor: bool
    difference: float
    folder: Path


def stated_licence(checkpoint: str, config: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """The licence that the card of a folder or Hub id states, or timm's configuration; empty if none is stated.

    A link to a file of a Hub repository becomes an address.
    """
    found = Path(checkpoint) / CARD_NAME
    is_on_hub = not Path(checkpoint).exists()
    if is_on_hub:
        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = Path(cached_file(checkpoint, CARD_NAME, **options) or found)
    metadata = _metadata(found) if found.is_file() else {}
    for source in (metadata, config.get("pretrained_cfg"), config):
        stated = {key: source[key] for key in LICENCE_KEYS if source.get(key)} if isinstance(source, Mapping) else {}
        if not stated:
            continue
        link = str(stated.get("license_link", ""))
        if link and is_on_hub and "://" not in link:
            stated["license_link"] = f"https://huggingface.co/{checkpoint}/blob/main/{link}"
        return {key: [*map(str, value)] if isinstance(value, list) else str(value) for key, value in stated.items()}
    return {}


def _metadata(card: Path) -> dict[str, Any]:
    """The metadata of a card. Of damaged metadata, the lines on the licence."""
    data = card.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        logger.warning("%s is not in UTF-8: check the licence that the export states", card)
        text = data.decode("utf-8-sig", errors="replace")
    header = re.match(r"\s*---[ \t]*\n(.*?)\n---", "\n".join(text.splitlines()), re.DOTALL)
    if header is None:
        return {}
    try:
        metadata = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        logger.warning(
            "The metadata of %s is not valid YAML: check the licence that the export states (%s)", card, error
        )
        return dict(re.findall(r"^(license\w*):[ \t]*['\"]?([\w.:/-]+)['\"]?[ \t]*$", header[1], re.MULTILINE))
    return metadata if isinstance(metadata, dict) else {}


def agreement(difference: float) -> str:
    """What the export's features do, compared with the original's."""
    if difference == 0:
        return "equal the original's"
    return f"differ from the original's by {difference:.0e} at most, relative to the largest"


def export_card(export: Export) -> str:
    """The text of the README, with its metadata."""
    is_on_hub = not Path(export.checkpoint).exists()
    origin = export.checkpoint if is_on_hub else _local_name(Path(export.checkpoint))
    licences: dict[str, Any] = dict(export.licence)
    if _file_of_original(export):
        del licences["license_link"]  # which would point to a file beside this card
    metadata = ModelCardData(
        library_name=LIBRARIES.get(export.export_format),
        pipeline_tag="image-classification" if export.classifies else "image-feature-extraction",
        tags=["hf_accel", "vision-transformer"],
        base_model=origin if is_on_hub else None,
        **licences,
    )
    source = f"[{origin}](https://huggingface.co/{origin})" if is_on_hub else f"`{origin}`"
    size = export.config.image_size
    text = f"""---
{metadata.to_yaml()}
---

# {origin} as {CLASSES.get(export.export_format, "ONNX")}

## Origin

Converted by hf_accel (`task=export`) on {export.date} from {source}, which is in the format of
{CLASSES[export.kind]} and whose weights have the digest `{export.weights}`.
For images of {size} x {size} pixels in patches of {export.patch_size} its features {agreement(export.difference)}.

## Licence

{_licence_line(export)}

## Feature

{_pooling(export)}

## How to use

```python
{_code(export)}
```
"""
    return str(ModelCard(text))


def _local_name(path: Path) -> str:
    """The last two parts of a path, such as "RUN/final": "final" alone is the name of every run's encoder."""
    path = path.resolve()
    return path.name if path.parent in (Path.home(), Path(path.anchor)) else f"{path.parent.name}/{path.name}"


def _file_of_original(export: Export) -> str | None:
    """The file of the original that holds its licence, if its card links to one."""
    link = export.licence.get("license_link")
    return str(link) if link and "://" not in str(link) else None


def _licence_line(export: Export) -> str:
    licence, file = export.licence, _file_of_original(export)
    if not licence:
        return "The original states none, so ask its authors before you use or share these weights."
    stated = licence.get("license_name") or licence.get("license")
    link = f"its text is in the file {file} of the original" if file else licence.get("license_link")
    parts = [", ".join(part) if isinstance(part, list) else part for part in (stated, link) if part]
    return f"That of the original: {', '.join(parts)}."


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
    if fmt == "onnx":
        name = "logits" if export.classifies else "pooler_output"
        return "\n".join(
            [
                "import onnxruntime" if export.has_processor else "import numpy as np\nimport onnxruntime",
                *_imports(export),
                "",
                f"folder = {here}",
                'session = onnxruntime.InferenceSession(folder + "/model.onnx")',
                *_pixels(export, "folder", "np"),
                f'(features,) = session.run(["{name}"], {{"pixel_values": pixel_values}})',
            ]
        )
    if fmt == "timm":
        return "\n".join(
            [
                "import timm",
                "import torch",
                *_imports(export),
                "",
                f"folder = {here}",
                'model = timm.create_model("local-dir:" + folder, pretrained=True).eval()',
                # of a folder with timm's config.json transformers would make timm's own transform, by torchvision
                *_pixels(export, 'folder, image_processor_filename="preprocessor_config.json"', "pt"),
                "with torch.no_grad():",
                "    features = model(pixel_values)",
            ]
        )
    auto = "AutoModelForImageClassification" if export.classifies else "AutoModel"
    trust = ", trust_remote_code=True" if fmt == "accel_vit" else ""
    feature = "outputs.logits" if export.classifies else "outputs.pooler_output"
    if config.pooling == "mean" and fmt in ("vit", "dinov2") and not export.classifies:
        feature = f"outputs.last_hidden_state[:, {config.num_prefix_tokens}:].mean(1)"
    return "\n".join(
        [
            "import torch",
            *_imports(export, auto),
            "",
            f"model_id = {here}  # its Hub id, once it is uploaded",
            f"model = {auto}.from_pretrained(model_id{trust}).eval()",
            *_pixels(export, f"model_id{trust}", "pt"),
            "with torch.no_grad():",
            "    outputs = model(pixel_values)",
            f"features = {feature}",
        ]
    )


def _imports(export: Export, *classes: str) -> list[str]:
    """Lines that import these classes of transformers, and what prepares an image."""
    classes = ("AutoImageProcessor", *classes) if export.has_processor else classes
    lines = ["from PIL import Image"] if export.has_processor else []
    return [*lines, f"from transformers import {', '.join(classes)}"] if classes else lines


def _pixels(export: Export, opened: str, tensors: str) -> list[str]:
    """Lines that make `pixel_values`, "np" or "pt": by the image processor, if the arguments `opened` open one."""
    channels, side = export.config.num_channels, export.config.image_size
    if export.has_processor:
        return [
            f"processor = AutoImageProcessor.from_pretrained({opened})",
            f'image = Image.new("RGB", ({side}, {side}))  # or Image.open(...)',
            f'pixel_values = processor(image, return_tensors="{tensors}")["pixel_values"]',
        ]
    shape = f"{channels}, {side}, {side}"
    zeros = f"torch.zeros(1, {shape})" if tensors == "pt" else f"np.zeros((1, {shape}), np.float32)"
    return [f"pixel_values = {zeros}  # a batch of normalised images"]
