"""Runs of each objective through `accelerate launch` under any engine, and what makes two of them the same training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from tests.tiny_runs import RECIPE, WEIGHTS, assert_same_weights, image_folder, losses, read

ROOT = Path(__file__).parents[1]
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
    "mixed_precision": "no",  # on a GPU, too, where the default is bf16: all engines are compared in fp32
    "learning_rate": 1.0e-3,
    "save_steps": 5,
}
NO_GRADIENT = ("k_proj.bias", "layernorm.bias", "running_mean")
"""What no loss here depends on, as softmax and BatchNorm take it off: rounding alone moves it; and what follows it."""


def write_recipes(folder: Path) -> Path:
    """A recipe for each objective, the same to every engine; the folder."""
    images = image_folder(folder / "images")
    for name, settings in OBJECTIVES.items():
        recipe = {**RECIPE, "data": str(images), "objective": name, **SHARED, **settings}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def start_with(
    config: str, recipe: Path, output: Path, *overrides: str, processes: int | None = None, largest: int = 0
) -> subprocess.Popen:
    """Launch the recipe under `accelerate_configs/CONFIG.yaml`.

    `largest`: blocks, of 512 or 1024 bytes, that a file may have at most; 0 for any size.
    """
    if "deepspeed" in config:
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles its communication with g++")
    # the command itself, as users have it: an import of its own can break it where the module works
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["--config_file", f"accelerate_configs/{config}.yaml"]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    command += ["hf_accel/run.py", str(recipe), f"output_dir={output}", *overrides]
    if largest:
        command = ["sh", "-c", f'ulimit -f {largest} && exec "$@"', "sh", *command]
    # The folder of the interpreter holds ninja, which DeepSpeed calls by name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def launch_with(config: str, recipe: Path, output: Path, *overrides: str, processes: int | None = None) -> str:
    """As `start_with`, to its end, which must be a good one; what it printed."""
    stdout, stderr = start_with(config, recipe, output, *overrides, processes=processes).communicate()
    assert (output / "results.json").exists(), stdout + stderr
    return stdout


def last_checkpoint(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def assert_trained_alike(run: Path, expected: Path, loss: float = 1e-4, weights: float = 1e-3) -> None:
    """The same schedule and units, losses and weights of both branches within these relative errors."""
    one, other = read(run / "results.json"), read(expected / "results.json")
    assert one["schedule"] == other["schedule"] and len(one["schedule"]) == 3
    assert one["units"] == other["units"]
    assert losses(run) == pytest.approx(losses(expected), rel=loss) and len(losses(run)) > 8
    # Both branches, heads and centre; a training checkpoint of any engine holds them whole.
    got, wanted = (load_file(last_checkpoint(path) / WEIGHTS) for path in (run, expected))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if not name.endswith(NO_GRADIENT):
            told: Any = {"msg": lambda text, n=name: f"{n}: {text}"}
            torch.testing.assert_close(got[name], value, rtol=weights, atol=weights / 20, **told)


def assert_opens(run: Path) -> None:
    """`AutoModel` opens the last training checkpoint as the encoder in final/."""
    encoder = AutoModel.from_pretrained(last_checkpoint(run))
    final = load_file(run / "final" / WEIGHTS)
    assert encoder.state_dict().keys() == final.keys()
    assert all(torch.equal(tensor, final[name]) for name, tensor in encoder.state_dict().items())


def resume(config: str, recipe: Path, run: Path, *overrides: str, processes: int | None = None) -> Path:
    """Once more from the checkpoint before the last; the new run."""
    again = run.with_name(f"{run.name}-again")
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("results.json", "final", last_checkpoint(run).name))
    (again / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(run), str(again)))
    assert "Resuming from" in launch_with(config, recipe, again, *overrides, processes=processes)
    return again


def assert_same_run(run: Path, again: Path) -> None:
    """Bit for bit."""
    assert_same_weights(run, again)
    assert_same_weights(last_checkpoint(run), last_checkpoint(again), WEIGHTS)
    assert losses(again) == losses(run)
