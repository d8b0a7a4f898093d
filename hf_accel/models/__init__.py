"""The AccelViT encoder. These files need nothing but torch, transformers and each other: the Hub copies them."""

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from .configuration_accel_vit import PRESETS, AccelViTConfig, vit_base, vit_large, vit_small, vit_tiny
from .modeling_accel_vit import AccelViTBackbone, AccelViTForImageClassification, AccelViTModel, AccelViTPreTrainedModel

# Importing these classes registers them, so that `AutoModel` opens their checkpoints.
AutoConfig.register("accel_vit", AccelViTConfig, exist_ok=True)
AutoModel.register(AccelViTConfig, AccelViTModel, exist_ok=True)
AutoBackbone.register(AccelViTConfig, AccelViTBackbone, exist_ok=True)
AutoModelForImageClassification.register(AccelViTConfig, AccelViTForImageClassification, exist_ok=True)
# It resizes the shortest edge and crops the centre, as evaluation does. The PIL form comes from its own module, because
# `from transformers import BitImageProcessor` asks for torchvision.
AutoImageProcessor.register(AccelViTConfig, image_processor_classes={"pil": BitImageProcessorPil}, exist_ok=True)

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
