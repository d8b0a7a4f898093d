"""What CONTRIBUTING says of a new objective is enough: its two lines and its command are carried out in a copy."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_accel.objectives import base, momentum
from tests.commands import ROOT, code_blocks

SOURCE = ROOT / "tests/objectives/fourth_objective.py"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package in which the two lines of CONTRIBUTING register byol.py, the fourth objective."""
    for name in ("hf_accel", "docs", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    objectives = tmp_path / "hf_accel/objectives"
    text = SOURCE.read_text(encoding="utf-8").replace("SimSiamForPreTraining", "BYOLForPreTraining")
    (objectives / "byol.py").write_text(
        text.replace("hf_accel.objectives import Draw", "hf_accel.objectives.base import Draw")
    )
    steps = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (imported,) = re.findall(r"`(from \.byol import \w+)`", steps)
    (entry,) = re.findall(r"`(\"byol\": \w+,)`", steps)
    registry = objectives / "__init__.py"
    found = (
        registry.read_text()
        .replace("from .dino", f"{imported}\nfrom .dino", 1)
        .replace('"dino":', f'{entry}\n    "dino":')
    )
    registry.write_text(found)
    return tmp_path


def run(copy: Path, *command: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_skeleton_is_the_fourth_objective():
    (skeleton,) = code_blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "python")
    (shown,), (*_, written) = (ast.parse(text).body for text in (skeleton, SOURCE.read_text(encoding="utf-8")))
    assert isinstance(shown, ast.ClassDef) and isinstance(written, ast.ClassDef)
    del written.body[0]  # its docstring
    assert ast.dump(shown) == ast.dump(written) and "self.post_init()" in skeleton


def test_the_names_in_the_table_exist():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### Names of an objective")[2]
    named = re.findall(r"`(?:self\.)?(\w+)[^`]*`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    known = {*dir(base), *dir(momentum), *dir(base.ObjectiveForPreTraining), "encoder", "metrics", "draw"}
    assert {"update_target", "embedding_std"} <= known and len(named) > 20 and {*named} <= known
    hooks = {name for name, value in vars(base.ObjectiveForPreTraining).items() if inspect.isfunction(value)}
    assert {"collapse_symptoms", "frozen_parameters", "before_optimizer_step", "view_configs"} <= hooks & {*named}


@pytest.mark.slow
def test_the_steps_of_contributing_register_an_objective(copy: Path):
    assert "Run `python docs/key_tables.py`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in (["docs/key_tables.py"], ["-m", "hf_accel", "list"], ["-m", "hf_accel", "pretrain", "--help"]):
        code, out, err = run(copy, *command)
        assert code == 0, err
        assert command[0] != "-m" or "byol" in out
    page = (copy / "docs/recipes.md").read_text(encoding="utf-8")
    assert "`objective_config` of byol" in page and "in moco, simclr and byol the loss of an image depends" in page


@pytest.mark.slow
def test_a_fault_in_a_new_file_is_laid_at_its_door(copy: Path):
    file = copy / "hf_accel/objectives/byol.py"
    text = file.read_text()
    file.write_text(text.replace("predictor_hidden_size: int", "predictor_hidden_size: Tensor"))
    assert run(copy, "-m", "hf_accel", "list")[0] == 0
    code, out, _ = run(copy, "-m", "hf_accel", "pretrain", "--help")
    fault = "hf_accel/objectives/byol.py, BYOLForPreTraining.__init__, predictor_hidden_size: the annotation Tensor"
    assert code == 0 and fault in out and "objective_config of simclr" in out
    code, _, err = run(copy, "-m", "hf_accel", "pretrain", "moco", "objective=byol", "objective_config={}")
    assert code == 1 and err.count("\n") == 1 and fault in err
    file.write_text(text.replace("import mlp", "import mlpp"))
    code, _, err = run(copy, "-m", "hf_accel", "pretrain", "moco", "objective=byol", "objective_config={}")
    assert code == 1 and "ImportError: cannot import name 'mlpp'" in err and "model_config" not in err
