"""`hf-accel list`: what can follow `hf-accel`, and what a recipe can name."""

import argparse

from ..recipe import RECIPES
from ..recipe.checks import PRESETS, objective_names
from ..utils.shipped import list_recipes
from . import COMMANDS, PREVIEWS


def print_list(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.parse_args(argv)
    print(format_table("tasks", summarize_tasks()))
    print("\n" + format_table("recipes", list_recipes()))
    print(f"\npresets (key model):\n  {', '.join(PRESETS)}")
    print(f"\nobjectives (key objective):\n  {', '.join(objective_names())}")


def summarize_tasks() -> dict[str, str]:
    """Return the tasks and commands, each with a line on what it does."""
    tasks = {task: kind.summary() for task, kind in RECIPES.items()}
    return tasks | {name: text for name, (_, _, text) in (PREVIEWS | COMMANDS).items()}


def format_table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows)) + 2
    return "\n".join([f"{title}:", *(f"  {name:<{width}}{text}" for name, text in rows.items())])
