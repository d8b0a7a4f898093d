"""The `hf-accel` command: what it prints, how it launches, and that an installed wheel has all that it needs."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomllib
import yaml

import hf_accel
import hf_accel.cli as cli
from hf_accel.compression import Schedule
from hf_accel.models import PRESETS
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import RECIPES, describe_keys, load_recipe
from hf_accel.tasks import COMMANDS, PREVIEWS, TASKS
from hf_accel.utils import shipped
from tests.tiny_runs import RECIPE, image_folder, read

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "hf_accel"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def end_of(*argv: str) -> str:
    """The message that the command ends with."""
    with pytest.raises(SystemExit) as end:
        cli.main([*argv])
    return str(end.value.code)


@pytest.fixture
def launched(monkeypatch) -> list:
    """The arguments that accelerate's launcher gets, in place of a launch; the handlers of signals stay."""
    found = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", found.append)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return found


@pytest.fixture
def started(monkeypatch) -> list:
    """The recipes of the tasks that are started, in place of running them."""
    found = []
    monkeypatch.setattr("hf_accel.run.run_task", lambda recipe, _: found.append(recipe))
    return found


# Recipe, task and keys


def test_tasks_commands_and_recipes_belong_together():
    assert TASKS.keys() == RECIPES.keys() and not TASKS.keys() & (COMMANDS | PREVIEWS).keys()
    for module, function, *_ in (*TASKS.values(), *PREVIEWS.values(), *COMMANDS.values()):
        assert callable(getattr(importlib.import_module(f"hf_accel.{module}"), function))


def test_a_recipe_is_a_file_or_a_shipped_name(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("budget: 1000\nseed: 5\n")
    (tmp_path / "a=b.yaml").write_text("budget: 1000\nseed: 6\n")
    for words in (["moco"], ["recipes/moco.yaml"], ["moco.yaml"], ["cifar10/moco_cpu", "seed=3"], ["own.yaml"]):
        cli.main(["pretrain", *words])
    cli.main(["pretrain", "a=b.yaml", "budget=7"])
    cli.main(["cost", "image_size=32", "patch_size=4"])
    names = [recipe.output_dir for recipe in started]
    assert names == ["runs/moco"] * 3 + ["runs/cifar10_moco_cpu"] + ["runs/default"] * 3
    assert [recipe.seed for recipe in started[:-1]] == [0, 0, 0, 3, 5, 6] and started[5].budget == 7
    assert started[-1].used() == load_recipe(None, ["task=cost", "image_size=32", "patch_size=4"]).used()
    (tmp_path / "moco").mkdir()  # a folder is no recipe
    cli.main(["pretrain", "moco"])
    assert started[-1].output_dir == "runs/moco"


def test_the_task_of_the_command_wins_over_the_files(started, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("task: search\nbudget: 1000\n")
    cli.main(["pretrain", str(tmp_path / "recipe.yaml")])
    assert started[0].task == "pretrain"
    assert "task=evaluate needs the folder of an encoder" in end_of("evaluate", str(tmp_path / "recipe.yaml"))
    assert end_of("pretrain", "moco", "task=search") == "2" and "given twice" in capsys.readouterr().err
    assert "there is no such key; did you mean 'batch_size'" in end_of("pretrain", "moco", "bacth_size=3")
    assert "did you mean 'cifar10/moco_cpu'?" in end_of("pretrain", "cifar10/moko_cpu")


def test_a_shipped_schedule_is_found_from_any_folder(tmp_path, monkeypatch):
    name = "recipes/schedules/moco_digits_gain.yaml"
    expected = Schedule.parse(str(ROOT / name), 4)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("moco", [f"schedule={name}"])
    assert recipe.schedule == expected.to_list() and recipe.files == {"schedule": name}
    (tmp_path / "recipes/schedules").mkdir(parents=True)
    (tmp_path / name).write_text("[{until: 1.0}]")
    assert len(load_recipe("moco", [f"schedule={name}"]).schedule) == 1 < len(recipe.schedule)


def test_a_wheels_files_are_found_inside_of_the_package(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "recipes/cifar10", tmp_path / "recipes/cifar10")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    assert shipped.find_file("cifar10/moco_cpu", "recipes") == tmp_path / "recipes/cifar10/moco_cpu.yaml"
    assert set(shipped.list_recipes()) == {f"cifar10/{path.stem}" for path in (ROOT / "recipes/cifar10").iterdir()}
    monkeypatch.setattr(shipped, "PACKAGE", ROOT / "hf_accel")  # as in a checkout, or installed with -e
    assert shipped.find_file("moco", "recipes") == ROOT / "recipes/moco.yaml"


def test_the_wheel_lists_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "hf_accel").rglob("__init__.py")}
    assert set(settings["packages"]) == {".".join(path.parts) for path in folders} | settings["package-dir"].keys()
    assert all((ROOT / folder).is_dir() for folder in settings["package-dir"].values())


# What it prints


def test_list_prints_what_a_recipe_can_name(capsys):
    cli.main(["list"])
    text = capsys.readouterr().out
    words = set(re.findall(r"[\w/]+", text))
    recipes = {path.relative_to(ROOT / "recipes").with_suffix("") for path in (ROOT / "recipes").rglob("*.yaml")}
    recipes = {path.as_posix() for path in recipes if path.parts[0] != "schedules"}
    assert {*TASKS, *PREVIEWS, *COMMANDS, *recipes, *PRESETS, *OBJECTIVES} <= words and "schedules" not in words
    assert "MoCo-v3 on the bundled digits" in text
    summaries = [kind.summary() for kind in RECIPES.values()]
    assert len(set(summaries)) == len(RECIPES) and all(f"  {line}\n" in text for line in summaries)


def test_a_command_without_a_task_asks_for_one(capsys):
    assert end_of() == "2"
    assert capsys.readouterr().err.endswith("required: TASK\n")


@pytest.mark.parametrize("command", ["init", "compare"])
def test_a_folder_that_begins_with_a_dash_is_explained(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for made in (False, True):
        with pytest.raises(SystemExit):
            cli.main([command, "-folder"])
        error = capsys.readouterr().err
        assert "arguments are required" in error
        assert ("; -folder was taken for an option: write ./-folder" in error) == made
        Path("-folder").mkdir(exist_ok=True)


def test_version_is_that_of_the_package(capsys):
    assert end_of("--version") == "0" and capsys.readouterr().out == f"hf-accel {hf_accel.__version__}\n"


def test_an_interrupted_command_ends_without_a_traceback(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_accel.tasks.init.init", interrupted)
    with pytest.raises(SystemExit, match="Interrupted"):
        cli.main(["init", "photos"])


def test_env_prints_versions_devices_and_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cli.main(["env"])
    found = yaml.safe_load(text := capsys.readouterr().out)
    assert {"python", "torch", "hf-accel", "transformers", "accelerate"} <= found["versions"].keys()
    assert found["hardware"]["torch_threads"] >= 1 and "gpus" in found["hardware"] and "accelerate" in found
    assert found["variables"]["OMP_NUM_THREADS"] == "3" and "hf_secret" not in text


@pytest.mark.parametrize("task", TASKS)
def test_help_of_a_task_lists_its_keys_only(task, capsys):
    with pytest.raises(SystemExit):
        cli.main([task, "--help"])
    text = capsys.readouterr().out
    assert describe_keys(task) in text and RECIPES[task].summary() in text and "--num_processes" in text


@pytest.mark.parametrize("argv", [["--help"], ["pretrain", "--help"], ["list"], ["pretrain", "moco", "bacth_size=3"]])
def test_a_quick_answer_imports_no_torch(argv):
    code = "import runpy, sys; sys.argv = ['hf_accel', *sys.argv[1:]]\n"
    code += "import atexit; atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\n"
    code += "sys.modules['__main__'].__file__ = 'bin/hf-accel'; from hf_accel.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout.endswith("TORCH False\n"), done


# Launching


def test_options_of_the_launcher_go_to_accelerate(launched, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["pretrain", "moco", "--config_file", "ddp.yaml", "seed=1", "--num_processes=2", "knn_k=3"])
    assert end.value.code == 0 and not started
    (arguments,) = launched
    assert arguments.config_file == str(ROOT / "accelerate_configs/ddp.yaml") and arguments.num_processes == 2
    assert arguments.training_script == str(ROOT / "hf_accel/run.py")
    assert arguments.training_script_args == ["moco", "task=pretrain", "seed=1", "knn_k=3"]
    with pytest.raises(SystemExit):
        cli.main(["cost", "--num_cpu_threads_per_process", "3"])
    assert launched[1].num_cpu_threads_per_process == 3 and launched[1].training_script_args == ["task=cost"]
    assert "did you mean" in end_of("pretrain", "moco", "bacth_size=3", "--num_processes", "2") and len(launched) == 2


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        (["--num_processes", "2"], "cpu", "cpu_2proc.yaml"),
        (["--num_processes", "1"], "cpu", "cpu.yaml"),
        (["--num_cpu_threads_per_process", "1"], "cpu", "cpu.yaml"),
        (["--num_processes", "2"], "gpu", None),
        (["--num_processes", "2"], "configured", None),
    ],
)
def test_processes_on_a_cpu_get_its_configuration(options, device, expected, launched, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: device == "gpu")
    default = tmp_path / "default_config.yaml"  # what `accelerate config` writes
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(default))
    if device == "configured":
        default.write_text("distributed_type: MULTI_GPU")
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "moco", *options])
    assert launched[0].config_file == (expected and str(ROOT / "accelerate_configs" / expected))


@pytest.mark.parametrize(("code", "expected"), [(143, 143), (1, 1), (-9, 137)])
def test_the_exit_code_is_that_of_the_launched_run(code, expected, launched, monkeypatch):
    def fail(_):
        raise subprocess.CalledProcessError(code, ["run.py"])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert end_of("cost", "--num_processes", "1") == str(expected)


@pytest.mark.slow
def test_sigterm_lets_a_launched_run_save(tmp_path):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "run"
    data = image_folder(tmp_path / "images")
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(data), "output_dir": str(output), "budget": 10**6}))
    command = [*COMMAND, "pretrain", str(recipe), "--config_file", "cpu.yaml", "--num_processes", "1"]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint-*/run_state.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 143 and "SIGTERM has arrived: the run saves" in text, text
    steps = [json.loads(path.read_text()) for path in output.glob("checkpoint-*/run_state.json")]
    assert steps and not (output / "results.json").exists()


@pytest.mark.slow
def test_two_processes_start_through_the_command(tmp_path):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "run"
    data = image_folder(tmp_path / "images")
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(data), "output_dir": str(output)}))
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home")}
    command = [*COMMAND, "pretrain", str(recipe), "--num_processes", "2"]
    done = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        timeout=200,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert read(output / "results.json")["processes"] == 2
    text = done.stdout.decode()
    assert "not passed to `accelerate launch`" not in text and "FutureWarning" not in text, text


@pytest.mark.slow
def test_an_installed_wheel_trains_outside_of_the_repository(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("hf_accel", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = tmp_path / "wheels"
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    subprocess.run(build, check=True, timeout=200, cwd=tmp_path)
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=200, cwd=tmp_path)
    shutil.rmtree(source)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(target)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, target / "bin/hf-accel", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "cifar10/moco_cpu" in run("list")
    small = ["model_config.hidden_size=32", "objective_config.projector_hidden_size=32", "eval_points=[1.0]"]
    run("pretrain", "moco", "budget=4096", *small, "schedule=recipes/schedules/moco_digits_gain.yaml", "report_to=none")
    results = read(tmp_path / "runs/moco/results.json")
    assert results["budget"] == 4096 and len(results["schedule"]) > 1
    assert (tmp_path / "runs/moco/final/config.json").is_file()
