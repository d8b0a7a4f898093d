"""How a sequence is shortened: patch kernels of any size, positions between patches, and the tokens that are kept.

These are plain functions of shapes. Kernels and positions follow Beyer et al., "FlexiViT" (arXiv 2212.08013), and token
dropout Lin et al., "Accelerating Augmentation Invariance Pretraining" (arXiv 2410.22364).
"""

from operator import index

import torch
from torch import nn
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .caching_accel_vit import cached_table

logger = logging.get_logger(__name__)


def interpolation_matrix(old_size: int, new_size: int) -> torch.Tensor:
    """(new_size, old_size), float64: linear resize of a line of pixels with half-pixel centres and no antialiasing.

    Bilinear resize is separable: for an image `x` (old_size, old_size) it is `A @ x @ A.T`.
    """
    eye = torch.eye(old_size, dtype=torch.float64, device="cpu")
    return nn.functional.interpolate(eye[None], size=new_size, mode="linear", align_corners=False)[0].T


@cached_table(lambda old_size, new_size: (new_size, old_size))
def kernel_resize_matrix(old_size: int, new_size: int) -> torch.Tensor:
    """(new_size, old_size): pinv(A^T). As B = A (x) A, the pseudo-inverse of B^T is that of A^T on each axis."""
    return torch.linalg.pinv(interpolation_matrix(old_size, new_size).T)


@cached_table(lambda old_size, new_size: (new_size, old_size))
def position_resize_matrix(old_size: int, new_size: int) -> torch.Tensor:
    """(new_size, old_size): sampling at the positions (i + 1/2) old_size / new_size - 1/2, clamped at the border."""
    return interpolation_matrix(old_size, new_size)


@cached_table(lambda base_grid_size, size, num_channels: (size, num_channels))
def sincos_waves(base_grid_size: int, size: int, num_channels: int) -> torch.Tensor:
    """(size, num_channels): sin and cos, half of the channels each, of the positions along one side of a grid."""
    half = num_channels // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
    positions = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * base_grid_size / size - 0.5
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_position_table(
    base_grid_size: int, height: int, width: int, hidden_size: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """(height * width, hidden_size): MoCo-v3's fixed embedding, at continuous positions relative to the image.

    The patch at the fraction u of the image's side has the position `u * base_grid_size - 1/2`. A quarter of the
    channels each holds sin and cos of what MoCo-v3's code calls w, then of h. Its w is the row, by its meshgrid.
    """
    rows = sincos_waves(base_grid_size, height, hidden_size // 2, device=device, dtype=dtype)
    columns = sincos_waves(base_grid_size, width, hidden_size // 2, device=device, dtype=dtype)
    table = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=2)
    return table.flatten(0, 1)


def resize_patch_kernel(kernel: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The kernel for another patch size: FlexiViT's `w_p = pinv(B^T) w` (arXiv 2212.08013, section 3.4).

    With B the bilinear resize of a patch from p0 to p pixels, `<B x, w_p> = <x, w>` for every patch x if p >= p0; for a
    smaller p it is the least-squares solution of `B^T w_p = w`.

    Args:
        kernel: (D, C, p0, p0). The result is differentiable with respect to it and computed in fp32 or better.
        patch_size: p in pixels.

    Returns:
        (D, C, p, p) in the kernel's dtype; the kernel itself if p = p0.

    Raises:
        ValueError: `patch_size` is not a positive whole number, or the kernel is not square.
    """
    patch_size = check_patch_size(patch_size)
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"the kernel must be (D, C, p0, p0), got {tuple(kernel.shape)}")
    if kernel.shape[-1] == patch_size:
        return kernel
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    matrix = kernel_resize_matrix(kernel.shape[-1], patch_size, device=kernel.device, dtype=dtype)
    with maybe_autocast(kernel.device.type, enabled=False):
        return (matrix @ kernel.to(dtype) @ matrix.T).to(kernel.dtype)


def resize_patches(patches: torch.Tensor, base_patch_size: int) -> torch.Tensor:
    """(..., p, p) -> (..., p0, p0): a kernel on the result equals its `resize_patch_kernel` on `patches`.

    With M the matrix of `resize_patch_kernel`, `<x, M w M^T> = <M^T x M, w>`. This costs more than resizing the
    kernel and serves projections whose kernel cannot be accessed.
    """
    if patches.shape[-1] == base_patch_size:
        return patches
    dtype = torch.promote_types(patches.dtype, torch.float32)
    matrix = kernel_resize_matrix(base_patch_size, patches.shape[-1], device=patches.device, dtype=dtype)
    with maybe_autocast(patches.device.type, enabled=False):
        return (matrix.T @ patches.to(dtype) @ matrix).to(patches.dtype)


def check_patch_size(patch_size: int) -> int:
    """Check a patch size; `operator.index` makes it constant for `torch.compile`, as inductor fails on a dynamic one.

    Raises:
        ValueError: it is not a positive whole number.
    """
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(
            f"patch_size must be a positive whole number of pixels, got {patch_size!r}; None is the base patch size"
        )
    return index(patch_size)


def num_kept_tokens(num_patches: int, token_dropout: float) -> int:
    """Number of patch tokens that remain: max(1, int(num_patches * (1 - token_dropout))).

    1e-9 is added before rounding down, because 10 * (1 - 0.9) is 0.9999999999999998 in floating point.

    Raises:
        ValueError: `token_dropout` is not in [0, 1).
    """
    if not 0 <= token_dropout < 1:
        raise ValueError(
            f"token_dropout must lie in [0, 1), got {token_dropout!r}: it is the ratio of patch tokens to drop, and 0 "
            "keeps all"
        )
    return max(1, int(num_patches * (1 - token_dropout) + 1e-9))


@torch.compiler.disable()
def draw(rows: int, columns: int, generator: torch.Generator, device: torch.device | str | None = None) -> torch.Tensor:
    """Draw uniform (rows, columns) on the generator's device, for `device`. `torch.compile` cannot trace generators."""
    noise = torch.rand(rows, columns, generator=generator, device=generator.device)
    if noise.device.type == "cpu" and torch.device(device or "cpu").type != "cpu":
        return noise.pin_memory().to(device, non_blocking=True)  # the host need not wait for the device
    return noise.to(device)


def sample_kept_tokens(
    batch_size: int,
    num_patches: int,
    token_dropout: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw the patch tokens to keep, uniformly without replacement, for each image separately.

    They are the tokens with the smallest values of `torch.rand(batch_size, num_patches, generator=generator)`, drawn on
    the generator's device (without one, on `device`), so a CPU generator gives the same tokens on every device.

    Returns:
        (batch_size, num_kept_tokens) int64 on `device`, ascending in each row.
    """
    num_kept = num_kept_tokens(num_patches, token_dropout)
    if generator is None:
        noise = torch.rand(batch_size, num_patches, device=device)
    else:
        noise = draw(batch_size, num_patches, generator, device)
    order = noise.argsort(dim=1, stable=True)
    return order[:, :num_kept].sort(dim=1).values


_resize_was_reported = False


@torch.compiler.disable()
def warn_of_resize(old_size: tuple[int, int], new_size: tuple[int, int], patch_size: int) -> None:
    """Warn once per process."""
    global _resize_was_reported
    if not _resize_was_reported:
        logger.warning(
            f"patch_size {patch_size} does not divide an image of {old_size[0]} x {old_size[1]} pixels, which is "
            f"resized to {new_size[0]} x {new_size[1]}; further ones are resized without another warning"
        )
        _resize_was_reported = True


def resize_to_multiple(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Resize (B, C, H, W), bilinear and antialiased, to the nearest multiples of `patch_size`, at least one patch.

    It is computed in fp32 or better, because torch has no antialiased resize in half precision on a CPU.
    """
    height, width = pixel_values.shape[-2:]
    if height % patch_size == 0 and width % patch_size == 0:
        return pixel_values
    new_size = (
        max(1, (2 * height + patch_size) // (2 * patch_size)) * patch_size,
        max(1, (2 * width + patch_size) // (2 * patch_size)) * patch_size,
    )
    warn_of_resize((height, width), new_size, patch_size)
    wide = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
    return nn.functional.interpolate(wide, size=new_size, mode="bilinear", antialias=True).to(pixel_values.dtype)
