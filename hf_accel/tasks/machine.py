"""The checks of `hf-accel doctor` that need no recipe: packages, devices, memory, disks and the launcher's settings."""

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.utils._triton import has_triton

from ..data.workers import REMEDY, SHARED_MEMORY, cores_of_process
from ..distributed.launch import check_launch, choose_precision, has_bf16, on_cpu
from ..report.origin import find_version
from ..utils.errors import SettingError
from .env import read_accelerate_config

LEAST_SHARED, LEAST_DISK = 1e9, 5e9
"""Free bytes of shared memory, and of a disk, below which a warning comes."""


class Check(NamedTuple):
    """What was looked at, how it stands, what was found and, unless that is good, what to do."""

    subject: str
    state: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<8} {self.subject}: {self.found}" + (f". {self.advice}" if self.advice else "")
        return line.replace("\n", " ")


def check_machine() -> Iterator[Check]:
    """Check the installation and its machine."""
    yield check_packages()
    yield check_gpu()
    yield check_bf16()
    yield check_compiler()
    yield check_threads()
    yield check_shared_memory()
    yield check_cache(Path(constants.HF_HOME))
    yield from check_launcher()


def check_packages() -> Check:
    """Compare Python and the packages with the requirements that the installed package states."""
    try:
        stated, python = metadata.requires("hf-accel") or [], metadata.metadata("hf-accel")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return Check("packages", "warning", "hf-accel is not installed", "In the clone: pip install -e .")
    if not SpecifierSet(python).contains(version := platform.python_version()):
        return Check("packages", "failed", f"Python {version}, and {python} is needed", "Install into a newer Python")
    needed = [requirement for requirement in map(Requirement, stated) if _is_needed(requirement)]
    versions = {requirement: find_version(requirement.name) for requirement in needed}
    wrong = {need: found for need, found in versions.items() if not (found and need.specifier.contains(found, True))}
    if wrong:
        found = ", ".join(f"{need.name} {version or 'is missing'}" for need, version in wrong.items())
        return Check("packages", "failed", found, "pip install " + " ".join(f"'{need}'" for need in wrong))
    return Check("packages", "ok", f"Python {version} and {len(needed)} packages as required")


def _is_needed(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def list_gpus() -> list[str]:
    """Name the GPUs that NVIDIA's driver finds."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]


def check_gpu() -> Check:
    """See whether torch can use the GPUs that are there."""
    if torch.accelerator.is_available():
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.accelerator.current_accelerator()
        return Check("device", "ok", f"{torch.accelerator.device_count()} x {name}")
    if not list_gpus():
        return Check("device", "ok", "cpu; there is no GPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (not hidden or hidden.startswith("-1")):
        return Check("device", "warning", f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU", "Unset it to use the GPU")
    version = str(torch.__version__).partition("+")[0]
    if torch.version.cuda is None:
        advice = f"pip uninstall -y torch, then pip install torch=={version}"
        return Check("device", "failed", "there is a GPU, and torch is its CPU build", advice)
    problem = f"there is a GPU, and torch {torch.__version__} for CUDA {torch.version.cuda} cannot use it"
    return Check("device", "failed", problem, "Update NVIDIA's driver, and see what nvidia-smi reports")


def check_bf16() -> Check:
    """See whether runs compute in bf16 by default."""
    if on_cpu():
        return Check("precision", "ok", "fp32, as by default on a CPU")
    if has_bf16():
        return Check("precision", "ok", "bf16")
    advice = "mixed_precision=fp16 is faster, and may diverge"
    return Check("precision", "warning", "this GPU has no bf16, so runs compute in fp32", advice)


def check_compiler() -> Check:
    """See whether torch.compile has what it generates code for: Triton on a GPU, a C++ compiler on a CPU."""
    advice = "Views are made operation by operation, and torch_compile=true fails. Install "
    if torch.cuda.is_available():
        if has_triton():
            return Check("compiler", "ok", "Triton")
        return Check("compiler", "warning", "torch finds no Triton for this GPU", advice + "it: pip install triton")
    try:
        return Check("compiler", "ok", get_cpp_compiler())
    except Exception as error:  # torch has an error of its own for each system
        return Check("compiler", "warning", " ".join(str(error).split()), advice + "g++: apt install g++")


def check_threads() -> Check:
    """Compare OMP_NUM_THREADS with the cores that this process may use."""
    asked, cores = os.environ.get("OMP_NUM_THREADS"), cores_of_process()
    if asked is None:
        return Check("threads", "ok", f"{cores} cores, and OMP_NUM_THREADS is not set")
    found = f"OMP_NUM_THREADS={asked}, and {cores} cores"
    if not asked.isdigit() or not 0 < int(asked) <= cores:
        return Check("threads", "warning", found, "Unset it, or set it to the number of cores at most")
    if on_cpu() and 2 * int(asked) <= cores:
        return Check("threads", "warning", found, "A run on the CPU leaves the other cores idle. Unset it to use all")
    return Check("threads", "ok", found)


def check_shared_memory() -> Check:
    """See whether the processes that decode images have room for their batches."""
    if not SHARED_MEMORY.exists():
        return Check("shared memory", "ok", f"this system has no {SHARED_MEMORY}")
    free = shutil.disk_usage(SHARED_MEMORY).free
    found = f"{free / 1e9:.2f} GB free in {SHARED_MEMORY}"
    return (
        Check("shared memory", "ok", found)
        if free >= LEAST_SHARED
        else Check("shared memory", "warning", found, REMEDY)
    )


def existing_part(path: Path) -> Path:
    """Return the folder itself, or the nearest one above that exists."""
    path = path.expanduser().resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_disk(subject: str, folder: Path, needed: float = 0.0) -> Check:
    """Compare the room in a folder with the bytes that are needed, or with a round number."""
    free = shutil.disk_usage(existing_part(folder)).free
    found = f"{free / 1e9:.1f} GB free for {folder}"
    if free < needed:
        more = f"Make room: {needed / 1e9:.1f} GB are needed"
        return Check(subject, "failed", found, f"{more}, fewer with a lower save_total_limit")
    if free < LEAST_DISK:
        return Check(subject, "warning", found, "Make room, or choose a folder on another disk")
    return Check(subject, "ok", found)


def find_refusal(folder: Path) -> str | None:
    """Return why no file can be written in a folder, or where it will be created. Nothing stays there."""
    there = existing_part(folder)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return f"nothing can be written in {there}: {error.strerror or error}"
    return None


def check_writing(folder: Path) -> Check:
    """See whether the files of a run can be written."""
    if problem := find_refusal(folder):
        return Check("output_dir", "failed", problem, "Choose another output_dir, or change the folder's permissions")
    return Check("output_dir", "ok", f"{folder} can be written")


def check_cache(folder: Path) -> Check:
    """See whether models and datasets of the Hub can be stored."""
    subject, advice = "cache of Hugging Face", "To download from the Hub, set HF_HOME to a folder that can be written"
    if problem := find_refusal(folder):
        return Check(subject, "warning", problem, advice)
    return check_disk(subject, folder)


def check_launcher() -> Iterator[Check]:
    """Check what `accelerate launch` takes for granted, by the checks of a run itself."""
    try:
        config = read_accelerate_config()
    except Exception as error:
        problem = f"its default configuration cannot be read: {' '.join(str(error).split())}"
        yield Check("accelerate", "failed", problem, "Run accelerate config, or remove the file")
        return
    name = config.get("distributed_type", "NO") if config else "no default configuration"
    try:
        with launched_as(config):
            check_launch()
            choose_precision("auto")
    except SettingError as error:
        advice = "Or run accelerate config again" if config else "Or unset its variables in the environment"
        yield Check("accelerate", "failed", str(error), advice)
        return
    yield Check("accelerate", "ok", name if not config else f"default configuration {name}")
    if "DEEPSPEED" in (name, "DEEPSPEED" * ("ACCELERATE_USE_DEEPSPEED" in os.environ)):
        missing = [program for program in ("g++", "ninja") if shutil.which(program) is None]
        if missing:
            lack = f"{' and '.join(missing)} not found, with which it compiles its operations"
            yield Check("DeepSpeed", "failed", lack, "apt install g++, pip install ninja")
        else:
            yield Check("DeepSpeed", "ok", f"version {find_version('deepspeed')}, g++ and ninja")


@contextmanager
def launched_as(config: Mapping[str, Any]) -> Iterator[None]:
    """Within it, the environment is that of a process which accelerate has started by a configuration."""
    kind, fsdp = config.get("distributed_type", "NO"), config.get("fsdp_config") or {}
    variables = {
        "ACCELERATE_USE_CPU": config.get("use_cpu", False),
        "ACCELERATE_USE_FSDP": kind == "FSDP",
        "ACCELERATE_USE_DEEPSPEED": kind == "DEEPSPEED",
        "ACCELERATE_MIXED_PRECISION": config.get("mixed_precision", "no"),
        "ACCELERATE_DYNAMO_BACKEND": (config.get("dynamo_config") or {}).get("dynamo_backend", "no"),
        "FSDP_VERSION": fsdp.get("fsdp_version", 1),
        "WORLD_SIZE": config.get("num_processes", 1),
    }
    before = dict(os.environ)
    if config:
        os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
