"""The settings inside a recipe's mappings, checked by name and type."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..utils.errors import fail
from ..utils.values import as_type
from .declarations import Setting


def did_you_mean(name: Any, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint at the closest of the names, to be put behind a message; empty where none is close."""
    close = difflib.get_close_matches(str(name), list(names), 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def join_names(names: Sequence[str]) -> str:
    """Write names as "a, b and c"."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def check_settings(name: str, values: dict[str, Any], settings: Mapping[str, Setting], owner: str) -> None:
    """Refuse what is no setting or of another type, and take `values` to the types of the settings."""
    for key, value in values.items():
        if key not in settings:
            there_are = f"there are {', '.join(settings)}" if settings else "it has none; leave it out"
            hint = did_you_mean(key, settings) or f"; {there_are}"
            fail(f"{name}.{key}", value, f"{owner} has no such setting{hint}")
        value = as_type(f"{name}.{key}", value, settings[key].annotation)
        values[key] = list(value) if isinstance(value, tuple) else value  # YAML has no tuples
