"""Test the feature of an image for any encoder: CLS, or the mean of patches or map; unclear outputs are refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaModel,
    PvtConfig,
    PvtModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_accel.evaluation import extract_features, load_encoder
from hf_accel.evaluation.pooling import pool

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 4,
}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def features(model: nn.Module, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    return extract_features(model, [{"pixel_values": pixels, "labels": torch.arange(len(pixels))}], "cpu")[0]


def tokens(model: Any, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixels).last_hidden_state


def test_mae_is_evaluated_on_all_its_patches(tmp_path):
    model = ViTMAEModel(ViTMAEConfig(**SIZES))
    model.save_pretrained(tmp_path)
    loaded = load_encoder(str(tmp_path))
    model.config.mask_ratio = 0.0
    assert tokens(loaded).shape[1] == 17
    torch.testing.assert_close(features(loaded), tokens(model)[:, 0], rtol=1e-4, atol=1e-5)


class DroppingViT(ViTModel):
    """Drops features at random even in eval mode."""

    def forward(self, pixel_values):
        outputs: Any = super().forward(pixel_values)
        outputs.last_hidden_state *= torch.rand(outputs.last_hidden_state.shape).round()
        return outputs


def test_features_that_depend_on_a_draw_are_refused():
    with pytest.raises(ValueError, match="DroppingViT gives other features of the same image each time"):
        features(DroppingViT(ViTConfig(**SIZES), add_pooling_layer=False))


def test_a_part_of_the_patches_is_refused():
    with pytest.raises(ValueError, match=r"^ViTMAEModel gives 5 tokens for an image of 16 patches"):
        features(ViTMAEModel(ViTMAEConfig(**SIZES)))


@pytest.mark.parametrize("size", [16, 24])
def test_an_encoder_without_cls_gives_the_mean_of_its_patches(size):
    model, pixels = IJepaModel(IJepaConfig(**{**SIZES, "image_size": size})), torch.randn(2, 3, size, size)
    torch.testing.assert_close(features(model, pixels), tokens(model, pixels).mean(1))


def test_cls_stands_first_among_other_prefix_tokens():
    vit = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)
    torch.testing.assert_close(features(vit), tokens(vit)[:, 0])
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES))
    torch.testing.assert_close(features(registers), tokens(registers)[:, 0])


def test_a_hierarchical_encoder_with_cls_gives_it():
    sizes = {"image_size": 32, "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    model = PvtModel(PvtConfig(**sizes))
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(features(model, pixels), tokens(model, pixels)[:, 0])


def outputs(*shape: int) -> Any:
    return SimpleNamespace(last_hidden_state=torch.randn(*shape))


def test_a_hierarchical_encoder_without_cls_gives_the_mean():
    model: Any = nn.Module()
    model.config = SimpleNamespace(depths=[1, 1], patch_size=4)
    found = outputs(2, 4, 8)
    assert torch.equal(pool(found, model, (16, 16)), found.last_hidden_state.mean(1))


def test_a_map_is_averaged_over_its_two_sides():
    first, last = outputs(2, 8, 4, 4), outputs(2, 4, 4, 8)
    assert torch.equal(pool(first, nn.Module(), (16, 16)), first.last_hidden_state.mean((2, 3)))
    assert torch.equal(pool(last, nn.Module(), (16, 16)), last.last_hidden_state.mean((1, 2)))


@pytest.mark.parametrize(
    "count, config, message",
    [
        (7, SimpleNamespace(patch_size=4), "7 tokens for an image of 16 patches"),
        (20, SimpleNamespace(patch_size=4), "20 tokens for an image of 16 patches"),
        (100, SimpleNamespace(num_queries=100), "unknown"),
    ],
    ids=["a part of the patches", "more than the patches", "queries of a detector"],
)
def test_tokens_of_unknown_meaning_are_refused(count, config, message):
    model: Any = nn.Module()
    model.config = config
    with pytest.raises(ValueError, match=message):
        pool(outputs(2, count, 8), model, (16, 16))


def test_outputs_without_features_are_refused():
    with pytest.raises(ValueError, match="neither pooler_output nor last_hidden_state"):
        pool(SimpleNamespace(pred_masks=torch.zeros(2, 4)), nn.Module(), (16, 16))


def test_a_model_that_takes_no_image_alone_is_named():
    with pytest.raises(ValueError, match=r"VideoMAEModel takes videos, not single images: name an image encoder$"):
        features(VideoMAEModel(VideoMAEConfig(**SIZES, num_frames=2)))
    with pytest.raises(ValueError, match=r"ViTModel gives no feature of a single image \(3, 24, 24\): .*size"):
        features(ViTModel(ViTConfig(**SIZES)), torch.zeros(1, 3, 24, 24))


def test_diverged_features_are_not_called_random():
    model = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)
    torch.nn.init.constant_(model.embeddings.cls_token, float("nan"))
    assert features(model).isnan().all()
