"""The smallest encoder that has everything: a grid of 4 x 4 patches, and heads."""

from typing import Any

from hf_accel import AccelViTConfig, AccelViTModel


def tiny_config(**overrides: Any) -> AccelViTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return AccelViTConfig(**{**sizes, "image_size": 32, "patch_size": 8, **overrides})


def tiny(**overrides: Any) -> AccelViTModel:
    return AccelViTModel(tiny_config(**overrides)).eval()
