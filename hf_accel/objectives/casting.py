"""The weights of encoders in autocast's dtype: cast together once a forward, and not one by one where they are used."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..models import AccelViTModel

Place = tuple[nn.Linear, str]
"""A module and the name of one of its parameters."""


@contextmanager
def weights_cast_together(encoders: Iterable[AccelViTModel]) -> Iterator[None]:
    """Give the linear layers of these encoders, within the context, weights that autocast need not cast.

    They are the numbers that autocast would make of the weights, and gradients reach the weights bit for bit as they
    do there. But a layer that learns launches one kernel in place of twelve, forward and backward, and all layers that
    do not learn one together, where autocast casts at every use. Each layer has its own, so that its gradients are
    complete before those of the layers below: data parallel training sends them while the backward pass goes on.

    Without autocast nothing changes.
    """
    learning: list[list[Place]] = []
    fixed: list[Place] = []
    for encoder in encoders:
        for layer in encoder.layers:
            places = [place for module in layer.modules() for place in _find_weights(module)]
            learning.append([place for place in places if _weight(place).requires_grad])
            fixed += [place for place in places if not _weight(place).requires_grad]
    weights: list[tuple[Place, Tensor]] = []
    try:
        for places in filter(None, [*learning, fixed]):
            before = [_weight(place) for place in places]
            dtype = torch.get_autocast_dtype(before[0].device.type)
            after = cast(Sequence[Tensor], _CastTogether.apply(dtype, *before))
            for place, old, new in zip(places, before, after, strict=True):
                weights.append((place, old))
                _put(place, new)
        yield
    finally:
        for place, weight in weights:
            _put(place, weight)


def _find_weights(module: nn.Module) -> Iterator[Place]:
    """The parameters of a plain linear layer that autocast would cast; a subclass may use them in another way."""
    if type(module) is not nn.Linear:
        return
    for name, weight in module._parameters.items():
        if weight is not None and weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type):
            yield module, name


def _weight(place: Place) -> Tensor:
    module, name = place
    return cast(Tensor, module._parameters[name])


def _put(place: Place, weight: Tensor) -> None:
    """`setattr` takes only an `nn.Parameter`, and these carry the gradient on to one."""
    module, name = place
    module._parameters[name] = cast(Any, weight)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return tuple(_cast(weights, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        made = iter(_cast([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(None if gradient is None else next(made) for gradient in gradients)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if made:
        torch._foreach_copy_(made, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return made
