"""The `hf-accel` command: the tasks of recipes by name, in this process or launched through accelerate."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from . import run
from .recipe import RECIPES, RecipeError, load_recipe, split_words
from .tasks import COMMANDS, PREVIEWS, TASKS
from .tasks.list import format_table, summarize_tasks
from .utils.shipped import find_file


class CommandParser(argparse.ArgumentParser):
    """Its errors name a file or folder among `words` that was taken for an option because it begins with a dash."""

    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        dashed = next((word for word in self.words if word.startswith("-") and os.path.exists(word)), None)
        super().error(message + (f"; {dashed} was taken for an option: write ./{dashed}" if dashed else ""))


@run.ending_with_reader()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-accel",
        usage="hf-accel TASK [RECIPE] [key=value ...]",
        description="Self-supervised pretraining of Vision Transformers under a compute budget.",
        epilog=format_table("tasks", summarize_tasks()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "task",
        choices=[*TASKS, *PREVIEWS, *COMMANDS],
        metavar="TASK",
        help="what to do; hf-accel TASK --help lists its keys",
    )
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # Otherwise Python 3.11 names it beside TASK if nothing is given.
    version = import_module("hf_accel").__version__
    parser.add_argument("--version", action="version", version=f"hf-accel {version}")
    arguments = parser.parse_args(argv)
    if arguments.task in COMMANDS:
        module, function, text = COMMANDS[arguments.task]
        parser = CommandParser(prog=f"hf-accel {arguments.task}", description=text)
        parser.words = arguments.rest
        try:
            getattr(import_module(f"hf_accel.{module}"), function)(parser, arguments.rest)
        except RecipeError as error:
            run.end_with(error)
        except KeyboardInterrupt:
            sys.exit("Interrupted")
    elif arguments.task in PREVIEWS:
        parser = parser_of(arguments.task, "pretrain", PREVIEWS[arguments.task][2])
        run.start(read_words(parser, vars(parser.parse_intermixed_args(arguments.rest)), "pretrain"), arguments.task)
    else:
        start_task(arguments.task, arguments.rest)


def parser_of(name: str, task: str, summary: str) -> argparse.ArgumentParser:
    """The parser of a command that takes the recipe of a task."""
    return run.make_parser(f"hf-accel {name}", f"hf-accel {name} [RECIPE]", f"{summary} Keys", task)


def read_words(parser: argparse.ArgumentParser, arguments: dict[str, Any], task: str) -> list[str]:
    """Take the recipe and the overrides out of the arguments, and return them with the task."""
    recipe, overrides = split_words(arguments.pop("words") + arguments.pop("overrides"))
    if any(override.startswith("task=") for override in overrides):
        parser.error(f"the task is given twice: leave task= out, or call hf-accel with another task than {task}")
    return [*([recipe] if recipe else []), f"task={task}", *overrides]


def start_task(task: str, argv: list[str]) -> None:
    """Run a task in this process, or through accelerate's launcher if one of its options is given."""
    parser = parser_of(task, task, RECIPES[task].summary())
    assert parser.usage
    parser.usage += " [--config_file FILE] [--num_processes N]"
    launching = parser.add_argument_group("options of accelerate launch")
    launching.add_argument("--config_file", help="configuration of accelerate: a file, or a shipped one as ddp.yaml")
    launching.add_argument("--num_processes", type=int, help="number of processes")
    launching.add_argument("--num_cpu_threads_per_process", help="threads of each process")
    arguments = vars(parser.parse_intermixed_args(argv))
    words = read_words(parser, arguments, task)
    options = {name: value for name, value in arguments.items() if value is not None}
    if options:
        launch(words, options)
    else:
        run.start(words)


def launch(words: list[str], options: dict[str, Any]) -> NoReturn:
    """Run a recipe as `accelerate launch` does, and end with the exit code of the run."""
    try:
        load_recipe(*split_words(words))  # so that what is wrong with it is said once, and at once
    except RecipeError as error:
        run.end_with(error)
    from accelerate.commands.launch import launch_command, launch_command_parser

    configuration = options.get("config_file") or configuration_of_cpu(int(options.get("num_processes", 1)))
    if configuration:
        options["config_file"] = str(find_file(configuration, "accelerate_configs"))
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the run, too, for which this process waits
    try:
        launch_command(launch_command_parser().parse_args([*flags, str(Path(run.__file__).resolve()), *words]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)
    sys.exit(0)


def configuration_of_cpu(processes: int) -> str | None:
    """Name the shipped configuration for processes on a CPU, without which accelerate starts one process only.

    None on a machine with an accelerator, and where the user has a configuration from `accelerate config`.
    """
    from accelerate.commands.config import default_config_file

    from .distributed.launch import on_cpu

    if not on_cpu() or Path(default_config_file).is_file():
        return None
    return "cpu.yaml" if processes == 1 else "cpu_2proc.yaml"


def hand_on(signum: int, _frame: Any) -> None:
    """Hand a signal on to the run that accelerate's launcher has started and waits for."""
    import psutil  # a dependency of accelerate

    children = psutil.Process().children()
    if not children:
        sys.exit(128 + signum)
    for child in children:
        child.send_signal(signum)
