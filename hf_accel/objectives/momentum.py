"""The exponential moving average that a target branch is."""

import torch
from torch import nn

from ..distributed.sharding import shards, writable_shards


@torch.no_grad()
def update_momentum(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online, for every parameter, in the parameters' own fp32.

    Where an engine keeps shards, each process moves its own: both modules are cut in the same places.

    Buffers are left alone, as in MoCo-v3: the target's BatchNorms keep the statistics of their own batches.

    Raises:
        ValueError: the two modules' parameters differ in number.
    """
    targets, onlines = writable_shards(target.parameters()), shards(online.parameters())
    if len(targets) != len(onlines):
        raise ValueError(f"target has {len(targets)} parameters, online {len(onlines)}")
    torch._foreach_lerp_(targets, onlines, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def copy_to_target(target: nn.Module, online: nn.Module) -> None:
    """Start the target at the online branch, and take it out of the gradient."""
    target.load_state_dict(online.state_dict())
    target.requires_grad_(False)
