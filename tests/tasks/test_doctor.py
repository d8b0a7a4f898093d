"""`hf-accel doctor`: every check can fail, and then says what to do."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml

from hf_accel import cli
from hf_accel.data import CorruptImage
from hf_accel.tasks import doctor, machine
from hf_accel.tasks.doctor import check_data, check_token, find_problems
from hf_accel.tasks.machine import Check
from hf_accel.training.memory import OutOfMemory
from hf_accel.training.timing import StepTime
from tests.tiny_runs import RECIPE, image_folder

pytestmark = pytest.mark.usefixtures("own_cache_and_threads")

PACKAGES = "hf_accel.tasks.machine.metadata"


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A machine without a GPU on which nothing is wrong, whatever this one is like."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "on_cpu", lambda: True)
    monkeypatch.setattr(machine, "list_gpus", list)
    monkeypatch.setattr(machine, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(machine, "read_accelerate_config", dict)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    monkeypatch.chdir(tmp_path)


def assert_said(check: Check, state: str, *texts: str) -> None:
    line = str(check)
    assert check.state == state and line.startswith(f"{state:<8} {check.subject}: ") and "\n" not in line, line
    assert all(text in line for text in texts), line


def test_a_healthy_machine_has_a_line_for_each_check(healthy, capsys):
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    subjects = [line.split(":")[0].split(maxsplit=1) for line in lines]
    assert [state for state, _ in subjects] == ["ok"] * len(lines)
    assert [subject for _, subject in subjects] == [
        *("packages", "device", "precision", "compiler", "threads", "shared memory", "cache of Hugging Face"),
        *("accelerate", "output_dir", "disk of output_dir"),
    ]


def test_a_failed_check_ends_with_1_and_a_warning_does_not(healthy, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    cli.main(["doctor"])
    assert "warning  threads" in capsys.readouterr().out
    monkeypatch.setattr(machine, "list_gpus", lambda: ["GPU 0: one"])
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 1 and "failed   device" in capsys.readouterr().out


def test_packages_are_compared_with_what_is_required(monkeypatch):
    needed = ["numpy>=1000", "absent-package>=2", 'other-package; extra == "dev"', "torch>=2"]
    monkeypatch.setattr(f"{PACKAGES}.requires", lambda _: needed)
    check = machine.check_packages()
    assert_said(check, "failed", "numpy ", "absent-package is missing", "pip install 'numpy>=1000' 'absent-package>=2'")
    assert "other-package" not in str(check) and "torch" not in str(check)
    monkeypatch.setattr(f"{PACKAGES}.metadata", lambda _: {"Requires-Python": ">=9"})
    assert_said(machine.check_packages(), "failed", ">=9 is needed", "newer Python")


def test_a_package_that_is_not_installed_is_said(monkeypatch):
    def missing(_: str):
        raise machine.metadata.PackageNotFoundError

    monkeypatch.setattr(f"{PACKAGES}.requires", missing)
    assert_said(machine.check_packages(), "warning", "not installed", "pip install -e .")


def test_a_gpu_that_torch_cannot_use_is_said(healthy, monkeypatch):
    monkeypatch.setattr(machine, "list_gpus", lambda: ["GPU 0: one"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    version = torch.__version__.partition("+")[0]
    assert_said(machine.check_gpu(), "failed", "torch is its CPU build", f"pip install torch=={version}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert_said(machine.check_gpu(), "failed", "for CUDA 13.0 cannot use it", "driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert_said(machine.check_gpu(), "warning", "hides the GPU", "Unset it")


def test_gpus_are_those_that_the_driver_lists(monkeypatch):
    listed = SimpleNamespace(stdout="GPU 0: NVIDIA H200 (UUID: x)\n  MIG 1g\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: listed)
    assert machine.list_gpus() == ["GPU 0: NVIDIA H200 (UUID: x)"]

    def absent(*_: Any, **__: Any):
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine.list_gpus() == []


def test_a_gpu_without_bf16_is_said(monkeypatch):
    monkeypatch.setattr(machine, "on_cpu", lambda: False)
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    assert_said(machine.check_bf16(), "warning", "no bf16", "mixed_precision=fp16")
    monkeypatch.setattr(machine, "has_bf16", lambda: True)
    assert_said(machine.check_bf16(), "ok", "bf16")


def test_a_missing_compiler_is_said(healthy, monkeypatch):
    def absent():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(machine, "get_cpp_compiler", absent)
    assert_said(machine.check_compiler(), "warning", "No working C++", "torch_compile=true fails", "apt install g++")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "has_triton", lambda: False)
    assert_said(machine.check_compiler(), "warning", "no Triton", "pip install triton")
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    assert_said(machine.check_compiler(), "ok", "Triton")


@pytest.mark.parametrize(
    "threads, state, text",
    [("8", "ok", ""), ("1", "warning", "idle"), ("9", "warning", "at most"), ("x", "warning", "at most")],
)
def test_threads_are_compared_with_the_cores(healthy, monkeypatch, threads, state, text):
    monkeypatch.setattr(machine, "cores_of_process", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert_said(machine.check_threads(), state, f"OMP_NUM_THREADS={threads}, and 8 cores", text)


def test_little_room_is_said(healthy, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=64e6))
    assert_said(machine.check_shared_memory(), "warning", "0.06 GB free", "--shm-size=8g")
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "absent")
    assert machine.check_shared_memory().state == "ok"
    assert_said(machine.check_disk("cache", tmp_path / "new"), "warning", "0.1 GB free", "another disk")
    assert_said(machine.check_disk("disk", tmp_path, 7e9), "failed", "7.0 GB are needed", "save_total_limit")


def test_a_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    assert machine.check_writing(tmp_path / "a/b").state == "ok" and not (tmp_path / "a").exists()

    def refuse(dir: Path):
        assert dir == tmp_path.resolve()
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    assert_said(machine.check_writing(tmp_path / "a/b"), "failed", "Permission denied", "another output_dir")
    assert_said(machine.check_cache(tmp_path / "a/b"), "warning", "Permission denied", "set HF_HOME")


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "GPUs": ({"distributed_type": "MULTI_GPU", "num_processes": 2}, "2 processes on GPUs were asked for"),
    "dynamo": ({"distributed_type": "NO", "dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo backend"),
    "precision": (
        {"distributed_type": "NO", "mixed_precision": "fp8", "use_cpu": True},
        "'fp8', which is not supported",
    ),
    "FSDP": ({"distributed_type": "FSDP", "use_cpu": True}, "FSDP on a CPU"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_a_run_refuses_is_said(healthy, monkeypatch, name):
    config, message = CONFIGURATIONS[name]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "read_accelerate_config", lambda: config)
    before = dict(machine.os.environ)
    (check,) = machine.check_launcher()
    assert_said(check, "failed", message, "accelerate config")
    assert dict(machine.os.environ) == before


def test_a_configuration_that_cannot_be_read_is_said(healthy, monkeypatch):
    def broken():
        raise yaml.YAMLError("not\nYAML")

    monkeypatch.setattr(machine, "read_accelerate_config", broken)
    (check,) = machine.check_launcher()
    assert_said(check, "failed", "not YAML", "Run accelerate config")


def test_the_environment_of_a_launcher_is_checked(healthy, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    (check,) = machine.check_launcher()
    assert_said(check, "failed", "dynamo backend", "unset its variables")


def test_deepspeed_needs_its_compiler(healthy, monkeypatch):
    config = {"distributed_type": "DEEPSPEED", "use_cpu": True}
    monkeypatch.setattr(machine, "read_accelerate_config", lambda: config)
    monkeypatch.setattr(machine.shutil, "which", lambda program: None if program == "ninja" else program)
    assert_said([*machine.check_launcher()][-1], "failed", "ninja not found", "pip install ninja")
    monkeypatch.setattr(machine.shutil, "which", lambda program: program)
    first, last = machine.check_launcher()
    assert (first.state, last.subject, last.state) == ("ok", "DeepSpeed", "ok")


# The recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def recipe(healthy, images, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": str(images), "output_dir": str(tmp_path / "run")}))
    return path


def by_subject(recipe: Path, *overrides: str) -> dict[str, Check]:
    return {check.subject: check for check in find_problems([str(recipe), *overrides])}


@pytest.mark.slow
def test_a_recipe_is_checked_to_its_steps(recipe, capsys):
    cli.main(["doctor", str(recipe)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(lines)
    said = {line.split(":")[0].split(maxsplit=1)[1]: line for line in lines}
    assert "120 images of" in said["data"] and "forward and backward on cpu, loss" in said["steps"]
    assert "8 steps, " in said["prediction"] and " GB" in said["prediction"]
    assert not (recipe.parent / "run").exists()


def test_a_wrong_key_ends_the_checks_of_the_recipe(recipe):
    found = by_subject(recipe, "bacth_size=3")
    assert_said(found["recipe"], "failed", "no such key", "did you mean", "--help lists the keys")
    assert "data" not in found


def test_data_that_cannot_be_opened_is_said(recipe):
    found = by_subject(recipe, "data=nowhere/at/all")
    assert_said(found["data"], "failed", "data='nowhere/at/all'", "docs/data.md")
    assert "steps" not in found and found["output_dir"].state == "ok"


def test_images_that_cannot_be_read_are_said(recipe, images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "images")
    files = sorted((copy / "train").rglob("*.png"))
    load = doctor.load_recipe
    files[0].write_bytes(b"no image")  # the first one is among those that are looked at
    assert_said(check_data(load(recipe, [f"data={copy}"]))[0], "warning", "1 cannot be read", "another image in place")
    for file in files:
        file.write_bytes(b"no image")
    found, given = check_data(load(recipe, [f"data={copy}"]))
    assert_said(found, "failed", "none of 32 images can be read", "docs/data.md")
    assert given is None


class Unreadable(list):
    """Images that are decoded one by one, as those of a large set."""

    name = title = "large"
    bad = {}

    def read(self, index: int):
        if index in self:
            raise CorruptImage(index, f"{index}.png", "truncated")


def test_images_of_a_large_set_are_decoded_here_and_there(recipe, monkeypatch):
    few, all_of_them = Unreadable([0, *[-1] * 99]), Unreadable(range(100))
    monkeypatch.setattr(doctor, "load_images", lambda _: (few, None))
    assert_said(check_data(cast(Any, None))[0], "warning", "32 of them decoded; 1 cannot be read, as 0.png: truncated")
    monkeypatch.setattr(doctor, "load_images", lambda _: (all_of_them, None))
    assert_said(check_data(cast(Any, None))[0], "failed", "none of 32 images can be read", "docs/data.md")


def test_a_push_needs_a_token(recipe, monkeypatch):
    monkeypatch.setattr(doctor, "get_token", lambda: None)
    monkeypatch.setattr(doctor, "check_steps", lambda *_: iter(()))
    assert_said(by_subject(recipe, "push_to_hub=true")["Hub"], "failed", "no token", "hf auth login")
    assert "Hub" not in by_subject(recipe)
    monkeypatch.setattr(doctor, "get_token", lambda: "hf_secret")
    assert check_token().state == "ok" and "hf_secret" not in str(check_token())


def test_steps_that_fail_or_diverge_are_said(recipe, monkeypatch):
    def times(loss: float):
        return lambda trainer: {step.strategy: StepTime(1.0, 10**9, loss) for step in trainer.plan}

    monkeypatch.setattr(doctor, "time_stages", times(float("nan")))
    found = by_subject(recipe)
    assert_said(found["steps"], "failed", "not finite", "mixed_precision=no")
    assert_said(found["prediction"], "ok", "8 steps, 8 s without", "1.00 GB")

    def fail(_: Any):
        raise OutOfMemory("cpu has too little memory")

    monkeypatch.setattr(doctor, "time_stages", fail)
    found = by_subject(recipe)
    assert_said(found["steps"], "failed", "too little memory", "hf-accel plan")
    assert "prediction" not in found and found["output_dir"].state == "ok"


def test_a_plan_that_may_not_be_intended_is_a_warning(recipe, monkeypatch):
    monkeypatch.setattr(doctor, "time_stages", lambda trainer: {s.strategy: StepTime(1.0, 1) for s in trainer.plan})
    unpaid = ["schedule=[{until: 0.99, patch_size: 8}, {until: 1.0}]", "batch_size=100", "budget=300"]
    assert_said(by_subject(recipe, *unpaid)["plan"], "warning", "budget=300 pays for no step of the schedule's last")
    assert "plan" not in by_subject(recipe)


def test_room_for_the_checkpoints_is_checked(recipe, monkeypatch):
    monkeypatch.setattr(doctor, "time_stages", lambda trainer: {s.strategy: StepTime(1.0, 1) for s in trainer.plan})
    monkeypatch.setattr(doctor, "checkpoint_bytes", lambda _: 2e12)
    assert_said(by_subject(recipe)["disk of output_dir"], "failed", "2000.0 GB are needed")


def test_checkpoints_hold_weights_and_moments():
    learns, target = torch.nn.Parameter(torch.zeros(10)), torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    objective = SimpleNamespace(parameters=lambda: [learns, target])
    trainer: Any = SimpleNamespace(objective=objective, args=SimpleNamespace(save_total_limit=2))
    assert doctor.checkpoint_bytes(trainer) == 4 * (3 * 10 + 5) * 3
