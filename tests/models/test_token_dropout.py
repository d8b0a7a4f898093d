"""Test token dropout: how many tokens stay, which ones, and that the others cost nothing."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from hf_accel.models.shortening_accel_vit import num_kept_tokens, sample_kept_tokens
from tests.models.tiny import tiny


def test_number_of_kept_tokens_is_exact() -> None:
    """It is that of exact arithmetic. Floating point would lose a token: int(10 * (1 - 0.9)) = 0."""
    assert int(10 * (1 - 0.9)) == 0
    for num_patches in range(1, 300):
        for hundredths in range(100):
            exact = num_patches * (1 - Fraction(hundredths, 100))
            assert num_kept_tokens(num_patches, hundredths / 100) == max(1, int(exact))


@pytest.mark.parametrize("token_dropout", [1.0, -0.1, 1.5, float("nan")])
def test_an_impossible_ratio_is_named(token_dropout: float) -> None:
    with pytest.raises(ValueError, match=rf"token_dropout must lie in \[0, 1\), got {token_dropout}.*0 keeps all"):
        tiny()(torch.randn(1, 3, 32, 32), token_dropout=token_dropout)


def test_kept_tokens_are_the_smallest_draws_of_each_image() -> None:
    state = torch.get_rng_state()
    kept = sample_kept_tokens(64, 20, 0.6, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    noise = torch.rand(64, 20, generator=torch.Generator().manual_seed(3)).numpy()
    expected = [sorted(sorted(range(20), key=lambda token, row=row: row[token])[:8]) for row in noise]
    assert kept.tolist() == expected
    assert len({tuple(row) for row in expected}) > 32


def test_the_default_generator_draws_without_one() -> None:
    torch.manual_seed(5)
    first = sample_kept_tokens(4, 30, 0.5)
    second = sample_kept_tokens(4, 30, 0.5)
    torch.manual_seed(5)
    assert torch.equal(sample_kept_tokens(4, 30, 0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_only_on_request(training: bool) -> None:
    model = tiny().train(training)
    images = torch.randn(2, 3, 32, 32)
    state = torch.get_rng_state()
    assert model(images).last_hidden_state.shape == (2, 17, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert model(images, token_dropout=0.5).last_hidden_state.shape == (2, 9, 16)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_kept_tokens_are_those_of_the_full_sequence(kind: str, patch_size: int) -> None:
    """Gathering before the projection agrees with projecting everything."""
    embeddings = tiny(num_register_tokens=2, position_embedding_type=kind).embeddings.double()
    images = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    full = embeddings(images, patch_size)
    num_patches = (32 // patch_size) * (48 // patch_size)
    assert full.shape == (3, 3 + num_patches, 16)
    kept = sample_kept_tokens(3, num_patches, 0.4)
    short = embeddings(images, patch_size, kept)
    assert torch.equal(short[:, :3], full[:, :3])
    for image in range(3):
        torch.testing.assert_close(short[image, 3:], full[image, 3 + kept[image]], rtol=0, atol=1e-12)
    every = torch.arange(num_patches).expand(3, -1)
    torch.testing.assert_close(embeddings(images, patch_size, every), full, rtol=0, atol=1e-12)


def test_dropped_patches_are_never_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(use_cls_token=False, pooling="mean")
    images = torch.randn(2, 3, 32, 32)
    generator = torch.Generator().manual_seed(1)
    kept = sample_kept_tokens(2, 16, 0.75, torch.Generator().manual_seed(1))
    expected = model(images, token_dropout=0.75, generator=generator).pooler_output

    poisoned = torch.full_like(images, float("nan"))
    for image, tokens in enumerate(kept.tolist()):
        for token in tokens:
            y, x = 8 * (token // 4), 8 * (token % 4)
            poisoned[image, :, y : y + 8, x : x + 8] = images[image, :, y : y + 8, x : x + 8]

    rows = []
    linear = nn.functional.linear

    def counting(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.shape == (16, 3 * 8 * 8):
            rows.append(tuple(input.shape))
        return linear(input, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counting)
    monkeypatch.setattr(nn.functional, "conv2d", lambda *_, **__: pytest.fail("all patches were projected"))
    result = model(poisoned, token_dropout=0.75, generator=torch.Generator().manual_seed(1)).pooler_output
    assert torch.equal(result, expected)
    assert rows == [(2, 4, 3 * 8 * 8)]
