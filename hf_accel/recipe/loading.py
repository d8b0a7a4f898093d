"""Recipes read from YAML files and `key=value` overrides, and the text of --help."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import yaml

from ..utils.errors import SettingError as RecipeError
from ..utils.errors import fail
from ..utils.shipped import find_file, list_recipes
from ..utils.strict_yaml import load_yaml
from ..utils.values import as_type, type_name
from .checks import configured_classes
from .continue_from import settle_continuation
from .init_from import settle_start
from .keys import RECIPES, Recipe, default_of, tasks_that_read
from .values import did_you_mean

DEFAULT_TASK = "pretrain"

REMOVED_KEYS = {
    "search_metric": "Leave it out: a search and `schedule: auto` compare plain gradients.",
    "search_horizon": "Leave it out: errors are those of one batch, as in the paper.",
    "search_parameters": "Leave it out: errors are those of the gradient of all trained parameters.",
}
"""Keys of earlier versions, each with what CHANGELOG.md says to do without it."""


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides (values in YAML; `a.b=value` sets an entry of a mapping).

    A recipe may serve several tasks: what the file gives to keys that its task does not read is left out.

    Raises:
        RecipeError: unknown key, wrong type, impossible value or combination, or an override of a key that the task
            does not read.
    """
    values = _read_file(path) if path is not None else {}
    given = [_override(values, override) for override in overrides]
    task = values.pop("task", DEFAULT_TASK)
    if not isinstance(task, str) or task not in RECIPES:
        fail("task", task, f"must be one of {list(RECIPES)}{did_you_mean(task, RECIPES)}")
    kind, known = RECIPES[task], {key for kind in RECIPES.values() for key in kind.types()}
    for key, value in values.items():
        if key in REMOVED_KEYS:
            fail(key, value, f"`{key}` is gone. {REMOVED_KEYS[key]}")
        if key not in known:
            raise RecipeError(f"{key}={value!r}: there is no such key{did_you_mean(key, known)} (--help lists them)")
        if key in given and not kind.reads(key):
            others = ", ".join(tasks_that_read(key))
            fail(key, value, f"task={task} does not read this key; leave it out (task={others} would read it)")
    types = kind.types()
    taken = {key: as_type(key, value, types[key]) for key, value in values.items() if key in types}
    if taken.get("continue_from"):
        taken = settle_continuation(kind, taken)
    elif taken.get("init_from"):
        taken = settle_start(kind, taken)
    recipe = kind(**taken)
    recipe.named = frozenset(values)
    return recipe


def _override(values: dict[str, Any], override: str) -> str:
    """Write a `key=value` override into the values, and return its key."""
    key, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"{override!r}: overrides are written key=value, e.g. seed=1")
    head, *rest = key.split(".")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise RecipeError(f"{override!r}: the value is not valid YAML ({problem}); is it in quotes?") from None
    if rest:
        entries = values.get(head) or {}
        if not isinstance(entries, Mapping):
            fail(key, value, f"{head} is no mapping but {entries!r}: it has no such entry")
        value = {**entries, ".".join(rest): value}
    values[head] = value
    return head


def _read_file(path: str | Path) -> dict[str, Any]:
    path = find_file(path, "recipes")
    if not path.is_file():
        hint = did_you_mean(str(path).removesuffix(".yaml").removeprefix("recipes/"), list_recipes())
        raise RecipeError(f"no recipe at {str(path)!r}; give a YAML file, or a name that `hf-accel list` prints{hint}")
    try:
        loaded = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} cannot be read: {error}; save it as a text file in UTF-8") from None
    if not isinstance(loaded, Mapping | None):
        raise RecipeError(f"{path}: expected `key: value` lines, got {type(loaded).__name__}")
    return dict(loaded or {})


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the words of a command into the recipe, if the first one is no `key=value`, and the overrides."""
    named = bool(words) and ("=" not in words[0] or Path(words[0]).is_file())
    return (words[0] if named else None), list(words[named:])


def overrides_for(task: str, overrides: Iterable[str]) -> list[str]:
    """The `key=value` overrides that the task reads, for a program that gives several tasks the same ones."""
    return [override for override in overrides if RECIPES[task].reads(override.partition("=")[0].partition(".")[0])]


def group_keys(task: str) -> dict[str, list[Field]]:
    """The keys of a task by heading."""
    heading, groups = "", {}
    for key in fields(RECIPES[task]):
        heading = key.metadata["group"] or heading
        groups.setdefault(heading, []).append(key)
    return groups


def describe_keys(task: str = DEFAULT_TASK) -> str:
    """Every key of a task with type, default and help text, by group, and the settings of its mappings."""
    kind, lines = RECIPES[task], []
    for heading, keys in group_keys(task).items():
        lines.append(f"\n{heading}:")
        for key in keys:
            lines.append(f"  {key.name} ({type_name(kind.types()[key.name])}; default {default_of(kind, key.name)!r})")
            lines.append(f"      {key.metadata['help']}")
    for name, read in configured_classes().items():
        if not kind.reads(name.partition(" ")[0]):
            continue
        lines.append(f"\n{name}:")
        try:
            declared = read()
        except RecipeError as error:  # What is wrong with one class is no reason to say nothing of the others.
            lines.append(f"  {error}")
            continue
        for setting, (annotation, default) in declared.settings.items():
            lines.append(f"  {setting} ({type_name(annotation)}; default {default!r})")
        about = declared.description.partition("Args:\n")[2].partition("\n\n")[0].splitlines()
        lines += [f"  {line}" for line in about if not line.lstrip().startswith("config:")]
    return "\n".join(lines)
