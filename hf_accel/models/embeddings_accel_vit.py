"""What enters the AccelViT encoder: patches under a kernel of any size, positions, CLS and register tokens."""

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_accel_vit import AccelViTConfig
from .shortening_accel_vit import checked_patch_size, position_resize_matrix, resize_patch_kernel, sincos_position_table


class AccelViTPatchProjection(nn.Conv2d):
    """The patch kernel at the base patch size p0; each call derives the kernel of its own patch size."""

    def forward(
        self, pixel_values: torch.Tensor, patch_size: int, kept_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, C, H, W) -> (B, L, D) with L = (H / p) (W / p), or (B, K, D) of the `kept_tokens` (B, K) alone.

        Dropped patches are gone before the projection: they cost nothing.
        """
        weight = resize_patch_kernel(self.weight, patch_size)
        if kept_tokens is None:
            tokens = nn.functional.conv2d(pixel_values, weight, self.bias, stride=patch_size)
            return tokens.flatten(2).transpose(1, 2)
        batch_size, channels, height, width = pixel_values.shape
        rows, columns = height // patch_size, width // patch_size
        patches = pixel_values.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
        images = torch.arange(batch_size, device=kept_tokens.device)[:, None]
        kept_patches = patches.permute(0, 2, 4, 1, 3, 5)[images, kept_tokens // columns, kept_tokens % columns]
        return nn.functional.linear(kept_patches.flatten(2), weight.flatten(1), self.bias)


class AccelViTPatchEmbeddings(nn.Module):
    """(B, num_channels, H, W) -> (B, kept patches, hidden_size)."""

    def __init__(self, config: AccelViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.projection = AccelViTPatchProjection(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(
        self, pixel_values: torch.Tensor, patch_size: int, kept_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            expected = f"(batch_size, {self.num_channels}, height, width)"
            raise ValueError(f"pixel_values must be {expected}, got {tuple(pixel_values.shape)}")
        return self.projection(pixel_values, patch_size, kept_tokens)


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
        # as in ViT, the position of CLS comes first; sin-cos gives it none, as in MoCo-v3
        num_positions = config.grid_size**2 + int(config.use_cls_token)
        learned = config.position_embedding_type == "learned"
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, size)) if learned else None

    def patch_positions(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """(height * width, hidden_size): positions of a grid, which spans the image whatever its size."""
        grid_size, hidden_size = self.config.grid_size, self.config.hidden_size
        if self.position_embeddings is None:
            return sincos_position_table(grid_size, height, width, hidden_size, device=like.device, dtype=like.dtype)
        stored = self.position_embeddings[0, int(self.config.use_cls_token) :]
        if height == width == grid_size:
            return stored
        dtype = torch.promote_types(stored.dtype, torch.float32)
        rows = position_resize_matrix(grid_size, height, device=stored.device, dtype=dtype)
        columns = position_resize_matrix(grid_size, width, device=stored.device, dtype=dtype)
        with maybe_autocast(stored.device.type, enabled=False):
            table = stored.to(dtype).reshape(grid_size, grid_size, hidden_size)
            sampled = torch.einsum("hr,wc,rcd->hwd", rows, columns, table)
        return sampled.flatten(0, 1).to(stored.dtype)

    def prefix_tokens(self, batch_size: int) -> list[torch.Tensor]:
        """Of (batch_size, n, hidden_size) each: CLS and registers, as far as there are any."""
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
        patch_size = checked_patch_size(patch_size)
        weight = self.patch_embeddings.projection.weight
        batch_size, (height, width) = pixel_values.shape[0], pixel_values.shape[-2:]
        positions = self.patch_positions(height // patch_size, width // patch_size, like=weight)
        if kept_tokens is not None:
            positions = positions[kept_tokens]
        tokens = self.patch_embeddings(pixel_values, patch_size, kept_tokens) + positions
        return torch.cat([*self.prefix_tokens(batch_size), tokens], dim=1)
