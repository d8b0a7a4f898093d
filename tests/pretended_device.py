"""A pretended accelerator, "pretend:0": CPU tensors treated as a GPU's are, to find what a host would wait for.

Values are computed on the CPU, and are true. What a GPU would do otherwise is told apart: operations on tensors of two
devices raise; host waits (a value read, a size that depends on values, a copy that is not asynchronous) are noted, each
with the line of the package that caused it. Registering it is final: it belongs into a process of its own.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten: Any = torch.ops.aten

READS_VALUES = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.linalg_svd, aten._linalg_svd, aten.linalg_eigh),
    *(aten._linalg_eigh, aten.multinomial, aten.randperm),
}
"""On a GPU the host waits for the values, or for the size that follows from them."""

COPIES = {aten._to_copy, aten.copy_}
LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "conv2d", "scaled_dot_product_attention")
RAISED = ("layer_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss", "nll_loss", "norm.ScalarOpt_dim")
"""What autocast computes in its own precision, and in fp32: of CUDA's lists what a training step here calls."""


class PretendModule:
    """What `torch.pretend` is."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The CPU's generator, which draws here, has been seeded with it."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class PretendTensor(torch.Tensor):
    """A tensor that claims to be on the device, and holds its values on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of Watch")


class Watch(TorchDispatchMode):
    """Computes for the pretended device, and notes what a host would wait for: `waits`, one line of text each.

    Nothing is noted while `on` is false.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.operations, self.copies, self.steps, self.on = 0, 0, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        packet, target = func.overloadpacket, kwargs.get("device")
        if packet is aten.is_pinned:
            return hasattr(tensors[0], "pinned")
        if packet is aten._pin_memory:
            copy = tensors[0].clone()
            copy.pinned = True  # pyright: ignore[reportAttributeAccessIssue]
            return copy
        to_device = is_here(target) if target is not None else bool(there)
        if not there and not to_device:
            return func(*args, **kwargs)
        self.check(func, packet, args, kwargs, tensors, there)
        plain: Any = tree_map(held, (args, {**kwargs, "device": "cpu"} if target is not None else kwargs))
        out = func(*plain[0], **plain[1])
        self.operations += self.on
        if packet is aten.copy_:
            return args[0]
        if not to_device or packet is aten._local_scalar_dense:
            return out
        out = tree_map(lambda leaf: PretendTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if there else out

    def check(self, func, packet, args, kwargs, tensors, there) -> None:
        """Raise what a GPU would raise; note what a host would wait for."""
        target = kwargs.get("device")
        if packet in COPIES:
            source, goal = (args[1], args[0].device) if packet is aten.copy_ else (args[0], target)
            if goal is None or is_here(goal) == isinstance(source, PretendTensor):
                return
            non_blocking = kwargs.get("non_blocking", False) or (packet is aten.copy_ and len(args) > 2 and args[2])
            self.copies += self.on
            if not (non_blocking and hasattr(source, "pinned")):
                way = "to" if is_here(goal) else "from"
                self.note(f"a copy of {tuple(source.shape)} {way} the device that is not asynchronous")
            return
        if there and len(there) < len(tensors):
            shapes = [tuple(t.shape) for t in tensors if not isinstance(t, PretendTensor)]
            raise RuntimeError(f"{func}: tensors on two devices; on the CPU those of shapes {shapes}")
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in READS_VALUES or by_mask:
            self.note(f"{func} reads values")

    def note(self, what: str) -> None:
        if self.on:
            ours = [f for f in traceback.extract_stack() if "hf_accel" in f.filename.split("site-packages")[0]]
            where = f"{ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}" if ours else "outside of the package"
            self.waits.append(f"{what} ({where})")


class Constants(TorchFunctionMode):
    """`torch.tensor(values, device=...)`, which does not reach a dispatch mode: a copy that is waited for."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") and is_here(kwargs["device"]):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def watching() -> Iterator[Watch]:
    """Within it the pretended device computes; the watch is off at first."""
    with Watch() as watch, Constants(watch):
        yield watch


def is_here(device: Any) -> bool:
    return torch.device(device).type == "pretend"


def held(leaf: Any) -> Any:
    """The CPU's tensor for the pretended one's, anything else as it is."""
    return leaf.held if isinstance(leaf, PretendTensor) else leaf


def autocast(operator: Any, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """`operator` on floating point arguments of this dtype, with autocast off inside."""

    def cast(leaf: Any) -> Any:
        wrong = isinstance(leaf, PretendTensor) and leaf.is_floating_point() and leaf.dtype != dtype()
        return leaf.to(dtype()) if wrong else leaf

    keys: Any = torch._C.DispatchKey

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(keys.AutocastPrivateUse1)):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


def register() -> torch.device:
    """Make "pretend:0" a device of this process, with autocast; for good."""
    global DEVICE
    from torch.utils import backend_registration  # here alone: what is taken of it is experimental

    backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=PretendModule())
    DEVICE = torch.device("pretend:0")
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    some = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    LIBRARIES.extend([rest, some])
    for names, dtype in ((LOWERED, lambda: torch.get_autocast_dtype("pretend")), (RAISED, lambda: torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            some.impl(name, autocast(getattr(getattr(aten, packet), overload or "default"), dtype))
    return DEVICE


DEVICE = torch.device("cpu")  # until it is registered
LIBRARIES: list[torch.library.Library] = []  # what they register goes when they do
