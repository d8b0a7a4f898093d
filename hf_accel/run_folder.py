"""Which checkpoints can be resumed from, and which are removed: a kill or a full disk never costs the last one."""

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .distributed import broadcast_object, is_main, say
from .utils.causes import lacks_room
from .utils.errors import SettingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # pyright: ignore[reportAssignmentType]

LOCK_NAME = ".lock"
LOCK_PATIENCE = 60.0
"""Seconds in which a run whose launcher has ended should have saved, or ended by itself as it gives no answer."""

RUN_STATE_NAME = "run_state.json"
"""Written last into a checkpoint: what has none was interrupted while it was saved and is not resumed from."""

TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")
"""Of the messages of torch.save's RuntimeErrors when a file cannot be written."""

AGAIN = "Make room, and launch the same command again"
"""The remedy for a full disk where nothing else needs to be said."""


class WriteFailed(RuntimeError):
    """The disk is full, or cannot be written to for another reason."""


@contextmanager
def writing(path: Path, remedy: str, *, reads_too: bool = False) -> Iterator[None]:
    """Whoever writes a file or folder. Who also reads, whose errors may be of that, is told of a full disk alone.

    Raises:
        WriteFailed: instead of what was raised because it could not be written; names it, and the remedy.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        of_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_WRITER)
        of_files = isinstance(error, OSError | SafetensorError) and (lacks_room(error) or not reads_too)
        if not (of_torch or of_files):
            raise
        free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
        why = str(error).splitlines()[0].rstrip(".")
        raise WriteFailed(f"{path} cannot be written ({free / 1e6:,.0f} MB are free there): {why}. {remedy}") from error


@contextmanager
def sole_launch(output: Path) -> Iterator[None]:
    """Keep other launches out of `output`. The lock is the system's: it ends with the process, however that ends.

    Every process must enter. Raises SettingError if another launch is still at work there after LOCK_PATIENCE seconds.
    """
    with (output / LOCK_NAME).open("w") if is_main() else nullcontext() as file:
        taken = file is not None and not _locked(file, time.monotonic() + LOCK_PATIENCE)
        if broadcast_object(taken):
            raise SettingError(
                f"output_dir={str(output)!r}: another launch is at work there; wait for its end, or stop it"
            )
        yield


def _locked(file: Any, until: float) -> bool:
    """Whether the lock is ours, or the system has none. False if it is another's until then."""
    if fcntl is None:
        return True
    os.register_at_fork(after_in_child=file.close)  # else workers would hold it after the death of this process
    waiting = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:  # a file system without locks
                return True
            if time.monotonic() > until:
                return False
            if not waiting:
                folder = Path(file.name).parent
                say(f"Another launch is at work in {folder}: waiting for {LOCK_PATIENCE:g} s for its end")
            waiting = True
            time.sleep(0.2)


def seal(checkpoint: Path, state: dict[str, Any]) -> None:
    """Mark a checkpoint as complete: write `state`, and the size of each of its files, once all of them are there."""
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in sorted(files_of(checkpoint))}
    write_json(checkpoint / RUN_STATE_NAME, {**state, "files": sizes})


def files_of(checkpoint: Path) -> Iterator[Path]:
    return (path for path in checkpoint.rglob("*") if path.is_file() and path.name != RUN_STATE_NAME)


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / RUN_STATE_NAME).read_text())


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, with the file's path; None if it can."""
    path = checkpoint / RUN_STATE_NAME
    if not path.exists():
        return f"it was interrupted while it was saved ({path} is missing)"
    try:
        sizes = read_state(checkpoint).get("files", {})  # of earlier versions they are not known
    except ValueError as error:
        return f"{path} is no JSON: {error}"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, and had {size} when it was saved"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints, complete or not, the newest first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {path: pattern.fullmatch(path.name) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint whose saving was not interrupted and whose files are all there."""
    return next((path for path in checkpoints(output_dir) if damage(path) is None), None)


def remove_interrupted(output_dir: str | Path, step: int) -> None:
    """Make room for a checkpoint, and what its folder may hold of an earlier attempt. Complete ones stay."""
    for path in checkpoints(output_dir):
        if not (path / RUN_STATE_NAME).exists() or path.name == f"{PREFIX_CHECKPOINT_DIR}-{step}":
            _remove(path)


def remove_old(output_dir: str | Path, limit: int) -> None:
    """Keep the newest `limit` complete checkpoints, and none that is damaged. For after one has been completed."""
    complete = [path for path in checkpoints(output_dir) if damage(path) is None]
    for path in checkpoints(output_dir):
        if path not in complete[:limit]:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    (checkpoint / RUN_STATE_NAME).unlink(missing_ok=True)  # first: a kill in between leaves no seal on what is left
    shutil.rmtree(checkpoint, ignore_errors=True)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write `values` as JSON, all or nothing. NaN and infinities, which JSON lacks, become null.

    Raises:
        TypeError: a value that is no JSON, path, NumPy or torch scalar; the file is as it was before.
        OSError: the disk is full or the like; the file is as it was before.
    """
    write_text(path, json.dumps(_plain(values), indent=2, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text`, all or nothing.

    Raises:
        OSError: as `write_json`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
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
