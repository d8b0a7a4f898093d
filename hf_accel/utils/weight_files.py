"""Weight files as people have them: settings beside the tensors, Git LFS pointers, files that were cut short."""

import argparse
import errno
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .caches import explain_download
from .causes import causes, reason

POINTER = b"version https://git-lfs"

FAILURES = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, ImportError),
    *(pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)
"""What libraries raise when they open a configuration or weights, by kind of damage."""

TORN = ("PytorchStreamReader", "unexpected EOF")
"""In messages of torch.load about a file that ends too early."""


class CannotBeOpened(ValueError):
    """A checkpoint or weight file that cannot be read."""


@contextmanager
def opening(checkpoint: str) -> Iterator[None]:
    """What opens a checkpoint, a file, a folder or a Hub id, runs inside.

    Raises:
        CannotBeOpened: the message says what is wrong with it.
    """
    refuse_pointers(Path(checkpoint))
    try:
        yield
    except FAILURES as error:
        missing = "" if Path(checkpoint).exists() else "there is no such folder, and as a Hub id "
        if missing and not may_be_hub_id(checkpoint):
            raise CannotBeOpened("there is no such file or folder") from error
        why = f"{missing}it cannot be opened: {_damage(error)}"
        raise CannotBeOpened(explain_download(error, why) if missing else why) from error


def may_be_hub_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def refuse_pointers(path: Path) -> None:
    """Raises CannotBeOpened for a file or folder that Git LFS has not filled yet."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    pointers = [file.name for file in files if file.is_file() and _starts_with(file, POINTER)]
    if pointers:
        folder = path if path.is_dir() else path.parent
        raise CannotBeOpened(
            f"{', '.join(pointers)} in {folder} only points to a file in Git LFS: run `git lfs pull` there, or "
            "download the file itself"
        )


def _starts_with(file: Path, words: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(words)) == words


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of one that torch.save wrote, under "state_dict" or "model" or alone.

    Raises:
        CannotBeOpened: it cannot be read, or holds other things.
    """
    if path.suffix == ".safetensors":
        with opening(str(path)):
            return load_file(path)
    # Namespaces hold the settings of a training script, and opening one runs no code.
    with opening(str(path)), torch.serialization.safe_globals([argparse.Namespace]):
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
            break
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        found = f"names such as {', '.join(map(str, [*state][:3]))}" if isinstance(state, Mapping) else type(state)
        raise CannotBeOpened(f"{path} holds no tensors by name, but {found}: save the state dict alone")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _damage(error: BaseException) -> str:
    """What is wrong with a file, from the error of the library that read it."""
    chain = causes(error)
    inner = chain[-1]
    objects = re.search(r"GLOBAL ([\w.]+)", " ".join(map(str, chain)))
    if objects:
        return (
            f"it holds objects of {objects[1]} beside its weights, and to open these could run foreign code. If you "
            "trust its origin, open it with torch.load(..., weights_only=False) and save its tensors alone"
        )
    unreadable = isinstance(inner, SafetensorError | pickle.UnpicklingError | EOFError)
    torn = any(words in str(inner) for words in TORN) or getattr(inner, "errno", None) == errno.EINVAL
    if unreadable or torn:
        return f"its weights are cut short or damaged ({reason(inner)[:200]}); copy or download them again"
    return reason(error)
