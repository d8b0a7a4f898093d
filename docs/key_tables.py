"""Write the tables of keys into docs/recipes.md, from the code: python docs/key_tables.py"""

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from hf_accel.recipe import Recipe
from hf_accel.recipe.checks import configured_classes
from hf_accel.recipe.declarations import Declaration
from hf_accel.recipe.keys import recipe_types
from hf_accel.recipe.task_keys import TASKS, tasks_that_read
from hf_accel.recipe.values import type_name

PAGE = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- keys: written by docs/key_tables.py -->\n", "<!-- end of keys -->\n"


def render_tables() -> str:
    return "\n".join([*_key_tables(), *_setting_tables()]) + "\n"


def insert_tables(page: str) -> str:
    """The page with the tables that the code gives now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + render_tables() + END + after


def _key_tables() -> Iterator[str]:
    hints = recipe_types()
    for key in fields(Recipe):
        if key.metadata["group"]:
            group = key.metadata["group"]
            yield f"\n### {group[0].upper()}{group[1:]}\n"
            yield "| key | type | default | meaning | tasks |\n|---|---|---|---|---|"
        readers = tasks_that_read(key.name)
        tasks = "all" if len(readers) == len(TASKS) else ", ".join(readers)
        yield _row(f"`{key.name}`", type_name(hints[key.name]), _show(_default(key)), key.metadata["help"], tasks)


def _setting_tables() -> Iterator[str]:
    of_evaluations = False
    yield "\n## Settings of objectives"
    for name, declared in configured_classes().items():
        if not of_evaluations and not name.startswith("objective_config"):
            of_evaluations = True
            yield "\n## Settings of evaluations"
        yield f"\n### `{name.partition(' of ')[0]}`{' of ' * (' of ' in name)}{name.partition(' of ')[2]}\n"
        yield "| setting | default | meaning |\n|---|---|---|"
        for names, text in _described(declared):
            defaults = ", ".join(_show(declared.settings[name].default) for name in names)
            yield _row(", ".join(f"`{name}`" for name in names), defaults, text)


def _described(declared: Declaration) -> Iterator[tuple[list[str], str]]:
    """The settings that the docstring's Args describe, several together where one line describes several."""
    about = declared.description.partition("Args:\n")[2].partition("\n\n")[0]
    for names, text in re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", about, re.MULTILINE):
        if names != "config":
            yield names.split(", "), " ".join(text.split())


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower() if value is not None else 'null'}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`" if value != "" else ""


def _default(key: Field) -> Any:
    return key.default_factory() if key.default_factory is not MISSING else key.default


if __name__ == "__main__":
    PAGE.write_text(insert_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
