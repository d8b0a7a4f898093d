"""How a run chooses the way to make its views, and keeps it."""

import json
import time
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from hf_accel import PretrainTrainer
from hf_accel.data import FusedViews
from hf_accel.run_folder import read_state
from hf_accel.training import views
from tests.training.test_front_door import StopAt, Tensors, assert_same_weights, config, moco

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


@pytest.fixture
def rendered(monkeypatch) -> list[int]:
    """Sizes of the fused views that are made, here without a compiler."""
    sizes: list[int] = []

    class Watched(FusedViews):
        def __call__(self, drawn, mean, std):
            sizes.append(drawn[0].size)
            return super().__call__(drawn, mean, std)

    monkeypatch.setattr(views, "FusedViews", partial(Watched, backend=None))
    return sizes


def trained(folder, callbacks: Any = (), resume: Any = None, **settings: Any) -> PretrainTrainer:
    trainer = PretrainTrainer(moco(), config(folder, **settings), Tensors(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def take_seconds(monkeypatch, fused: float) -> None:
    """Eager views of a micro-batch of 16 images take one second."""
    monkeypatch.setattr(views, "_seconds", lambda trainer, *_: fused if trainer.render else 1.0)


def losses(trainer: PretrainTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("fused_takes, chosen", [(0.5, "fused"), (2.0, "eager")])
def test_the_faster_way_is_taken_where_views_take_long(fused_takes, chosen, rendered, monkeypatch, tmp_path):
    take_seconds(monkeypatch, fused_takes)
    trainer = trained(tmp_path / "short")  # six steps of a second
    assert trainer.view_backend == "eager" and trainer.render is None and not rendered
    monkeypatch.setattr(views, "WORTH", 5.0)
    trainer = trained(tmp_path / "long")
    assert trainer.view_backend == chosen and bool(rendered) == (chosen == "fused")
    assert json.loads((tmp_path / "long" / "results.json").read_text())["view_backend"] == chosen
    monkeypatch.setattr(views, "WORTH", 7.0)
    assert trained(tmp_path / "shorter").view_backend == "eager"


def test_seconds_of_views_leave_out_other_programs(monkeypatch, tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path), Tensors())
    monkeypatch.setattr(trainer, "views_of", lambda *_: time.sleep(0.05))  # what a busy core looks like to the run
    assert views._seconds(trainer, 16, {}, 1) < 0.025


@pytest.mark.slow
def test_fused_views_give_the_same_losses(rendered, tmp_path):
    stages = [{"until": 0.4, "patch_size": 8}, {"until": 1.0, "patch_size": 4}]
    settings = {"schedule": stages, "view_resolution": "matched"}
    eager, fused = (trained(tmp_path / name, view_backend=name, **settings) for name in ("eager", "fused"))
    assert losses(fused) == pytest.approx(losses(eager), rel=1e-4) and len(losses(eager)) > 6
    assert rendered[:2] == [8, 16]  # both are compiled before the first step
    assert rendered[2:] == [fused.view_size(step) for step in range(len(fused.plan))]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_views(rendered, monkeypatch, tmp_path):
    monkeypatch.setattr(views, "WORTH", 0.0)
    take_seconds(monkeypatch, 0.5)
    trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", [StopAt(5)])
    monkeypatch.setattr(views, "_seconds", lambda *_: 1 / 0)  # nothing is measured again
    resumed = trained(tmp_path / "run", resume=True)
    assert resumed.view_backend == "fused" and resumed._first_step == 3
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    state = tmp_path / "run" / "checkpoint-6" / "run_state.json"
    assert read_state(state.parent)["view_backend"] == "fused"
    changed = trained(tmp_path / "other", resume=str(state.parent.with_name("checkpoint-3")), view_backend="eager")
    assert changed.view_backend == "eager"


def test_without_a_compiler_views_are_eager_unless_asked_for(monkeypatch, tmp_path, capsys):
    class Broken(FusedViews):
        def __call__(self, *_):
            raise TorchDynamoException("no C++ compiler\nand a long trace")

    monkeypatch.setattr(views, "FusedViews", Broken)
    monkeypatch.setattr(views, "WORTH", 0.0)
    assert trained(tmp_path / "auto").view_backend == "eager"
    assert "operation by operation, as torch.compile fails: no C++ compiler\n" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"view_backend='fused': torch.compile fails: no C\+\+ compiler; take view_bac"
    ):
        trained(tmp_path / "asked", view_backend="fused")


def test_views_are_timed_as_they_come(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path), Tensors())
    batch = views._example(trainer, 8)
    assert batch["images"].shape == (16, 3, 16, 16)  # these lie in memory
    assert views._seconds(trainer, 8) > 0
    trainer.source.pixels = None
    assert [crop.shape for crop in views._example(trainer, 8)["crops"]] == [torch.Size([16, 3, 8, 8])] * 2


@pytest.mark.parametrize("begun", [0, 3, 20])
def test_steps_that_are_left_are_counted_by_size(begun, tmp_path, monkeypatch):
    stages = [{"until": 0.4, "patch_size": 8}, {"until": 1.0, "patch_size": 4}]
    trainer = PretrainTrainer(moco(), config(tmp_path, budget=3000, schedule=stages), Tensors())
    trainer._first_step = begun
    left = Counter(map(trainer.view_size, range(begun, trainer.plan.num_steps)))
    assert begun < trainer.plan.num_steps and set(left) <= {8, 16}
    # Unwrapping reads the metadata of packages: a plan of many steps took minutes.
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda *_, **__: 1 / 0)
    assert views._steps_by_size(trainer) == left and trainer.objective is trainer.model
