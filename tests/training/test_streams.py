"""The order of events with a pretended GPU: views beside the steps before, few of them in memory, and idle steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_accel import PretrainTrainer
from hf_accel.training.streams import GpuSteps
from hf_accel.training.timing import name_bound
from tests.training.test_front_door import Tensors, config, moco

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


class PretendedCuda:
    """Notes in `told` what is done, with the stream that it is done on."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.current, self.done, self.events = "main", True, 0

    def note(self, *what: Any) -> None:
        self.told.append((self.current, *what))

    def Stream(self, device: Any) -> Any:
        return SimpleNamespace(name="side", wait_stream=lambda other: self.note("side waits for", other.name))

    def current_stream(self, device: Any) -> Any:
        return SimpleNamespace(name=self.current, wait_stream=lambda other: self.note("waits for", other.name))

    def Event(self) -> Any:
        self.events += 1
        number = self.events
        return SimpleNamespace(
            record=lambda stream: self.note("record", number, stream.name),
            synchronize=lambda: self.note("host waits for", number),
            query=lambda: self.done,
        )

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class View:
    """A view that notes where it is made, and for which stream its memory is kept."""

    def __init__(self, cuda: PretendedCuda):
        self.cuda = cuda
        cuda.note("make")

    def record_stream(self, stream: Any) -> None:
        self.cuda.note("keep for", stream.name)


def test_views_are_made_beside_the_steps_before():
    cuda = PretendedCuda()
    steps = GpuSteps(torch.device("cpu"), cuda)
    trainer = SimpleNamespace(
        _prepare_inputs=lambda inputs: (cuda.note("send"), inputs)[1],
        view_size=lambda step: 16 * step,
        views_of=lambda inputs, size: [View(cuda) for _ in range(2)] if size == 16 * inputs["step"] else [],
    )

    def loader() -> Iterator[dict[str, Any]]:
        for step in range(3):
            cuda.note("load")
            yield {"step": step, "micro_step": 0, "images": "pixels"}

    batches, seen = loader(), []
    for step in range(3):
        for batch in steps.begin_step(batches):
            given = steps.with_views(trainer, batch)
            assert given.keys() == {"step", "micro_step", "views"} and given["step"] == step
            seen.append(len(given["views"]))
            cuda.note("train")
            break
    assert seen == [2, 2, 2] and next(batches, None) is None
    side = [("side", "send"), ("side", "make"), ("side", "make"), ("main", "waits for", "side")]
    rest = [*side, *[("main", "keep for", "main")] * 2, ("main", "train")]
    # The views of a step wait for nothing on the device, and the host for the step before the last.
    assert cuda.told == [
        ("main", "side waits for", "main"),
        *[("side", "load"), ("main", "record", 1, "main"), *rest],
        *[("side", "load"), ("main", "record", 2, "main"), ("main", "host waits for", 1), *rest],
        *[("side", "load"), ("main", "record", 3, "main"), ("main", "host waits for", 2), *rest],
    ]


def test_steps_for_which_a_gpu_was_idle_are_counted():
    cuda = PretendedCuda()
    steps = GpuSteps(torch.device("cpu"), cuda)
    for done in (None, True, True, False, True):
        cuda.done = bool(done)
        steps.begin_step(iter(()))
        steps.end_backward()
    assert steps.take_idle_fraction() == 0.75 and steps.take_idle_fraction() == 0.0


@pytest.mark.parametrize(
    "data, idle, part",
    [(0.1, 0.9, "launches"), (0.6, 0.9, "data"), (0.1, 0.3, "device"), (0.1, None, "device"), (0.6, 0.1, "data")],
)
def test_launches_bound_steps_for_which_a_gpu_is_idle(data, idle, part):
    logs = {"data_wait_fraction": data} | ({} if idle is None else {"device_idle_fraction": idle})
    assert name_bound(logs) == part


def trained(folder, monkeypatch, beside: bool, **settings: Any) -> tuple[PretrainTrainer, list[Any]]:
    """A run of which every view is kept, with or without a stream of its own for them."""
    views: list[Any] = []
    make = PretrainTrainer.views_of

    def kept(self, inputs, size):
        made = make(self, inputs, size)
        views.extend(view.detach().clone().cpu() for view in made)
        return made

    monkeypatch.setattr(PretrainTrainer, "views_of", kept)
    if not beside:
        monkeypatch.setattr(GpuSteps, "with_views", lambda self, trainer, inputs: inputs)
    stages = [{"until": 0.5, "patch_size": 8, "token_dropout": 0.5}, {"until": 1.0}]
    settings = {"schedule": stages, "view_resolution": "matched", "budget": "4 epochs", "eval_points": [], **settings}
    trainer = PretrainTrainer(moco(), config(folder, **settings), Tensors())
    trainer.train()
    return trainer, views


def losses(trainer: PretrainTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_views_that_were_made_before_train_as_any(tmp_path, monkeypatch):
    """On the CPU, with a pretended stream in place of the GPU's."""
    with monkeypatch.context() as patch:
        plain, expected = trained(tmp_path / "plain", patch, beside=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    steps = GpuSteps(torch.device("cpu"), PretendedCuda())
    monkeypatch.setattr(PretrainTrainer, "_gpu_steps", property(lambda _: steps, lambda *_: None), raising=False)
    trainer, views = trained(tmp_path / "beside", monkeypatch, beside=True)
    assert losses(trainer) == losses(plain) and len(views) == len(expected) > 8
    assert all(map(torch.equal, views, expected)) and len({view.shape for view in views}) == 2
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 <= entry["device_idle_fraction"] <= 1 for entry in entries)
    assert not any("device_idle_fraction" in entry for entry in plain.state.log_history)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["none", "device"])
def test_views_on_a_stream_of_their_own_are_the_same(cache, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        plain, expected = trained(tmp_path / "plain", patch, beside=False, cache=cache)
    trainer, views = trained(tmp_path / "beside", monkeypatch, beside=True, cache=cache)
    assert trainer._gpu_steps is not None and len(views) == len(expected) > 8
    assert all(map(torch.equal, views, expected))
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-3)
