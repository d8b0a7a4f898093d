"""benchmarks/gpu.py: every command is one that its program takes, failures are told and passed over."""

import importlib
import json
import subprocess

import pytest

from benchmarks import gpu


@pytest.fixture
def measured(tmp_path):
    (tmp_path / "cost_base.json").write_text(json.dumps({"rows": [{"ms_per_image": 0.5}]}))
    return tmp_path


@pytest.mark.parametrize("toy", [False, True])
@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name != "tests"])
def test_each_part_is_a_command_that_parses(name, toy, measured, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    _, _, module, *arguments = gpu.command_of(name, measured, toy)
    own_device = name == "scaling" or name.startswith("whole")
    if not toy and not own_device:
        arguments += ["--device", "cuda"]
    args = importlib.import_module(module).parse_arguments(arguments)
    assert args.output == measured / f"{name}.json"
    if name == "scaling":
        assert args.ms_per_unit == 0.125
    elif own_device:
        assert ("model=vit_tiny" in args.settings) == toy and args.images == (8 if toy else 4096)
    else:
        small = args.size == 32 if name in ("views", "data") else args.model.endswith("tiny")
        assert args.device.type == ("cpu" if toy else "cuda") and small == toy


def test_the_rest_goes_on_after_a_failure(measured, monkeypatch, capsys):
    asked = []

    def run(command, stdout, stderr, timeout):
        asked.append(command[2])
        stdout.write("a line of the log\n")
        if command[2] == "benchmarks.cost":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 3 if command[2] == "pytest" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    (measured / "cost_base.json").unlink()
    assert gpu.main([str(measured), "tests", "cost_base", "scaling", "search"]) == 1
    printed = capsys.readouterr().out
    assert asked == ["pytest", "benchmarks.cost", "benchmarks.search"] and "a line of the log" in printed
    last = printed.splitlines()[-1]
    assert "tests (exit status 3)" in last and "cost_base (took longer than 75 s)" in last and "scaling (" in last
    assert "search" not in last and gpu.main([str(measured), "--toy", "search"]) == 0


def test_limits_keep_to_the_promise():
    assert all(part.seconds < 600 for part in gpu.PARTS.values())
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 25 * 60


def test_an_unknown_part_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "sleep"])
    assert "no such part: sleep; there are tests, views, data, step_small" in capsys.readouterr().err
