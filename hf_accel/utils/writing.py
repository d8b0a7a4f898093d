"""Writing files so that a kill or a full disk cannot tear them, and errors of writing that say what to do."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from .causes import lacks_room

TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")
"""Words in the RuntimeErrors that torch.save raises when it cannot write a file."""

AGAIN = "Make room, and launch the same command again"
"""The remedy for a full disk where nothing else needs to be said."""


class WriteFailed(RuntimeError):
    """A file cannot be written, because the disk is full or for another reason."""


@contextmanager
def writing(path: Path, remedy: str, *, reads_too: bool = False) -> Iterator[None]:
    """Turn the errors of writing a file or folder into one that names it, and says what to do.

    Args:
        reads_too: whether the code also reads files; then only the errors of a full disk surely come from writing.

    Raises:
        WriteFailed: instead of the error of what could not be written.
    """
    try:
        yield
    except WriteFailed:  # It names its path and its remedy.
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        of_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_WRITER)
        of_files = isinstance(error, OSError | SafetensorError) and (lacks_room(error) or not reads_too)
        if not (of_torch or of_files):
            raise
        free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
        why = str(error).splitlines()[0].rstrip(".")
        raise WriteFailed(f"{path} cannot be written ({free / 1e6:,.0f} MB are free there): {why}. {remedy}") from error


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write `values` as JSON, all or nothing. NaN and infinities, which JSON lacks, become null.

    Raises:
        TypeError: a value is no JSON, path, NumPy or torch scalar; the file is as it was before.
        OSError: the disk is full or the like; the file is as it was before.
    """
    write_text(path, json.dumps(_plain(values), indent=2, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text`, all or nothing.

    Raises:
        OSError: as `write_json`.
    """
    with replacing(Path(path)) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when all of it is written without an error, and not before.

    Raises:
        OSError: as `write_json`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
