"""Where results come from, and that they are written whole or not at all."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_accel.report import environment, origin
from hf_accel.utils.writing import write_json

DOCUMENTS = ("README.md", "docs/table.json")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A fresh repository in which origin.py seems to lie, tracked."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    source = tmp_path / "package" / "origin.py"
    source.parent.mkdir()
    shutil.copy(origin.__file__, source)
    (tmp_path / "docs").mkdir()
    for name in DOCUMENTS:
        (tmp_path / name).touch()
    monkeypatch.setattr(origin, "__file__", str(source))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package", *DOCUMENTS)
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_commit_clean_and_dirty(repository) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert {"commit": head, "dirty": False}.items() <= environment().items()
    (repository / "note").write_text("untracked files, as of a run's output, do not count")
    assert environment()["dirty"] is False
    for name in DOCUMENTS:
        (repository / name).write_text("nor do documents, which a benchmark writes its tables into")
    assert environment()["dirty"] is False
    (repository / "package" / "origin.py").write_text("changed")
    assert {"commit": head, "dirty": True}.items() <= environment().items()


def test_a_repository_around_an_installed_copy_is_not_ours(repository, monkeypatch) -> None:
    installed = repository / ".venv" / "results.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(origin, "__file__", str(installed))
    assert {"commit": None, "dirty": None}.items() <= environment().items()


def test_no_git_on_the_machine(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


def test_versions_hardware_and_command(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_accel/run.py", "recipes/moco.yaml", "title=two words"])
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"].endswith("hf_accel/run.py recipes/moco.yaml 'title=two words'")
    assert found["hardware"]["cpu_cores"] >= 1 and found["hardware"]["torch_threads"] == torch.get_num_threads()
    assert len(found["hardware"]["gpus"]) == torch.cuda.device_count()
    json.dumps(found, allow_nan=False)


def test_scalars_of_every_kind(tmp_path) -> None:
    values = {
        "float": np.float32(0.5),
        "int": torch.tensor(3),
        "path": tmp_path,
        "nan": math.nan,
        "deep": [{"inf": (math.inf, np.float64("nan"), 1.5)}],
        4: None,
    }
    write_json(tmp_path / "a.json", values)
    expected = {"float": 0.5, "int": 3, "path": str(tmp_path), "nan": None, "deep": [{"inf": [None, None, 1.5]}]}
    assert json.loads((tmp_path / "a.json").read_text()) == {**expected, "4": None}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
