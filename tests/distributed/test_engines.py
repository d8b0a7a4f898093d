"""Every engine trains as one process does: same losses, same weights of both branches, exact resume, same artefacts.

And survives what one process survives: a kill, a torn checkpoint, a full disk.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import hf_accel.run as entry
from hf_accel import AccelViTConfig, AccelViTModel
from hf_accel.run_folder import find_damage
from tests.engine_runs import (
    OBJECTIVES,
    assert_opens,
    assert_same_run,
    assert_trained_alike,
    last_checkpoint,
    launch_with,
    start_with,
    write_recipes,
)
from tests.tiny_runs import RECIPE, WEIGHTS, read

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")]

ENGINES = {
    "ddp": "cpu_2proc",
    "zero1": "deepspeed_zero1_cpu_2proc",
    "zero2": "deepspeed_zero2_cpu_2proc",
    "zero3": "deepspeed_zero3_cpu_2proc",
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    return write_recipes(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def alone(recipes) -> dict[str, Path]:
    """The run of each objective in one process."""
    runs = {name: recipes / f"alone-{name}" for name in OBJECTIVES}
    for name, output in runs.items():
        entry.main([str(recipes / f"{name}.yaml"), f"output_dir={output}"])
    return runs


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("engine", list(ENGINES))
def test_two_processes_train_as_one(engine, objective, recipes, alone, tmp_path):
    run, recipe = tmp_path / "run", recipes / f"{objective}.yaml"
    launch_with(ENGINES[engine], recipe, run)
    assert read(run / "results.json")["processes"] == 2 and read(alone[objective] / "results.json")["processes"] == 1
    assert_trained_alike(run, alone[objective])
    assert_opens(run)
    if objective == "dino":  # the one with most state
        again = tmp_path / "again"
        if engine == "zero3":  # the one with most to save
            survive(engine, recipe, again)
        else:
            shutil.copytree(run, again, ignore=shutil.ignore_patterns("results.json", "final"))
            (again / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(run), str(again)))
            tear(last_checkpoint(again))
        go_on(engine, recipe, run, again)
        if engine != "zero1":
            longer, expected = tmp_path / "longer", tmp_path / "alone-longer"
            launch_with(ENGINES[engine], recipe, longer, f"continue_from={run}")
            entry.main([str(recipe), f"output_dir={expected}", f"continue_from={alone[objective]}"])
            results = read(longer / "results.json")
            assert results["processes"] == 2 and results["total_units"] == 2 * results["units"]
            assert_trained_alike(longer, expected)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_a_frozen_then_slower_encoder_trains_as_in_one(engine, recipes, tmp_path):
    """Weight decay must not move what is frozen, whatever the engine makes of the groups."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**RECIPE["model_config"], "image_size": 16, "patch_size": 4}
    AccelViTModel(AccelViTConfig(**sizes)).save_pretrained(tmp_path / "released")
    settings = yaml.safe_load((recipes / "moco.yaml").read_text())
    del settings["model"], settings["model_config"]
    pace: dict[str, Any] = {"freeze_encoder": 0.5, "layer_decay": 0.5, "weight_decay": 0.4}
    start: dict[str, Any] = {"init_from": str(tmp_path / "released"), "keep_points": [0.4], **pace}
    (tmp_path / "moco.yaml").write_text(yaml.safe_dump({**settings, **start}))
    entry.main([str(tmp_path / "moco.yaml"), f"output_dir={tmp_path / 'alone'}"])
    launch_with(ENGINES[engine], tmp_path / "moco.yaml", tmp_path / "run")
    assert_trained_alike(tmp_path / "run", tmp_path / "alone")
    released = load_file(tmp_path / "released" / WEIGHTS)
    for run in ("alone", "run"):
        (kept,) = (tmp_path / run / "kept").iterdir()
        weights, best = load_file(kept / WEIGHTS), load_file(tmp_path / run / "best" / WEIGHTS)
        for name, value in released.items():
            assert torch.equal(weights[f"encoder.{name}"], value) and torch.equal(
                weights[f"momentum_encoder.{name}"], value
            ), name
        assert best.keys() == released.keys()


@pytest.mark.parametrize("launcher", ["cpu", "cpu_2proc"])
def test_a_launcher_that_is_stopped_lets_the_run_save(launcher, recipes, alone, tmp_path):
    run, recipe = tmp_path / "run", recipes / "moco.yaml"
    process = start_with(launcher, recipe, run)
    while not list(run.glob("checkpoint-*/run_state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    said = "".join(process.communicate())  # to the end of its output, which is that of the last process
    assert process.returncode in ((1,) if launcher == "cpu_2proc" else (-signal.SIGTERM,))
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    step = int(last_checkpoint(run).name.rpartition("-")[2])
    assert f"Stopped at step {step} of" in said and said.count("SIGTERM has") + said.count("launcher has ended") == 1
    assert find_damage(last_checkpoint(run)) is None and not (run / "results.json").exists()
    assert f"Resuming from {last_checkpoint(run)}" in launch_with(launcher, recipe, run)
    assert_trained_alike(run, alone["moco"])


def tear(checkpoint: Path) -> Path:
    """Cut the last process's part of the optimizer's state in half."""
    part = max(checkpoint.rglob("*optim*.pt"))
    os.truncate(part, part.stat().st_size // 2)
    return part


def survive(engine: str, recipe: Path, run: Path) -> None:
    """Kill the launcher alone; tear a checkpoint, and leave no room for another: what is complete stays."""
    often = ["save_steps=2", "save_total_limit=9"]
    process = start_with(ENGINES[engine], recipe, run, *often)
    good, torn = run / "checkpoint-2", run / "checkpoint-4"
    while not (torn / "run_state.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert len(ranks) >= 2 and not psutil.wait_procs(ranks, timeout=20)[1]
    assert not (run / "results.json").exists()
    for later in set(run.glob("checkpoint-*")) - {good, torn}:  # which the ranks wrote before they were gone
        shutil.rmtree(later)

    part = tear(torn)
    process = start_with(ENGINES[engine], recipe, run, *often, largest=40)
    said = "".join(process.communicate())
    assert process.returncode != 0 and f"Not resumed from {torn}: {part} has" in said and f"from {good}" in said, said
    assert f"WriteFailed: {torn} cannot be written" in said and f"Last good checkpoint: {good}." in said, said
    assert find_damage(good) is None


def go_on(engine: str, recipe: Path, run: Path, again: Path) -> None:
    """From the checkpoint before the last, which is torn: the same end as that of `run`, bit for bit."""
    good, torn = sorted(again.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    said = launch_with(ENGINES[engine], recipe, again)
    assert f"Not resumed from {torn}: " in said and f"Resuming from {good}" in said
    assert_same_run(run, again)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_bf16_leaves_weights_and_momentum_branch_in_fp32(engine, recipes, tmp_path):
    run = tmp_path / "run"
    # So slow a momentum branch stands still in bf16, which keeps 8 bits
    slow = ["objective_config.momentum=0.999", "learning_rate=1.0e-4", "mixed_precision=bf16"]
    launch_with(ENGINES[engine], recipes / "moco.yaml", run, *slow)
    weights = load_file(last_checkpoint(run) / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    name = "layers.0.mlp.fc1.weight"
    moved = (weights[f"momentum_encoder.{name}"] - weights[f"encoder.{name}"]).abs()
    assert 0 < moved.max() < 2e-3
    earlier = load_file(min(run.glob("checkpoint-*")) / WEIGHTS)
    assert not torch.equal(earlier[f"momentum_encoder.{name}"], weights[f"momentum_encoder.{name}"])


def test_a_schedule_is_found_under_zero3_as_in_one_process(recipes, tmp_path):
    auto = ["schedule=auto", "auto_share=0.8", "auto_draws=3", "budget=4000", "batch_size=64"]
    auto += ["learning_rate=1.0e-5"]  # long steps enlarge the rounding
    entry.main([str(recipes / "moco.yaml"), f"output_dir={tmp_path / 'one'}", *auto])
    launch_with(ENGINES["zero3"], recipes / "moco.yaml", tmp_path / "zero3", *auto)
    probes = {}
    for name in ("one", "zero3"):
        history = read(tmp_path / name / "log_history.json")["log_history"]
        probes[name] = [line for line in history if "probe_units" in line]
    assert len(probes["one"]) == len(probes["zero3"]) >= 1
    for one, other in zip(probes["one"], probes["zero3"], strict=True):
        assert one["probe_tokens"] == other["probe_tokens"] and one["step"] == other["step"]
        assert one["probe_ca_mse"] == pytest.approx(other["probe_ca_mse"], rel=1e-4)
