"""What is answered before torch is imported, which takes seconds, and that `import hf_accel` registers the classes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import hf_accel.run as entry
from hf_accel.recipe import RecipeError
from hf_accel.training import TrainingDiverged
from tests.engine_runs import start_with

ROOT = Path(__file__).parents[1]
SCRIPT = """
import runpy, sys
sys.argv = ["hf_accel/run.py", *sys.argv[1:]]
sys.modules["__main__"].__file__ = "hf_accel/run.py"
try:
    runpy.run_path("hf_accel/run.py", run_name="__main__")
except SystemExit as end:
    print("END", end.code)
print("TORCH", "torch" in sys.modules, "TRANSFORMERS", "transformers" in sys.modules)
"""


def run(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--help"], "neighbours"),
        (["recipes/moco.yaml", "bacth_size=3"], "did you mean 'batch_size'"),
        (["recipes/moco.yaml", "batch_size=many"], "expected int"),
        (["recipes/moco.yaml", "objective=mocko"], "did you mean 'moco'"),
        (["recipes/moco.yaml", "objective_config.temprature=1"], "did you mean 'temperature'"),
        (["recipes/moco.yaml", "model_config.hiden_size=64"], "did you mean 'hidden_size'"),
        (["recipes/moco.yaml", "model_config.hidden_size=wide"], "expected int"),
        (["recipes/moco.yaml", "task=evaluate", "checkpoint=x", "finetune_config.epoch=3"], "did you mean 'epochs'"),
        (["recipes/moco.yaml", "schedule=[{until: 1.0, pach_size: 7}]"], "unknown key 'pach_size'"),
        (["recipes/moco.yaml", "checkpoint=x"], "task=pretrain does not read"),
        (["recipes/mocco.yaml"], "no recipe at"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_recipe_is_refused_before_torch_is_imported(arguments, answer):
    text = run(SCRIPT, *arguments)
    assert answer in text and text.endswith("TORCH False TRANSFORMERS False\n"), text


@pytest.mark.slow
def test_import_hf_accel_is_enough_for_automodel():
    code = "import hf_accel; from transformers import AutoModel, AutoConfig; print(AutoConfig.for_model('accel_vit')"
    code += ".model_type, hf_accel.AccelViTModel.__name__, AutoModel._model_mapping[hf_accel.AccelViTConfig].__name__)"
    assert run(code) == "accel_vit AccelViTModel AccelViTModel\n"


def test_dir_lists_public_names_before_their_first_use():
    code = "import hf_accel; print(set(hf_accel.__all__) <= set(dir(hf_accel)), 'training' in vars(hf_accel))"
    assert run(code) == "True False\n"


def test_one_process_prints_its_error_itself(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(SystemExit, match=r"^SettingError: bacth_size=3: there is no such key"):
        entry.main(["recipes/moco.yaml", "bacth_size=3"])


RUN_TASK = """
import sys
sys.modules["__main__"].__file__ = "hf_accel/run.py"
import hf_accel.run as run
run.run_task = lambda *_: print("done", flush=True)
run.main(["task=card", "checkpoint=x"])
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["-m", "hf_accel", "list"], ["-c", RUN_TASK]], ids=["command", "task"])
def test_closed_output_ends_a_command_without_traceback(command, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, **pipes) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert (said, process.returncode) == (b"", 128 + signal.SIGPIPE)


def test_errors_pass_while_the_output_is_open(monkeypatch):
    for error in (BrokenPipeError("of a worker"), SystemExit(3)):
        monkeypatch.setattr(entry, "run_task", MagicMock(side_effect=error))
        with pytest.raises(type(error)) as raised:
            entry.main(["task=card", "checkpoint=x"])
        assert raised.value is error


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("kind", [RecipeError, TrainingDiverged])
def test_one_of_several_leaves_its_error_to_the_launcher(kind, rank, monkeypatch, tmp_path, capsys):
    def fail(recipe):
        raise kind("what is wrong")

    slept, handler = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("hf_accel.tasks.pretrain.pretrain", fail)
    monkeypatch.setattr("hf_accel.distributed.launch.end_with_launcher", lambda: None)
    try:
        with pytest.raises(SystemExit) as end:
            entry.main(["recipes/moco.yaml"])
        assert rank == "0" or signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # it ends when it is told to
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert end.value.code == 1 and capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "error.json").read_text())["message"] == f"{kind.__name__}: what is wrong"
    assert slept == ([] if rank == "0" else [entry.PATIENCE])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("cpu_2proc", "bacth_size=3", "SettingError: bacth_size=3: there is no such key"),
        ("cpu_2proc", "batch_size=7", "SettingError: batch_size=7: must be a multiple of"),
        ("ddp", "seed=3", "SettingError: 2 processes on GPUs were asked for"),
    ],
)
def test_an_error_of_several_is_printed_once_and_last(config, override, message, tmp_path):
    if config == "ddp" and torch.accelerator.is_available():
        pytest.skip("the launch is sound where there is a GPU")
    process = start_with(config, ROOT / "recipes/moco.yaml", tmp_path / "run", override, processes=2)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode != 0 and stdout.count(message) == 0 and stderr.count(message) == 1, stderr
    assert message in [line for line in stderr.splitlines() if line.strip("= ")][-1]
