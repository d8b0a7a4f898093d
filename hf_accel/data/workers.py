"""The processes that load images: how batches reach the run, and how they react to signals and failures."""

import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import get_worker_info

from ..distributed import processes_on_node
from .sources import CorruptDataError

BATCH_SECONDS = 300
"""How long a run waits for a batch. Workers on a busy machine, or on a slow file system, take minutes to start."""

REMEDY = (
    "If shared memory is what they lack (Docker gives a container 64 MB in /dev/shm), start the container with "
    "`docker run --shm-size=8g` or `--ipc=host`. Otherwise lower num_workers; num_workers: 0 loads without them"
)

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps the memory that workers and the run share."""

ALIGNMENT = 64
"""In bytes. A tensor in a batch's memory starts at a multiple of this, which suits numbers of every size."""

TORCH_FAILURES = re.compile(
    r"DataLoader worker \(pid|DataLoader timed out|Pin memory thread exited|Too many open files|received \d+ items of"
)
"""Beginnings of the messages with which torch says that workers failed."""


class WorkersFailed(RuntimeError):
    """The processes that load images ended, gave no batch for too long, or could not pass one on."""


def cores_of_process() -> int:
    """Return this process's share of the CPU cores that it may use, which may be 0."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // processes_on_node()


def count_workers(batch_bytes: int) -> int:
    """Count the processes that may decode images for this one: its share of the node's CPU cores, less one for itself.

    Each worker makes two batches of `batch_bytes` ahead. Together they take at most half of the free shared memory.
    """
    workers = max(0, cores_of_process() - 1)
    if SHARED_MEMORY.exists():
        room = shutil.disk_usage(SHARED_MEMORY).free // 2 // processes_on_node()
        workers = min(workers, room // (2 * batch_bytes))
    return workers


# Batches


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in the memory of a batch, in bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def pass_on(batch: dict[str, Any]) -> Any:
    """Return a batch as it is or, in a worker, in a form that takes one piece of shared memory (a `collate_fn`).

    Torch shares each tensor separately, and each takes an open file in the run for as long as it lives. Ten views of an
    image and a hundred batches would exceed the usual limit of 1,024.
    """
    return batch if get_worker_info() is None else _SharedBatch(batch)


class _SharedBatch:
    """A batch on its way to the run, where it is unpickled as the dictionary that it was made of."""

    def __init__(self, batch: dict[str, Any]):
        tensors: list[tuple[int, Tensor]] = []
        end = 0

        def place(value: Any) -> Any:
            nonlocal end
            if not isinstance(value, Tensor):
                return value
            start, end = end, end + -(-value.nbytes // ALIGNMENT) * ALIGNMENT
            tensors.append((start, value))
            return _Place(start, value.dtype, tuple(value.shape))

        self.template = tree_map(place, batch)
        try:
            # This happens before the batch is sent, as a thread sends it and the run does not see that thread's errors.
            self.memory = torch.empty(end, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            size = f"{end / 1e6:.1f} MB"
            raise WorkersFailed(f"A batch of {size} does not fit into shared memory: {error}. {REMEDY}") from error
        for start, tensor in tensors:
            self.memory[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self.memory, self.template)


def _unpack(memory: Tensor, template: dict[str, Any]) -> dict[str, Any]:
    """Return the batch, whose tensors are views of `memory`."""

    def take(value: Any) -> Any:
        if not isinstance(value, _Place):
            return value
        end = value.start + value.dtype.itemsize * torch.Size(value.shape).numel()
        return memory[value.start : end].view(value.dtype).view(value.shape)

    return tree_map(take, template)


# Signals


def outlive_sigterm(worker: int) -> None:
    """Ignore every SIGTERM that does not come from the run itself (a `worker_init_fn`).

    Queues and launchers send SIGTERM to all processes of a run, whose last step before the checkpoint needs the
    workers. On systems without `sigwaitinfo`, workers end at the first SIGTERM.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    run = multiprocessing.parent_process()  # not `os.getppid`, which may be a fork server

    def heed_run():
        while run and signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
            pass
        os._exit(0)

    threading.Thread(target=heed_run, daemon=True).start()


@contextmanager
def block_sigterm_in_children() -> Iterator[None]:
    """Let processes that are started in this context block SIGTERM until `outlive_sigterm` handles it.

    A process that is not forked first imports for seconds, and so does the fork server, which stays alive.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    from multiprocessing import resource_tracker  # systems with `sigwaitinfo` have this, too

    # Python starts this tracker with the first worker that is not forked, and then unblocks SIGTERM. Start it first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Failures


@contextmanager
def explained_failures() -> Iterator[None]:
    """Turn errors about workers, which hold another process's traceback, into messages that say what to do.

    Raises:
        WorkersFailed: replaces torch's errors about workers that ended, are late or cannot pass a batch on.
        CorruptDataError: has the message with which it was raised in a worker.
    """
    try:
        yield
    except (WorkersFailed, CorruptDataError) as error:
        kind = type(error)
        _, raised_elsewhere, message = str(error).rpartition(f"{kind.__name__}: ")
        if raised_elsewhere:
            raise kind(message.strip()) from error
        raise
    except RuntimeError as error:
        if not TORCH_FAILURES.match(str(error)):
            raise
        what = str(error).splitlines()[0].rstrip(".")
        raise WorkersFailed(f"The processes that load images failed: {what}. {REMEDY}") from error
