"""Write the tables of keys into docs/recipes.md and docs/python.md, from the code: python docs/key_tables.py"""

import re
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_accel.recipe import RECIPES
from hf_accel.recipe.checks import configured_classes
from hf_accel.recipe.declarations import Declaration
from hf_accel.recipe.keys import default_of
from hf_accel.recipe.loading import group_keys
from hf_accel.utils.pretrain_settings import PretrainSettings
from hf_accel.utils.values import type_name

DOCS = Path(__file__).parent
BEGIN, END = "<!-- keys: written by docs/key_tables.py -->\n", "<!-- end of keys -->\n"


def render_pages() -> dict[Path, str]:
    """Return each page with the tables that the code gives now."""
    tables = {"recipes.md": [*_key_tables(), *_setting_tables()], "python.md": [*_config_table()]}
    pages = {}
    for name, lines in tables.items():
        before, _, rest = (DOCS / name).read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        pages[DOCS / name] = before + BEGIN + "\n".join(lines) + "\n" + END + after
    return pages


def _config_table() -> Iterator[str]:
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    hints, defaults = typing.get_type_hints(PretrainSettings), PretrainSettings()
    for field in fields(PretrainSettings):
        yield _row(
            f"`{field.name}`",
            type_name(hints[field.name]),
            _show(getattr(defaults, field.name)),
            field.metadata["help"],
        )


def _key_tables() -> Iterator[str]:
    groups: dict[str, dict[tuple[str, str], list[str]]] = {}
    for task in RECIPES:
        for heading, keys in group_keys(task).items():
            for key in keys:
                groups.setdefault(heading, {}).setdefault((key.name, key.metadata["help"]), []).append(task)
    for heading, keys in groups.items():
        yield f"\n### {heading[0].upper()}{heading[1:]}\n"
        yield "| key | type | default | meaning | tasks |\n|---|---|---|---|---|"
        for (key, text), tasks in keys.items():
            kind = RECIPES[tasks[0]]
            readers = "all" if len(tasks) == len(RECIPES) else ", ".join(tasks)
            yield _row(f"`{key}`", type_name(kind.types()[key]), _show(default_of(kind, key)), text, readers)


def _setting_tables() -> Iterator[str]:
    of_evaluations = False
    yield "\n## Settings of objectives"
    for name, read in configured_classes().items():
        if not of_evaluations and not name.startswith("objective_config"):
            of_evaluations = True
            yield "\n## Settings of evaluations"
        yield f"\n### `{name.partition(' of ')[0]}`{' of ' * (' of ' in name)}{name.partition(' of ')[2]}\n"
        yield "| setting | default | meaning |\n|---|---|---|"
        declared = read()
        described = list(_described(declared))
        listed = [name for names, _ in described for name in names]
        if sorted(listed) != sorted(declared.settings):
            wrong = ", ".join(sorted({*listed} ^ {*declared.settings})) or "a setting twice"
            raise SystemExit(f"{declared.place}: Args of the docstring and the settings differ in {wrong}")
        for names, text in described:
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


if __name__ == "__main__":
    for path, text in render_pages().items():
        path.write_text(text, encoding="utf-8")
