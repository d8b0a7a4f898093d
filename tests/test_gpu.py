"""What only a GPU can show: whole launches under each GPU configuration, against the CPU and against each other.

Without TF32, so that fp32 is fp32. GPUs add in any order, so a resumed run is held to a tolerance; bits are for CPUs.
"""

import math
from pathlib import Path

import pytest
import yaml

from tests.engine_runs import OBJECTIVES, assert_opens, assert_trained_alike, launch_with, resume, write_recipes
from tests.tiny_runs import losses, read

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_tf32")]

SINGLE = "single_gpu"
ENGINES = {
    "ddp": "optimizer.pt",
    "fsdp2": "optimizer.bin",
    "deepspeed_zero1": "latest",
    "deepspeed_zero2": "latest",
    "deepspeed_zero3": "latest",
}
"""Configurations, and a file by which a checkpoint tells that it is this engine's."""

PROCESSES = 1
ALIKE = {"loss": 1e-3, "weights": 1e-2}
"""Relative errors of two runs on a GPU."""


@pytest.fixture(scope="module")
def no_tf32():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        yield


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    return write_recipes(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def alone(recipes) -> dict[str, Path]:
    """Where the run of each objective in one process on the GPU is, once `run_alone` has been asked for it."""
    return {name: recipes / f"alone-{name}" for name in OBJECTIVES}


def run_alone(objective: str, recipes: Path, alone: dict[str, Path]) -> Path:
    run = alone[objective]
    if not run.exists():
        launch_with(SINGLE, recipes / f"{objective}.yaml", run)
    return run


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_gpu_trains_as_a_cpu_and_resumes(objective, recipes, alone, tmp_path):
    recipe, run = recipes / f"{objective}.yaml", run_alone(objective, recipes, alone)
    launch_with("cpu", recipe, tmp_path / "cpu")
    first = slice(0, 5)  # rounding grows from step to step
    assert losses(run)[first] == pytest.approx(losses(tmp_path / "cpu")[first], rel=1e-3)
    assert len(losses(run)) == len(losses(tmp_path / "cpu")) and all(map(math.isfinite, losses(run)))
    assert_opens(run)
    assert_trained_alike(resume(SINGLE, recipe, run), run, **ALIKE)


def test_bf16_is_finite_and_close(recipes, alone, tmp_path):
    run = run_alone("moco", recipes, alone)
    launch_with(SINGLE, recipes / "moco.yaml", tmp_path / "bf16", "mixed_precision=bf16")
    got = losses(tmp_path / "bf16")
    # micro-batches of eight images: on a CPU the worst of the losses is off by a few per cent
    assert got == pytest.approx(losses(run), rel=0.15) and got != losses(run)


@pytest.mark.parametrize("config", list(ENGINES))
def test_an_engine_with_one_gpu_trains_as_one_process(config, recipes, alone, tmp_path):
    run, expected, recipe = tmp_path / "run", run_alone("dino", recipes, alone), recipes / "dino.yaml"
    launch_with(config, recipe, run, processes=PROCESSES)
    assert read(run / "results.json")["processes"] == PROCESSES
    assert all((checkpoint / ENGINES[config]).exists() for checkpoint in run.glob("checkpoint-*"))
    assert_trained_alike(run, expected, **ALIKE)
    assert_opens(run)
    assert_trained_alike(resume(config, recipe, run, processes=PROCESSES), run, **ALIKE)


def test_compiled_once_for_each_branch_and_stage(recipes, tmp_path):
    recipe = yaml.safe_load((recipes / "moco.yaml").read_text())
    recipe["model_config"]["num_hidden_layers"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("eager", "compiled"):
        compiled = str(name == "compiled").lower()
        launch_with(SINGLE, tmp_path / "recipe.yaml", tmp_path / name, f"torch_compile={compiled}")
    history = read(tmp_path / "compiled" / "log_history.json")["log_history"]
    logged = [line["compilations"] for line in history if "loss" in line]
    # a graph for each branch and stage, the key's last two being one
    assert 5 <= logged[-1] <= 8 < len(logged)
    assert logged[0] < logged[-1] == logged[-2]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-2)


@pytest.mark.parametrize("objective", ["moco", "dino"])
def test_fp16_is_finite(objective, recipes, tmp_path):
    launch_with(SINGLE, recipes / f"{objective}.yaml", tmp_path / "fp16", "mixed_precision=fp16")
    assert all(map(math.isfinite, losses(tmp_path / "fp16")))
