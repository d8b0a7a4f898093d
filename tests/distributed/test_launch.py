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
from hf_accel.recipe import PretrainRecipe, Recipe, RecipeError

VARIABLES = (
    *("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "WORLD_SIZE"),
    *("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DYNAMO_BACKEND"),
)
FSDP = {"ACCELERATE_USE_FSDP": "true"}
GPU, CPU = {"ACCELERATE_USE_CPU": "false"}, {"ACCELERATE_USE_CPU": "true"}


def recipe(**settings: Any) -> Recipe:
    return PretrainRecipe(budget=1000, **settings)


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
    ("variables", "precision", "reason"),
    [
        ({**CPU, "MASTER_ADDR": "127.0.0.1"}, "no", r"several processes and started one.*cpu_2proc"),
        ({**CPU}, "fp16", r"mixed_precision='fp16': a CPU has none.*bf16"),
        (
            {**CPU, **FSDP, "FSDP_VERSION": "2"},
            "no",
            r"FSDP on a CPU.*deepspeed_zero3_cpu_2proc",
        ),
        ({**GPU, **FSDP, "FSDP_VERSION": "1"}, "no", r"fsdp_version: 2"),
        ({**GPU, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "no", r"dynamo backend.*torch_compile=true"),
        ({**GPU, **FSDP}, "no", r"fsdp_version: 2"),
    ],
)
def test_a_launch_that_would_not_do_what_it_says_is_refused(launched, variables, precision, reason):
    launched(variables)
    with pytest.raises(RecipeError, match=reason):
        engine.check_launch(recipe(mixed_precision=precision))


def test_deepspeed_that_is_not_installed_is_named(launched, monkeypatch):
    launched({**GPU, "ACCELERATE_USE_DEEPSPEED": "true"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'hf-accel\[deepspeed\]'"):
        engine.check_launch(recipe())


@pytest.mark.parametrize(
    "variables",
    [
        {**CPU},
        {**CPU, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"},
        {**GPU, **FSDP, "FSDP_VERSION": "2"},
    ],
)
def test_what_is_sound_passes(launched, variables):
    launched(variables)
    engine.check_launch(recipe(mixed_precision="bf16"))


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
        ("no", "no", None, "no"),
        ("no", None, "bf16", "no"),
        ("bf16", "no", None, "bf16"),
        ("bf16", "bf16", None, "bf16"),
        ("no", "bf16", None, r"mixed_precision='no': accelerate was asked for bf16; name .* one"),
        ("bf16", "fp16", None, r"mixed_precision='bf16': accelerate was asked for fp16"),
        ("auto", "fp8", None, r"'fp8', which is not supported: take bf16"),
    ],
)
def test_recipe_launcher_run_and_device_decide_on_the_precision(
    launched, monkeypatch, recipes, launchers, until_now, expected, has_bf16
):
    launched({**GPU, **({"ACCELERATE_MIXED_PRECISION": launchers} if launchers else {})})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    of_run = recipe(mixed_precision=recipes)
    if " " in expected and expected != "by the device":
        with pytest.raises(RecipeError, match=expected):
            engine.settle_precision(of_run, until_now)
        return
    engine.settle_precision(of_run, until_now)
    device = "bf16" if has_bf16 else "no"
    assert of_run.mixed_precision == (device if expected == "by the device" else expected)
    engine.settle_precision(of_run)  # once settled it stays
    assert of_run.mixed_precision == (device if expected == "by the device" else expected)


def test_on_a_cpu_auto_is_fp32_or_what_the_launcher_names(launched, monkeypatch):
    launched({**CPU})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    for launchers, expected in {"no": "no", "bf16": "bf16"}.items():
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
        of_run = recipe()
        engine.settle_precision(of_run)
        assert of_run.mixed_precision == expected
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(RecipeError, match=r"mixed_precision='fp16': a CPU has none"):
        engine.settle_precision(recipe())


@pytest.mark.parametrize(
    ("recipes", "deepspeed", "expected"), [("bf16", "false", "bf16"), ("auto", "false", "no"), ("bf16", "true", "no")]
)
def test_accelerate_is_told_the_precision_that_was_settled(launched, monkeypatch, recipes, deepspeed, expected):
    launched({**CPU, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": deepspeed})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    engine.check_launch(recipe(mixed_precision=recipes))
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == expected


SEVERAL = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "8", "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({**SEVERAL}, "8 processes on GPUs"),  # ddp.yaml
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
    engine.check_launch(recipe())  # where there are some
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    if reason is None:
        engine.check_launch(recipe())
        return
    with pytest.raises(RecipeError, match=rf"{reason} .*torch finds no GPU here.*cpu\.yaml, or cpu_2proc"):
        engine.check_launch(recipe())


def test_the_files_for_several_processes_on_a_cpu_hide_gpus():
    for path in (Path(__file__).parents[2] / "accelerate_configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        hides = str(config.get("gpu_ids", "")).startswith("-1,")
        assert hides == (bool(config["use_cpu"]) and config["num_processes"] > 1), path.name


def test_the_first_line_describes_the_launch(launched):
    launched({**CPU})
    arguments: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    line = engine.describe_launch(arguments, recipe(mixed_precision="bf16"))
    assert line == f"Device: cpu; processes: 2; threads: {torch.get_num_threads()} each; precision: bf16 autocast"
    assert engine.describe_launch(arguments, recipe(mixed_precision="no")).endswith("precision: fp32")


def test_precision_is_the_arguments_or_under_deepspeed_autocast(launched):
    launched({**GPU})
    assert engine.autocast_arguments(recipe(mixed_precision="bf16")) == {"bf16": True, "fp16": False}
    launched({**GPU, "ACCELERATE_USE_DEEPSPEED": "true"})
    assert engine.autocast_arguments(recipe(mixed_precision="bf16")) == {}
    config = configured({"zero_optimization": {"stage": 3}}, mixed_precision="bf16")
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "torch_autocast" not in configured({}, mixed_precision="no")


def configured(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """DeepSpeed's configuration as it is after ours."""
    arguments: Any = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    engine.set_deepspeed(arguments, recipe(**settings))
    return config


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ({"bf16": {"enabled": True}}, {}, r"bf16 section.*mixed_precision: bf16"),
        ({"fp16": {"enabled": "true"}}, {}, r"fp16 section.*mixed_precision: bf16"),
        ({}, {"mixed_precision": "fp16"}, r"take bf16"),
        ({"optimizer": {"type": "AdamW"}}, {}, r"section 'optimizer': remove it"),
        (
            {"gradient_accumulation_steps": 4},
            {},
            r"gradient_accumulation_steps=4, and the recipe .*=1: remove",
        ),
        (
            {"gradient_clipping": 1.0},
            {"max_grad_norm": 3.0},
            r"gradient_clipping=1.0, and .* max_grad_norm=3.0",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, {}, r"section 'scheduler': remove it.*lr_schedule"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, {}, r"offload_param to nvme.*cpu"),
        ({"zero_optimization": {"stage": 3}}, {"torch_compile": True}, r"ZeRO-3.*ZeRO-2"),
    ],
)
def test_a_deepspeed_configuration_that_would_not_train_right_is_refused(config, settings, reason):
    with pytest.raises(RecipeError, match=reason):
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


def test_without_deepspeed_there_is_nothing_to_set():
    engine.set_deepspeed(SimpleNamespace(deepspeed_plugin=None), recipe(mixed_precision="fp16"))  # pyright: ignore
