"""Timed steps change nothing, predictions follow from them, and too little memory ends with advice."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch

from hf_accel import Compression, DINOForPreTraining, PretrainConfig, PretrainTrainer, Strategy, vit_tiny
from hf_accel.training.memory import OutOfMemory, advise, explained_memory
from hf_accel.training.timing import PredictedTime, StepTime, format_duration, predict_seconds, time_steps
from tests.training.test_front_door import SIZES, Tensors, config, moco

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

COARSE, BASE = Strategy(Compression(8, 0.5)), Strategy(Compression(4))
STAGES = [{"until": 0.5, "patch_size": 8, "token_dropout": 0.5}, {"until": 1.0}]


def small_trainer(folder: Path, model: Any = None, **settings: Any) -> PretrainTrainer:
    return PretrainTrainer(model or moco(), config(folder, schedule=STAGES, **settings), train_dataset=Tensors())


@pytest.mark.parametrize("objective", ["moco", "dino"])
def test_timed_steps_leave_the_trainer_as_it_is(objective, tmp_path):
    heads: dict[str, Any] = {"head_hidden_size": 32, "bottleneck_size": 16, "num_prototypes": 24, "local_crop_size": 8}
    model = moco() if objective == "moco" else DINOForPreTraining(vit_tiny(**SIZES), **heads)
    trainer = small_trainer(tmp_path, model, view_resolution="matched", gradient_accumulation_steps=2)
    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [{key: torch.as_tensor(value).clone() for key, value in s.items()} for s in optimizer.state.values()]
    random, seconds, plan, training = torch.get_rng_state(), dict(trainer.seconds), trainer.plan.state(), model.training
    times = time_steps(trainer, [COARSE, BASE, COARSE], steps=2)
    assert times.keys() == {COARSE, BASE} and all(step.seconds > 0 and step.memory > 10**7 for step in times.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for old, new in zip(moments, optimizer.state.values(), strict=True):
        assert moments and all(torch.equal(value, torch.as_tensor(new[key])) for key, value in old.items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.requires_grad and p.grad is not None)
    assert torch.equal(random, torch.get_rng_state()) and model.training == training
    assert (trainer.seconds, trainer.plan.state(), trainer.source.bad) == (seconds, plan, {})
    assert trainer.state.global_step == 0 and trainer._metric_count == 0


def test_a_timed_step_does_all_that_a_step_does(tmp_path, monkeypatch):
    seen: list[Any] = []
    trainer = small_trainer(tmp_path, gradient_accumulation_steps=2, max_grad_norm=1.0)
    kind = type(trainer.objective)
    forward, update = kind.forward, kind.update_target

    def recorded(self, views, strategy, draw, progress=0.0):
        seen.append((strategy, len(views[0])))
        return forward(self, views, strategy, draw, progress)

    monkeypatch.setattr(kind, "forward", recorded)
    monkeypatch.setattr(kind, "update_target", lambda *args: (seen.append("target"), update(*args)))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: seen.append("optimizer"))
    time_steps(trainer, [COARSE, BASE], steps=1)
    turns = [[(strategy, 8), (strategy, 8), "optimizer", "target"] for strategy in (COARSE, BASE)]
    assert seen == 2 * [*turns[0], *turns[1]]


def test_the_median_leaves_the_warm_up_out(tmp_path, monkeypatch):
    trainer, taken = small_trainer(tmp_path), iter([90, 9, 3, 40, 4, 6, 2, 5])
    monkeypatch.setattr("hf_accel.training.timing._Timer.take_step", lambda *_: StepTime(next(taken), 7))
    assert time_steps(trainer, [COARSE, BASE]) == {COARSE: StepTime(3, 7), BASE: StepTime(6, 7)}


def test_a_stage_takes_its_steps_times_their_seconds(tmp_path):
    plan = small_trainer(tmp_path).plan
    (first, coarse), (second, base) = plan.stage_steps()
    assert (first, second) == (COARSE, BASE) and coarse + base == plan.num_steps and coarse > base > 0
    times = {COARSE: StepTime(2.0, 0), BASE: StepTime(30.0, 0)}
    assert predict_seconds(plan, times) == [2.0 * coarse, 30.0 * base]
    assert [format_duration(s) for s in (0.1234, 89, 720, 7200)] == ["0.123 s", "89 s", "12 min", "2.0 h"]


@pytest.mark.parametrize("evaluation", [0.0, 50.0])
def test_a_run_predicts_its_end_from_seconds_per_unit(tmp_path, monkeypatch, capsys, evaluation):
    trainer = small_trainer(tmp_path, budget="20 epochs")
    (_, coarse), (_, base) = trainer.plan.stage_steps()
    assert coarse > 30
    clock, callback = [0.0], cast(Any, PredictedTime(trainer))
    monkeypatch.setattr("hf_accel.training.timing.time.perf_counter", lambda: clock[0])
    callback.on_train_begin(None, None, None)
    for done in range(1, 26):
        clock[0] += 100 if done == 1 else 3.0 + evaluation
        trainer.seconds["evaluation"] += 0 if done == 1 else evaluation
        callback.on_step_end(None, SimpleNamespace(global_step=done), None)
        if done == 20:
            assert "About" not in capsys.readouterr().out
    cost = [trainer.plan[0].cost, trainer.plan[trainer.plan.num_steps - 1].cost]
    left = 3.0 * (coarse - 21) + 3.0 * base * cost[1] / cost[0]  # the base strategy has not been seen
    steps = trainer.plan.num_steps - 21
    assert capsys.readouterr().out == f"About {format_duration(left)} for the remaining {steps} steps\n"


# Too little memory

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def test_too_little_memory_names_settings_that_need_less(tmp_path, monkeypatch):
    trainer, error = small_trainer(tmp_path), RuntimeError(CPU)
    monkeypatch.setattr(type(trainer.objective), "forward", MagicMock(side_effect=error))
    with pytest.raises(OutOfMemory) as raised:
        trainer.train()
    text = str(raised.value)
    assert "cpu has too little memory for micro-batches of 16 images" in text and "\n" not in text
    assert "gradient_accumulation_steps=2, for micro-batches of 8 images; in moco the loss" in text
    assert "the loss of an image then depends on these 8 only." in text
    assert "gradient_checkpointing=true" in text and raised.value.__cause__ is error


def test_the_advice_can_be_followed(tmp_path):
    dino = SimpleNamespace(name="dino", least_batch=1)
    contrastive: Any = SimpleNamespace(name="moco", least_batch=2)

    def advice(model: Any, **settings: Any) -> str:
        return advise(PretrainConfig(str(tmp_path), budget=1, report_to="none", bf16=False, **settings), model)

    assert "steps=6, for micro-batches of 4 images. Or" in advice(dino, batch_size=24, gradient_accumulation_steps=3)
    assert "steps=3, for micro-batches of 3 images;" in advice(contrastive, batch_size=9)  # 9 has no half
    assert "accumulation" not in advice(contrastive, batch_size=3)
    assert "smaller model" in advice(contrastive, batch_size=3, activation_checkpointing=True)
    args = PretrainConfig(str(tmp_path), budget=1, report_to="none", bf16=False)
    with pytest.raises(OutOfMemory), explained_memory(args, contrastive):
        raise torch.OutOfMemoryError("in words of another backend")
    with pytest.raises(RuntimeError, match="shape") as other, explained_memory(args, contrastive):
        raise RuntimeError("shape mismatch")
    assert not isinstance(other.value, OutOfMemory)
