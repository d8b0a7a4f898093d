"""Test the kernel rule w_p = pinv(B^T) w against a NumPy transcription, and its gradient, precision and cache."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from hf_accel.models.shortening_accel_vit import resize_patch_kernel
from tests.models.tiny import tiny


def bilinear_matrix(old_size: int, new_size: int) -> np.ndarray:
    """(new_size**2, old_size**2): bilinear resize of a flattened patch; half-pixel centres, border clamped."""
    matrix = np.zeros((new_size, new_size, old_size, old_size))
    for row in range(new_size):
        for column in range(new_size):
            corners = []
            for index in (row, column):
                centre = min(max((index + 0.5) * old_size / new_size - 0.5, 0.0), old_size - 1.0)
                low = int(np.floor(centre))
                high = min(low + 1, old_size - 1)
                corners.append([(low, 1 - (centre - low)), (high, centre - low)])
            for y, weight_y in corners[0]:
                for x, weight_x in corners[1]:
                    matrix[row, column, y, x] += weight_y * weight_x
    return matrix.reshape(new_size**2, old_size**2)


@pytest.mark.parametrize("old_size, new_size", [(4, 7), (4, 14), (7, 5), (6, 2), (5, 5), (3, 1)])
def test_kernel_equals_the_pseudo_inverse_of_the_resize(old_size: int, new_size: int) -> None:
    kernel = torch.randn(5, 3, old_size, old_size, dtype=torch.float64)
    resized = resize_patch_kernel(kernel, new_size)
    inverse = np.linalg.pinv(bilinear_matrix(old_size, new_size).T)
    expected = kernel.numpy().reshape(15, -1) @ inverse.T
    np.testing.assert_allclose(resized.numpy().reshape(15, -1), expected, atol=1e-10)


@pytest.mark.parametrize("old_size, new_sizes", [(16, range(17, 57)), (4, range(5, 29)), (8, (12, 16, 24, 32))])
def test_a_larger_patch_gives_the_same_embedding(old_size: int, new_sizes: range) -> None:
    """<B x, w_p> = <x, w> holds to 1e-6 in fp32, with x resized by torch itself."""
    kernel = torch.randn(4, 3, old_size, old_size) / old_size
    patch = torch.randn(2, 3, old_size, old_size)
    expected = torch.einsum("bchw,dchw->bd", patch.double(), kernel.double())
    for new_size in new_sizes:
        resized = resize_patch_kernel(kernel, new_size)
        assert resized.shape == (4, 3, new_size, new_size) and resized.dtype == torch.float32
        larger = nn.functional.interpolate(patch.double(), size=new_size, mode="bilinear", align_corners=False)
        result = torch.einsum("bchw,dchw->bd", larger, resized.double())
        assert (result - expected).abs().max() < 1e-6, new_size


def test_the_base_patch_size_is_the_kernel_itself() -> None:
    kernel = torch.randn(4, 3, 8, 8)
    assert resize_patch_kernel(kernel, 8) is kernel


@pytest.mark.parametrize("new_size", [3, 6, 9])
def test_gradient_of_the_resized_kernel(new_size: int) -> None:
    kernel = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resize_patch_kernel(w, new_size), (kernel,))


def test_precision_under_autocast_and_of_half_kernels() -> None:
    kernel = torch.randn(4, 3, 8, 8)
    expected = resize_patch_kernel(kernel, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_patch_kernel(kernel, 16), expected)
    half = resize_patch_kernel(kernel.bfloat16(), 16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, resize_patch_kernel(kernel.bfloat16().float(), 16).bfloat16())


def test_a_matrix_made_in_inference_mode_serves_training() -> None:
    kernel = torch.randn(2, 3, 9, 9, requires_grad=True)
    with torch.inference_mode():
        resize_patch_kernel(kernel, 13)
    resize_patch_kernel(kernel, 13).sum().backward()
    assert kernel.grad is not None and kernel.grad.abs().sum() > 0


def test_the_cache_is_no_part_of_the_model() -> None:
    model = tiny(image_size=16, patch_size=4)
    names = set(model.state_dict())
    images = torch.randn(2, 3, 16, 16)
    expected = model(images, patch_size=8).pooler_output
    assert set(model.state_dict()) == names and not list(model.buffers())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images, patch_size=8).pooler_output, expected)


@pytest.mark.parametrize("patch_size", [0, -4, 8.0, True, "8"])
def test_an_impossible_patch_size_is_named(patch_size) -> None:
    with pytest.raises(ValueError, match="patch_size must be a positive whole number.*" + str(patch_size)):
        resize_patch_kernel(torch.randn(2, 3, 4, 4), patch_size)


def test_a_kernel_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(D, C, p0, p0\)"):
        resize_patch_kernel(torch.randn(2, 3, 4, 8), 8)
