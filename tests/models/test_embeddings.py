"""Test embeddings whose weights other libraries have offloaded, wrapped, replaced or parametrised."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import parametrize

from hf_accel import AccelViTForImageClassification
from hf_accel.models.embeddings_accel_vit import AccelViTPatchProjection
from tests.models.tiny import tiny

CALLS = [(None, 0.0), (16, 0.0), (4, 0.0), (8, 0.5), (12, 0.5)]
"""Patch sizes and token dropouts."""


def features(model: nn.Module, patch_size: int | None, token_dropout: float) -> torch.Tensor:
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    return model(images, patch_size, token_dropout, torch.Generator().manual_seed(2)).last_hidden_state


def assert_equal_features(model: nn.Module, expected: nn.Module) -> None:
    for call in CALLS:
        torch.testing.assert_close(features(model, *call), features(expected, *call), rtol=0, atol=2e-5, msg=str(call))


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_offloaded_weights(kind: str) -> None:
    """`device_map` does the same if memory is short: weights exist only while their module is called."""
    model = tiny(position_embedding_type=kind)
    offloaded: Any = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_equal_features(offloaded, model)


class LoRA(nn.Module):
    """LoRA as in peft, where the two adapters of a convolution have its class."""

    def __init__(self, base: Any):
        super().__init__()
        self.base_layer = base
        self.lora_A = type(base)(base.in_channels, 4, base.kernel_size, base.stride, bias=False)
        self.lora_B = type(base)(4, base.out_channels, (1, 1), (1, 1), bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_lora_on_the_patch_projection_is_its_merged_kernel(kind: str) -> None:
    """This holds at other patch sizes and under token dropout, and the adapters get gradients."""
    model = tiny(position_embedding_type=kind)
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    lora = LoRA(adapted.embeddings.patch_embeddings.projection)
    adapted.embeddings.patch_embeddings.projection = lora  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        delta = torch.einsum("dr,rchw->dchw", lora.lora_B.weight[..., 0, 0], lora.lora_A.weight)
        merged.embeddings.patch_embeddings.projection.weight += delta
    assert_equal_features(adapted, merged)
    features(adapted, 16, 0.5).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.parameters())


def test_a_parametrised_kernel() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = tiny()
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        doubled.embeddings.patch_embeddings.projection.weight *= 2
    parametrize.register_parametrization(model.embeddings.patch_embeddings.projection, "weight", Double())
    assert_equal_features(model, doubled)


def test_the_projection_alone_is_a_convolution() -> None:
    projection = AccelViTPatchProjection(3, 16, 8, 8)
    images = torch.randn(2, 3, 32, 48)
    expected = nn.functional.conv2d(images, projection.weight, projection.bias, stride=8)
    assert torch.equal(projection(images), expected)
    assert torch.equal(projection(images, 8), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_positions_stay_when_the_config_changes_image_size(kind: str) -> None:
    model = AccelViTForImageClassification(tiny(position_embedding_type=kind).config).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images).logits
    model.config.image_size = 64
    assert torch.equal(model(images).logits, expected)
