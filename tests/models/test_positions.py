"""Test positions u * G - 1/2 at any patch and image size against loops, and images that the patch does not divide."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_accel.models import shortening_accel_vit
from hf_accel.models.modeling_accel_vit import AccelViTEmbeddings, AccelViTModel
from hf_accel.models.shortening_accel_vit import resize_to_multiple
from tests.models.tiny import tiny_config

GRIDS = [(4, 4), (2, 2), (8, 8), (3, 5), (1, 7), (6, 4), (1, 1)]


def patch_positions(embeddings: AccelViTEmbeddings, grid: tuple[int, int]) -> np.ndarray:
    with torch.no_grad():
        positions = embeddings.patch_positions(*grid, like=embeddings.patch_embeddings.projection.weight)
    return positions.detach().reshape(*grid, -1).double().numpy()


def test_sincos_is_that_of_moco_v3_at_the_base_grid() -> None:
    """They agree token by token. What MoCo-v3's code calls w is the row, `token // grid`, by its meshgrid."""
    positions = patch_positions(AccelViTEmbeddings(tiny_config(hidden_size=24)), (4, 4)).reshape(16, 24)
    for token in range(16):
        for quarter, (wave, at) in enumerate(
            [(math.sin, token // 4), (math.cos, token // 4), (math.sin, token % 4), (math.cos, token % 4)]
        ):
            for channel in range(6):
                expected = wave(at / 10000 ** (channel / 6))
                assert positions[token, quarter * 6 + channel] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_sincos_is_continuous_and_relative_to_the_image(grid: tuple[int, int]) -> None:
    positions = patch_positions(AccelViTEmbeddings(tiny_config()), grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            y, x = (row + 0.5) / grid[0] * 4 - 0.5, (column + 0.5) / grid[1] * 4 - 0.5
            frequencies = [10000 ** (-channel / 4) for channel in range(4)]
            expected = [wave(at * f) for at in (y, x) for wave in (math.sin, math.cos) for f in frequencies]
            np.testing.assert_allclose(positions[row, column], expected, atol=1e-6)


@pytest.mark.parametrize("use_cls_token", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_learned_positions_are_sampled_bilinearly(grid: tuple[int, int], use_cls_token: bool) -> None:
    pooling = "cls" if use_cls_token else "mean"
    embeddings = AccelViTEmbeddings(
        tiny_config(position_embedding_type="learned", use_cls_token=use_cls_token, pooling=pooling)
    )
    assert embeddings.position_embeddings is not None
    nn.init.normal_(embeddings.position_embeddings)
    stored = embeddings.position_embeddings[0, int(use_cls_token) :].detach().double().numpy().reshape(4, 4, 16)
    positions = patch_positions(embeddings, grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            y = min(max((row + 0.5) / grid[0] * 4 - 0.5, 0), 3)
            x = min(max((column + 0.5) / grid[1] * 4 - 0.5, 0), 3)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 3), min(left + 1, 3)
            upper = stored[top, left] * (1 - x + left) + stored[top, right] * (x - left)
            lower = stored[bottom, left] * (1 - x + left) + stored[bottom, right] * (x - left)
            np.testing.assert_allclose(positions[row, column], upper * (1 - y + top) + lower * (y - top), atol=1e-6)
    if grid == (4, 4):
        assert np.array_equal(positions, stored)


def test_learned_positions_learn_at_every_patch_size() -> None:
    for patch_size in (4, 8, 16):
        embeddings = AccelViTEmbeddings(tiny_config(position_embedding_type="learned"))
        embeddings(torch.randn(2, 3, 32, 32), patch_size).square().sum().backward()
        assert embeddings.position_embeddings is not None
        gradient = embeddings.position_embeddings.grad
        assert gradient is not None and (gradient[0, 1:].abs().sum(dim=1) > 0).all()


def test_learned_positions_of_a_resized_grid_in_bf16() -> None:
    embeddings = AccelViTEmbeddings(tiny_config(position_embedding_type="learned"))
    assert embeddings.position_embeddings is not None
    nn.init.normal_(embeddings.position_embeddings)
    rounded = embeddings.bfloat16()
    exact = patch_positions(rounded.float(), (3, 5))
    result = patch_positions(rounded.bfloat16(), (3, 5))
    np.testing.assert_allclose(result, exact, atol=0.02)
    assert rounded(torch.randn(1, 3, 24, 40).bfloat16(), 8).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "size, patch_size, expected",
    [
        ((33, 31), 8, (32, 32)),
        ((36, 44), 8, (40, 48)),
        ((20, 32), 16, (16, 32)),
        ((3, 50), 8, (8, 48)),
        ((5, 5), 2, (6, 6)),
    ],
)
def test_an_image_that_the_patch_does_not_divide(
    size: tuple[int, int], patch_size: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortening_accel_vit, "_resize_was_reported", True)
    images = torch.rand(2, 3, *size)
    resized = resize_to_multiple(images, patch_size)
    antialiased = nn.functional.interpolate(images, size=expected, mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(resized, antialiased)
    model = AccelViTModel(tiny_config()).eval()
    for pixels in (images, images.bfloat16()):
        same = model(resized.to(pixels.dtype), patch_size=patch_size).pooler_output
        torch.testing.assert_close(model(pixels, patch_size=patch_size).pooler_output, same, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_half_weights_and_an_image_the_patch_does_not_divide(kind: str, dtype: torch.dtype) -> None:
    """On a CPU, torch has no antialiased resize in half precision."""
    model: Any = AccelViTModel(tiny_config(position_embedding_type=kind)).eval()
    for pixels in (torch.rand(2, 3, 33, 41), torch.randint(256, (2, 3, 33, 41), dtype=torch.uint8) / 255):
        for patch_size in (8, 12):
            expected = model.float()(pixels, patch_size).pooler_output
            output = model.to(dtype)(pixels.to(dtype), patch_size).pooler_output
            assert output.dtype == dtype
            torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.1)
    resized = resize_to_multiple(torch.rand(1, 3, 9, 9).to(dtype), 8)
    assert resized.dtype == dtype and resized.shape == (1, 3, 8, 8)


def test_the_resize_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(shortening_accel_vit, "_resize_was_reported", False)
    monkeypatch.setattr(shortening_accel_vit.logger, "propagate", True, raising=False)
    model = AccelViTModel(tiny_config()).eval()
    with caplog.at_level(logging.WARNING, logger=shortening_accel_vit.logger.name):
        model(torch.randn(1, 3, 32, 32), patch_size=16)
        assert not caplog.records
        for size in (30, 30, 37):
            model(torch.randn(1, 3, size, size))
    assert [record.getMessage() for record in caplog.records if "patch_size" in record.getMessage()] == [
        "patch_size 8 does not divide an image of 30 x 30 pixels, which is resized to 32 x 32; further ones are "
        "resized without another warning"
    ]


def test_registers_have_no_position_and_cls_has_the_first() -> None:
    embeddings = AccelViTEmbeddings(tiny_config(position_embedding_type="learned", num_register_tokens=2))
    for parameter in embeddings.parameters():
        nn.init.normal_(parameter)
    assert embeddings.cls_token is not None and embeddings.register_tokens is not None
    assert embeddings.position_embeddings is not None
    output = embeddings(torch.randn(2, 3, 32, 32), 8)
    assert torch.equal(output[:, :1], (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(2, -1, -1))
    assert torch.equal(output[:, 1:3], embeddings.register_tokens.expand(2, -1, -1))
