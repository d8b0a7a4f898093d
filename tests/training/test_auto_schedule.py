"""Whole runs with `schedule: auto`: what their probes cost, and that no interruption changes what they decide."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import hf_accel.run as entry
from hf_accel.compression import Compression, Schedule, Strategy, forward_cost
from hf_accel.compression.cost import StepCosts, load_costs
from hf_accel.recipe import load_recipe
from hf_accel.run_folder import RunFolder
from hf_accel.schedule_search.gradient_error import GradientErrorAccumulator
from hf_accel.schedule_search.gradient_probe import GradientProbe
from hf_accel.training.timing import StepTime
from hf_accel.training.trainer import PretrainTrainer
from tests.tiny_runs import WEIGHTS, assert_same_weights, image_folder, launch, launch_until_stopped, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

ROOT = Path(__file__).parents[2]
BUDGET, SHARE, DRAWS, BATCH = 2400, 0.64, 3, 16  # for four probes
LADDER = [Compression(16), Compression(8), Compression(4)]
"""Of both branches."""
AUTO = [
    "image_size=32",
    "schedule=auto",
    f"budget={BUDGET}",
    f"auto_share={SHARE}",
    f"auto_draws={DRAWS}",
    "eval_points=[0.0, 0.3, 0.6, 1.0]",
    "save_steps=4",
    "learning_rate=1.0e-3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def eager():
    """Runs climb on the estimate alone: so few draws of so few images would never make them sure."""
    true_evidence = GradientErrorAccumulator.evidence

    def evidence(self, criterion, one, other):
        errors = self.result()
        if len(errors) > 2:  # where to start
            return true_evidence(self, criterion, one, other)
        return 10.0 * (getattr(errors[one], criterion) > getattr(errors[other], criterion))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientErrorAccumulator, "evidence", evidence)
        yield


@pytest.fixture(scope="module")
def whole(eager, folder, tmp_path_factory) -> Path:
    """A run left alone."""
    return launch(folder, tmp_path_factory.mktemp("whole") / "run", *AUTO)


def history(output: Path) -> list[dict[str, Any]]:
    """The log without what a clock has measured."""
    clocks = ("images_per_second", "data_wait_fraction", "views_fraction", "bound_by")
    logs = [log for log in read(output / "log_history.json")["log_history"] if "train_runtime" not in log]
    return [{key: value for key, value in log.items() if key not in clocks} for log in logs]


def probes_of(output: Path) -> list[dict[str, Any]]:
    return [log for log in history(output) if "probe_units" in log]


@pytest.mark.slow
def test_probes_are_charged_and_every_unit_is_accounted_for(whole):
    config = load_recipe(whole / "recipe.yaml").encoder_config()
    spent, probed, most, start = 0.0, 0.0, BATCH * 4, probes_of(whole)[0]["probe_units"]
    for log in history(whole):
        if "probe_units" in log:
            spent, probed = spent + log["probe_units"], probed + log["probe_units"]
        elif "loss" in log:
            online = Compression(log["patch_size"], log["token_dropout"])
            target = Compression(log["target_patch_size"], log["target_token_dropout"])
            spent += BATCH * (3 * forward_cost(config, online) + forward_cost(config, target))
        assert log["units"] == pytest.approx(spent)
        assert log["progress"] == pytest.approx(max(0.0, (spent - start) / (BUDGET - start)))
    assert 0 < probed <= SHARE * BUDGET
    results = read(whole / "results.json")
    assert results["units"] == pytest.approx(spent) and BUDGET - most < spent <= BUDGET * (1 + 1e-9)


@pytest.mark.slow
def test_probes_stand_in_the_log(whole):
    probes = probes_of(whole)
    assert len(probes) >= 3 and any(probe["probe_moved"] for probe in probes[1:]) and probes[0]["step"] == 0
    points = [probe["units"] - probe["probe_units"] for probe in probes]  # the charge is in it
    assert points == sorted(points) and len(set(points)) == len(points)
    assert all((probe["probe_evidence"] > 1.96) == probe["probe_moved"] for probe in probes[1:])
    assert all(probe["probe_moved"] in (0, 1) and probe["probe_tokens"] >= 4 for probe in probes)
    tokens = [probe["probe_tokens"] for probe in probes]
    assert tokens == sorted(tokens)  # it never climbs down
    for probe in probes:
        assert math.isfinite(probe["probe_bias2"]) and math.isfinite(probe["probe_ca_mse"])
        assert ("probe_ca_mse_next" in probe) == ("probe_evidence" in probe) == (probe is not probes[0])


@pytest.mark.slow
def test_the_results_hold_the_schedule_that_was_followed(whole):
    results = read(whole / "results.json")
    followed = Schedule.parse(results["schedule"], 4)
    steps = [log for log in history(whole) if "loss" in log]
    start = before = probes_of(whole)[0]["probe_units"]
    for log in steps:  # `units` are those after the step, and a probe is charged before it
        online = Compression(log["patch_size"], log["token_dropout"])
        charged = sum(p["probe_units"] for p in probes_of(whole) if p["step"] == log["step"] - 1 > 0)
        assert followed(min(1.0, (before + charged - start) / (BUDGET - start) + 1e-9)).online == online
        before = log["units"]
    assert [s.online for s in followed.strategies] == list(
        dict.fromkeys(Compression(log["patch_size"], log["token_dropout"]) for log in steps)
    )
    assert followed.stages[-1].until == 1


@pytest.mark.slow
def test_the_first_probe_takes_nothing_from_the_warm_up(whole):
    recipe, start = load_recipe(whole / "recipe.yaml"), probes_of(whole)[0]["probe_units"]
    assert start / BUDGET > recipe.warmup  # counted as progress, it would skip it
    first, second = [log for log in history(whole) if "loss" in log][:2]
    progress = (first["units"] - start) / (BUDGET - start)
    assert first["learning_rate"] == 0 and second["learning_rate"] == pytest.approx(
        recipe.learning_rate * min(1.0, progress / recipe.warmup)
    )


@pytest.mark.slow
def test_the_number_of_steps_is_true_wherever_it_stands(whole):
    steps = read(whole / "results.json")["steps"]
    state = read(whole / f"checkpoint-{steps}" / "trainer_state.json")
    assert state["max_steps"] == state["global_step"] == steps
    assert len([log for log in history(whole) if "loss" in log]) == steps
    evaluated = [log for log in history(whole) if "eval_knn_top1" in log]
    assert len(evaluated) == 4 and evaluated[0]["step"] == 0 and evaluated[-1]["step"] == steps


def assert_same_run(whole: Path, other: Path) -> None:
    steps = read(whole / "results.json")["steps"]
    assert history(whole) == history(other)
    assert_same_weights(whole, other)
    assert_same_weights(whole, other, f"checkpoint-{steps}/{WEIGHTS}")
    one, two = read(whole / "results.json"), read(other / "results.json")
    assert all(one[key] == two[key] for key in ("schedule", "units", "steps", "knn_top1"))


def terminate_in_step(monkeypatch, step: int) -> None:
    true_step = PretrainTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if inputs["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)


def in_gradient(monkeypatch, number: int, act: Callable[[], Any]) -> list[int]:
    """`act` in the probe's gradient of this number, counted from 1 over the whole run; how many there were."""
    true_gradient, calls = GradientProbe._gradient, [0]

    def gradient(self, *args):
        calls[0] += 1
        value = true_gradient(self, *args)
        if calls[0] == number:
            act()
        return value

    monkeypatch.setattr(GradientProbe, "_gradient", gradient)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("where", ["between probes", "before a probe", "with a probe"])
def test_stopped_and_resumed_equals_left_alone(where, whole, folder, tmp_path, monkeypatch, capsys):
    second, third = (probe["step"] for probe in probes_of(whole)[1:3])
    assert third - second > 2
    step = {"between probes": second + 1, "before a probe": second - 1, "with a probe": second}[where]
    with monkeypatch.context() as patch:
        terminate_in_step(patch, step)
        output = launch_until_stopped(folder, tmp_path / "run", *AUTO)
    assert not (output / "results.json").exists() and f"Stopped at step {step + 1} of" in capsys.readouterr().out
    launch(folder, output, *AUTO)
    assert f"Resuming from {output / f'checkpoint-{step + 1}'}" in capsys.readouterr().out
    assert_same_run(whole, output)


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["the first", "a later"])
def test_killed_in_the_middle_of_a_probe_and_resumed_equals_left_alone(probe, whole, folder, tmp_path, monkeypatch):
    output, rungs = tmp_path / "run", len(LADDER)
    with monkeypatch.context() as patch:
        number = 4 if probe == "the first" else DRAWS * rungs + 4
        in_gradient(patch, number, MagicMock(side_effect=KeyboardInterrupt))
        with pytest.raises(SystemExit, match="Interrupted"):
            launch(folder, output, *AUTO)
    assert bool(list(output.glob("checkpoint-*"))) == (probe == "a later")
    launch(folder, output, *AUTO)
    assert_same_run(whole, output)


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["the first", "a later"])
def test_a_probe_stopped_between_draws_equals_left_alone(probe, whole, folder, tmp_path, monkeypatch, capsys):
    output, before = tmp_path / "run", 0 if probe == "the first" else DRAWS * len(LADDER)
    with monkeypatch.context() as patch:
        calls = in_gradient(patch, before + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        launch_until_stopped(folder, output, *AUTO)
    step = probes_of(whole)[0 if probe == "the first" else 1]["step"]
    assert calls[0] == before + 3, "the rest of the draw and no more"
    assert f"Stopped at step {step} of" in capsys.readouterr().out
    assert RunFolder(output).checkpoints()[:1] == ([output / f"checkpoint-{step}"] if step else [])
    launch(folder, output, *AUTO)
    assert_same_run(whole, output)


def test_a_gradient_that_is_not_finite_ends_the_run_with_advice(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(GradientProbe, "_gradient", lambda *_: torch.full((3,), torch.nan))
    with pytest.raises(SystemExit, match=r"TrainingDiverged: .*a gradient.* not finite at step 0 .*Try a lower"):
        launch(folder, tmp_path / "run", *AUTO)


@pytest.mark.slow
def test_a_run_of_a_version_with_another_ladder_is_not_resumed(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("hf_accel.schedule_search.ladder.RUNG_RATIO", 0.9)
        terminate_in_step(patch, 1)
        output = launch_until_stopped(folder, tmp_path / "run", *AUTO)
    before = sorted(output.rglob("*"))
    with pytest.raises(SystemExit, match=r"SettingError: schedule='auto': .*checkpoint-2: .*climbs another ladder, .*"):
        launch(folder, output, *AUTO)
    assert sorted(output.rglob("*")) == before


def test_a_budget_that_does_not_pay_for_probes_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"SettingError: schedule='auto': probes of 8 draws take .*raise auto_share"):
        launch(folder, tmp_path / "run", "schedule=auto")
    with pytest.raises(SystemExit, match=r"schedule='auto': there is no strategy to choose from"):
        launch(folder, tmp_path / "run", "schedule=auto", "patch_size=8")


@pytest.mark.slow
def test_measured_costs_hold_the_whole_ladder(folder, tmp_path, monkeypatch):
    seconds = {Strategy(rung): taken for rung, taken in zip(LADDER, (0.05, 0.2, 0.8), strict=True)}

    def time_steps(trainer, strategies, steps=3):
        return {strategy: StepTime(seconds[strategy], 0) for strategy in strategies}

    monkeypatch.setattr("hf_accel.training.step_costs.time_steps", time_steps)
    output = launch(folder, tmp_path / "run", *AUTO, "cost=measured")
    units = {rung: 4 * taken / 0.8 for rung, taken in seconds.items()}
    assert load_costs(output / "cost_table.json") == StepCosts(units, 0.8 / 64, "cpu")
    assert probes_of(output)[0]["probe_units"] == pytest.approx(DRAWS * 16 * sum(units.values()))
    assert read(output / "results.json")["units"] <= BUDGET


SMALL = [
    "patch_size=4",
    "model_config.hidden_size=16",
    "model_config.num_hidden_layers=1",
    "model_config.intermediate_size=32",
    "model_config.num_attention_heads=2",
    "image_size=16",
    "batch_size=32",
    "gradient_accumulation_steps=2",
    "schedule=auto",
    "auto_share=0.5",
    "auto_draws=3",
    "eval_points=[]",
    "logging_steps=1",
    "report_to=[]",
]
HEADS = {
    "moco": ["objective_config.projector_hidden_size=32", "objective_config.projection_size=16", "budget=5000"],
    "simclr": ["objective_config.projector_hidden_size=32", "objective_config.projection_size=16", "budget=7500"],
    "dino": ["objective_config.num_prototypes=64", "budget=10000"],
}
"""What makes each objective's own recipe small."""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["moco", "simclr", "dino"])
def test_every_objective_finds_its_schedule(objective, folder, tmp_path):
    recipe = Path("recipes") / f"{objective}.yaml"
    entry.main([str(recipe), f"data={folder}", f"output_dir={tmp_path}", *SMALL, *HEADS.get(objective, [])])
    results, probes = read(tmp_path / "results.json"), probes_of(tmp_path)
    uncompressed = (16 // 4) ** 2
    assert len(probes) >= 2 or probes[0]["probe_tokens"] == uncompressed  # at the top no more are due
    assert 0 < sum(probe["probe_units"] for probe in probes) <= 0.5 * results["budget"]
    assert results["units"] <= results["budget"] * (1 + 1e-9)
    *earlier, last = Schedule.parse(results["schedule"], 4).stages
    assert last.strategy.online == Compression(4)  # and not before it is due, but for clear evidence
    assert not earlier or earlier[-1].until >= 0.8 or any(probe["probe_moved"] for probe in probes)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dino"])  # the one with most state; gradients of all: test_two_processes.py
def test_two_processes_decide_as_one(objective, folder, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"]
    for name, start in (("one", []), ("two", launcher)):
        settings = [
            *SMALL,
            *HEADS[objective],
            "gradient_accumulation_steps=1",
            f"data={folder}",
            f"output_dir={tmp_path / name}",
        ]
        command = [sys.executable, *start, "hf_accel/run.py", f"recipes/{objective}.yaml", *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        # Judged by what it wrote: a gloo process may abort at exit after all its work is done.
        assert (tmp_path / name / "results.json").exists(), done.stdout + done.stderr
    one, two = (read(tmp_path / name / "results.json") for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["schedule"] == two["schedule"] and one["steps"] == two["steps"] and one["units"] == two["units"]
    first, second = (probes_of(tmp_path / name) for name in ("one", "two"))
    assert len(first) == len(second) >= 2
    exact = ("step", "probe_moved", "probe_tokens", "probe_units")
    assert [[p[key] for key in exact] for p in first] == [[p[key] for key in exact] for p in second]
    assert [p["probe_ca_mse"] for p in first] == pytest.approx([p["probe_ca_mse"] for p in second], rel=0.02)
    losses = [[log["loss"] for log in history(tmp_path / name) if "loss" in log] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) > 5


@pytest.mark.slow
def test_matched_views_follow_a_schedule_that_changes(eager, tmp_path, monkeypatch):
    """Crops of workers that were cut before a probe are as good as those cut after it."""
    # Images of two sizes are read from files.
    folder, sizes = image_folder(tmp_path / "images", side=lambda index: 36 + index % 2), list[tuple[int, int]]()
    matched = [*AUTO, "view_resolution=matched", "cache=none"]
    make = PretrainTrainer.views_of

    def watched(trainer: Any, inputs: dict[str, Any], size: int):
        views = make(trainer, inputs, size)
        if "index" in inputs:  # of the loader
            patch_size = trainer.plan[inputs["step"]].strategy.online.patch_size
            sizes.append((patch_size, views[0].shape[-1]))
        return views

    monkeypatch.setattr(PretrainTrainer, "views_of", watched)
    one = launch(folder, tmp_path / "one", *matched)
    assert set(sizes) <= {(16, 8), (8, 16), (4, 32)} and len(set(sizes)) > 1
    assert_same_run(one, launch(folder, tmp_path / "two", *matched, "num_workers=2"))
