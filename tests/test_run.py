"""Whole runs in processes of their own: results, exact resume after SIGKILL and SIGTERM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_runs import assert_same_weights

ROOT = Path(__file__).parents[1]
TINY = [
    "model_config.hidden_size=32",
    "model_config.num_hidden_layers=2",
    "model_config.intermediate_size=64",
    "model_config.num_attention_heads=2",
    "model_config.drop_path_rate=0.2",
    "batch_size=64",
    "gradient_accumulation_steps=2",
    "logging_steps=1",
    "save_steps=2",
    "schedule=[{until: 0.3, patch_size: 7}, {until: 0.7, token_dropout: 0.5}, {until: 1.0}]",
    "report_to=[]",
]
HEADS = ["objective_config.projector_hidden_size=64", "objective_config.projection_size=32"]
DINO = {
    "num_prototypes": 64,
    "head_hidden_size": 32,
    "bottleneck_size": 16,
    "freeze_last_layer": 0.2,  # beyond the first checkpoint, whose optimizer then has no state of that layer
    "num_local_crops": 2,
    "local_crop_size": 16,
}
OBJECTIVES = {
    "moco": [*HEADS, "budget=4000"],
    "simclr": [*HEADS, "budget=6000"],
    "dino": [*(f"objective_config.{key}={value}" for key, value in DINO.items()), "budget=11000"],
}
"""Recipes by name, with what makes each as short as the others: about 26 steps."""


def start(output: Path, *overrides: str, objective: str = "moco") -> subprocess.Popen:
    settings = [f"output_dir={output}", *TINY, *OBJECTIVES[objective], *overrides]
    command = [sys.executable, "hf_accel/run.py", f"recipes/{objective}.yaml", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(output: Path, *overrides: str, objective: str = "moco") -> str:
    process = start(output, *overrides, objective=objective)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def interrupt(output: Path, signum: int, *overrides: str, objective: str) -> str:
    """Start the run, send the signal once it has a complete checkpoint, and return what it printed."""
    process = start(output, *overrides, objective=objective)
    deadline = time.monotonic() + 200
    while not list(output.glob("checkpoint-*/run_state.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signum)
    text, _ = process.communicate(timeout=100)
    assert not (output / "results.json").exists(), "the run had ended before the signal: make it longer"
    assert process.returncode == (143 if signum == signal.SIGTERM else -signum), text
    return text


def last_logs(output: Path) -> list[dict]:
    logs = json.loads((output / "log_history.json").read_text())["log_history"]
    exact = ("step", "loss", "learning_rate", "units", "progress", "embedding_std", "eval_knn_top1", "tokens")
    return [{key: entry[key] for key in exact if key in entry} for entry in logs if "train_runtime" not in entry]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Callable[[str], Path]:
    """An objective's run that was left alone, made once."""

    @cache
    def of(objective: str) -> Path:
        output = tmp_path_factory.mktemp(objective)
        run(output, objective=objective)
        return output

    return of


@pytest.fixture(scope="module")
def whole(whole_run) -> Path:
    return whole_run("moco")


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_says(whole):
    results = json.loads((whole / "results.json").read_text())
    logs = [entry for entry in last_logs(whole) if "loss" in entry]
    assert results["budget"] - results["units"] < 64 * 4
    assert logs[-1]["units"] == pytest.approx(results["units"]) and len(logs) == results["steps"]
    assert results["images_seen"] == 64 * results["steps"]
    assert {entry["tokens"] for entry in logs} == {17, 25, 50}
    for name in ("final/config.json", "final/preprocessor_config.json", "recipe.yaml", "curves.png"):
        assert (whole / name).is_file(), name
    from transformers import AutoImageProcessor, AutoModel

    import hf_accel  # noqa: F401

    encoder = AutoModel.from_pretrained(whole / "final")
    checkpoint = AutoModel.from_pretrained(whole / f"checkpoint-{results['steps']}")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, checkpoint.state_dict()[name]), name
    assert AutoImageProcessor.from_pretrained(whole / "final").crop_size["height"] == 28


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "signum"),
    [("moco", signal.SIGTERM), *((objective, signal.SIGKILL) for objective in OBJECTIVES)],
    ids=lambda value: getattr(value, "name", value),
)
def test_interrupted_and_resumed_equals_left_alone(whole_run, tmp_path, objective, signum):
    whole = whole_run(objective)
    text = interrupt(tmp_path, signum, objective=objective)
    said = ("SIGTERM has arrived: the run saves", "same command resumes")
    assert signum == signal.SIGKILL or all(words in text for words in said)
    assert "Resuming from" in run(tmp_path, objective=objective)
    steps = json.loads((whole / "results.json").read_text())["steps"]
    for name in ("final/model.safetensors", f"checkpoint-{steps}/model.safetensors"):
        expected, got = load_file(whole / name), load_file(tmp_path / name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected), name
    assert last_logs(whole) == last_logs(tmp_path)
    if signum == signal.SIGTERM:
        assert "complete" in run(tmp_path, objective=objective)


@pytest.mark.slow
def test_killed_in_a_time_budget_equals_a_run_from_its_cost_table(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    settings = ["budget=0.3 minutes", "save_steps=10", "eval_points=[1.0]"]
    interrupt(killed, signal.SIGKILL, *settings, objective="moco")
    table = (killed / "cost_table.json").read_text()
    assert "Resuming from" in run(killed, *settings)
    undisturbed.mkdir()
    shutil.copy(killed / "cost_table.json", undisturbed)
    text = run(undisturbed, *settings)
    assert "Resuming" not in text and "Costs:" not in text  # It starts, and times no step.
    assert (killed / "cost_table.json").read_text() == (undisturbed / "cost_table.json").read_text() == table
    one, other = (json.loads((output / "results.json").read_text()) for output in (killed, undisturbed))
    assert one["budget_requested"] == "0.3 minutes" and one["steps"] > 10
    assert all(one[key] == other[key] for key in ("budget", "units", "steps", "knn_top1"))
    assert_same_weights(killed, undisturbed)
    assert_same_weights(killed, undisturbed, f"checkpoint-{one['steps']}/model.safetensors")
    assert last_logs(killed) == last_logs(undisturbed)
