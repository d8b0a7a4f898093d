"""How many kernels a piece of work launches, and how many bytes they move."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class KernelCount(TorchDispatchMode):
    """Counts the operations on images that are run eagerly, and the bytes that they read and write.

    An operation on images touches at least `least` bytes; smaller ones are on parameters, on the host.
    """

    def __init__(self, least: int = 0):
        super().__init__()
        self.least, self.launches, self.bytes = least, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, kind = func(*args, **(kwargs or {})), func.overloadpacket
        if func.is_view or kind in (aten.empty, aten.empty_like, aten.detach):
            return result
        moved = sum(map(_size, tree_leaves((args, result))))
        if kind == aten.index_select:  # reads no other rows
            moved = 2 * _size(result)
        elif kind == aten.index_copy_:  # writes no other rows
            moved = 2 * _size(args[-1])
        if moved >= self.least:
            self.launches += 1
            self.bytes += moved
        return result


def _size(value: Any) -> int:
    """Bytes of a tensor; an image repeated by a stride of 0 is one image."""
    if not isinstance(value, torch.Tensor):
        return 0
    return value.element_size() * math.prod(n for n, step in zip(value.shape, value.stride(), strict=True) if step)


def count_launches(work: Callable[[], Any], device: torch.device, compiled: bool = False) -> int | None:
    """Kernels on a GPU, by the profiler. A CPU's count is of the operations that would be one there.

    None for compiled work on a CPU, whose kernels are not seen.
    """
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize(device)
        events = seen.events() or []
        copies = ("Memcpy", "Memset")
        return sum(str(event.device_type).endswith("CUDA") and not event.name.startswith(copies) for event in events)
    if compiled:
        return None
    with KernelCount() as count:
        work()
    return count.launches
