"""What CONTRIBUTING says of a new objective is enough: its two lines and its command are carried out in a copy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

SOURCE = ROOT / "tests/objectives/fourth_objective.py"


@pytest.mark.slow
def test_the_steps_of_contributing_register_an_objective(tmp_path: Path):
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
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    assert "Run `python docs/key_tables.py`" in steps
    for command in (["docs/key_tables.py"], ["-m", "hf_accel", "list"], ["-m", "hf_accel", "pretrain", "--help"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert command[0] != "-m" or "byol" in done.stdout
    assert "`objective_config` of byol" in (tmp_path / "docs/recipes.md").read_text(encoding="utf-8")
