"""Where a result comes from: images, command, versions, commit and hardware."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..data import ImageSource
from ..data.labels import UNLABELLED
from ..utils.redact import without_local_paths

PACKAGES = ("hf-accel", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "numpy")

DOCUMENTS = (":(top,exclude)docs", ":(top,exclude)*.md")
"""What of the repository no run reads, as git's path patterns."""

MOST_NAMED = 100
"""The number of unreadable images of a split that results.json names."""


def describe_data(data: str | None, source: ImageSource, validation: ImageSource | None) -> dict[str, Any]:
    """Return what results.json says about the images, without paths of this machine.

    Args:
        data: "bundled", a Hub id, or the path of a folder; None for a dataset that was made in Python.
    """
    local = Path(data or "").expanduser()
    parts = [source] if validation is None else [source, validation]
    is_on_hub = data not in (None, "bundled") and not local.exists()
    made = "a dataset made in Python" + (f" ({source.made_of})" if source.made_of else "")
    name = {"bundled": "bundled digits", None: made}.get(data, local.resolve().name)
    return {
        "name": data if is_on_hub else name,
        "is_on_hub": is_on_hub,
        "images": len(source),
        "train_split": source.name.rpartition("/")[2],
        "validation_images": None if validation is None else len(validation),
        "validation_split": None if validation is None else validation.name.rpartition("/")[2],
        "classes": source.num_classes,
        "labels": source.labels_from,
        "labelled_images": 0 if source.labels is None else int((source.labels != UNLABELLED).sum()),
        "unreadable_images": len(source.bad),
        "unreadable_validation_images": None if validation is None else len(validation.bad),
        "unreadable": [
            {"image": _name_inside(local, name), "reason": without_local_paths(reason)}
            for part in parts
            for name, reason in list(part.bad.values())[:MOST_NAMED]
        ],
    }


def _name_inside(folder: Path, name: str) -> str:
    """Return the name of an image without the path of its folder, or any other path of this machine."""
    for start in (folder.resolve(), folder):
        if Path(name).is_relative_to(start):
            return Path(name).relative_to(start).as_posix()
    return without_local_paths(name)


def environment() -> dict[str, Any]:
    """Return the command, the versions, the git commit of the source (with "dirty") and the hardware.

    Entries that cannot be found are None, such as the commit of an installed wheel.
    """
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # with its build, which the package's metadata may lack
            **{name: find_version(name) for name in PACKAGES},
        },
        **_git(Path(__file__).parent),
        "hardware": {
            "platform": platform.platform(),
            "cpu": _cpu_name(),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        },
    }


def find_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any]:
    """Return {"commit", "dirty"} of the repository that tracks this file, not of one around a virtual environment.

    Changes of documents do not make it dirty: a benchmark writes its tables into them, and no run reads them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *DOCUMENTS)),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
