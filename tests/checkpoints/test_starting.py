"""Objectives that start at released encoders: random weights of the real classes of transformers and timm."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hf_accel import AccelViTConfig, AccelViTForImageClassification, AccelViTModel, MoCoForPreTraining
from hf_accel.checkpoints import normalisation_of, read_start
from hf_accel.models.conversion_timm import to_timm
from tests.models.test_conversion import randomised, timm_model
from tests.objectives.test_from_pretrained import CASES, CONTRASTIVE, encoders, every_objective

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
SIZES |= {"patch_size": 8}
MLP: dict[str, Any] = {"intermediate_size": 96}
DECODER: dict[str, Any] = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
DECODER |= {"decoder_intermediate_size": 32}
LABELS: dict[str, Any] = {"num_labels": 5}
FAMILIES: dict[str, tuple[Any, list[str]]] = {
    # what makes a model, and the parts that are no part of its encoder
    "accel_vit": (lambda: AccelViTModel(AccelViTConfig(**SIZES, **MLP)), []),
    "accel_vit, mean, registers": (
        lambda: AccelViTModel(AccelViTConfig(**SIZES, **MLP, pooling="mean", num_register_tokens=2)),
        [],
    ),
    "classifier of ours": (
        lambda: AccelViTForImageClassification(AccelViTConfig(**SIZES, **MLP, **LABELS)),
        ["classifier"],
    ),
    "training checkpoint": (
        lambda: MoCoForPreTraining(AccelViTConfig(**SIZES, **MLP), **CONTRASTIVE),
        ["the heads and other branches of MoCoForPreTraining"],
    ),
    "ViT": (lambda: ViTModel(ViTConfig(**SIZES, **MLP)), ["pooler"]),
    "DINO v1": (lambda: ViTModel(ViTConfig(**SIZES, **MLP, layer_norm_eps=1e-6), add_pooling_layer=False), []),
    "ViT with classifier": (lambda: ViTForImageClassification(ViTConfig(**SIZES, **MLP, **LABELS)), ["classifier"]),
    "DINOv2": (lambda: Dinov2Model(Dinov2Config(**SIZES)), ["embeddings.mask_token"]),
    "DINOv2 with classifier": (
        lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, **LABELS)),
        ["classifier", "embeddings.mask_token"],
    ),
    "DINOv2 with registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
        ["embeddings.mask_token"],
    ),
    "ViT-MAE": (lambda: ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **MLP, **DECODER)), ["decoder"]),
}


def saved(model: Any, folder: Path, processor: bool = True) -> str:
    randomised(model).save_pretrained(folder)
    if processor:
        sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
        made = BitImageProcessorPil(**sizes, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
        made.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def original(model: Any, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, and the tokens that the original's encoder makes of them at this size."""
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    encoder = getattr(model, model.base_model_prefix, model).eval()
    options: dict[str, Any] = {}
    if size != SIZES["image_size"] and "ViT" in type(encoder).__name__ and not isinstance(encoder, AccelViTModel):
        options["interpolate_pos_encoding"] = True
    if "MAE" in type(encoder).__name__:
        encoder.config.mask_ratio = 0.0
        options["noise"] = torch.arange((size // SIZES["patch_size"]) ** 2).expand(2, -1)
    return pixels, encoder(pixels, **options).last_hidden_state


def assert_equal_features(model: Any, pixels: torch.Tensor, expected: torch.Tensor) -> None:
    assert len(encoders(model)) == 2
    for encoder in encoders(model):
        with torch.no_grad():
            got = encoder.eval()(pixels).last_hidden_state
        assert got.shape == expected.shape and (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [32, 48, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_before_training_are_the_originals(tmp_path, family, size, capsys):
    make, left_out = FAMILIES[family]
    theirs = make()
    path = saved(theirs, tmp_path)
    model = MoCoForPreTraining.from_encoder(path, CONTRASTIVE, image_size=size)
    assert_equal_features(model, *original(theirs, size))
    said = capsys.readouterr().out
    assert f"left out: {', '.join(left_out)}" in said if left_out else "nothing is left out" in said
    assert (model.config.image_size, model.config.patch_size) == (size, 8)
    assert model.config.num_labels == 2 and ("stored: 32 px" in said) == (size != 32)


@pytest.mark.parametrize("form", ["folder", "pth"])
def test_timm_encoders_are_read(tmp_path, form):
    shape: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3}
    ours = randomised(AccelViTModel(AccelViTConfig(**SIZES | shape, intermediate_size=768)))
    arguments, state = to_timm(ours.config, ours.state_dict())
    theirs = timm_model(arguments, state)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.forward_features(pixels)
    config: dict[str, Any] = {"architecture": "vit_tiny_patch8_224.dino", "license": "apache-2.0"}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "config.json").write_text(json.dumps(config))

    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    if form == "folder":
        model = MoCoForPreTraining.from_encoder(tmp_path, CONTRASTIVE)
        assert model.config.image_std == pytest.approx([0.4, 0.5, 0.6], abs=1e-6)
        assert model.config.init_from["license"] == "apache-2.0"
    else:
        model = MoCoForPreTraining.from_encoder(tmp_path / "weights.pth", CONTRASTIVE, num_attention_heads=3)
    assert_equal_features(model, pixels, expected)


@every_objective
def test_every_objective_starts_all_branches(tmp_path, kind, settings):
    theirs = ViTModel(ViTConfig(**SIZES, **MLP))
    model = kind.from_encoder(saved(theirs, tmp_path), settings, pooling="mean", drop_path_rate=0.1)
    lists = {name: [*value] if isinstance(value, tuple) else value for name, value in model.settings.items()}
    assert lists | {k: [*v] if isinstance(v, tuple) else v for k, v in settings.items()} == lists
    assert (model.config.pooling, model.config.drop_path_rate) == ("mean", 0.1)
    pixels, expected = original(theirs, 32)
    for encoder in encoders(model):
        with torch.no_grad():
            output = encoder.eval()(pixels)
        assert torch.allclose(output.last_hidden_state, expected, atol=1e-4)
        assert torch.allclose(output.pooler_output, output.last_hidden_state[:, 1:].mean(1))
    assert len(encoders(model)) == 1 + kind.has_target_branch
    assert {kind for kind, _ in CASES} >= {kind}


def test_a_larger_patch_sees_the_same_at_the_matching_size(tmp_path):
    """An image that is enlarged twofold has the same tokens under patches of twice the size."""
    theirs = Dinov2Model(Dinov2Config(**SIZES))
    model = MoCoForPreTraining.from_encoder(saved(theirs, tmp_path), CONTRASTIVE, image_size=64, patch_size=16)
    pixels, expected = original(theirs, 32)
    enlarged = torch.nn.functional.interpolate(
        pixels.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 8, 8),
        scale_factor=2,
        mode="bilinear",
    )
    enlarged = enlarged.reshape(2, 4, 4, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    assert_equal_features(model, enlarged, expected)


def test_sizes_by_default_are_the_encoders_own_up_to_224(tmp_path):
    small: dict[str, Any] = {**SIZES, "num_hidden_layers": 1}
    start = read_start(saved(Dinov2Model(Dinov2Config(**{**small, "image_size": 518, "patch_size": 14})), tmp_path))
    assert (start.config.image_size, start.config.patch_size) == (224, 14)
    assert read_start(saved(ViTModel(ViTConfig(**SIZES, **MLP)), tmp_path / "vit")).config.image_size == 32


def test_normalisation_and_origin_are_the_encoders(tmp_path):
    folder = tmp_path / "released"
    path = saved(ViTModel(ViTConfig(**SIZES, **MLP)), folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    config = read_start(path).config
    assert config.image_mean == pytest.approx([0.1, 0.2, 0.3], abs=1e-6)
    assert config.image_std == pytest.approx([0.4, 0.5, 0.6], abs=1e-6)
    assert config.init_from == {
        **{"name": f"{tmp_path.name}/released", "is_on_hub": False},
        **{"kind": "vit", "license": "cc-by-nc-4.0"},
    }
    assert "license" not in read_start(path).description
    without = read_start(saved(ViTModel(ViTConfig(**SIZES, **MLP)), tmp_path / "b", processor=False))
    assert "no licence is stated: the card of the run says license: unknown" in without.description
    assert without.config.image_mean is None and "no image processor" in without.description


def test_normalisation_of_any_processor(tmp_path):
    wide = BitImageProcessorPil(
        size={"shortest_edge": 40}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[1] * 3
    )
    mean, std = normalisation_of(wide)
    assert mean == pytest.approx([0.5] * 3) and std == pytest.approx([1.0] * 3)
    mean, std = normalisation_of(BitImageProcessorPil(do_normalize=False))
    assert mean == pytest.approx([0.0] * 3) and std == pytest.approx([1.0] * 3)


def test_what_the_weights_do_not_allow_is_refused(tmp_path):
    path = saved(ViTModel(ViTConfig(**SIZES, **MLP)), tmp_path)
    with pytest.raises(ValueError, match="hidden_size=48: the checkpoint's weights were trained with hidden_size=24"):
        read_start(path, hidden_size=48)
    with pytest.raises(ValueError, match="patches of 8 pixels do not divide image_size=36"):
        read_start(path, image_size=36)


@pytest.mark.parametrize(
    "config", [{"model_type": "dinov3_vit"}, {"architecture": "vit_small_patch16_dinov3.lvd1689m"}]
)
def test_dinov3_is_refused_with_the_reason(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="DINOv3 cannot be read: it rotates queries and keys"):
        read_start(str(tmp_path))


def test_a_tensor_that_is_not_accounted_for_is_refused(tmp_path):
    model = randomised(ViTModel(ViTConfig(**SIZES, **MLP)))
    state = {**model.state_dict(), "layers.0.extra": torch.ones(2)}
    model.save_pretrained(tmp_path, state_dict=state)

    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.extra"):
        read_start(str(tmp_path))
