"""Test encoder and classifier: equality with transformers' ViT for the same architecture, and each option."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_accel import AccelViTConfig, AccelViTForImageClassification, AccelViTModel
from hf_accel.models.modeling_accel_vit import AccelViTDropPath

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def config(**overrides: Any) -> AccelViTConfig:
    return AccelViTConfig(**{**SIZES, **overrides})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_features_are_those_of_vit_bit_for_bit(attention: str, qkv_bias: bool) -> None:
    fields: dict[str, Any] = {**SIZES, "qkv_bias": qkv_bias, "attn_implementation": attention}
    vit = ViTModel(ViTConfig(**fields, layer_norm_eps=1e-6), add_pooling_layer=False).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = AccelViTModel(
        config(position_embedding_type="learned", qkv_bias=qkv_bias, attn_implementation=attention)
    ).eval()
    model.load_state_dict(vit.state_dict(), strict=True)
    vit.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32)
    expected, output = vit(images, output_hidden_states=True), model(images, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.pooler_output, expected.last_hidden_state[:, 0])
    assert len(output.hidden_states) == len(expected.hidden_states) == 4
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images).last_hidden_state, vit(images).last_hidden_state)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "mean pooling": {"pooling": "mean"},
    "no CLS": {"use_cls_token": False, "pooling": "mean"},
    "registers": {"num_register_tokens": 3},
    "registers, no CLS": {"num_register_tokens": 3, "use_cls_token": False, "pooling": "mean"},
    "learned positions": {"position_embedding_type": "learned"},
    "learned positions, no CLS": {"position_embedding_type": "learned", "use_cls_token": False, "pooling": "mean"},
    "LayerScale": {"layerscale_value": 0.5},
    "stochastic depth": {"drop_path_rate": 0.2},
    "no qkv bias": {"qkv_bias": False},
    "relu": {"hidden_act": "relu"},
    "one channel": {"num_channels": 1},
    "eager": {"attn_implementation": "eager"},
    "frozen projection": {"freeze_patch_projection": True},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_every_option_forwards_and_backwards(fields: dict[str, Any]) -> None:
    model = AccelViTModel(config(**fields)).train()
    images = torch.randn(8, model.config.num_channels, 32, 48)
    prefix = model.config.num_prefix_tokens
    for patch_size, token_dropout, tokens in [(None, 0.0, 24), (16, 0.0, 6), (8, 0.5, 12), (4, 0.9, 9)]:
        model.zero_grad()
        output = model(images, patch_size, token_dropout)
        assert output.last_hidden_state.shape == (8, prefix + tokens, 24)
        if model.config.pooling == "cls":
            assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
        else:
            patches = output.last_hidden_state[:, prefix:].sum(dim=1) / tokens
            torch.testing.assert_close(output.pooler_output, patches)
        (output.last_hidden_state * torch.randn(8, prefix + tokens, 24)).sum().backward()
        for name, parameter in model.named_parameters():
            frozen = model.config.freeze_patch_projection and "patch_embeddings" in name
            assert parameter.requires_grad != frozen, name
            if frozen:
                assert parameter.grad is None
            else:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                # the bias of the keys shifts all scores of a query equally
                assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


def test_initialisation_is_that_of_moco_v3() -> None:
    model = AccelViTModel(
        config(
            hidden_size=96,
            position_embedding_type="learned",
            num_register_tokens=50,
            layerscale_value=0.1,
            image_size=128,
        )
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.flatten(1)
            bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
            assert 0.97 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            assert module.bias is not None and not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-6
    embeddings = model.embeddings
    assert embeddings.cls_token is not None and 3e-7 < embeddings.cls_token.std() < 3e-6
    for parameter in (embeddings.position_embeddings, embeddings.register_tokens):
        assert parameter is not None and parameter.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in range(3):
        for scale in ("layer_scale1", "layer_scale2"):
            assert torch.equal(model.get_parameter(f"layers.{layer}.{scale}.lambda1"), torch.full((96,), 0.1))


def test_stochastic_depth_grows_with_depth_in_training_only() -> None:
    model = AccelViTModel(config(num_hidden_layers=5, drop_path_rate=0.4))
    drop_probs = [module.drop_prob for module in model.modules() if isinstance(module, AccelViTDropPath)]
    assert drop_probs == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    drop_path = AccelViTDropPath(0.4).train()
    output = drop_path(torch.ones(20_000, 2, 3))
    assert (output == output[:, :1, :1]).all()
    assert sorted(output.unique().tolist()) == pytest.approx([0, 1 / 0.6])
    assert output.mean().item() == pytest.approx(1, abs=0.03)
    hidden = torch.randn(4, 2, 3)
    assert torch.equal(drop_path.eval()(hidden), hidden)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images).pooler_output, model(images).pooler_output)
    assert not torch.equal(model.train()(images).pooler_output, model(images).pooler_output)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # new name in 5.23
def test_gradient_checkpointing_changes_nothing() -> None:
    model = AccelViTModel(config(drop_path_rate=0.3)).train()
    images, slope = torch.randn(4, 3, 32, 32), torch.randn(4, 24)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert all(layer.gradient_checkpointing is checkpointing for layer in model.layers)
        model.zero_grad()
        torch.manual_seed(1)
        output = model(images, 16, 0.25, torch.Generator().manual_seed(2)).pooler_output
        (output * slope).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_attention_implementations_agree_and_eager_gives_weights() -> None:
    model = AccelViTModel(config()).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.config._attn_implementation == "sdpa"
    expected = model(images).last_hidden_state
    model.set_attn_implementation("eager")
    output = model(images, output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=1e-5)
    assert len(output.attentions) == 3
    for weights in output.attentions:
        assert weights.shape == (2, 3, 17, 17)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 17))


def test_flash_attention_goes_through_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kernel needs a GPU and its package. A stand-in checks what it gets and what is returned."""
    shapes = []

    def stand_in(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None and not module.is_causal and scaling == 8**-0.5
        shapes.append((query.shape, key.shape, value.shape))
        output = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return output.transpose(1, 2), None

    model = AccelViTModel(config()).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", stand_in)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert torch.equal(model(images).last_hidden_state, expected)
    assert shapes == [((2, 3, 17, 8),) * 3] * 3 and model._supports_flash_attn


def test_bf16_autocast_and_weights() -> None:
    model = AccelViTModel(config(position_embedding_type="learned"))
    images = torch.randn(4, 3, 32, 32)
    for patch_size, token_dropout in ((8, 0.0), (16, 0.0), (8, 0.5)):
        expected = model(images, patch_size, token_dropout, torch.Generator().manual_seed(0)).pooler_output
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images, patch_size, token_dropout, torch.Generator().manual_seed(0))
        assert output.pooler_output.dtype == torch.float32  # LayerNorm stays in fp32
        torch.testing.assert_close(output.pooler_output, expected, rtol=0, atol=0.1)
        model.zero_grad()
        (output.pooler_output * images.flatten(1)[:, :24]).sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    half = AccelViTModel(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    for patch_size, token_dropout in ((8, 0.0), (16, 0.5)):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        output = half(images, patch_size, token_dropout, generators[0]).pooler_output
        assert output.dtype == torch.bfloat16
        expected = model(images, patch_size, token_dropout, generators[1]).pooler_output
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.1)


def test_wrong_pixel_values_are_named() -> None:
    model = AccelViTModel(config())
    with pytest.raises(
        ValueError, match=r"pixel_values must be \(batch_size, 3, height, width\), got \(2, 1, 32, 32\)"
    ):
        model(torch.randn(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"pixel_values must be .*, got \(3, 32, 32\)"):
        model(torch.randn(3, 32, 32))
    for patch_size in (0, -8, 8.0, True):
        with pytest.raises(ValueError, match=f"patch_size must be .*got {patch_size}"):
            model(torch.randn(2, 3, 32, 32), patch_size=patch_size)


def test_outputs_as_tuples_and_by_index() -> None:
    model = AccelViTModel(config()).eval()
    images = torch.randn(2, 3, 32, 32)
    output = model(images)
    last, pooled = model(images, return_dict=False)
    assert torch.equal(last, output.last_hidden_state) and torch.equal(pooled, output.pooler_output)
    assert output.hidden_states is None and output.attentions is None
    assert model.get_input_embeddings() is model.embeddings.patch_embeddings


def test_classification_loss_and_gradients() -> None:
    model = AccelViTForImageClassification(config(num_labels=5, pooling="mean")).train()
    images, labels = torch.randn(6, 3, 32, 32), torch.randint(5, (6,))
    output = model(images, labels=labels, patch_size=16, token_dropout=0.5, generator=torch.Generator().manual_seed(4))
    pooled = model.encoder(images, 16, 0.5, torch.Generator().manual_seed(4)).pooler_output.detach().double().numpy()
    weight, bias = (p.detach().double().numpy() for p in model.classifier.parameters())
    logits = pooled @ weight.T + bias
    np.testing.assert_allclose(output.logits.detach().numpy(), logits, atol=1e-5)
    losses = [math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(logits, labels, strict=True)]
    assert output.loss.item() == pytest.approx(sum(losses) / 6, abs=1e-5)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    without = model(images, return_dict=False)
    assert len(without) == 1 and without[0].shape == (6, 5)


@pytest.mark.parametrize(
    "problem_type, labels",
    [
        ("single_label_classification", torch.tensor([0, 1, 2, -100, 1, 0])),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0]]).repeat(3, 1)),
        ("regression", torch.linspace(-1, 1, 18).reshape(6, 3)),
        (None, torch.tensor([[0.0, 1, 1], [1, 0, 0]]).repeat(3, 1)),
    ],
)
def test_losses_of_micro_batches_add_up_to_that_of_the_batch(problem_type: Any, labels: torch.Tensor) -> None:
    """The Trainer passes the number of labels of all micro-batches and adds the losses; sizes may differ."""
    model = AccelViTForImageClassification(config(num_labels=3, problem_type=problem_type))
    images = torch.randn(6, 3, 32, 32)
    whole = model(images, labels=labels).loss
    count = (labels != -100).sum()
    for num_items in (count, int(count)):
        parts = [
            model(images[rows], labels=labels[rows], num_items_in_batch=num_items).loss
            for rows in (slice(0, 3), slice(3, 5), slice(5, 6))
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_classifier_without_labels_is_the_pooled_output() -> None:
    model = AccelViTForImageClassification(config(num_labels=0)).eval()
    images = torch.randn(2, 3, 32, 32)
    output = model(images, output_hidden_states=True)
    assert torch.equal(output.logits, model.encoder(images).pooler_output)
    assert output.loss is None and len(output.hidden_states) == 4


@pytest.mark.parametrize(("patch_size", "token_dropout"), [(8, 0.0), (16, 0.5), (12, 0.0)])
@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_pixels_in_autocasts_dtype_are_not_cast(kind: str, patch_size: int, token_dropout: float) -> None:
    """bf16 pixels give the bits of the same numbers in fp32, and no copy of them in fp32 is made."""
    model = AccelViTModel(config(position_embedding_type=kind)).eval()
    pixels = torch.randn(2, 3, 32, 32).bfloat16()
    results = []
    for images in (pixels, pixels.float()):
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            fitted, _ = model.fit_to_patches(images, patch_size)
            assert fitted.dtype == images.dtype
            results.append(model(images, patch_size, token_dropout, generator).last_hidden_state)
    assert torch.equal(*results) and model.fit_to_patches(pixels, patch_size)[0].dtype == torch.float32
