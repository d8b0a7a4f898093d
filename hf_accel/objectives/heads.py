"""Projection and prediction heads, and the BatchNorm that spans processes."""

from itertools import pairwise

import torch
from torch import nn

from ..distributed import all_reduce, world_size


class BatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over the global batch: its statistics, and their gradient, span all processes.

    torch's SyncBatchNorm refuses CPU tensors; this one runs wherever the process group does, so that two processes can
    be held against one. Each process must bring the same number of rows.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        rows = input.float()
        count = rows.shape[0] * world_size()
        mean = all_reduce(rows.sum(dim=0)) / count
        centred = rows - mean
        variance = all_reduce(centred.square().sum(dim=0)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            momentum = 0.1 if self.momentum is None else self.momentum
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = variance * (count / max(count - 1, 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        output = centred * torch.rsqrt(variance + self.eps)
        if self.affine:
            output = output * self.weight + self.bias
        return output.to(input.dtype)


def mlp(num_layers: int, input_size: int, hidden_size: int, output_size: int, last_norm: bool = True) -> nn.Sequential:
    """(N, input_size) -> (N, output_size): linear layers with BatchNorm and ReLU between them.

    MoCo-v3's head ends in a BatchNorm without scale and shift (arXiv 2104.02057, section 4.1 and its code); without
    `last_norm` it is SLIP's, which ends in a plain linear layer (arXiv 2112.12750). Only that one has a bias: the mean
    that a BatchNorm takes off would undo any other.
    """
    layers: list[nn.Module] = []
    for index in range(num_layers):
        last = index == num_layers - 1
        size = output_size if last else hidden_size
        layers.append(nn.Linear(input_size if index == 0 else hidden_size, size, bias=last and not last_norm))
        if not last:
            layers += [BatchNorm1d(size), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(BatchNorm1d(size, affine=False))
    return nn.Sequential(*layers)


class PrototypeHead(nn.Module):
    """(N, input_size) -> (N, num_prototypes): DINO's head (arXiv 2104.14294, appendix C).

    An MLP of three layers with GELU, whose output of length 1 is compared with prototypes of length 1, or, without
    `norm_last_layer`, of lengths that learn.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bottleneck_size: int, num_prototypes: int, norm_last_layer: bool = True
    ):
        super().__init__()
        sizes = (input_size, hidden_size, hidden_size, bottleneck_size)
        linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2])
        self.prototypes = nn.Parameter(nn.Linear(bottleneck_size, num_prototypes, bias=False).weight.detach())
        self.lengths = None if norm_last_layer else nn.Parameter(torch.ones(num_prototypes, 1))

    def last_layer(self) -> list[nn.Parameter]:
        return [self.prototypes] if self.lengths is None else [self.prototypes, self.lengths]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # In fp16 the squares of small numbers vanish: lengths are taken in fp32.
        embedding = nn.functional.normalize(self.mlp(features).float(), dim=-1)
        prototypes = nn.functional.normalize(self.prototypes, dim=-1)
        if self.lengths is not None:
            prototypes = prototypes * self.lengths
        return nn.functional.linear(embedding.to(prototypes.dtype), prototypes)
