"""Test conversions against the real classes of transformers and timm, with random weights in every tensor."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel

from hf_accel import AccelViTConfig, AccelViTForImageClassification, AccelViTModel
from hf_accel.models import conversion
from hf_accel.models.conversion import from_dinov2, from_vit, to_dinov2, to_vit, with_learned_positions
from hf_accel.models.conversion_timm import from_timm, to_timm
from tests.real_timm import real_timm

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned": {"position_embedding_type": "learned", "patch_size": 4},
    "layerscale, no qkv_bias": {"layerscale_value": 0.1, "qkv_bias": False, "layer_norm_eps": 1e-6},
    "mean": {"pooling": "mean", "num_hidden_layers": 1},
    "other shape": {"hidden_size": 32, "num_attention_heads": 2, "image_size": 24, "num_channels": 1},
}
REGISTERS: dict[str, dict[str, Any]] = {
    "registers": {"num_register_tokens": 3},
    "registers, learned, layerscale": {
        "num_register_tokens": 2,
        "position_embedding_type": "learned",
        "layerscale_value": 1.0,
    },
    "registers, no CLS": {"num_register_tokens": 2, "use_cls_token": False, "pooling": "mean"},
    "no prefix": {"use_cls_token": False, "pooling": "mean", "position_embedding_type": "learned"},
}


def randomised(model: Any) -> Any:
    """Randomise every parameter: at initialisation many are 0 or 1, so that swapping two would not be noticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def accel(kind: type[nn.Module] = AccelViTModel, **fields: Any) -> Any:
    fields = {**SIZES, "patch_size": 8, **fields}
    return randomised(kind(AccelViTConfig(**{"intermediate_size": 4 * fields["hidden_size"], **fields})))


def loaded(model: Any, state: dict[str, torch.Tensor]) -> Any:
    model.load_state_dict(state, strict=True)
    return model.eval()


def pixels_for(config: AccelViTConfig) -> torch.Tensor:
    size = (3, config.num_channels, config.image_size, config.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(model: Any, other: Any, config: AccelViTConfig, **options: Any) -> None:
    """Compare last_hidden_state and pooler_output, or logits, to a relative 1e-5."""
    pixels = pixels_for(config)
    outputs, expected = other(pixels), model(pixels, **options)
    for name, wanted in expected.items():
        if name != "pooler_output" or config.pooling == "cls":
            difference = (outputs[name] - wanted).abs().max() / wanted.abs().max()
            assert difference <= 1e-5, (name, float(difference))


def timm_model(arguments: dict[str, Any], state: dict[str, torch.Tensor] | None = None) -> Any:
    model = real_timm().models.VisionTransformer(**arguments)
    return randomised(model) if state is None else loaded(model, state)


@torch.no_grad()
def assert_same_as_timm(model: Any, other: Any, config: AccelViTConfig, **options: Any) -> None:
    pixels = pixels_for(config)
    tokens, expected = other.forward_features(pixels), model(pixels, **options)
    pooled = other.forward_head(tokens, pre_logits=True)
    for got, wanted in ((tokens, expected.last_hidden_state), (pooled, expected.pooler_output)):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# From ours


@pytest.mark.parametrize("patch_size", [None, 8])
@pytest.mark.parametrize("fields", OURS.values(), ids=OURS)
@pytest.mark.parametrize("target", ["vit", "dinov2"])
def test_converted_to_transformers_features_are_equal(
    target: str, fields: dict[str, Any], patch_size: int | None
) -> None:
    model = accel(**{"patch_size": 4 if patch_size else 8, **fields})
    convert, kind = {"vit": (to_vit, ViTModel), "dinov2": (to_dinov2, Dinov2Model)}[target]
    config, state = convert(model.config, model.state_dict(), patch_size)
    assert config.patch_size == (patch_size or model.config.patch_size)
    assert_same(model, loaded(kind(config), state), model.config, patch_size=patch_size)


@pytest.mark.parametrize("patch_size", [None, 16])
@pytest.mark.parametrize("fields", [*OURS.values(), *REGISTERS.values()], ids=[*OURS, *REGISTERS])
def test_converted_to_timm_features_are_equal(fields: dict[str, Any], patch_size: int | None) -> None:
    model = accel(**{**fields, "image_size": 48})
    assert_same_as_timm(
        model, timm_model(*to_timm(model.config, model.state_dict(), patch_size)), model.config, patch_size=patch_size
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_classifier_stays_one(pooling: str) -> None:
    model = accel(AccelViTForImageClassification, num_labels=5, id2label={n: f"class {n}" for n in range(5)})
    model.config.pooling = model.encoder.config.pooling = pooling
    pixels = pixels_for(model.config)
    timm_classifier = timm_model(*to_timm(model.config, model.state_dict()))
    with torch.no_grad():
        assert (timm_classifier(pixels) - model(pixels).logits).abs().max() <= 1e-5
    if pooling == "mean":
        with pytest.raises(ValueError, match="ViT cannot express a classifier on the mean"):
            to_vit(model.config, model.state_dict())
        return
    config, state = to_vit(model.config, model.state_dict())
    assert config.id2label == model.config.id2label
    assert_same(model, loaded(ViTForImageClassification(config), state), model.config)


def test_learned_positions_are_the_same_encoder() -> None:
    model = accel(num_register_tokens=2, patch_size=4)
    config, state = with_learned_positions(model.config, model.state_dict(), 16)
    assert (config.patch_size, config.position_embedding_type) == (16, "learned")
    assert_same(model, loaded(AccelViTModel(config), state), model.config, patch_size=16)
    with pytest.raises(ValueError, match="image_size 32 must be a multiple of patch_size 12"):
        with_learned_positions(model.config, model.state_dict(), 12)


def test_pooler_of_vit_is_replaced_by_cls_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our pooler is CLS, and so is the one that a conversion to ViT writes. Another one is left out with a warning."""
    said: list[str] = []
    monkeypatch.setattr(conversion.logger, "warning", said.append)
    model = accel()
    config, state = to_vit(model.config, model.state_dict())
    from_vit(config, state)
    assert not said
    from_vit(config, {**state, "pooler.dense.bias": torch.ones(24)})
    assert len(said) == 1 and "pooler.dense.* is left out" in said.pop()
    mean = accel(pooling="mean")
    for convert in (to_vit, to_dinov2):
        convert(mean.config, mean.state_dict())
        assert "last_hidden_state[:, 1:].mean(1)" in said.pop()


# To ours


VITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "no pooler, mask token": ({}, {"add_pooling_layer": False, "use_mask_token": True}),
    "other shape": ({"qkv_bias": False, "patch_size": [4, 4], "image_size": (32, 32), "hidden_act": "relu"}, {}),
}


@pytest.mark.parametrize("fields, options", VITS.values(), ids=VITS)
def test_converted_from_vit_features_are_equal(fields: dict[str, Any], options: dict[str, Any]) -> None:
    config = ViTConfig(**{**SIZES, "patch_size": 8, "intermediate_size": 40, **fields})
    model = randomised(ViTModel(config, **options))
    ours, state = from_vit(config, model.state_dict())
    converted = loaded(AccelViTModel(ours), state)
    assert ours.layer_norm_eps == 1e-12
    with torch.no_grad():
        pixels = pixels_for(ours)
        expected, got = model(pixels).last_hidden_state, converted(pixels)
    assert (got.last_hidden_state - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(got.pooler_output, got.last_hidden_state[:, 0])


def test_from_a_vit_classifier() -> None:
    labels: dict[str, Any] = {"num_labels": 7}
    config = ViTConfig(**SIZES, patch_size=8, intermediate_size=40, **labels)
    model = randomised(ViTForImageClassification(config))
    ours, state = from_vit(config, model.state_dict())
    assert ours.num_labels == 7
    assert_same(loaded(AccelViTForImageClassification(ours), state), model, ours)


@pytest.mark.parametrize("fields", [{}, {"use_mask_token": False, "qkv_bias": False, "mlp_ratio": 2, "patch_size": 4}])
def test_converted_from_dinov2_features_are_equal(fields: dict[str, Any]) -> None:
    config = Dinov2Config(**{**SIZES, "patch_size": 8, "layerscale_value": 0.5, **fields})
    model = randomised(Dinov2Model(config))
    ours, state = from_dinov2(config, model.state_dict())
    assert_same(loaded(AccelViTModel(ours), state), model, ours)


TIMM: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "registers without positions": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "mean": {"global_pool": "avg", "fc_norm": False, "qkv_bias": False},
    "no CLS": {"class_token": False, "global_pool": "avg", "fc_norm": False, "mlp_ratio": 2.5},
    "no CLS, registers": {"class_token": False, "reg_tokens": 3, "global_pool": "avg", "fc_norm": False},
    "classifier": {"num_classes": 6},
}


@pytest.mark.parametrize("arguments", TIMM.values(), ids=TIMM)
def test_converted_from_timm_features_are_equal(arguments: dict[str, Any]) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm_model({**sizes, **arguments})
    config, state = from_timm(model.state_dict(), 3, arguments.get("global_pool", "token"))
    if "num_classes" in arguments:
        classifier = loaded(AccelViTForImageClassification(config), state)
        pixels = pixels_for(config)
        with torch.no_grad():
            assert (classifier(pixels).logits - model(pixels)).abs().max() <= 1e-5
    else:
        assert_same_as_timm(loaded(AccelViTModel(config), state), model, config)


def test_conversion_there_and_back_changes_nothing() -> None:
    fields = {"position_embedding_type": "learned", "layerscale_value": 0.5}
    model = accel(**fields)
    heads = model.config.num_attention_heads
    for config, state in (
        from_dinov2(*to_dinov2(model.config, model.state_dict())),
        from_timm(to_timm(model.config, model.state_dict())[1], heads),
    ):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        ignored = {"layerscale_value", "dtype", "_name_or_path", "auto_map", "architectures"}
        ours, theirs = model.config.to_dict(), config.to_dict()
        assert {k: v for k, v in theirs.items() if k not in ignored} == {k: ours[k] for k in theirs if k not in ignored}


# What is refused


def from_timm_3(_: Any, state: dict[str, torch.Tensor]) -> Any:
    return from_timm(state, 3)


def sources() -> list[tuple[Callable[..., Any], Any, dict[str, torch.Tensor]]]:
    model = accel(layerscale_value=0.1)
    vit = accel(AccelViTForImageClassification)
    vit_model = accel()
    return [
        (to_vit, model.config, model.state_dict()),
        (to_dinov2, model.config, model.state_dict()),
        (to_timm, vit.config, vit.state_dict()),
        (from_vit, *to_vit(vit.config, vit.state_dict())),
        (from_vit, *to_vit(vit_model.config, vit_model.state_dict())),
        (from_dinov2, *to_dinov2(model.config, model.state_dict())),
        (from_timm_3, *to_timm(model.config, model.state_dict())),
    ]


@pytest.mark.parametrize(
    "number", range(7), ids=["to vit", "to dinov2", "to timm", "vit, labels", "vit", "dinov2", "timm"]
)
def test_every_tensor_is_accounted_for(number: int) -> None:
    """Each tensor in turn is missing or has another shape; then there is one too many."""
    convert, config, state = sources()[number]
    convert(config, state)
    for name, tensor in state.items():
        without = {key: value for key, value in state.items() if key != name}
        told = "17 positions and 0 prefix tokens" if name == "cls_token" else re.escape(name)
        with pytest.raises(ValueError, match=told):
            convert(config, without)
        # timm's sizes follow from these tensors
        if number != 6 or name not in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
            with pytest.raises(ValueError, match=re.escape(name)):
                convert(config, {**state, name: tensor[..., None]})
    with pytest.raises(ValueError, match=r"unknown: layers\.9\.mlp\.fc1\.weight"):
        convert(config, {**state, "layers.9.mlp.fc1.weight": torch.zeros(3)})


OUR_REFUSALS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "vit, registers": (to_vit, {"num_register_tokens": 2}, "ViT cannot express register tokens"),
    "vit, no CLS": (to_vit, {"use_cls_token": False, "pooling": "mean"}, "ViT cannot express a model without CLS"),
    "dinov2, registers": (to_dinov2, {"num_register_tokens": 2}, "DINOv2 cannot express register tokens"),
    "dinov2, MLP": (to_dinov2, {"intermediate_size": 40}, "intermediate_size 40, no multiple of hidden_size 24"),
    "timm, activation": (to_timm, {"hidden_act": "relu"}, "timm cannot express hidden_act 'relu'"),
    "timm, epsilon": (to_timm, {"layer_norm_eps": 1e-12}, "timm cannot express layer_norm_eps 1e-12"),
}


@pytest.mark.parametrize("convert, fields, message", OUR_REFUSALS.values(), ids=OUR_REFUSALS)
def test_what_the_target_lacks_is_refused(convert: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
    model = accel(**fields)
    with pytest.raises(ValueError, match=message):
        convert(model.config, model.state_dict())


def test_dinov2_has_another_classifier() -> None:
    model = accel(AccelViTForImageClassification)
    with pytest.raises(ValueError, match="DINOv2 cannot express a classifier on pooler_output"):
        to_dinov2(model.config, model.state_dict())


TIMM_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "pre_norm": ({"pre_norm": True}, "cannot express a LayerNorm before the first layer"),
    "fc_norm": ({"global_pool": "avg"}, "cannot express a LayerNorm after pooling"),
    "map": ({"global_pool": "map"}, "cannot express attention pooling"),
    "qk_norm": ({"qk_norm": True}, "cannot express normalised queries and keys"),
    "no positions": ({"pos_embed": "none"}, "pos_embed is missing"),
    "grid, as many as 3 x 3 with CLS": ({"img_size": (32, 16)}, "the grid of patches is not square"),
    "patch": ({"patch_size": (8, 16), "img_size": (32, 64)}, "square base patches"),
    "ambiguous": ({"reg_tokens": 4, "img_size": 24, "no_embed_class": True}, "say no_embed_class=True or False"),
}


@pytest.mark.parametrize("arguments, message", TIMM_REFUSALS.values(), ids=TIMM_REFUSALS)
def test_what_we_lack_of_timm_is_refused(arguments: dict[str, Any], message: str) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    state = timm_model({**sizes, **arguments}).state_dict()
    with pytest.raises(ValueError, match=message):
        from_timm(state, 3)


def test_what_we_lack_of_transformers_is_refused() -> None:
    swiglu = Dinov2Config(**SIZES, patch_size=8, use_swiglu_ffn=True)
    with pytest.raises(ValueError, match="use_swiglu_ffn=True"):
        from_dinov2(swiglu, Dinov2Model(swiglu).state_dict())
    oblong = ViTConfig(**{**SIZES, "image_size": (32, 16)}, patch_size=8, intermediate_size=40)
    with pytest.raises(ValueError, match=r"image_size=\(32, 16\)"):
        from_vit(oblong, ViTModel(oblong).state_dict())
    with pytest.raises(ValueError, match="global_pool='max'"):
        from_timm({}, 3, "max")
