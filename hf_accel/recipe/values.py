"""Values of a recipe as the types that its keys and settings want, or an error that names key, value and fix."""

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ..utils.errors import SettingError as RecipeError
from ..utils.errors import fail
from ..utils.strict_yaml import as_number
from .declarations import Setting


def did_you_mean(name: Any, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint at the closest of the names, to be put behind a message; empty where none is close."""
    close = difflib.get_close_matches(str(name), list(names), 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_settings(name: str, values: dict[str, Any], settings: Mapping[str, Setting], owner: str) -> None:
    """Refuse what is no setting or of another type, and take `values` to the types of the settings."""
    for key, value in values.items():
        if key not in settings:
            hint = did_you_mean(key, settings) or f"; there are {', '.join(settings)}"
            fail(f"{name}.{key}", value, f"{owner} has no such setting{hint}")
        value = as_type(f"{name}.{key}", value, settings[key].annotation)
        values[key] = list(value) if isinstance(value, tuple) else value  # YAML has no tuples


def as_type(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or a RecipeError.

    Whole numbers and numbers in exponent form may stand where floats belong, and a single value where a list does.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        matches, typed = _as_kind(key, value, kind)
        if matches:
            return typed
    for kind in kinds:
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is list and inner[0] is not Any and isinstance(value, str | int | float):
            return [as_type(key, value, inner[0])]
    raise RecipeError(f"{key}={value!r}: expected {type_name(hint)}")


def _as_kind(key: str, value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` is of this one type, and what it is then."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        value = "no" if value is False and "no" in inner else value  # YAML 1.1 reads `no` as False
        return value in inner and isinstance(value, str), value
    if origin is float:
        number = as_number(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            return False, None
        if not math.isfinite(number):
            fail(key, value, "must be a finite number")
        return True, float(number)
    if origin in (list, tuple) and isinstance(value, list) and inner and inner[0] is not Any:
        hints = [inner[0]] * len(value) if origin is list or inner[1:] == (...,) else inner
        if len(value) != len(hints):
            return False, None
        return True, origin(as_type(key, part, one) for part, one in zip(value, hints, strict=True))
    return type(value) is origin, value


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and inner[0] is not Any:
        return f"list of {type_name(inner[0])}"
    return {types.NoneType: "null"}.get(hint, getattr(origin or hint, "__name__", str(hint)))
