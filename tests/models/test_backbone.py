"""Test the feature maps of AccelViTBackbone, which hold the tokens of chosen layers at the places of their patches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, Dinov2Backbone
from transformers.models.auto import auto_factory

from hf_accel import AccelViTBackbone, AccelViTForImageClassification, AccelViTModel
from hf_accel.models.conversion import to_dinov2
from tests.models.tiny import tiny_config


def backbone(**overrides: Any) -> Any:
    """Return a backbone whose last LayerNorm is not the identity."""
    model = AccelViTBackbone(tiny_config(num_hidden_layers=3, **overrides)).eval()
    nn.init.normal_(model.layernorm.weight)
    return model


@torch.no_grad()
def test_maps_are_the_tokens_of_the_encoder() -> None:
    """The image is not square, the call names a patch size, and CLS and registers are skipped."""
    model = backbone(num_register_tokens=2, out_features=["stem", "stage2", "stage3"])
    pixels = torch.randn(2, 3, 32, 48)
    encoder = AccelViTModel(model.config).eval()
    encoder.load_state_dict(model.state_dict())
    tokens = encoder(pixels, patch_size=16, output_hidden_states=True)
    maps = model(pixels, patch_size=16).feature_maps
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 16, 2, 3)] * 3
    for stage, feature_map in zip((0, 2, 3), maps, strict=True):
        hidden = encoder.layernorm(tokens.hidden_states[stage])
        for row in range(2):
            for column in range(3):
                assert torch.allclose(feature_map[:, :, row, column], hidden[:, 3 + 3 * row + column], atol=1e-6)
    assert torch.allclose(maps[-1].flatten(2).transpose(1, 2), tokens.last_hidden_state[:, 3:], atol=1e-6)


@torch.no_grad()
def test_feature_maps_equal_those_of_dinov2s_backbone() -> None:
    model = backbone(out_indices=[1, 3])
    dinov2, state = to_dinov2(model.config, model.state_dict())
    dinov2.out_indices = [1, 3]
    theirs: Any = Dinov2Backbone(dinov2)
    theirs.load_state_dict(state)
    pixels = torch.randn(2, 3, 32, 32)
    expected, got = theirs.eval()(pixels), model(pixels)
    assert (
        (model.channels, model.out_features)
        == (theirs.channels, theirs.out_features)
        == ([16, 16], theirs.out_features)
    )
    for one, other in zip(got.feature_maps, expected.feature_maps, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() <= 1e-5 * other.abs().max()


@torch.no_grad()
def test_maps_of_sides_that_the_patch_does_not_divide() -> None:
    model = backbone()
    assert model(torch.randn(1, 3, 36, 45)).feature_maps[0].shape == (1, 16, 5, 6)  # resized to 40 x 48
    assert model(torch.randn(1, 3, 32, 32), patch_size=32).feature_maps[0].shape == (1, 16, 1, 1)


@torch.no_grad()
def test_hidden_states_on_request_and_gradients() -> None:
    model = backbone()
    pixels = torch.randn(1, 3, 32, 32)
    assert model(pixels).hidden_states is None
    assert len(model(pixels, output_hidden_states=True).hidden_states) == 4
    assert isinstance(model(pixels, return_dict=False)[0], tuple)
    with torch.enable_grad():
        model(pixels).feature_maps[0].square().sum().backward()
    assert model.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_loads_from_any_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = AccelViTForImageClassification(tiny_config(num_hidden_layers=3, num_labels=3))
    classifier.save_pretrained(tmp_path / "classifier")
    classifier.encoder.save_pretrained(tmp_path / "encoder")
    pixels = torch.randn(1, 3, 32, 32)
    expected = classifier.encoder.eval()(pixels).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    load: Any = AccelViTBackbone.from_pretrained
    for name in ("classifier", "encoder"):
        model, report = load(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"]
        assert torch.allclose(model(pixels).feature_maps[0], expected, atol=1e-6)
    chosen = load(tmp_path / "encoder", out_features=["stage1", "stage3"], patch_size=16)
    assert [feature_map.shape[-1] for feature_map in chosen(pixels).feature_maps] == [2, 2]
    chosen.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").out_indices == [1, 3]
    assert type(AutoBackbone.from_config(chosen.config)) is AccelViTBackbone
    # AutoBackbone treats a local folder as the name of a timm model and asks the Hub for this repository
    monkeypatch.setattr(auto_factory, "hf_api", lambda: SimpleNamespace(repo_exists=lambda _: True))
    found = AutoBackbone.from_pretrained(tmp_path / "encoder")
    assert type(found) is AccelViTBackbone
    assert torch.allclose(found(pixels).feature_maps[0], expected, atol=1e-6)


def test_a_stage_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"out_features must be a subset of stage_names.*stage9"):
        tiny_config(out_features=["stage9"])
