"""Read and change weights and gradients that DeepSpeed's ZeRO-3 or FSDP2 keeps in shards.

This is the only module that knows how DeepSpeed stores weights, gradients and optimizer states. It imports DeepSpeed in
the functions that need it, because other engines run without that package.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import world_size

Parameters = Iterable[nn.Parameter]


def of_zero3(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 shards the parameter, whose `data` is then empty while it is not in use."""
    return hasattr(parameter, "ds_id")


def is_sharded(module: nn.Module) -> bool:
    return any(of_zero3(p) or isinstance(p, DTensor) for p in module.parameters())


def shards(parameters: Parameters) -> list[Tensor]:
    """Return this process's shard of each parameter, which is all of it if no engine shards it."""
    kept: list[Tensor] = []
    for parameter in parameters:
        if of_zero3(parameter):
            kept.append(cast(Any, parameter).ds_tensor)
        else:
            kept.append(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
    return kept


def writable_shards(parameters: Parameters) -> list[Tensor]:
    """Return `shards` whose new values the next forward uses."""
    parameters = list(parameters)
    # Between steps ZeRO-3 keeps small parameters whole beside their shards, and the next forward would use the former.
    whole: list[Any] = [p for p in parameters if of_zero3(p) and p.numel() > 0]
    if whole:
        whole[0].partition(param_list=whole, has_been_updated=False)
    return shards(parameters)


@contextmanager
def loading_whole() -> Iterator[None]:
    """Let `from_pretrained` open whole models inside, which it would otherwise shard at once under ZeRO-3."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


@torch.no_grad()
def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict with whole parameters, on every process. All processes must call this."""
    parameters = [p for p in module.parameters() if of_zero3(p)]
    if not parameters:
        tensors = module.state_dict().items()
        return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors}
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


# Gradients and optimizer, between the backward pass and the optimizer's step


def clip_each(parameters: Parameters, largest: float) -> None:
    """Scale each parameter's own gradient to a norm of at most `largest`."""
    parameters = [p for p in parameters if p.requires_grad]
    if _held_by_deepspeed(parameters):
        _update_gradients(parameters, lambda gradient: gradient * (largest / (gradient.norm() + 1e-6)).clamp(max=1.0))
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        for gradient in cast(list[DTensor], gradients):
            norm = cast(DTensor, gradient.norm()).full_tensor()
            gradient.to_local().mul_((largest / (norm + 1e-6)).clamp(max=1.0))
    elif gradients:
        foreach = cast(Any, torch)
        factors = [largest / (norm + 1e-6) for norm in foreach._foreach_norm(gradients)]
        foreach._foreach_mul_(gradients, [factor.clamp(max=1.0) for factor in factors])


def drop_gradients(parameters: Parameters) -> None:
    """Exclude these parameters from the next step.

    DeepSpeed always has gradients and therefore needs `separate_group` as well.
    """
    parameters = list(parameters)
    if _held_by_deepspeed(parameters):
        _update_gradients(parameters, torch.zeros_like)
    for parameter in parameters:
        parameter.grad = None


def separate_group(optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
    """Move these parameters to a group of their own, with their settings and the mark "freezable".

    DeepSpeed steps every parameter that it has. A step of this group with a learning rate of 0 and zero gradients does
    not change weights and moments. It is not counted, because Adam's bias correction would otherwise be too weak later.
    """
    chosen = set(parameters)
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if p in chosen]
        if mine:
            group["params"] = [p for p in group["params"] if p not in chosen]
            optimizer.add_param_group({**group, "params": mine, "freezable": True})
    optimizer.register_step_post_hook(_forget_frozen_steps)


def _forget_frozen_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("freezable") and group["lr"] == 0:
            for parameter in group["params"]:  # DeepSpeed replaces them by their shards for the step
                optimizer.state[parameter]["step"].zero_()


def _held_by_deepspeed(parameters: list[nn.Parameter]) -> bool:
    return any(of_zero3(p) or hasattr(p, "_hp_mapping") for p in parameters)


def _update_gradients(parameters: list[nn.Parameter], update: Callable[[Tensor], Tensor]) -> None:
    from deepspeed.utils import safe_update_full_grad_vectorized

    def whole(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        updated = update(gradient)
        if of_zero3(parameter):  # DeepSpeed cuts its shard, of which the last is padded, out of the result
            updated = F.pad(updated.flatten(), (0, -updated.numel() % world_size()))
        return updated

    safe_update_full_grad_vectorized(parameters, whole)
