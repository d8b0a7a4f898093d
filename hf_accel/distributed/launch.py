"""Check the choices of `accelerate launch` before training, and set up processes, threads and DeepSpeed.

Weights, optimizer states, momentum branches and centres stay in fp32 under every engine; `mixed_precision` is autocast.
"""

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ..utils.errors import SettingError, fail
from ..utils.shipped import find_file
from .collectives import say
from .signals import launcher_ended

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype in which autocast computes, by the name of the precision."""


MEETING = ("RANK", "MASTER_ADDR")
"""What the processes of a launch need to find each other, besides WORLD_SIZE."""


def check_launch() -> None:
    """Check the launcher's choices before any process connects.

    Raises:
        SettingError: the engine would not do what it is asked for; the message says what to take instead.
    """
    environment = os.environ
    _refuse_stray_variables()
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise SettingError(
            "several processes were asked for and accelerate started one, as it does on a CPU without a configuration "
            f"for it: launch with --config_file {_shipped('cpu_2proc.yaml')} --num_processes N"
        )
    if _is_on("ACCELERATE_USE_FSDP"):
        if on_cpu():
            raise SettingError(
                "FSDP on a CPU: accelerate would run plain data parallel training instead; "
                f"launch with --config_file {_shipped('deepspeed_zero3_cpu_2proc.yaml')}, or with cpu_2proc.yaml there"
            )
        if environment.get("FSDP_VERSION", "1") != "2":
            raise SettingError(
                "FSDP 1 flattens weights, and a momentum branch could not follow: set fsdp_version: 2, as in "
                f"{_shipped('fsdp2.yaml')}"
            )
    _check_gpus()
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise SettingError(
            "accelerate was asked for a dynamo backend: it would compile the random draws of a step, too; leave it out "
            "and set torch_compile=true in the recipe"
        )
    if _is_on("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise SettingError("DeepSpeed is not installed: pip install deepspeed ninja, or launch with ddp.yaml")


def choose_precision(asked: str, begun: str | None = None, given: tuple[str, Any] | None = None) -> str:
    """Choose the precision of a launch: "no" (fp32), "bf16" or "fp16".

    "auto" takes the launcher's precision, else that of the resumed run, else bf16 on a GPU that has it, else fp32. A
    launcher's "no" counts as none, because accelerate passes it on if no precision was asked for.

    Args:
        asked: the setting, "auto" or a key of DTYPES.
        begun: the precision of the run that is resumed, if there is one.
        given: name and value of the setting, for messages. Default: mixed_precision.

    Raises:
        SettingError: the setting and the launcher name different precisions, or the device does not have this one.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    named = None if launched == "no" else launched
    if named not in (None, "bf16", "fp16"):
        raise SettingError(f"accelerate was asked for mixed precision {named!r}, which is not supported: take bf16")
    if asked == "auto":
        precision = named or (begun if begun in DTYPES else None) or ("bf16" if has_bf16() else "no")
    elif named and named != asked:
        fail(
            *(given or ("mixed_precision", asked)),
            f"accelerate was asked for {named}; name the precision in one place only, or the same one in both",
        )
    else:
        precision = asked
    if precision == "fp16" and on_cpu():
        problem = "a CPU has none, and accelerate would run in fp32; take bf16 or no autocast"
        fail(*(given or ("mixed_precision", "fp16")), problem)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if _is_on("ACCELERATE_USE_DEEPSPEED") else precision
    return precision


def has_bf16() -> bool:
    """Return whether the run is on a GPU that computes in bf16 without emulation."""
    return not on_cpu() and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _refuse_stray_variables() -> None:
    """Raise SettingError if WORLD_SIZE stands for several processes and nothing has started them."""
    processes, missing = os.environ.get("WORLD_SIZE", "1"), [name for name in MEETING if name not in os.environ]
    if processes != "1" and missing and not _is_launched():
        raise SettingError(
            f"WORLD_SIZE={processes} is set in the environment, without {' and '.join(missing)}: unset it (env -u "
            "WORLD_SIZE hf-accel ...) to run one process, or launch several with accelerate (--num_processes N)"
        )


def _check_gpus() -> None:
    """Raise SettingError if the launcher was asked for GPUs and there are none, as the run would be on the CPU."""
    if torch.accelerator.is_available() or _is_on("ACCELERATE_USE_CPU"):
        return
    processes, visible = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible or visible.startswith("-1")):  # GPUs are hidden, so the CPU is meant
        return
    if processes > 1:
        asked = f"{processes} processes on GPUs" + ("" if _is_launched() else f" (WORLD_SIZE={processes})")
    elif visible and _is_launched():
        asked = f"GPU {visible}"
    else:
        return
    raise SettingError(
        f"{asked} were asked for, and torch finds no GPU here: this would train on the CPU. Launch with --config_file "
        f"{_shipped('cpu.yaml')}, or cpu_2proc.yaml there for several processes (ACCELERATE_USE_CPU=true says so, too)"
    )


def start_processes(arguments: TrainingArguments, precision: str, compiled: bool = False) -> None:
    """Call `connect_processes`, and print the device, the processes and the precision of the run."""
    connect_processes(arguments, precision, compiled)
    say(describe_launch(arguments, precision))


def connect_processes(arguments: TrainingArguments, precision: str, compiled: bool = False) -> None:
    """Connect the processes, and set their threads and random state.

    Args:
        precision: what `choose_precision` has returned.
        compiled: whether the model is compiled.

    Raises:
        SettingError: not all processes take part, DeepSpeed's configuration contradicts the run's settings, or a
            tracker is missing.
    """
    _check_trackers(arguments)
    _ = arguments.device  # This starts the process group.
    arguments._n_gpu = min(arguments._n_gpu, 1)  # Several GPUs need several processes, by accelerate launch.
    started = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.world_size != started:
        raise SettingError(f"{started} processes were started but {arguments.world_size} take part")
    _set_deepspeed(arguments, precision, compiled)
    if arguments.device.type == "cpu":
        _set_threads(started)
    set_seed(arguments.seed)


def _check_trackers(arguments: TrainingArguments) -> None:
    """Raise SettingError if the Trainer does not know a tracker or does not find its package."""
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise SettingError(f"report_to={arguments.report_to!r}: {error}") from None


def _set_threads(processes: int) -> None:
    """Share the cores among the processes, unless OMP_NUM_THREADS says otherwise.

    `accelerate launch` sets OMP_NUM_THREADS to 1 if it is not told a number of threads. Only the environment of the
    launcher itself, which only Linux lets other processes read, shows whether the user had set 1.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen == "1" and _is_launched():
        chosen = _launcher_variable("OMP_NUM_THREADS")
    if chosen is None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _launcher_variable(name: str) -> str | None:
    """Return a variable of the launcher's environment, or None if it is unset or cannot be read."""
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{name}=")), None)


def describe_launch(arguments: TrainingArguments, precision: str) -> str:
    """Describe device, processes, threads and precision in one line."""
    device = arguments.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    computed = "fp32" if precision == "no" else f"{precision} autocast"
    threads = torch.get_num_threads()
    return f"Device: {name}; processes: {arguments.world_size}; threads: {threads} each; precision: {computed}"


def end_with_launcher() -> None:
    """End this process soon after the launcher that started it, if there is one.

    torch's launcher, which starts several processes, passes SIGTERM and SIGINT on and waits for them. If it is gone, it
    was killed, so its processes are killed before the run is launched again. The launcher of a single process ends at a
    SIGTERM without passing it on. Its process then stops at a checkpoint, or ends if no training is running.
    """
    if not _is_launched():
        return
    parent, several = os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if several or not launcher_ended():
            number = signal.SIGKILL if several else signal.SIGTERM
            signal.pthread_kill(threading.main_thread().ident or 0, number)  # it also interrupts a wait

    threading.Thread(target=watch, daemon=True).start()


def _is_launched() -> bool:
    """Return whether accelerate or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def on_cpu() -> bool:
    """Return whether the launcher asks for the CPU, or there is no other device."""
    return _is_on("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def shards_weights() -> bool:
    """Return whether the launcher asks for an engine that may shard the weights."""
    return _is_on("ACCELERATE_USE_DEEPSPEED") or _is_on("ACCELERATE_USE_FSDP")


def autocast_arguments(precision: str) -> dict[str, Any]:
    """Return `TrainingArguments`' bf16 and fp16. With bf16 DeepSpeed would store weights in it, so it gets neither.

    `connect_processes` turns DeepSpeed's own autocast on.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return {"bf16": False, "fp16": False}
    return {"bf16": precision == "bf16", "fp16": precision == "fp16"}


def _set_deepspeed(arguments: TrainingArguments, precision: str, compiled: bool) -> None:
    """Complete DeepSpeed's configuration, if there is one.

    Raises:
        SettingError: with this configuration, training would not follow the run's settings.
    """
    plugin: Any = arguments.deepspeed_plugin
    if plugin is None:
        return
    config: dict[str, Any] = plugin.deepspeed_config
    zero = config.setdefault("zero_optimization", {})
    if precision == "fp16":
        raise SettingError("mixed_precision='fp16' under DeepSpeed is not supported: take bf16")
    for name in ("bf16", "fp16"):
        if str(config.get(name, {}).get("enabled", False)).lower() == "true":
            raise SettingError(
                f"DeepSpeed's {name} section keeps weights in {name}, in which a momentum branch stands still: "
                "remove it and set mixed_precision: bf16 in the recipe (bf16=True in Python), which is autocast"
            )
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise SettingError(
                f"DeepSpeed's configuration has a section {name!r}: remove it; learning_rate, lr_schedule, warmup and "
                "weight_decay are followed"
            )
    shared = {"gradient_accumulation_steps": "gradient_accumulation_steps", "gradient_clipping": "max_grad_norm"}
    for name, ours in shared.items():
        if config.get(name, "auto") not in ("auto", getattr(arguments, ours)):
            raise SettingError(
                f"DeepSpeed's configuration has {name}={config[name]}, and the run {ours}={getattr(arguments, ours)}: "
                "remove it from DeepSpeed's configuration"
            )
    for name in ("offload_param", "offload_optimizer"):
        if zero.get(name, {}).get("device", "none") == "nvme":
            raise SettingError(f"DeepSpeed's {name} to nvme: a momentum branch is out of reach there; take cpu")
    if zero.get("stage") == 3 and compiled:
        raise SettingError("torch_compile=true under ZeRO-3: the engine's own hooks break every graph; take ZeRO-2")
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    zero["stage3_gather_16bit_weights_on_model_save"] = True  # otherwise checkpoints have no weights to open
    config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW steps offloaded states, too


def engine_of(accelerator: Any) -> str:
    """Describe the engine in words. A checkpoint's optimizer state can only be loaded under the same engine."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return f"{accelerator.num_processes} processes of DeepSpeed ZeRO-{stage}"
    return "FSDP" if accelerator.distributed_type == DistributedType.FSDP else "a single process or data parallel"


def _shipped(name: str) -> Path:
    """Return the path of a shipped configuration of accelerate, which exists wherever the package is installed."""
    return find_file(name, "accelerate_configs")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")
