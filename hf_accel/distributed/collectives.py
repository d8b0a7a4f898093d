"""The few collective operations that the objectives need; each is the identity in a single process."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if _initialised() else 1


def processes_on_node() -> int:
    """Return how many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if _initialised() else 0


def is_main() -> bool:
    return rank() == 0


@torch.no_grad()
def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """(N, ...) on each process -> (world * N, ...) in rank order, without gradient. N must agree between processes."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Like `all_gather`, but the summed gradient of all processes' losses flows back to the owner of each row."""
    if world_size() == 1:
        return tensor
    return _Gather.apply(tensor)  # pyright: ignore[reportReturnType]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes. The gradient of every process's loss flows back to every summand."""
    if world_size() == 1:
        return tensor
    return _Sum.apply(tensor)  # pyright: ignore[reportReturnType]


class _Sum(Function):
    """The sum over processes, whose gradient is the sum of the gradients (torch.distributed.nn's is deprecated)."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce(gradient)


class _Gather(Function):
    """The rows of all processes, whose gradients are summed and returned to the owner of each row."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce(gradient).chunk(world_size())[rank()]


def all_gather_objects(value: Any) -> list[Any]:
    """Return the picklable `value` of every process, in rank order."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def say(text: str) -> None:
    """Print in the first process only, even if the processes are not connected."""
    if _is_first():
        print(text, flush=True)


@contextmanager
def warning_once() -> Iterator[None]:
    """Within it, only the first process shows warnings of this package. It is for work that every process does."""
    logger = logging.getLogger("hf_accel")
    level = logger.level
    try:
        if not _is_first():
            logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)


def _is_first() -> bool:
    return (rank() if _initialised() else int(os.environ.get("RANK", 0))) == 0


def host_group() -> Any:
    """Make a group for communication on the CPU, or return None for a single process. All processes must call this."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


def on_any(flag: bool, group: Any) -> bool:
    """Return whether `flag` is set on any process of a `host_group`. No device has to wait."""
    if group is None:
        return flag
    raised = torch.tensor([int(flag)])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
    return bool(raised.item())


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value):
    """Return the first process's picklable `value` on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
