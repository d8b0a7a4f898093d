"""Derived tensors that are kept between calls, within a number of bytes and apart from what a model saves."""

import re
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers.utils.import_utils import is_fake_tensor

TABLE_BYTES = 8 * 2**20
"""The most that the process keeps of one kind of table. A table is small: it describes one side of a grid or patch."""


class TensorCache:
    """Tensors by key. Beyond `max_bytes` in all, those that were used longest ago are dropped.

    Copying or pickling gives an empty cache, so the copies of a model that holds one share nothing.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.tensors: dict[Hashable, torch.Tensor] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_bytes,)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def get(self, key: Hashable, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor of this key, from `compute()` if it is not kept. It carries no gradient."""
        with self.lock:
            if key in self.tensors:
                self.tensors[key] = self.tensors.pop(key)  # the one used last stands last
                return self.tensors[key]
        # A tensor first made under inference mode could never take part in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            tensor = compute()
        if tensor.nbytes > self.max_bytes or is_fake_tensor(tensor):
            return tensor
        with self.lock:
            self.tensors[key] = tensor
            while self.num_bytes > self.max_bytes:
                del self.tensors[next(iter(self.tensors))]
        return tensor


def is_dynamic(*numbers: int) -> bool:
    """Whether `torch.export` is to leave one of these numbers open."""
    return any(isinstance(number, torch.SymInt) for number in numbers)


def cached_table(shape: Callable[..., tuple[int, ...]]) -> Callable[[Callable[..., torch.Tensor]], Any]:
    """Turn `compute(*numbers)`, in float64 on the CPU, into a cached `table(*numbers, device=, dtype=)` of that shape.

    The cache belongs to the process. To `torch.compile` a table is an opaque operator: a graph neither computes it
    again nor is tied to one image size. Nobody else knows that operator, so an exported graph holds the table itself
    or, where a number is dynamic, computes it.
    """

    def decorate(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        cache = TensorCache(TABLE_BYTES)

        def cached(*key: Any) -> torch.Tensor:
            *numbers, device, dtype = key
            return cache.get(key, lambda: compute(*numbers).to(device, dtype).contiguous())

        # The Hub's copy of this file may be loaded beside the package's: each has operators of its own. Its module is
        # called after the folder, which may hold blanks and umlauts.
        operator = torch.library.custom_op(
            f"{re.sub(r'[^0-9A-Za-z_]', '_', compute.__module__)}::{compute.__name__}",
            lambda numbers, device, dtype: cached(*numbers, device, dtype).clone(),
            mutates_args=(),
            schema="(SymInt[] numbers, Device device, ScalarType dtype) -> Tensor",
        )
        operator.register_fake(lambda numbers, device, dtype: torch.empty(shape(*numbers), device=device, dtype=dtype))

        @torch.compiler.assume_constant_result
        def constant(*key: Any) -> torch.Tensor:
            # While it exports, torch turns the tensors of this thread into fake ones. A new thread makes real ones.
            with ThreadPoolExecutor(max_workers=1) as executor:
                return executor.submit(cached, *key).result()

        def table(*numbers: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
            if torch.compiler.is_exporting():
                if is_dynamic(*numbers):
                    return compute(*numbers).to(device, dtype)
                return constant(*numbers, device, dtype)
            if torch.compiler.is_compiling():
                return operator(numbers, device, dtype)
            return cached(*numbers, device, dtype)

        return table

    return decorate
