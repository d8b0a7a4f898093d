"""Test the configuration: what it refuses, what it derives, and the presets."""

import re
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

from hf_accel import PRESETS, AccelViTConfig, AccelViTModel
from hf_accel.models.configuration_accel_vit import CHANGEABLE_AT_LOAD


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 18, "num_attention_heads": 3}, "hidden_size 18 must be a multiple of 4.*'learned'"),
        ({"hidden_size": 20, "num_attention_heads": 3}, "hidden_size 20 must be a multiple of num_attention_heads 3"),
        ({"image_size": 100, "patch_size": 16}, "image_size 100 must be a multiple of patch_size 16"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"hidden_act": "gelo"}, "hidden_act must be one of .*gelu.*, got 'gelo'"),
        ({"use_cls_token": False}, "pooling='cls' needs use_cls_token=True.*pooling='mean'"),
        ({"num_register_tokens": -1}, "num_register_tokens must be 0 or more, got -1"),
        (
            {"default_patch_size": 0},
            "default_patch_size must be a positive whole number of pixels, got 0; None .* base",
        ),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
    ],
)
def test_an_impossible_combination_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccelViTConfig(**fields)


@pytest.mark.parametrize(
    "fields", [{"pooling": "max"}, {"position_embedding_type": "rope"}, {"patch_size": "16"}, {"hidden_size": 3.5}]
)
def test_a_wrong_type_or_choice_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        AccelViTConfig(**fields)


def test_hidden_size_is_free_with_learned_positions() -> None:
    assert AccelViTConfig(hidden_size=18, num_attention_heads=3, position_embedding_type="learned").hidden_size == 18


def test_prefix_tokens_and_grid() -> None:
    assert AccelViTConfig().num_prefix_tokens == 1
    assert AccelViTConfig(num_register_tokens=4).num_prefix_tokens == 5
    assert AccelViTConfig(use_cls_token=False, pooling="mean", num_register_tokens=2).num_prefix_tokens == 2
    assert AccelViTConfig(image_size=240).grid_size == 15


@pytest.mark.parametrize(
    "name, heads, millions",
    [("vit_tiny", 3, 5.5), ("vit_small", 12, 21.6), ("vit_base", 12, 85.6), ("vit_large", 16, 303.1)],
)
def test_presets_have_the_sizes_of_the_papers(name: str, heads: int, millions: float) -> None:
    config = PRESETS[name]()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AccelViTModel(config).parameters())
    assert config.num_attention_heads == heads
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_presets_take_overrides() -> None:
    config = PRESETS["vit_small"](image_size=240, num_attention_heads=6)
    assert (config.hidden_size, config.image_size, config.num_attention_heads) == (384, 240, 6)


def test_roundtrip() -> None:
    fields: dict[str, Any] = {"layerscale_value": 1e-5, "drop_path_rate": 0, "pooling": "mean", "num_labels": 7}
    config = AccelViTConfig(**fields)
    assert config.to_dict() != AccelViTConfig().to_dict() and config.num_labels == 7
    assert AccelViTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("size", [0, -8, "16", 8.0, True])
@pytest.mark.parametrize("name, stored", [("patch_size", 8), ("image_size", 224)])
def test_an_impossible_size_at_load_time_is_named(name: str, stored: int, size: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} .* got {size!r}; leave it out, or give None, .*, {stored}"):
        AccelViTConfig.from_dict(AccelViTConfig(patch_size=8).to_dict(), **{name: size})


OTHER_VALUES: dict[str, Any] = {
    **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
    **{"hidden_act": "relu", "layer_norm_eps": 1e-12, "num_channels": 1, "qkv_bias": False, "use_cls_token": False},
    **{"num_register_tokens": 4, "position_embedding_type": "learned", "layerscale_value": 0.1},
    **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}
"""Values for the fields that decide what a checkpoint's weights compute."""


def test_every_field_is_changeable_at_load_or_is_not() -> None:
    fields = {name for name in AccelViTConfig.__annotations__ if not name.startswith("_")}
    assert fields == {*OTHER_VALUES, *CHANGEABLE_AT_LOAD, "image_size", "patch_size"}


@pytest.mark.parametrize("name, value", OTHER_VALUES.items())
def test_what_was_trained_is_not_changed_at_load(name: str, value: Any) -> None:
    stored = AccelViTConfig(pooling="mean")
    message = rf"{name}={re.escape(repr(value))}: .* trained with {name}={getattr(stored, name)!r}.*Leave {name} out"
    with pytest.raises(ValueError, match=message):
        AccelViTConfig.from_dict(stored.to_dict(), **{name: value})
    both = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if name.startswith("image_") else {}
    other = AccelViTConfig(**{"pooling": "mean", name: value, **both})
    assert getattr(AccelViTConfig.from_dict(other.to_dict(), **{name: value}), name) == value
    # a file holds only values that differ from the default
    with pytest.raises(ValueError, match=message):
        AccelViTConfig.from_dict({"pooling": "mean"}, **{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"pooling": "mean"},
        {"default_patch_size": 32},
        {"drop_path_rate": 0.1, "freeze_patch_projection": True},
        {"initializer_range": 0.1, "num_labels": 7, "out_indices": [1], "output_attentions": True},
    ],
)
def test_what_was_not_trained_can_be_changed_at_load(fields: dict[str, Any]) -> None:
    config: Any = AccelViTConfig.from_dict(AccelViTConfig().to_dict(), return_unused_kwargs=True, stray=1, **fields)
    assert {name: getattr(config[0], name) for name in fields} == fields and config[1] == {"stray": 1}


def test_changes_at_load_are_checked_as_a_configuration_is() -> None:
    stored = AccelViTConfig(use_cls_token=False, pooling="mean").to_dict()
    with pytest.raises(ValueError, match="pooling='cls' needs use_cls_token=True"):
        AccelViTConfig.from_dict(stored, pooling="cls")
    with pytest.raises(ValueError, match="drop_path_rate must lie in"):
        AccelViTConfig.from_dict(stored, drop_path_rate=2.0)


def test_pooling_of_a_trained_classifier_is_fixed_at_load() -> None:
    stored = {**AccelViTConfig().to_dict(), "architectures": ["AccelViTForImageClassification"]}
    with pytest.raises(ValueError, match=r"pooling='mean': .* trained with pooling='cls'"):
        AccelViTConfig.from_dict(stored, pooling="mean")
