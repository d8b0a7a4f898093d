"""The AccelViT encoder. These files need nothing but torch, transformers and each other: the Hub copies them."""

from .configuration_accel_vit import PRESETS, AccelViTConfig, vit_base, vit_large, vit_small, vit_tiny
from .modeling_accel_vit import (
    AccelViTBackbone,
    AccelViTForImageClassification,
    AccelViTModel,
    AccelViTPreTrainedModel,
)

__all__ = [
    "PRESETS",
    "AccelViTBackbone",
    "AccelViTConfig",
    "AccelViTForImageClassification",
    "AccelViTModel",
    "AccelViTPreTrainedModel",
    "vit_base",
    "vit_large",
    "vit_small",
    "vit_tiny",
]
