"""What enters the AccelViT encoder: patches under a kernel of any size, positions, CLS and register tokens."""

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .caching_accel_vit import TensorCache, is_dynamic
from .configuration_accel_vit import AccelViTConfig
from .shortening_accel_vit import (
    check_patch_size,
    position_resize_matrix,
    resize_patch_kernel,
    resize_patches,
    sincos_position_table,
)

POSITION_BYTES = 32 * 2**20
"""Limit of the sin-cos positions that an encoder caches. In ViT-B/16, 55 image sizes of about 224 px need as much."""


def split_patches(pixel_values: torch.Tensor, patch_size: int, kept_tokens: torch.Tensor | None) -> torch.Tensor:
    """(B, C, H, W) -> (B, L, C, p, p) with L = (H / p) (W / p), or (B, K, C, p, p) for `kept_tokens` (B, K) only."""
    batch_size, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 1, 3, 5)
    if kept_tokens is None:
        return patches.flatten(1, 2)
    images = torch.arange(batch_size, device=kept_tokens.device)[:, None]
    return patches[images, kept_tokens // columns, kept_tokens % columns]


class AccelViTPatchProjection(nn.Conv2d):
    """The patch kernel at the base patch size p0. A call with another patch size derives the kernel of that size."""

    def forward(
        self, pixel_values: torch.Tensor, patch_size: int | None = None, kept_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, C, H, W) -> (B, L, D) with L = (H / p) (W / p), or (B, K, D) for the `kept_tokens` (B, K) only.

        Dropped patches are removed before the projection and cost nothing. Without a patch size this is an ordinary
        convolution, (B, D, H / p0, W / p0): libraries such as peft call it so, or create instances of its class.
        """
        if patch_size is None:
            return super().forward(pixel_values)
        weight = resize_patch_kernel(self.weight, patch_size)
        if kept_tokens is None:
            tokens = nn.functional.conv2d(pixel_values, weight, self.bias, stride=patch_size)
            return tokens.flatten(2).transpose(1, 2)
        patches = split_patches(pixel_values, patch_size, kept_tokens)
        return nn.functional.linear(patches.flatten(2), weight.flatten(1), self.bias)


class AccelViTPatchEmbeddings(nn.Module):
    """(B, num_channels, H, W) -> (B, kept patches, hidden_size)."""

    def __init__(self, config: AccelViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.projection = AccelViTPatchProjection(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(
        self, pixel_values: torch.Tensor, patch_size: int, kept_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            expected = f"(batch_size, {self.num_channels}, height, width)"
            raise ValueError(f"pixel_values must be {expected}, got {tuple(pixel_values.shape)}")
        if isinstance(self.projection, AccelViTPatchProjection):
            return self.projection(pixel_values, patch_size, kept_tokens)
        # Another module, such as LoRA around the projection, has replaced it and knows the base patch size only.
        if patch_size == self.patch_size and kept_tokens is None:
            return self.projection(pixel_values).flatten(2).transpose(1, 2)
        patches = split_patches(pixel_values, patch_size, kept_tokens)
        tokens = self.projection(resize_patches(patches, self.patch_size).flatten(0, 1))
        return tokens.flatten(1).unflatten(0, patches.shape[:2])


class AccelViTEmbeddings(nn.Module):
    """CLS and register tokens, patch embeddings and their positions."""

    def __init__(self, config: AccelViTConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size)) if config.use_cls_token else None
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_register_tokens, size)) if config.num_register_tokens else None
        )
        self.patch_embeddings = AccelViTPatchEmbeddings(config)
        # As in ViT, the position of CLS comes first. With sin-cos it has none, as in MoCo-v3.
        num_positions = config.grid_size**2 + int(config.use_cls_token)
        learned = config.position_embedding_type == "learned"
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, size)) if learned else None
        # The grid that the positions were trained on. A change of the config's image size must not move them.
        self.grid_size = config.grid_size
        self.position_tables = TensorCache(POSITION_BYTES)

    def patch_positions(
        self, height: int, width: int, like: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """(height * width, hidden_size): positions of a grid that spans the image, whatever the image's size.

        Fixed positions get the device of `like` and `dtype`, or that of `like`. It is not a parameter, as offloaded
        ones have no device.
        """
        grid_size, hidden_size = self.grid_size, self.config.hidden_size
        if self.position_embeddings is None:
            key = (grid_size, height, width, hidden_size, like.device, dtype or like.dtype)
            if torch.compiler.is_compiling():
                return sincos_position_table(*key)
            return self.position_tables.get(key, lambda: sincos_position_table(*key))
        stored = self.position_embeddings[0, int(self.config.use_cls_token) :]
        if not is_dynamic(height, width) and height == width == grid_size:
            return stored
        dtype = torch.promote_types(stored.dtype, torch.float32)
        rows = position_resize_matrix(grid_size, height, device=stored.device, dtype=dtype)
        columns = position_resize_matrix(grid_size, width, device=stored.device, dtype=dtype)
        with maybe_autocast(stored.device.type, enabled=False):
            table = stored.to(dtype).reshape(grid_size, grid_size, hidden_size)
            sampled = torch.einsum("hr,wc,rcd->hwd", rows, columns, table)
        return sampled.flatten(0, 1).to(stored.dtype)

    def prefix_tokens(self, batch_size: int) -> list[torch.Tensor]:
        """CLS and registers, if there are any, each (batch_size, n, hidden_size)."""
        prefix = []
        if self.cls_token is not None:
            cls_token = self.cls_token
            if self.position_embeddings is not None:
                cls_token = cls_token + self.position_embeddings[:, :1]
            prefix.append(cls_token.expand(batch_size, -1, -1))
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(batch_size, -1, -1))
        return prefix

    def forward(
        self, pixel_values: torch.Tensor, patch_size: int, kept_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, C, H, W) -> (B, num_prefix_tokens + L, hidden_size), or K for L if `kept_tokens` (B, K) are given."""
        patch_size = check_patch_size(patch_size)
        batch_size, (height, width) = pixel_values.shape[0], pixel_values.shape[-2:]
        dtype = self.patch_embeddings.projection.weight.dtype  # pixels may be in that of autocast
        positions = self.patch_positions(height // patch_size, width // patch_size, pixel_values, dtype)
        if kept_tokens is not None:
            positions = positions[kept_tokens]
        tokens = self.patch_embeddings(pixel_values, patch_size, kept_tokens) + positions
        return torch.cat([*self.prefix_tokens(batch_size), tokens], dim=1)
