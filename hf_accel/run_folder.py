"""The folder of a run: its paths, its lock, its checkpoints and its settings."""

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from filelock import FileLock, Timeout
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .compression.schedule import describe_change, names_file
from .distributed import broadcast_object, is_main, say
from .utils.errors import SettingError, fail, format_value
from .utils.pretrain_settings import Rule
from .utils.writing import write_json

LOCK_PATIENCE = 100.0
"""Seconds to wait for a lock. It ends with its process or, if the machine of the process crashes, with the lease that a
file server has granted: after 90 s by default with version 4 of NFS."""

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""The errors of a file system that has no locks."""

RUN_STATE_NAME = "run_state.json"
"""The seal of a checkpoint. It is written last: a checkpoint without it was interrupted while it was saved."""


class RunFolder:
    """The `output_dir` of a run: the one place that knows which file lies where.

    Example:
        >>> run = RunFolder("runs/moco")
        >>> run.is_complete(), run.read_results().get("knn_top1")
        (True, 0.92)
        >>> run.final
        PosixPath('runs/moco/final')

    Attributes:
        path: the folder itself.
        recipe: the settings of the run, as it was started.
        results: what the run measured, and every later evaluation.
        log_history: the Trainer's log.
        cost_table: measured costs of compressions.
        curves: the figure of the training.
        views: the contact sheet of its views.
        explore: the page of pictures of what its encoder has learnt.
        final: the folder of the exported encoder.
        best: the folder of the best encoder of a run that started from released weights.
        kept: the folder of the checkpoints at `keep_points`, which are never removed.
        hub: the folder of what waits to be uploaded, and of the note of what was uploaded.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.results = self.path / "results.json"
        self.log_history = self.path / "log_history.json"
        self.cost_table = self.path / "cost_table.json"
        self.curves = self.path / "curves.png"
        self.views = self.path / "views.png"
        self.explore = self.path / "explore.md"
        self.final = self.path / "final"
        self.best = self.path / "best"
        self.kept = self.path / "kept"
        self.hub = self.path / ".hub"
        self.lock_file = self.path / ".lock"

    def __str__(self) -> str:
        return str(self.path)

    # Checkpoints

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint at a step."""
        return self.path / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def checkpoints(self) -> list[Path]:
        """Return the folders of all checkpoints, complete or not, the newest first."""
        pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
        found = {path: pattern.fullmatch(path.name) for path in self.path.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
        steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
        return sorted(steps, key=lambda path: steps[path], reverse=True)

    def last_complete_checkpoint(self) -> Path | None:
        """Return the newest checkpoint whose saving was not interrupted and whose files are all there."""
        return next((path for path in self.checkpoints() if find_damage(path) is None), None)

    def has_trained(self) -> bool:
        """Whether anything that was trained was saved here, damaged or not. A start that is kept for good is not."""
        kept = RunFolder(self.kept)
        saved = {*self.checkpoints(), *kept.checkpoints()} - {kept.checkpoint(0)}
        return any((path / RUN_STATE_NAME).exists() for path in saved)

    @staticmethod
    def seal(checkpoint: Path, state: dict[str, Any]) -> None:
        """Mark a checkpoint as complete once all of its files are there: write `state` and the size of each file."""
        files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != RUN_STATE_NAME)
        sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
        write_json(checkpoint / RUN_STATE_NAME, {**state, "files": sizes})

    def remove_interrupted(self, step: int) -> None:
        """Make room for the checkpoint at `step`: remove what its folder holds, and all that was saved only in part."""
        for path in self.checkpoints():
            if not (path / RUN_STATE_NAME).exists() or path == self.checkpoint(step):
                _remove(path)

    def remove_old(self, limit: int) -> None:
        """Keep the newest `limit` complete checkpoints, and none that is damaged. Call it after sealing one."""
        complete = [path for path in self.checkpoints() if find_damage(path) is None]
        for path in self.checkpoints():
            if path not in complete[:limit]:
                _remove(path)

    # Results and settings

    def read_results(self) -> dict[str, Any]:
        """Return what results.json holds, or nothing if there is none."""
        return _read(self.results, json.loads) if self.results.exists() else {}

    @contextmanager
    def update_results(self) -> Iterator[dict[str, Any]]:
        """Read results.json, let the caller change what it holds, and write it, while other processes wait.

        Only the main process of a launch may enter. A launch that trains in this folder does not have to end first.
        """
        lock = FileLock(self.path / ".results.lock", fallback_to_soft=False)
        if not _acquire(lock, f"Another process is at work on {self.results}"):
            fail("output_dir", str(self), "another process holds its results.json; wait for its end, or stop it")
        try:
            results = self.read_results()
            yield results
            write_json(self.results, results)
        finally:
            lock.release()

    def is_complete(self) -> bool:
        """Whether a training run has ended here. A folder that holds evaluations only is not complete."""
        return "units" in self.read_results()

    def read_recipe(self) -> dict[str, Any]:
        """Return the settings that the run was started with, or nothing if no run was started."""
        return _read(self.recipe, yaml.safe_load) if self.recipe.exists() else {}

    def offer_stages(self) -> str:
        """Say how the run in this folder goes on without the file of its schedule, if it holds the stages of it."""
        if not isinstance(self.read_recipe().get("schedule"), list):
            return ""
        return f"; to go on with the run in {self}, give the stages that {self.recipe} holds"

    def compare_settings(
        self, now: Mapping[str, Any], rules: Mapping[str, Rule], files: Mapping[str, str] = MappingProxyType({})
    ) -> list[str]:
        """Refuse to continue the run in this folder under other settings than those it was started with.

        Args:
            now: the settings of this launch, in plain YAML values.
            rules: for every key of `now`, whether it may change.
            files: for keys whose value was read from a file, its path.

        Returns:
            What to tell the user about settings that change from the last checkpoint on or, if nothing was saved, from
            the start.

        Raises:
            SettingError: the run is of another task, or was started with another value of a key that its result
                depends on.
        """
        started, notes = self.read_recipe(), []
        task = started.get("task")
        if task and "task" in now and task != now["task"]:
            fail("output_dir", str(self), f"it holds the recipe.yaml of task={task}; choose another output_dir")
        checkpoint, complete = self.last_complete_checkpoint(), self.is_complete()
        # Other tasks save no checkpoints.
        restarts = task in (None, "pretrain") and not complete and not self.has_trained()
        for key, value in now.items():  # in their order, so that every process names the same key
            if rules[key] == "free" or key not in started or started[key] == value:
                continue
            if key == "schedule" and names_file(started[key]):
                continue  # Earlier versions recorded the path. The plan in a checkpoint tells the stages.
            new, old = f"{key}={format_value(value)}", format_value(started[key])
            if rules[key] == "correction" and restarts:
                notes.append(f"Starting from the beginning with {new}, as no checkpoint was saved with {old}")
                continue
            if rules[key] == "correction" and checkpoint and not complete:
                notes.append(f"Continuing with {new} (until here {old})")
                continue
            what = "file" if key in files else "key"
            remedy = f"choose another output_dir, or restore the {what} to continue that run"
            if complete:
                further = f"; to train it further, give continue_from={self} and another output_dir" * (key == "budget")
                remedy = f"which is complete; choose another output_dir for a new run{further}"
            elif restarts:
                remedy = "of which no checkpoint was saved; choose another output_dir, or remove this one"
            comma = "," if complete or restarts else ";"
            if key in files:
                change = f"{describe_change(started[key], value)}{comma} {remedy}"
                fail(key, files[key], f"{self} holds a run with other stages than this file: {change}")
            fail(key, value, f"{self} holds a run with {key}={old}{comma} {remedy}")
        return notes

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other launches out of this folder. Every process of a launch must enter.

        The lock belongs to the process and ends with it, however it ends. Forked workers do not hold it. Where the file
        system has no locks, nothing is kept out.

        Raises:
            SettingError: another launch is still at work here after LOCK_PATIENCE seconds.
        """
        lock, is_taken = FileLock(self.lock_file, fallback_to_soft=False), False
        if is_main():
            is_taken = not _acquire(lock, f"Another launch is at work in {self}")
        if broadcast_object(is_taken):
            fail("output_dir", str(self), "another launch is at work there; wait for its end, or stop it")
        try:
            yield
        finally:
            lock.release()


def _acquire(lock: FileLock, taken: str) -> bool:
    """Take a lock. If it is `taken`, say so and wait. Return False if another process keeps it for LOCK_PATIENCE."""
    for patience in (0.0, LOCK_PATIENCE):
        try:
            lock.acquire(timeout=patience, poll_interval=0.2)
        except Timeout:
            if not patience:
                say(f"{taken}: waiting for {LOCK_PATIENCE:g} s for its end")
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True
    return False


def _read(path: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    """Return the mapping in a file of a run. Raises SettingError for a file that was cut short or edited badly."""
    try:
        values = load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {values!r:.40} and no mapping")
    except (ValueError, yaml.YAMLError) as error:
        raise SettingError(
            f"{path} cannot be read: {' '.join(str(error).split())}. Restore it from a copy, or choose another folder"
        ) from None
    return values


# One checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state that a checkpoint was sealed with."""
    return _read(checkpoint / RUN_STATE_NAME, json.loads)


def find_damage(checkpoint: Path) -> str | None:
    """Say why a checkpoint cannot be resumed from, with the file's path. Return None if it can."""
    path = checkpoint / RUN_STATE_NAME
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not path.exists():
        return f"it was interrupted while it was saved ({path} is missing)"
    try:
        sizes = read_state(checkpoint).get("files", {})  # earlier versions did not write the sizes
    except ValueError as error:
        return str(error)
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, and had {size} when it was saved"
    return None


def find_end(run: str) -> Path:
    """Return the checkpoint that `continue_from` names: the last one of a finished run, or a checkpoint itself.

    Raises:
        SettingError: there is no such run or checkpoint, or the run is not finished.
    """
    path, folder = Path(run), RunFolder(run)
    if (path / RUN_STATE_NAME).exists():
        checkpoint = path
    elif folder.is_complete():
        checkpoint = folder.checkpoint(folder.read_results()["steps"])
        if not checkpoint.is_dir():
            lost = "its last checkpoint, with heads and optimizer, was removed"
            fail("continue_from", run, f"{lost}; init_from={folder.final} starts from its encoder, with new heads")
    elif folder.recipe.exists():
        fail(
            "continue_from", run, "it is not finished: resume it with the same command, or name one of its checkpoints"
        )
    else:
        fail("continue_from", run, "it is neither the output_dir of a finished run nor a checkpoint of one")
    if wrong := find_damage(checkpoint):
        fail("continue_from", run, wrong)
    if not read_state(checkpoint)["step"]:
        fail("continue_from", run, "it was saved before the first step; start a run without continue_from")
    return checkpoint


def run_of(checkpoint: Path) -> RunFolder:
    """Return the folder of the run that a checkpoint belongs to."""
    run = RunFolder(checkpoint.resolve().parent)
    return RunFolder(run.path.parent) if run.path.name == RunFolder("").kept.name else run


def _remove(checkpoint: Path) -> None:
    # The seal goes first, so that a kill in between leaves no seal on the rest.
    (checkpoint / RUN_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
