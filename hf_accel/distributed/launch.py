"""What `accelerate launch` chose to run a recipe under, checked, and set as the recipe needs it.

Weights, optimizer states, momentum branches and centres stay in fp32 under every engine; `mixed_precision` is autocast.
"""

import importlib.util
import os
import signal
import threading
import time
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from ..recipe import Recipe, RecipeError
from .signals import launcher_ended

PRECISIONS = ("no", "bf16", "fp16")

SETTINGS_OF_DEEPSPEED = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""What DeepSpeed's configuration can say as well, by the recipe's key."""


def check_launch(recipe: Recipe) -> None:
    """Before anything is set up.

    Raises:
        RecipeError: an engine or precision that would not do what it was asked for, with what to take instead.
    """
    environment = os.environ
    settle_precision(recipe)
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise RecipeError(
            "accelerate was asked for several processes and started one, as it does with --cpu --num_processes N: "
            "launch with --config_file accelerate_configs/cpu_2proc.yaml --num_processes N"
        )
    if _is_on("ACCELERATE_USE_FSDP"):
        if on_cpu():
            raise RecipeError(
                "FSDP on a CPU: accelerate would run plain data parallel training instead; "
                "take accelerate_configs/deepspeed_zero3_cpu_2proc.yaml, or cpu_2proc.yaml"
            )
        if environment.get("FSDP_VERSION", "1") != "2":
            raise RecipeError(
                "FSDP 1 flattens weights, and a momentum branch could not follow: set fsdp_version: 2, as in "
                "accelerate_configs/fsdp2.yaml"
            )
    _check_gpus()
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise RecipeError(
            "accelerate was asked for a dynamo backend: it would compile the random draws of a step, too; leave it out "
            "and set torch_compile=true in the recipe"
        )
    if _is_on("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError("DeepSpeed is not installed: pip install 'hf-accel[deepspeed]', or launch with ddp.yaml")
    if "ACCELERATE_MIXED_PRECISION" in environment:
        deepspeed = _is_on("ACCELERATE_USE_DEEPSPEED")
        environment["ACCELERATE_MIXED_PRECISION"] = "no" if deepspeed else recipe.mixed_precision


def settle_precision(recipe: Recipe, until_now: str | None = None) -> None:
    """Give `mixed_precision: auto` its meaning for this launch.

    That is what the launcher names, else what the run was begun with, else bf16 on a GPU that has it, else fp32. A
    launcher's "no" names nothing: accelerate passes it on wherever no precision was asked for.

    Args:
        until_now: the precision of the run that goes on, if one does.

    Raises:
        RecipeError: recipe and launcher name different ones, or it is one that this device does not have.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    named = None if asked == "no" else asked
    if named not in (None, "bf16", "fp16"):
        raise RecipeError(f"accelerate was asked for mixed precision {named!r}, which is not supported: take bf16")
    if recipe.mixed_precision == "auto":
        begun = until_now if until_now in PRECISIONS else None
        recipe.mixed_precision = named or begun or ("bf16" if _has_bf16() else "no")  # pyright: ignore
    elif named and named != recipe.mixed_precision:
        raise RecipeError(
            f"mixed_precision={recipe.mixed_precision!r}: accelerate was asked for {named}; name the precision in one "
            "place only, or the same one in both"
        )
    if recipe.mixed_precision == "fp16" and on_cpu():
        raise RecipeError("mixed_precision='fp16': a CPU has none, and accelerate would run in fp32; take bf16 or no")


def _has_bf16() -> bool:
    """Whether the run is on a GPU that computes in bf16 and does not only imitate it."""
    return not on_cpu() and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _check_gpus() -> None:
    """Raises RecipeError if the launcher was asked for GPUs and there are none: the run would be on the CPU instead."""
    if torch.accelerator.is_available() or _is_on("ACCELERATE_USE_CPU"):
        return
    processes, visible = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible or visible.startswith("-1")):  # GPUs are hidden, so the CPU is meant
        return
    if processes > 1:
        asked = f"{processes} processes on GPUs"
    elif visible and _is_launched():
        asked = f"GPU {visible}"
    else:
        return
    raise RecipeError(
        f"{asked} were asked for, and torch finds no GPU here: this would train on the CPU. Launch with --config_file "
        "accelerate_configs/cpu.yaml, or cpu_2proc.yaml for several processes (ACCELERATE_USE_CPU=true says so, too)"
    )


def describe_launch(arguments: TrainingArguments, recipe: Recipe) -> str:
    """Device, processes, threads and precision of a run, in a line."""
    device = arguments.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    precision = {"no": "fp32"}.get(recipe.mixed_precision, f"{recipe.mixed_precision} autocast")
    threads = torch.get_num_threads()
    return f"Device: {name}; processes: {arguments.world_size}; threads: {threads} each; precision: {precision}"


def end_with_launcher() -> None:
    """Where a launcher started this process, see to it that it does not go on alone once the launcher is gone.

    torch's, which several processes have, hands SIGTERM and SIGINT on and waits: it is gone only if it was killed, and
    so are its processes then, before the run is launched again. That of one process just dies of SIGTERM; its process
    then stops at a checkpoint or, where it trains nothing, ends.
    """
    if not _is_launched():
        return
    parent, several = os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if several or not launcher_ended():
            number = signal.SIGKILL if several else signal.SIGTERM
            signal.pthread_kill(threading.main_thread().ident or 0, number)  # wakes it, whatever it waits for

    threading.Thread(target=watch, daemon=True).start()


def _is_launched() -> bool:
    """Whether accelerate or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def on_cpu() -> bool:
    """Whether the launcher asks for the CPU, or there is nothing else."""
    return _is_on("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def shards_weights() -> bool:
    """Whether the launcher asks for an engine that may keep weights in shards."""
    return _is_on("ACCELERATE_USE_DEEPSPEED") or _is_on("ACCELERATE_USE_FSDP")


def autocast_arguments(recipe: Recipe) -> dict[str, Any]:
    """For `TrainingArguments`. DeepSpeed would hold weights in `bf16`; it gets autocast from `set_deepspeed`."""
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return {}
    precision = recipe.precision()
    return {"bf16": precision == torch.bfloat16, "fp16": precision == torch.float16}


def set_deepspeed(arguments: TrainingArguments, recipe: Recipe) -> None:
    """Complete DeepSpeed's configuration, if there is one.

    Raises:
        RecipeError: the configuration asks for what would not train as the recipe says.
    """
    plugin: Any = arguments.deepspeed_plugin
    if plugin is None:
        return
    config: dict[str, Any] = plugin.deepspeed_config
    zero = config.setdefault("zero_optimization", {})
    if recipe.mixed_precision == "fp16":
        raise RecipeError("mixed_precision='fp16' under DeepSpeed is not supported: take bf16")
    for name in ("bf16", "fp16"):
        if str(config.get(name, {}).get("enabled", False)).lower() == "true":
            raise RecipeError(
                f"DeepSpeed's {name} section keeps weights in {name}, in which a momentum branch stands still: "
                "remove it and set mixed_precision: bf16 in the recipe, which is autocast"
            )
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise RecipeError(
                f"DeepSpeed's configuration has a section {name!r}: remove it; the recipe's keys learning_rate, "
                "lr_schedule, warmup and weight_decay are what is followed"
            )
    for name, key in SETTINGS_OF_DEEPSPEED.items():
        if config.get(name, "auto") not in ("auto", getattr(recipe, key)):
            raise RecipeError(
                f"DeepSpeed's configuration has {name}={config[name]}, and the recipe {key}={getattr(recipe, key)}: "
                "remove it there; the recipe is what is followed"
            )
    for name in ("offload_param", "offload_optimizer"):
        if zero.get(name, {}).get("device", "none") == "nvme":
            raise RecipeError(f"DeepSpeed's {name} to nvme: a momentum branch is out of reach there; take cpu")
    if zero.get("stage") == 3 and recipe.torch_compile:
        raise RecipeError("torch_compile=true under ZeRO-3: the engine's own hooks break every graph; take ZeRO-2")
    if recipe.mixed_precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    zero["stage3_gather_16bit_weights_on_model_save"] = True  # else checkpoints hold no weights that others can open
    config["zero_force_ds_cpu_optimizer"] = False  # offloaded states, too, are torch's AdamW


def engine_of(accelerator: Any) -> str:
    """In words, what the optimizer's state in a checkpoint depends on: another engine finds none in it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return f"{accelerator.num_processes} processes of DeepSpeed ZeRO-{stage}"
    return "FSDP" if accelerator.distributed_type == DistributedType.FSDP else "a single process or data parallel"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")
