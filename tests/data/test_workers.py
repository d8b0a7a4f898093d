"""Test that workers return batches unchanged, and that their failures say what to do."""

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_accel.data import CorruptDataError, ImageSource, eval_loader, workers
from hf_accel.data.workers import WorkersFailed, explained_failures, pass_on

BATCH = {
    "crops": [torch.arange(7, dtype=torch.uint8), torch.arange(12, dtype=torch.uint8).view(2, 3, 2).transpose(0, 2)],
    "pixel_values": torch.randn(2, 3, 5),
    "index": torch.tensor([5, 2**40]),
    "flags": torch.tensor([True, False]),
    "one": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.empty(0, 3),
    "bad": [(3, "name", "reason")],
    "rows": slice(2, 4),
    "step": 7,
}


class Batches(Dataset):
    """Calls `act` in a worker with the number of the batch and returns its result as the batch."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 4

    def __getitems__(self, indices):
        return self.act(indices[0])


def load(act, **options):
    collate: Any = pass_on
    loader = DataLoader(Batches(act), num_workers=1, collate_fn=collate, batch_size=1, **options)
    with explained_failures():
        return list(loader)


def test_a_batch_leaves_a_worker_unchanged():
    for batch in load(lambda number: BATCH):
        assert batch.keys() == BATCH.keys()
        for key, value in BATCH.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(batch[key], value) and batch[key].dtype == value.dtype, key
            elif key != "crops":
                assert batch[key] == value, key
        assert all(torch.equal(one, other) for one, other in zip(batch["crops"], BATCH["crops"], strict=True))
        tensors = [*batch["crops"], *(value for value in batch.values() if isinstance(value, torch.Tensor))]
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


@pytest.mark.parametrize(
    ("cores", "processes", "free", "expected"),
    [(8, 1, 10**9, 7), (8, 2, 10**9, 3), (1, 1, 10**9, 0), (2, 4, 10**9, 0), (8, 1, 4000, 1), (8, 2, 8000, 1)],
)
def test_workers_are_as_many_as_cores_and_memory_allow(cores, processes, free, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert workers.count_workers(1000) == expected


def full_memory(*_):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")


def test_full_shared_memory_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", full_memory)
    with pytest.raises(WorkersFailed) as error:
        load(lambda number: BATCH)
    (line,) = str(error.value).splitlines()
    assert line.startswith("A batch of 0.0 MB does not fit into shared memory: unable to allocate")
    assert all(remedy in line for remedy in ("--shm-size", "--ipc=host", "num_workers: 0"))


@pytest.mark.slow
def test_a_late_worker_is_an_error_with_a_remedy():
    with pytest.raises(WorkersFailed, match=r"DataLoader timed out after 1 seconds\. .*--shm-size.*num_workers: 0"):
        load(lambda number: time.sleep(1.5) if number == 0 else BATCH, timeout=1)


@pytest.mark.slow
def test_a_killed_worker_is_an_error_with_a_remedy():
    with pytest.raises(WorkersFailed, match=r"failed: DataLoader worker \(pid.*--shm-size.*num_workers: 0"):
        load(lambda number: os.kill(os.getpid(), signal.SIGKILL))


def test_loaders_with_workers_wait_for_a_bounded_time(monkeypatch):
    source = ImageSource("set", pixels=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(source, "pixels", None)
    monkeypatch.setattr(ImageSource, "__len__", lambda self: 4)
    monkeypatch.setattr(ImageSource, "sample_sizes", lambda self: [])
    waits = [eval_loader(source, 8, 2, num_workers=number).timeout for number in (0, 2)]
    assert waits == [0, workers.BATCH_SECONDS] and 60 <= workers.BATCH_SECONDS <= 600


def raise_corrupt(number):
    raise CorruptDataError("set: at least 2 images cannot be read.\nRemove them.")


def test_an_error_of_the_data_has_no_traceback():
    with pytest.raises(CorruptDataError) as error:
        load(raise_corrupt)
    assert str(error.value) == "set: at least 2 images cannot be read.\nRemove them."


@pytest.mark.parametrize("error", [RuntimeError("a DataLoader worker"), ValueError("DataLoader timed out")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, explained_failures():
        raise error
    assert raised.value is error
