"""hf_accel: accelerated self-supervised pretraining of vision transformers on the Hugging Face stack."""

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from .models import (
    PRESETS,
    AccelViTBackbone,
    AccelViTConfig,
    AccelViTForImageClassification,
    AccelViTModel,
    AccelViTPreTrainedModel,
)

__version__ = "0.1.0"

AutoConfig.register("accel_vit", AccelViTConfig, exist_ok=True)
AutoModel.register(AccelViTConfig, AccelViTModel, exist_ok=True)
AutoBackbone.register(AccelViTConfig, AccelViTBackbone, exist_ok=True)
AutoModelForImageClassification.register(AccelViTConfig, AccelViTForImageClassification, exist_ok=True)
# Shortest-edge resize and centre crop, as in evaluation. The PIL form, by its own module: `from transformers import
# BitImageProcessor` wants torchvision and says so.
AutoImageProcessor.register(AccelViTConfig, image_processor_classes={"pil": BitImageProcessorPil}, exist_ok=True)

__all__ = [
    "PRESETS",
    "AccelViTBackbone",
    "AccelViTConfig",
    "AccelViTForImageClassification",
    "AccelViTModel",
    "AccelViTPreTrainedModel",
]
