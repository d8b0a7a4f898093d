"""Features and attention by patch, for encoders of several kinds."""

from typing import Any

import pytest
import torch
import transformers

from hf_accel.evaluation.patches import attention_is_trained, color_patches, look_at_patches
from hf_accel.models import AccelViTConfig, AccelViTModel

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
DINOV2 = transformers.Dinov2WithRegistersConfig(**SIZES, patch_size=4, num_register_tokens=3, mlp_ratio=1)
ENCODERS: dict[str, tuple[Any, int]] = {
    "accel_vit": (lambda: AccelViTModel(AccelViTConfig(**SIZES, patch_size=4, intermediate_size=16)), 1),
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, patch_size=4, intermediate_size=16)), 1),
    "dinov2": (lambda: transformers.Dinov2WithRegistersModel(DINOV2), 4),
}
"""How to make each encoder, and the tokens before its patches."""


@pytest.mark.parametrize("name", ENCODERS)
def test_patches_follow_the_prefix_and_attention_is_that_of_cls(name):
    make, prefix = ENCODERS[name]
    torch.manual_seed(0)
    model, pixels = make().train(), torch.randn(2, 3, 16, 16)
    before = model.config._attn_implementation
    maps = look_at_patches(model, pixels)
    assert maps is not None and maps.attention is not None
    assert model.training and model.config._attn_implementation == before
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(pixel_values=pixels, output_attentions=True)
    for row in range(4):
        for column in range(4):
            token = prefix + 4 * row + column
            assert torch.allclose(maps.features[:, row, column], outputs.last_hidden_state[:, token], atol=1e-5)
            weights = outputs.attentions[-1][:, :, 0, token]
            assert torch.allclose(maps.attention[:, :, row, column], weights, atol=1e-5)


def test_a_patch_size_that_does_not_divide_the_image_has_its_own_grid():
    model = ENCODERS["accel_vit"][0]()
    maps = look_at_patches(model, torch.randn(1, 3, 16, 16), patch_size=6)
    assert maps is not None and maps.features.shape == (1, 3, 3, 16)


def test_feature_maps_have_patches_and_no_attention():
    config = transformers.ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1], image_size=32)
    model = transformers.ConvNextModel(config)
    pixels = torch.randn(1, 3, 64, 32)
    maps = look_at_patches(model, pixels)
    assert maps is not None and maps.attention is None and maps.features.shape == (1, 2, 1, 10)
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).last_hidden_state
    assert torch.allclose(maps.features[0, 1, 0], expected[0, :, 1, 0], atol=1e-5)


def test_attention_counts_where_the_feature_comes_from_cls():
    config = AccelViTConfig(**SIZES, patch_size=4, intermediate_size=16)
    assert attention_is_trained(AccelViTModel(config))
    config.pooling = "mean"
    assert not attention_is_trained(AccelViTModel(config))


def test_like_patches_have_like_colours_at_every_patch_size():
    torch.manual_seed(0)
    kinds = torch.randn(3, 8) * torch.tensor([[1.0], [2.0], [3.0]])
    fine = kinds[torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 1, 1], [2, 2, 0, 0]])][None]
    coarse = kinds[torch.tensor([[0, 1], [2, 1]])][None] + 5  # another patch size, with an offset of its own
    colors = color_patches([fine, coarse])
    assert [image.shape for image in colors] == [(1, 4, 4, 3), (1, 2, 2, 3)]
    assert all(image.min() >= 0 and image.max() <= 1 for image in colors)
    assert torch.allclose(colors[0][0, 0, 0], colors[0][0, 3, 3], atol=1e-5)
    distance = (colors[0][0, 0, 0] - colors[0][0, 0, 2]).abs().max()
    assert distance > 0.3
    assert (colors[1][0, 0, 0] - colors[1][0, 0, 1]).abs().max() > 0.3
