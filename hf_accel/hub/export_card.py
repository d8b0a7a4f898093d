"""The README of an exported encoder: its origin, its licence, what its feature is, and code that runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCardData

from ..models import AccelViTConfig
from .card import HERE, folder_name, render

LIBRARIES = {"accel_vit": "transformers", "vit": "transformers", "dinov2": "transformers", "timm": "timm"}
CLASSES = {"accel_vit": "AccelViT", "vit": "transformers' ViT", "dinov2": "transformers' DINOv2", "timm": "timm's ViT"}


@dataclass(frozen=True)
class Export:
    """What the README of an export says.

    Args:
        export_format: the key of the recipe.
        checkpoint: the folder, file or Hub id that was exported.
        weights: a digest of the exported weights.
        date: of the export.
        kind: the format of the checkpoint.
        licence: those of LICENCE_KEYS that the card of the checkpoint states. None: it could not be read.
        config: the configuration of the encoder.
        patch_size: of the export, in pixels.
        classifies: whether the model has a classifier.
        has_processor: whether an image processor lies beside the weights.
        difference: the largest difference of any feature, relative to the largest feature.
    """

    export_format: str
    checkpoint: str
    weights: str
    date: str
    kind: str
    licence: Mapping[str, str | list[str]] | None
    config: AccelViTConfig
    patch_size: int
    classifies: bool
    has_processor: bool
    difference: float


def agreement(difference: float) -> str:
    """Say how the features of the export compare with those of the original."""
    if difference == 0:
        return "equal the original's"
    return f"differ from the original's by {difference:.0e} at most, relative to the largest"


def export_card(export: Export) -> str:
    """Return the text of the README, with its metadata."""
    config, export_format = export.config, export.export_format
    is_on_hub = not Path(export.checkpoint).exists()
    origin = export.checkpoint if is_on_hub else folder_name(Path(export.checkpoint))
    licence = dict(export.licence or {})
    link = str(licence.get("license_link", ""))
    if link and "://" not in link:  # A file of the original, which does not lie beside this card.
        del licence["license_link"]
        link = f"its text is in the file {link} of the original"
    stated = licence.get("license_name") or licence.get("license") or ()
    parts = [*([stated] if isinstance(stated, str) else stated), *[link] * bool(link)]
    metadata = ModelCardData(
        library_name=LIBRARIES.get(export_format),
        pipeline_tag="image-classification" if export.classifies else "image-feature-extraction",
        tags=["hf_accel", "vision-transformer"],
        base_model=origin if is_on_hub else None,
        **cast(Any, licence),
    )
    # The processor of other channels takes arrays, whose bits only the original's training data can tell.
    prepares_images = export.has_processor and config.num_channels == 3
    auto_classes = ["AutoImageProcessor"] * prepares_images
    if LIBRARIES.get(export_format) == "transformers":
        auto_classes.append("AutoModelForImageClassification" if export.classifies else "AutoModel")
    return render(
        "export_card.md.jinja",
        export=export,
        config=config,
        format=export_format,
        metadata=metadata.to_yaml(),
        origin=origin,
        is_on_hub=is_on_hub,
        class_name=CLASSES.get(export_format, "ONNX"),
        original_class_name=CLASSES[export.kind],
        agreement=agreement(export.difference),
        licence=", ".join(parts),
        side=config.image_size,
        pooled="the mean of the patch tokens" if config.pooling == "mean" else "the CLS token",
        averages=config.pooling == "mean" and export_format in ("vit", "dinov2"),
        auto_classes=auto_classes,
        prepares_images=prepares_images,
        trust=", trust_remote_code=True" if export_format == "accel_vit" else "",
        here='"."  # run this in the folder of this file',
        hub_id=HERE,
    )
