"""Every engine trains as one process does: same losses, same weights of both branches, exact resume, same artefacts.

And survives what one process survives: a kill, a torn checkpoint, a full disk.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

import hf_accel.run as entry
from hf_accel.checkpoints import damage
from tests.tiny_runs import RECIPE, WEIGHTS, assert_same_weights, image_folder, losses, read

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache_and_threads")]

ROOT = Path(__file__).parents[1]
ENGINES = {
    "ddp": "cpu_2proc",
    "zero1": "deepspeed_zero1_cpu_2proc",
    "zero2": "deepspeed_zero2_cpu_2proc",
    "zero3": "deepspeed_zero3_cpu_2proc",
}
HEADS = {"projector_hidden_size": 32, "projection_size": 16}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "moco": {"objective_config": HEADS, "budget": 700},
    "simclr": {"objective_config": HEADS, "budget": 800},
    "dino": {
        "objective_config": {
            "num_prototypes": 24,
            "head_hidden_size": 32,
            "bottleneck_size": 8,
            "num_local_crops": 2,
            "local_crop_size": 8,
            "norm_last_layer": False,
            "freeze_last_layer": 0.4,
            "clip_grad": 0.05,  # so small that every parameter's is clipped
        },
        "budget": 1000,
        "weight_decay_end": 0.4,
    },
}
SHARED: dict[str, Any] = {
    "schedule": [
        {"until": 0.4, "patch_size": 8},
        {"until": 0.7, "patch_size": 4, "token_dropout": 0.5},
        {"until": 1.0, "patch_size": 4},
    ],
    "gradient_accumulation_steps": 2,
    "learning_rate": 1.0e-3,
    "save_steps": 5,
}
NO_GRADIENT = ("k_proj.bias", "layernorm.bias", "running_mean")
"""What no loss here depends on, as softmax and BatchNorm take it off: rounding alone moves it; and what follows it."""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """A recipe for each objective, the same to every engine."""
    folder = tmp_path_factory.mktemp("recipes")
    images = image_folder(folder / "images")
    for name, settings in OBJECTIVES.items():
        recipe = {**RECIPE, "data": str(images), "objective": name, **SHARED, **settings}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def alone(recipes) -> dict[str, Path]:
    """The run of each objective in one process."""
    runs = {name: recipes / f"alone-{name}" for name in OBJECTIVES}
    for name, output in runs.items():
        entry.main([str(recipes / f"{name}.yaml"), f"output_dir={output}"])
    return runs


def start_with(engine: str, recipe: Path, output: Path, *overrides: str, largest: int = 0) -> subprocess.Popen:
    """`largest`: blocks, of 512 or 1024 bytes, that a file may have at most."""
    if engine != "ddp":
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles its communication with g++")
    config = f"accelerate_configs/{ENGINES[engine]}.yaml"
    # the command itself, as users have it: an import of its own can break it where the module works
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", config]
    command += ["hf_accel/run.py", str(recipe), f"output_dir={output}", *overrides]
    if largest:
        command = ["sh", "-c", f'ulimit -f {largest} && exec "$@"', "sh", *command]
    # The folder of the interpreter holds ninja, which DeepSpeed calls by name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def launch_with(engine: str, recipe: Path, output: Path, *overrides: str, **limits: int) -> subprocess.CompletedProcess:
    process = start_with(engine, recipe, output, *overrides, **limits)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def last_checkpoint(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("engine", list(ENGINES))
def test_two_processes_train_as_one(engine, objective, recipes, alone, tmp_path):
    run = tmp_path / "run"
    done = launch_with(engine, recipes / f"{objective}.yaml", run)
    assert (run / "results.json").exists(), done.stdout + done.stderr
    results, expected = read(run / "results.json"), read(alone[objective] / "results.json")
    assert results["processes"] == 2 and expected["processes"] == 1
    assert results["schedule"] == expected["schedule"] and len(results["schedule"]) == 3
    assert results["units"] == expected["units"]
    assert losses(run) == pytest.approx(losses(alone[objective]), rel=1e-4) and len(losses(run)) > 8
    # Both branches, heads and centre; a training checkpoint of any engine holds them whole.
    got, wanted = (load_file(last_checkpoint(path) / WEIGHTS) for path in (run, alone[objective]))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if not name.endswith(NO_GRADIENT):
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}")

    encoder = AutoModel.from_pretrained(last_checkpoint(run))
    final = load_file(run / "final" / WEIGHTS)
    assert encoder.state_dict().keys() == final.keys()
    assert all(torch.equal(tensor, final[name]) for name, tensor in encoder.state_dict().items())
    if objective == "dino":  # the one with most state
        again, recipe = tmp_path / "again", recipes / "dino.yaml"
        if engine in ("ddp", "zero3"):
            survive(engine, recipe, again)
        else:
            shutil.copytree(run, again, ignore=shutil.ignore_patterns("results.json", "final"))
            (again / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(run), str(again)))
            tear(last_checkpoint(again))
        resume(engine, recipe, run, again)


def tear(checkpoint: Path) -> Path:
    """Cut the last process's part of the optimizer's state in half."""
    part = max(checkpoint.rglob("*optim*.pt"))
    os.truncate(part, part.stat().st_size // 2)
    return part


def survive(engine: str, recipe: Path, run: Path) -> None:
    """Kill the launcher alone; tear a checkpoint, and leave no room for another: what is complete stays."""
    often = ["save_steps=2", "save_total_limit=9"]
    process = start_with(engine, recipe, run, *often)
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
    done = launch_with(engine, recipe, run, *often, largest=40)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and f"Not resumed from {torn}: {part} has" in said and f"from {good}" in said, said
    assert f"WriteFailed: {torn} cannot be written" in said and f"Last good checkpoint: {good}." in said, said
    assert damage(good) is None


def resume(engine: str, recipe: Path, run: Path, again: Path) -> None:
    """From the checkpoint before the last, which is torn: the same end as that of `run`, bit for bit."""
    good, torn = sorted(again.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    done = launch_with(engine, recipe, again)
    assert (again / "results.json").exists(), done.stdout + done.stderr
    assert f"Not resumed from {torn}: " in done.stdout and f"Resuming from {good}" in done.stdout
    assert_same_weights(run, again)
    assert_same_weights(last_checkpoint(run), last_checkpoint(again), WEIGHTS)
    assert losses(again) == losses(run)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_bf16_leaves_weights_and_momentum_branch_in_fp32(engine, recipes, tmp_path):
    run = tmp_path / "run"
    # So slow a momentum branch stands still in bf16, which keeps 8 bits
    slow = ["objective_config.momentum=0.999", "learning_rate=1.0e-4", "mixed_precision=bf16"]
    done = launch_with(engine, recipes / "moco.yaml", run, *slow)
    assert (run / "results.json").exists(), done.stdout + done.stderr
    weights = load_file(last_checkpoint(run) / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    name = "layers.0.mlp.fc1.weight"
    moved = (weights[f"momentum_encoder.{name}"] - weights[f"encoder.{name}"]).abs()
    assert 0 < moved.max() < 2e-3
    earlier = load_file(min(run.glob("checkpoint-*")) / WEIGHTS)
    assert not torch.equal(earlier[f"momentum_encoder.{name}"], weights[f"momentum_encoder.{name}"])


def test_a_schedule_is_found_under_zero3_as_under_data_parallel(recipes, tmp_path):
    auto = ["schedule=auto", "auto_share=0.8", "auto_draws=3", "budget=4000", "batch_size=64"]
    probes = {}
    for engine in ("ddp", "zero3"):
        done = launch_with(engine, recipes / "moco.yaml", tmp_path / engine, *auto)
        assert (tmp_path / engine / "results.json").exists(), done.stdout + done.stderr
        history = read(tmp_path / engine / "log_history.json")["log_history"]
        probes[engine] = [line for line in history if "probe_units" in line]
    assert len(probes["ddp"]) == len(probes["zero3"]) >= 1
    for one, other in zip(probes["ddp"], probes["zero3"], strict=True):
        assert one["probe_tokens"] == other["probe_tokens"] and one["step"] == other["step"]
        assert one["probe_ca_mse"] == pytest.approx(other["probe_ca_mse"], rel=0.02)
