"""Weights that an engine keeps in shards: DeepSpeed's ZeRO-3 and FSDP2 in theirs, everyone else none.

The only module that knows how DeepSpeed stores weights, gradients and optimizer states. It is imported lazily: whoever
does without the engine does without the package.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import world_size

Parameters = Iterable[nn.Parameter]


def of_zero3(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds the parameter: its `data` is empty wherever it is not in use."""
    return hasattr(parameter, "ds_id")


def is_sharded(module: nn.Module) -> bool:
    return any(of_zero3(p) or isinstance(p, DTensor) for p in module.parameters())


def shards(parameters: Parameters) -> list[Tensor]:
    """What this process keeps of each parameter: all of it, without an engine that shards."""
    kept: list[Tensor] = []
    for parameter in parameters:
        if of_zero3(parameter):
            kept.append(cast(Any, parameter).ds_tensor)
        else:
            kept.append(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
    return kept


def writable_shards(parameters: Parameters) -> list[Tensor]:
    """As `shards`; what is written into them is what the next forward finds."""
    parameters = list(parameters)
    # ZeRO-3 keeps small parameters whole between steps, beside their shards, and would go on with those.
    whole: list[Any] = [p for p in parameters if of_zero3(p) and p.numel() > 0]
    if whole:
        whole[0].partition(param_list=whole, has_been_updated=False)
    return shards(parameters)


@torch.no_grad()
def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every parameter whole, copied, on every process. All processes must call it."""
    parameters = [p for p in module.parameters() if of_zero3(p)]
    if not parameters:
        tensors = module.state_dict().items()
        return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors}
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


# Gradients and optimizer, between the backward and the optimizer's step


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
    """Keep these parameters out of the step; under DeepSpeed, which always has gradients, together with `skip_step`."""
    parameters = list(parameters)
    if _held_by_deepspeed(parameters):
        _update_gradients(parameters, torch.zeros_like)
    for parameter in parameters:
        parameter.grad = None


def separate_group(optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
    """Give these parameters a group of their own, marked "freezable", with the settings that they had."""
    chosen = set(parameters)
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if p in chosen]
        if mine:
            group["params"] = [p for p in group["params"] if p not in chosen]
            optimizer.add_param_group({**group, "params": mine, "freezable": True})


def skip_step(zero_optimizer: Any) -> None:
    """After a ZeRO step without gradient and with lr 0: Adam's count of steps of the "freezable" groups starts anew.

    ZeRO steps whatever it holds. The moments are still 0, but the bias corrections would take them for old ones.
    """
    freezable = [i for i, group in enumerate(zero_optimizer.param_groups) if group.get("freezable")]
    if hasattr(zero_optimizer, "sub_group_to_group_id"):  # ZeRO-3
        flat = zero_optimizer.fp32_partitioned_groups_flat
        tensors = [flat[sub] for sub, group in zero_optimizer.sub_group_to_group_id.items() if group in freezable]
    else:
        tensors = [zero_optimizer.single_partition_of_fp32_groups[i] for i in freezable]
    for tensor in tensors:
        count = zero_optimizer.optimizer.state[tensor]["step"]
        count.zero_()


def _held_by_deepspeed(parameters: list[nn.Parameter]) -> bool:
    return any(of_zero3(p) or hasattr(p, "_hp_mapping") for p in parameters)


def _update_gradients(parameters: list[nn.Parameter], update: Callable[[Tensor], Tensor]) -> None:
    from deepspeed.utils import safe_update_full_grad_vectorized

    def whole(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        updated = update(gradient)
        if of_zero3(parameter):  # its last shard is padded, and is cut out of what is returned
            updated = F.pad(updated.flatten(), (0, -updated.numel() % world_size()))
        return updated

    safe_update_full_grad_vectorized(parameters, whole)
