"""Costs of whole steps, timed at the start of a run, and budgets in time that they turn into units."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_accel import (
    Compression,
    DINOForPreTraining,
    MoCoForPreTraining,
    PretrainConfig,
    PretrainTrainer,
    SimCLRForPreTraining,
    Strategy,
    cli,
    vit_tiny,
)
from hf_accel.compression import CostTable, forward_cost
from hf_accel.compression.cost import TABLE_NAME, StepCosts, load_costs
from hf_accel.schedule_search.gradient_probe import GradientProbe
from hf_accel.training import step_costs
from hf_accel.training.step_costs import prepare_steps
from hf_accel.training.timing import StepTime, _Timer, name_bound
from hf_accel.utils.errors import SettingError
from hf_accel.utils.pretrain_settings import budget_in_seconds
from tests.tiny_runs import RECIPE, assert_same_weights, image_folder
from tests.training.test_front_door import HEADS, SIZES, StopAt, Tensors, config, moco

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

COARSE, BASE = Strategy(Compression(8, 0.5)), Strategy(Compression(4))
STAGES = [{"until": 0.5, "patch_size": 8, "token_dropout": 0.5}, {"until": 1.0}]
SECONDS = {COARSE: 0.15, BASE: 0.4}


def trainer_of(folder: Path, model: Any = None, callbacks: Any = (), **settings: Any) -> PretrainTrainer:
    args = config(folder, **{"schedule": STAGES, **settings})
    return PretrainTrainer(model or moco(), args, Tensors(), Tensors(30), callbacks=list(callbacks))


@pytest.fixture
def timed(monkeypatch) -> list[Any]:
    """Steps take SECONDS; the strategies that were timed, with the way to make views."""
    asked: list[Any] = []

    def time_steps(trainer, strategies, steps=3):
        asked.append((trainer.view_backend, list(strategies), steps))
        return {strategy: StepTime(SECONDS[strategy], 0) for strategy in strategies}

    monkeypatch.setattr(step_costs, "time_steps", time_steps)
    return asked


@pytest.fixture
def refused(monkeypatch) -> Callable[[], None]:
    """When called, steps must not be timed from then on."""

    def refuse() -> None:
        monkeypatch.setattr(step_costs, "time_steps", lambda *_, **__: pytest.fail("steps were timed again"))

    return refuse


def steps_of(budget: float, step: dict[Strategy, float]) -> list[Strategy]:
    """A transcription of the plan along STAGES."""
    spent, steps = 0.0, []
    while True:
        strategy = COARSE if spent < 0.5 * budget else BASE
        if spent + step[strategy] > budget:
            return steps
        spent += step[strategy]
        steps.append(strategy)


# Costs


def test_a_measured_plan_spends_seconds_in_units(timed, tmp_path):
    budget = 10.3 * 64
    trainer = trainer_of(tmp_path, cost="measured", budget=budget)
    provisional = len(trainer.plan)
    times = prepare_steps(trainer, time.perf_counter())
    assert times == {strategy: StepTime(seconds, 0) for strategy, seconds in SECONDS.items()}
    expected = steps_of(budget, {BASE: 64.0, COARSE: 64.0 * 0.15 / 0.4})
    assert [step.strategy for step in trainer.plan] == expected and len(expected) != provisional
    assert trainer.args.max_steps == trainer.most_steps == len(expected)
    assert trainer.plan.budget == budget


@pytest.mark.parametrize("objective", ["moco", "simclr", "dino"])
def test_the_uncompressed_step_costs_its_analytic_units(objective, timed, tmp_path):
    heads: dict[str, Any] = {"head_hidden_size": 32, "bottleneck_size": 16, "num_prototypes": 24, "local_crop_size": 8}
    made = {
        "moco": moco,
        "simclr": lambda: SimCLRForPreTraining(vit_tiny(**SIZES), **HEADS),
        "dino": lambda: DINOForPreTraining(vit_tiny(**SIZES), **heads),  # with local crops
    }
    model = made[objective]()
    units = model.units_per_image(BASE, partial(forward_cost, model.config))
    trainer = trainer_of(tmp_path, model, cost="measured", budget="4 epochs")
    prepare_steps(trainer, time.perf_counter())
    assert isinstance(trainer.costs, StepCosts) and trainer.costs(BASE) == units
    assert trainer.costs(COARSE) == pytest.approx(units * 0.15 / 0.4)
    assert trainer.costs.seconds_per_unit == pytest.approx(0.4 / (16 * units))
    assert trainer.plan.budget == pytest.approx(4 * 96 * units)


def test_costs_are_read_from_the_folder_and_not_measured_again(timed, refused, tmp_path):
    first = trainer_of(tmp_path, cost="measured", budget=1000)
    prepare_steps(first, time.perf_counter())
    assert load_costs(tmp_path / TABLE_NAME) == first.costs
    refused()
    second = trainer_of(tmp_path, cost="measured", budget=1000)
    assert second.plan_is_final and second.plan.state() == first.plan.state()
    assert prepare_steps(second, time.perf_counter()) == {} and second.costs == first.costs


def test_a_run_that_restarts_in_another_precision_is_measured_again(timed, tmp_path, monkeypatch):
    prepare_steps(trainer_of(tmp_path, cost="measured", budget=1000), time.perf_counter())
    (tmp_path / "recipe.yaml").write_text("mixed_precision: bf16")
    second = trainer_of(tmp_path, cost="measured", budget=1000)
    monkeypatch.setitem(SECONDS, COARSE, 0.2)
    prepare_steps(second, time.perf_counter())
    assert load_costs(tmp_path / TABLE_NAME) == second.costs
    measured: Any = second.costs
    assert measured(COARSE) == pytest.approx(measured(BASE) / 2)


def test_a_table_without_a_strategy_names_the_remedy(timed, tmp_path):
    prepare_steps(trainer_of(tmp_path, cost="measured", budget=1000), time.perf_counter())
    with pytest.raises(SettingError, match=rf"no cost of a step under patch 8, dropout 0 .*remove {TABLE_NAME}"):
        trainer_of(tmp_path, cost="measured", budget=1000, schedule=[{"until": 0.5, "patch_size": 8}, {"until": 1.0}])


def test_forward_costs_of_an_earlier_version_are_planned_by(tmp_path, refused):
    refused()
    table = CostTable({Compression(4): 1.0, Compression(8, 0.5): 0.1, Compression(8): 0.2}, "cpu")
    table.save(tmp_path / TABLE_NAME)
    trainer = trainer_of(tmp_path, cost="measured", budget=1000)
    assert trainer.costs == table and trainer.plan[0].cost == pytest.approx(16 * (3 * 0.1 + 0.2))
    assert prepare_steps(trainer, time.perf_counter()) == {}


def test_short_steps_are_timed_often(timed, monkeypatch, tmp_path):
    monkeypatch.setitem(SECONDS, BASE, 0.5)
    prepare_steps(trainer_of(tmp_path / "short", cost="measured", budget=1000), 0.0)
    assert [steps for _, _, steps in timed] == [3, 7]  # 5 s of 0.65 s
    monkeypatch.setitem(SECONDS, BASE, 5.0)
    prepare_steps(trainer_of(tmp_path / "long", cost="measured", budget=1000), 0.0)
    assert [steps for _, _, steps in timed] == [3, 7, 3]


def test_steps_are_timed_with_the_views_of_the_run(timed, monkeypatch, tmp_path):
    monkeypatch.setitem(SECONDS, BASE, 5.0)
    monkeypatch.setattr(step_costs, "start_views", lambda trainer: setattr(trainer, "view_backend", chosen))
    for chosen, asked, expected in (("eager", "auto", [None]), ("fused", "auto", [None, "fused"])):
        timed.clear()
        trainer = trainer_of(tmp_path / chosen, cost="measured", budget=1000, view_backend=asked)
        prepare_steps(trainer, 0.0)
        assert [backend for backend, _, _ in timed] == expected
        assert isinstance(trainer.costs, StepCosts) and trainer.costs.view_backend == chosen
    monkeypatch.setattr(step_costs, "start_views", lambda trainer: None)
    again = trainer_of(tmp_path / "fused", cost="measured", budget=1000)
    prepare_steps(again, 0.0)
    assert again.view_backend == "fused"


# Budgets in time


@pytest.mark.parametrize(
    "text, seconds", [("2 minutes", 120), ("1 minute", 60), ("1.5 hours", 5400), ("2 epochs", None), (7.0, None)]
)
def test_minutes_and_hours_are_read(text, seconds):
    assert budget_in_seconds(text) == seconds


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"budget": "0 minutes"}, "budget='0 minutes': must be above 0"),
        ({"budget": "5 parsecs"}, "epochs, minutes or hours"),
        ({"budget": "-1 hours"}, "epochs, minutes or hours"),
        ({"budget": "2 minutes", "cost": "analytic"}, "cost='analytic': budget='2 minutes' is a time"),
    ],
)
def test_a_budget_in_time_that_is_not_possible_is_refused(settings, problem, tmp_path):
    with pytest.raises(SettingError, match=problem):
        PretrainConfig(str(tmp_path), report_to="none", **settings)


def test_a_budget_in_time_is_measured_and_others_are_not(tmp_path):
    budgets = {"2 hours": "measured", "2 epochs": "analytic", 1000.0: "analytic"}
    assert {budget: config(tmp_path, budget=budget).cost for budget in budgets} == budgets


@pytest.mark.parametrize("save_steps", [0.1, 50])
def test_a_budget_in_time_counts_timing_evaluations_and_saves(save_steps, timed, monkeypatch, tmp_path):
    clock = [1000.0]
    monkeypatch.setattr(step_costs, "time", type("", (), {"perf_counter": lambda: clock[0]}))
    monkeypatch.setattr(PretrainTrainer, "measure_encoder", lambda *_: clock.__setitem__(0, clock[0] + 3.0))
    monkeypatch.setattr(step_costs.torch, "save", lambda *_: clock.__setitem__(0, clock[0] + 0.5))
    points = {"eval_points": [0.0, 0.5, 1.0], "keep_points": [0.5], "save_steps": save_steps}
    trainer = trainer_of(tmp_path, budget="2 minutes", **points)
    prepare_steps(trainer, 1000.0 - 10)
    left = 120 - 10 - 3.0 - 1.5 - 3 * 3.0  # once to time them, and three evaluations
    expected = steps_of(left, SECONDS)
    saves = 10 + 1 if save_steps == 0.1 else len(expected) // 50 + 1 + 1  # the last one, too
    left += 1.5  # the weights are written after the clock is read
    expected = steps_of(120 - 10 - 3.0 - 1.5 - 9.0 - saves * 1.5, SECONDS)
    assert [step.strategy for step in trainer.plan] == expected and len(expected) > 200
    assert trainer.costs == load_costs(tmp_path / TABLE_NAME)
    assert isinstance(trainer.costs, StepCosts) and trainer.costs.budget_requested == "2 minutes"


@pytest.mark.parametrize(("gradient", "extra"), [(1.0, 3 * 1.0 - 0.7), (0.1, 0.0)], ids=["slow", "fast"])
def test_a_draw_of_a_probe_is_charged_with_what_it_takes(gradient, extra, monkeypatch, tmp_path):
    clock, seconds = [1000.0], (0.4, 0.2, 0.1)  # of the three rungs' steps

    def compute(self, strategy, draw):
        clock[0] += gradient
        return torch.full((3,), 1.0 + draw)

    def time_steps(trainer, strategies, steps=3):
        return {strategy: StepTime(taken, 0) for strategy, taken in zip(strategies, seconds, strict=True)}

    monkeypatch.setattr(step_costs, "time", type("", (), {"perf_counter": lambda: clock[0]}))
    monkeypatch.setattr(step_costs, "time_steps", time_steps)
    monkeypatch.setattr(GradientProbe, "_gradient", compute)
    model = MoCoForPreTraining(vit_tiny(**{**SIZES, "image_size": 32}), **HEADS)
    trainer = trainer_of(tmp_path, model, schedule="auto", budget="5 minutes", auto_share=0.5, auto_draws=3)
    prepare_steps(trainer, 1000.0)
    assert isinstance(trainer.costs, StepCosts) and trainer.costs == load_costs(tmp_path / TABLE_NAME)
    controller, unit = trainer.controller, trainer.costs.seconds_per_unit
    assert controller and len(controller.ladder) == 3
    assert controller.cost_of(controller.ladder) * unit == pytest.approx(controller.draws * (sum(seconds) + extra))
    assert trainer.plan.budget * unit == pytest.approx(300 - 4 * 3 * gradient)  # less the timing of probes


def test_a_budget_that_timing_uses_up_is_refused(timed, tmp_path):
    with pytest.raises(SettingError, match=r"budget='1 minute': timing, evaluations and saves alone take longer"):
        prepare_steps(trainer_of(tmp_path, budget="1 minute"), time.perf_counter() - 61)


def test_a_table_made_for_another_time_is_refused(timed, tmp_path):
    prepare_steps(trainer_of(tmp_path, budget="1 minute"), time.perf_counter())
    with pytest.raises(SettingError, match=rf"made for budget='1 minute'; remove {TABLE_NAME}"):
        trainer_of(tmp_path, budget="2 minutes")
    assert trainer_of(tmp_path, budget=640.0, cost="measured").plan.budget == 640


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 6])
def test_a_stopped_run_ends_as_one_that_starts_from_its_table(stop, timed, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(step_costs, "_evaluation_seconds", lambda trainer: 0.0)
    settings = {"budget": "0.1 minutes", "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "run", callbacks=[StopAt(stop)], **settings).train()
    if stop > 4:
        (tmp_path / "run" / TABLE_NAME).unlink()  # the checkpoint has it, too
    refused()
    resumed = trainer_of(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint="auto")
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "run" / TABLE_NAME, tmp_path / "copy")
    undisturbed = trainer_of(tmp_path / "copy", **settings)
    undisturbed.train()
    assert len(undisturbed.plan) > 8 and undisturbed.plan.state() == resumed.plan.state()
    assert_same_weights(tmp_path / "run", tmp_path / "copy")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["budget_requested"] == "0.1 minutes" and results["budget"] == resumed.plan.budget
    assert results["steps"] == len(undisturbed.plan)


@pytest.mark.slow
def test_a_checkpoint_elsewhere_is_resumed_with_its_costs(timed, refused, tmp_path):
    for cost in ("measured", "analytic"):
        with pytest.raises(KeyboardInterrupt):
            trainer_of(tmp_path / cost, callbacks=[StopAt(4)], cost=cost, budget=1000).train()
    refused()
    trainer = trainer_of(tmp_path / "run", cost="measured", budget=1000)
    trainer.train(resume_from_checkpoint=str(tmp_path / "measured" / "checkpoint-3"))
    assert trainer.costs == load_costs(tmp_path / "measured" / TABLE_NAME) == load_costs(tmp_path / "run" / TABLE_NAME)
    with pytest.raises(SettingError, match=f"cost='measured': .*{TABLE_NAME} is missing"):
        other = trainer_of(tmp_path / "other", cost="measured", budget=1000)
        other.train(resume_from_checkpoint=str(tmp_path / "analytic" / "checkpoint-3"))


def test_a_run_says_its_plan_once_its_steps_are_timed(timed, tmp_path, capsys):
    trainer = trainer_of(tmp_path, cost="measured", budget=640)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Costs: "))
    assert f"Budget: {len(trainer.plan)} steps" in lines[start + 1]
    assert sum(line.startswith("Budget: ") for line in lines) == 1
    assert trainer.state.global_step == len(trainer.plan) == trainer.state.max_steps


def test_a_stop_while_steps_are_timed_leaves_nothing(tmp_path, monkeypatch):
    take_step, taken = _Timer.take_step, []

    def stopped(self, *args):
        taken.append(os.kill(os.getpid(), signal.SIGTERM) if not taken else None)
        return take_step(self, *args)

    monkeypatch.setattr(_Timer, "take_step", stopped)
    trainer = trainer_of(tmp_path, cost="measured", budget=640)
    trainer.train()
    assert trainer.stopped and len(taken) == 2 and trainer.state.global_step == 0
    assert not list(tmp_path.glob("*check*")) and not (tmp_path / TABLE_NAME).exists()


def test_plan_shows_a_budget_in_time(timed, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    data = str(image_folder(tmp_path / "images"))
    recipe.write_text(json.dumps({**RECIPE, "data": data, "output_dir": str(tmp_path / "run"), "schedule": STAGES}))
    cli.main(["plan", str(recipe), "budget=10 minutes"])
    text = capsys.readouterr().out
    assert "units (10 minutes)" in text and "| whole run" in text
    total = next(line for line in text.splitlines() if line.startswith("| whole run")).split("|")[7].strip()
    assert 5 <= float(total.removesuffix(" min")) <= 10  # A busy machine takes more of it for timing and evaluations.
    assert not (tmp_path / "run").exists()


# What bounds a step


@pytest.mark.parametrize(
    "data, views, part", [(0.5, 0.2, "data"), (0.2, 0.5, "views"), (0.2, 0.3, "model"), (0.6, None, "data")]
)
def test_the_largest_part_bounds_a_step(data, views, part):
    fractions = {"data_wait_fraction": data} | ({} if views is None else {"views_fraction": views})
    assert name_bound(fractions) == part


def test_a_gpu_bounds_a_step_as_a_whole():
    assert name_bound({"data_wait_fraction": 0.4}) == "device"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["views", "model"])
def test_log_lines_say_what_bounds_a_step(part, tmp_path, monkeypatch, capsys):
    owner, name = (PretrainTrainer, "views_of") if part == "views" else (type(moco()), "forward")
    quick = getattr(owner, name)

    def slowed(*args, **kwargs):
        time.sleep(0.3)
        return quick(*args, **kwargs)

    monkeypatch.setattr(owner, name, slowed)
    trainer = trainer_of(tmp_path, budget=3 * 64, schedule=None, eval_points=[], report_to="none")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["bound_by"] for entry in entries[1:]] == [part] * 2  # the first step is a warm-up
    assert capsys.readouterr().out.count(f"images/s  bound by {part}") >= 2


def test_a_table_keeps_every_field(tmp_path):
    costs = StepCosts({BASE: 4.0, COARSE: 0.7}, 0.1, "cpu", "fused", "2 minutes", 77.5, 1.5)
    costs.save(tmp_path / TABLE_NAME)
    assert load_costs(tmp_path / TABLE_NAME) == costs != replace(costs, budget=None)
