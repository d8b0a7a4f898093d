"""Test how a run chooses where to keep its images, and what a resumed run makes of that."""

import json
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from torch.utils.data import Dataset

from hf_accel import PretrainTrainer
from hf_accel.data import cache
from hf_accel.run_folder import read_state
from hf_accel.training import caching
from hf_accel.training.timing import time_steps
from tests.data.test_loader import noise
from tests.training.test_front_door import StopAt, Tensors, assert_same_weights, config, moco

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

COUNT = 48


class Pictures(Dataset):
    """PIL images of several sizes with labels; `reads` counts how often one is read."""

    def __init__(self, count: int = COUNT):
        self.count, self.reads = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        self.reads += 1
        return noise(index, 40 + index % 7, 30 + 5 * (index % 3)), index % 3


def trained(folder, callbacks: Any = (), resume: Any = None, **settings: Any) -> PretrainTrainer:
    args = config(folder, eval_points=[], **{"budget": "3 epochs", **settings})
    trainer = PretrainTrainer(moco(), args, Pictures(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def cache_of(trainer: PretrainTrainer) -> Any:
    return json.loads((trainer.folder.results).read_text())["cache"]


@pytest.mark.slow
def test_stored_images_are_read_once(tmp_path, capsys):
    plain, stored = trained(tmp_path / "none", cache="none"), trained(tmp_path / "ram", cache="ram")
    reads = [trainer.source._table.dataset.reads for trainer in (plain, stored)]  # pyright: ignore
    assert reads[0] - reads[1] == 3 * COUNT - 2 * COUNT  # once for its size, once for its pixels
    assert [cache_of(trainer) for trainer in (plain, stored)] == ["none", "ram"]
    assert plain.source.stored is None and stored.source.stored is not None
    assert stored.source.stored.rows.shape[1] == cache.storage_side(stored.view_configs, 16) == 22
    assert "Images are stored in 0.00 GB, short side at most 22 pixels" in capsys.readouterr().out


@pytest.mark.slow
def test_on_a_cpu_the_device_is_the_memory(tmp_path):
    ram, device = trained(tmp_path / "ram", cache="ram"), trained(tmp_path / "device", cache="device")
    assert_same_weights(tmp_path / "ram", tmp_path / "device")
    assert cache_of(device) == "device" and cache_of(ram) == "ram"


def test_auto_takes_half_of_the_memory_for_two_passes_or_more(monkeypatch):
    free = {"cpu": 200, "cuda": 200}
    monkeypatch.setattr(caching, "estimate_bytes", lambda source, side: 100)
    monkeypatch.setattr(caching, "free_memory", lambda device: free[device.type])

    def chosen(device: str = "cpu", steps: int = 20, **settings: Any) -> str:
        args = SimpleNamespace(cache="auto", device=torch.device(device))
        plan = SimpleNamespace(num_steps=steps, batch_size=10)
        trainer = SimpleNamespace(args=args, plan=plan, source=range(100), cache=None)
        return caching.choose_cache(SimpleNamespace(**(vars(trainer) | settings)), 22)

    assert chosen() == "ram" and chosen("cuda") == "device" and chosen(steps=19) == "none"
    assert chosen(cache="none") == "none" and chosen("cuda", cache="ram") == "ram"  # of resumed runs
    free["cuda"] = 199
    assert chosen("cuda") == "ram"
    free["cpu"] = 199
    assert chosen() == chosen("cuda") == "none"
    free["cpu"] = 200
    monkeypatch.setattr(caching, "all_gather_objects", lambda value: [value, False])  # of another process
    assert chosen() == "none"


def test_too_little_memory_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"^cache='ram': the stored images take .* are free .*; take cache=none"):
        trained(tmp_path, cache="ram")


@pytest.mark.slow
@pytest.mark.parametrize("begun", ["ram", "none"])
def test_a_resumed_run_keeps_its_cache(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "SHARE", 1.0 if begun == "ram" else 0.0)
    trained(tmp_path / "whole", cache="auto")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", [StopAt(5)], cache="auto")
    monkeypatch.setattr(caching, "SHARE", 0.0 if begun == "ram" else 1.0)
    resumed = trained(tmp_path / "run", resume=True, cache="auto")
    assert cache_of(resumed) == begun and resumed._first_step > 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    state = max(tmp_path.glob("run/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert read_state(state)["cache"] == begun


@pytest.mark.slow
def test_a_resumed_run_may_change_its_cache(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, [StopAt(5)], cache="ram")
    resumed = trained(tmp_path, resume=True, cache="none")
    assert cache_of(resumed) == "none" and resumed.source.stored is None and "cache" in capsys.readouterr().out


def test_images_in_memory_need_no_second_copy(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path, cache="ram"), Tensors(), Tensors(30))
    trainer.train()
    assert trainer.source.pixels is not None and trainer.source.stored is None and cache_of(trainer) == "ram"


def test_steps_are_timed_with_stored_images(tmp_path):
    trainer = trained(tmp_path, cache="ram")
    (taken,) = time_steps(trainer, [trainer.plan[0].strategy], 1).values()
    assert taken.seconds > 0 and torch.is_tensor(trainer.source.stored.rows)  # pyright: ignore
