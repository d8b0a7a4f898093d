"""A cache for derived tensors, which are kept between calls up to a number of bytes and never saved with a model."""

import re
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers.utils.import_utils import is_fake_tensor

TABLE_BYTES = 8 * 2**20
"""Limit of one kind of table in the process. A table is small: it describes one side of a grid or a patch."""


class TensorCache:
    """Tensors by key. Above `max_bytes` in total, the least recently used ones are dropped.

    A copied or unpickled cache is empty, so the copies of a model that holds one share nothing.
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
        """Return the tensor of this key, from `compute()` if it is not cached. It carries no gradient."""
        with self.lock:
            if key in self.tensors:
                self.tensors[key] = self.tensors.pop(key)  # the one used last comes last
                return self.tensors[key]
        # A tensor that was made under inference mode could never take part in a backward pass.
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
    """Whether one of these numbers is dynamic under `torch.export`."""
    return any(isinstance(number, torch.SymInt) for number in numbers)


def cached_table(shape: Callable[..., tuple[int, ...]]) -> Callable[[Callable[..., torch.Tensor]], Any]:
    """Turn `compute(*numbers)`, in float64 on the CPU, into a cached `table(*numbers, device=, dtype=)` of that shape.

    The cache belongs to the process. For `torch.compile` a table is an opaque operator: a graph neither computes it
    again nor depends on one image size. Other programs do not know this operator, so an exported graph contains the
    table itself or, if a number is dynamic, computes it.
    """

    def decorate(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        cache = TensorCache(TABLE_BYTES)

        def cached(*key: Any) -> torch.Tensor:
            *numbers, device, dtype = key
            return cache.get(key, lambda: compute(*numbers).to(device, dtype).contiguous())

        # The Hub's copy of this file may be loaded beside the package's, so each has its own operators. The name of its
        # module contains the folder's name, in which any character may occur.
        operator = torch.library.custom_op(
            f"{re.sub(r'[^0-9A-Za-z_]', '_', compute.__module__)}::{compute.__name__}",
            lambda numbers, device, dtype: cached(*numbers, device, dtype).clone(),
            mutates_args=(),
            schema="(SymInt[] numbers, Device device, ScalarType dtype) -> Tensor",
        )
        operator.register_fake(lambda numbers, device, dtype: torch.empty(shape(*numbers), device=device, dtype=dtype))

        @torch.compiler.assume_constant_result
        def constant(*key: Any) -> torch.Tensor:
            # During an export, torch turns the tensors of this thread into fake ones. A new thread makes real ones.
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
