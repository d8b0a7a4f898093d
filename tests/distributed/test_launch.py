"""What an engine cannot do right is refused before anything starts, with the reason and what to take instead."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from hf_accel.distributed import launch as engine
from hf_accel.utils.errors import SettingError

VARIABLES = (
    *("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "WORLD_SIZE", "RANK"),
    *("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DYNAMO_BACKEND"),
)
CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
FSDP = {"ACCELERATE_USE_FSDP": "true"}
GPU, CPU = {"ACCELERATE_USE_CPU": "false"}, {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def launched(monkeypatch):
    """As a launcher with these variables would, on a machine that has an accelerator."""

    def launch(variables: dict[str, str]) -> None:
        for name in (*VARIABLES, "ACCELERATE_MIXED_PRECISION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)

    return launch


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({**CPU, "MASTER_ADDR": "127.0.0.1"}, rf"accelerate started one.*--config_file {CONFIGS}/cpu_2proc\.yaml"),
        ({**CPU, **FSDP, "FSDP_VERSION": "2"}, rf"FSDP on a CPU.*{CONFIGS}/deepspeed_zero3_cpu_2proc"),
        ({**GPU, **FSDP, "FSDP_VERSION": "1"}, r"fsdp_version: 2"),
        ({**GPU, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"dynamo backend.*torch_compile=true"),
        ({**GPU, **FSDP}, r"fsdp_version: 2"),
        ({"WORLD_SIZE": "8"}, r"WORLD_SIZE=8 is set in the environment, without RANK and MASTER_ADDR: unset it"),
        ({"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_CPU": "true"}, r"WORLD_SIZE=2 .* without MASTER_ADDR: unset"),
    ],
)
def test_a_launch_that_would_not_do_what_it_says_is_refused(launched, variables, reason):
    launched(variables)
    with pytest.raises(SettingError, match=reason):
        engine.check_launch()


def test_deepspeed_that_is_not_installed_is_named(launched, monkeypatch):
    launched({**GPU, "ACCELERATE_USE_DEEPSPEED": "true"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match="pip install deepspeed ninja, or"):
        engine.check_launch()


@pytest.mark.parametrize(
    "variables",
    [
        {**CPU},
        {**CPU, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"},
        {**GPU, **FSDP, "FSDP_VERSION": "2"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_what_is_sound_passes(launched, variables):
    launched(variables)
    engine.check_launch()


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize(
    ("recipes", "launchers", "until_now", "expected"),
    [
        ("auto", None, None, "by the device"),
        ("auto", "no", None, "by the device"),  # what accelerate says where nothing was asked for
        ("auto", "bf16", None, "bf16"),
        ("auto", "fp16", "no", "fp16"),
        ("auto", None, "no", "no"),
        ("auto", "no", "bf16", "bf16"),
        ("no", None, "bf16", "no"),
        ("bf16", "no", None, "bf16"),
        ("bf16", "bf16", None, "bf16"),
        ("no", "bf16", None, r"mixed_precision='no': accelerate was asked for bf16; name .* one"),
        ("auto", "fp8", None, r"'fp8', which is not supported: take bf16"),
    ],
)
def test_recipe_launcher_run_and_device_decide_on_the_precision(
    launched, monkeypatch, recipes, launchers, until_now, expected, has_bf16
):
    launched({**GPU, **({"ACCELERATE_MIXED_PRECISION": launchers} if launchers else {})})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    if " " in expected and expected != "by the device":
        with pytest.raises(SettingError, match=expected):
            engine.choose_precision(recipes, until_now)
        return
    chosen = engine.choose_precision(recipes, until_now)
    assert chosen == (("bf16" if has_bf16 else "no") if expected == "by the device" else expected)
    assert engine.choose_precision(chosen) == chosen  # once chosen it stays


def test_on_a_cpu_auto_is_fp32_or_what_the_launcher_names(launched, monkeypatch):
    launched({**CPU})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    for launchers, expected in {"no": "no", "bf16": "bf16"}.items():
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
        assert engine.choose_precision("auto") == expected
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SettingError, match=r"mixed_precision='fp16': a CPU has none"):
        engine.choose_precision("auto")


@pytest.mark.parametrize(
    ("asked", "deepspeed", "expected"), [("bf16", "false", "bf16"), ("auto", "false", "no"), ("bf16", "true", "no")]
)
def test_accelerate_is_told_the_precision_that_was_settled(launched, monkeypatch, asked, deepspeed, expected):
    launched({**CPU, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": deepspeed})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    engine.choose_precision(asked)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == expected


SEVERAL = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "8", "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({**SEVERAL}, "8 processes on GPUs were"),  # ddp.yaml
        ({"MASTER_ADDR": "n1", "RANK": "0", "WORLD_SIZE": "8"}, r"8 processes on GPUs \(WORLD_SIZE=8\)"),  # by hand
        ({**SEVERAL, "ACCELERATE_USE_DEEPSPEED": "true"}, "8 processes on GPUs"),
        ({**GPU, "CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_MIXED_PRECISION": "no"}, "GPU 0"),  # single_gpu.yaml
        ({**SEVERAL, "CUDA_VISIBLE_DEVICES": "-1,-1"}, None),  # cpu_2proc.yaml
        ({**SEVERAL, **CPU}, None),
        ({**GPU, "ACCELERATE_MIXED_PRECISION": "no"}, None),  # a bare launch takes what is there
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        ({**CPU, "CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_MIXED_PRECISION": "no"}, None),  # cpu.yaml
    ],
)
def test_a_launch_on_gpus_that_are_not_there_is_refused(launched, monkeypatch, variables, reason):
    launched(variables)
    engine.check_launch()  # where there are some
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    if reason is None:
        engine.check_launch()
        return
    with pytest.raises(SettingError, match=rf"{reason} .*torch finds no GPU here.*cpu\.yaml, or cpu_2proc"):
        engine.check_launch()


def test_the_files_for_several_processes_on_a_cpu_hide_gpus():
    for path in (Path(__file__).parents[2] / "accelerate_configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        hides = str(config.get("gpu_ids", "")).startswith("-1,")
        assert hides == (bool(config["use_cpu"]) and config["num_processes"] > 1), path.name


def test_the_first_line_describes_the_launch(launched):
    launched({**CPU})
    arguments: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    line = engine.describe_launch(arguments, "bf16")
    assert line == f"Device: cpu; processes: 2; threads: {torch.get_num_threads()} each; precision: bf16 autocast"
    assert engine.describe_launch(arguments, "no").endswith("precision: fp32")


def test_precision_is_the_arguments_or_under_deepspeed_autocast(launched):
    launched({**GPU})
    assert engine.autocast_arguments("bf16") == {"bf16": True, "fp16": False}
    launched({**GPU, "ACCELERATE_USE_DEEPSPEED": "true"})
    assert engine.autocast_arguments("bf16") == {"bf16": False, "fp16": False}
    config = configured({"zero_optimization": {"stage": 3}}, precision="bf16")
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "torch_autocast" not in configured({})


def configured(config: dict[str, Any], precision: str = "no", compiled: bool = False, **settings: Any) -> dict:
    """DeepSpeed's configuration as it is after ours."""
    settings = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, **settings}
    arguments: Any = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config), **settings)
    engine._set_deepspeed(arguments, precision, compiled)
    return config


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ({"bf16": {"enabled": True}}, {}, r"bf16 section.*mixed_precision: bf16"),
        ({"fp16": {"enabled": "true"}}, {}, r"fp16 section.*mixed_precision: bf16"),
        ({}, {"precision": "fp16"}, r"take bf16"),
        ({"optimizer": {"type": "AdamW"}}, {}, r"section 'optimizer': remove it"),
        ({"gradient_accumulation_steps": 4}, {}, r"gradient_accumulation_steps=4, and the run .*=1: remove"),
        ({"gradient_clipping": 1.0}, {"max_grad_norm": 3.0}, r"gradient_clipping=1.0, and .* max_grad_norm=3.0"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, r"section 'scheduler': remove it.*lr_schedule"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, {}, r"offload_param to nvme.*cpu"),
        ({"zero_optimization": {"stage": 3}}, {"compiled": True}, r"ZeRO-3.*ZeRO-2"),
    ],
)
def test_a_deepspeed_configuration_that_would_not_train_right_is_refused(config, settings, reason):
    with pytest.raises(SettingError, match=reason):
        configured(config, **settings)


LEFT_ALONE = """
import signal, sys, time
from hf_accel.distributed.launch import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("stopped", flush=True)))
end_with_launcher()
print("started", flush=True)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])  # whole runs of several: test_engines.py
def test_a_process_stops_or_ends_when_its_launcher_is_gone(several):
    launcher = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", LEFT_ALONE]
    given = {"ACCELERATE_MIXED_PRECISION": "no", **({"TORCHELASTIC_RUN_ID": "none"} if several else {})}
    environment = {name: value for name, value in os.environ.items() if name not in given} | given
    root = Path(__file__).parents[2]
    process = subprocess.Popen(launcher, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "started\n"
    process.kill()
    assert process.communicate(timeout=300)[0] == ("" if several else "stopped\n")


def test_what_deepspeed_has_taken_from_the_recipe_passes():
    configured(
        {"gradient_accumulation_steps": 2, "gradient_clipping": 1.0}, gradient_accumulation_steps=2, max_grad_norm=1.0
    )
    configured({"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"})


@pytest.mark.parametrize(
    ("threads", "launched", "processes", "expected"),
    [
        (None, False, 1, 6),
        (None, False, 2, 3),
        ("1", True, 1, 6),
        ("1", False, 1, 5),
        ("4", True, 1, 5),
        (None, True, 9, 1),
    ],
    ids=["unset", "shared", "set by accelerate", "set by the user", "set by the user of accelerate", "more than cores"],
)
def test_a_bare_launch_uses_all_cores_and_a_choice_is_kept(monkeypatch, threads, launched, processes, expected):
    given = [5]  # what torch made of OMP_NUM_THREADS
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for name, value in (("OMP_NUM_THREADS", threads), ("ACCELERATE_MIXED_PRECISION", "no" if launched else None)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine, "_launcher_variable", lambda name: None)
    engine._set_threads(processes)
    assert given[-1] == expected


LAUNCHER = """
import os, subprocess, sys
os.environ["OMP_NUM_THREADS"] = "1"  # as accelerate sets it for its processes
sys.exit(subprocess.call([sys.executable, "-c", sys.argv[1]]))
"""
PRINT_THREADS = "import hf_accel.distributed.launch as l, torch; l._set_threads(1); print(torch.get_num_threads())"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux shows a process's environment")
@pytest.mark.parametrize("threads", [None, "1"])
def test_threads_are_those_that_the_launchers_user_chose(threads):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"ACCELERATE_MIXED_PRECISION": "no", **({"OMP_NUM_THREADS": threads} if threads else {})}
    command = [sys.executable, "-c", LAUNCHER, PRINT_THREADS]
    printed = subprocess.check_output(command, cwd=Path(__file__).parents[2], env=environment, text=True)
    assert int(printed) == (1 if threads else os.cpu_count())


def test_trackers_that_are_not_there_are_named():
    def arguments(names: list[str]) -> Any:
        return SimpleNamespace(report_to=names)

    engine._check_trackers(arguments(["tensorboard"]))
    engine._check_trackers(arguments([]))
    with pytest.raises(SettingError, match=r"report_to=\['tensorbord'\]: .*only .*tensorboard"):
        engine._check_trackers(arguments(["tensorbord"]))
    with pytest.raises(SettingError, match=r"report_to=\['swanlab'\]: .*swanlab"):
        engine._check_trackers(arguments(["swanlab"]))
