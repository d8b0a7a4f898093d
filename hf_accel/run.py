"""The entry point: a recipe in, a task out. `accelerate launch hf_accel/run.py RECIPE [key=value ...]`."""

import sys
from pathlib import Path

# As a script, this folder comes first on the path and its modules would hide installed ones of the same name.
_FOLDER = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _FOLDER]
if str(_FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(_FOLDER.parent))

# What imports torch, which takes seconds, is imported only once the recipe is known to be sound.
import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager, suppress  # noqa: E402
from importlib import import_module  # noqa: E402
from typing import NoReturn  # noqa: E402

from hf_accel.recipe import Recipe, RecipeError, describe_keys, load_recipe, split_words  # noqa: E402
from hf_accel.tasks import PREVIEWS, TASKS  # noqa: E402

PATIENCE = 10.0
"""Seconds in which torch's launcher has ended the other processes once one of them has failed."""


@contextmanager
def ending_with_reader() -> Iterator[None]:
    """End as other commands do, and without a traceback, if nobody reads the output any longer (`| head -1`)."""
    end: BaseException | None = None
    try:
        yield
    except (BrokenPipeError, SystemExit) as error:
        end = error
    try:
        if isinstance(end, BrokenPipeError):
            print()  # This fails, too, if it was the output that was closed, and no connection.
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends.
        if not (isinstance(end, SystemExit) and end.code):
            end = SystemExit(128 + signal.SIGPIPE)
    if end:
        raise end


@ending_with_reader()
def main(argv: list[str] | None = None) -> None:
    command = "accelerate launch hf_accel/run.py RECIPE"
    parser = make_parser("hf_accel/run.py", command, "Run the task of a recipe. Keys of task=pretrain", "pretrain")
    arguments = parser.parse_args(argv)
    start(arguments.words + arguments.overrides)


def make_parser(name: str, command: str, summary: str, task: str) -> argparse.ArgumentParser:
    """Make the parser of a command that takes the recipe of a task."""
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{command} [key=value ...]",
        description=f"{summary}, for the recipe or as key=value:",
        epilog=describe_keys(task),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE", help="a YAML file, or a name that hf-accel list prints")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace those of the recipe")
    return parser


def start(words: list[str], preview: str | None = None) -> None:
    """Run the task of a recipe, given as RECIPE and overrides, and end the process with a line if it cannot be done.

    Args:
        preview: what of PREVIEWS to do with the recipe in place of its task.
    """
    try:
        recipe = load_recipe(*split_words(words))
        run_task(recipe, PREVIEWS[preview][:2] if preview else TASKS[recipe.task])
    except RecipeError as error:
        end_with(error)
    except KeyboardInterrupt:
        first = not int(os.environ.get("LOCAL_RANK", 0))
        sys.exit("Interrupted. The same command goes on from what is saved in output_dir" if first else 1)


@contextmanager
def leaving_no_empty_folders(folder: Path) -> Iterator[None]:
    """Where a command is refused, remove what it has made on the way to `folder` and left empty."""
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield
    except RecipeError:
        for path in made:
            with suppress(OSError):  # There is something in it, or another process was faster.
                path.rmdir()
        raise


def run_task(recipe: Recipe, entry: tuple[str, str]) -> None:
    """Call what takes the recipe, given by its module of hf_accel and its name."""
    from hf_accel.data import CorruptDataError, WorkersFailed, explained_failures
    from hf_accel.distributed.launch import end_with_launcher
    from hf_accel.hub import PushFailed
    from hf_accel.training import OutOfMemory, TrainingDiverged
    from hf_accel.training.console import quiet
    from hf_accel.utils.writing import AGAIN, WriteFailed, writing

    end_with_launcher()
    module, function = entry
    task = getattr(import_module(f"hf_accel.{module}"), function)
    folder = recipe.output_dir if recipe.reads("output_dir") else str(recipe.checkpoint)  # a card is its run's
    try:
        with (
            leaving_no_empty_folders(Path(folder)),
            quiet(),
            explained_failures(),
            writing(Path(folder), AGAIN, reads_too=True),
        ):
            task(recipe)
    except (TrainingDiverged, OutOfMemory, CorruptDataError, PushFailed, WorkersFailed, WriteFailed) as error:
        end_with(error)


def end_with(error: Exception) -> NoReturn:
    """End this process with an error in a line, which is printed once and last, whatever the number of processes.

    When one of several processes fails, torch's launcher ends the others, and closes with a report that quotes what the
    failed one has left in its error file. So the first process of a machine leaves its message there and does not print
    it. The others wait to be ended. One that is still there after PATIENCE seconds has failed alone: it leaves its own.
    """
    message, path = f"{type(error).__name__}: {error}", os.environ.get("TORCHELASTIC_ERROR_FILE")
    report = {"message": message, "timestamp": int(time.time())}  # the report closes with the earliest error
    if not path:
        sys.exit(message)
    if int(os.environ.get("LOCAL_RANK", 0)):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    Path(path).write_text(json.dumps(report))
    sys.exit(1)


if __name__ == "__main__":
    main()
