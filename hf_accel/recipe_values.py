"""Values of a recipe as the types that its keys and settings want, or an error that names key, value and fix."""

import difflib
import inspect
import math
import types
import typing
from typing import Any, Literal


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key, the value and the fix."""


def fail(key: str, value: Any, problem: str) -> typing.NoReturn:
    raise RecipeError(f"{key}={value!r}: {problem}")


def settings_of(kind: type) -> dict[str, inspect.Parameter]:
    """What a class can be made with, by name, but for a model's `config`."""
    parameters = inspect.signature(kind.__init__, eval_str=True).parameters
    return {key: parameter for key, parameter in parameters.items() if key not in ("self", "config")}


def check_settings(name: str, values: dict[str, Any], settings: dict[str, inspect.Parameter], owner: str) -> None:
    """Refuse what is no setting or of another type, and take `values` to the types of the settings."""
    for key, value in values.items():
        if key not in settings:
            close = difflib.get_close_matches(key, list(settings), 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(settings)}"
            fail(f"{name}.{key}", value, f"{owner} has no such setting{hint}")
        value = as_type(f"{name}.{key}", value, settings[key].annotation)
        values[key] = list(value) if isinstance(value, tuple) else value  # YAML has no tuples


def as_type(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` (whole numbers may stand where floats belong), or a RecipeError."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is Literal:
            if value in typing.get_args(kind) and isinstance(value, str):
                return value
        elif origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                fail(key, value, "must be a finite number")
            return float(value)
        elif type(value) is origin:
            return value
        elif origin is tuple and isinstance(value, list):
            inner = typing.get_args(kind)
            if inner[1:] == (...,):
                return tuple(as_type(key, part, inner[0]) for part in value)
            if len(value) == len(inner):
                return tuple(as_type(key, part, one) for part, one in zip(value, inner, strict=True))
    # YAML 1.1 reads `no` as False and 1e-3 as a string
    if origin is Literal and value is False and "no" in typing.get_args(hint):
        return "no"
    tip = " (write floats with a point, as 1.0e-3)" if float in kinds and isinstance(value, str) else ""
    raise RecipeError(f"{key}={value!r}: expected {type_name(hint)}{tip}")


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(hint))
    return {types.NoneType: "null"}.get(hint, getattr(typing.get_origin(hint) or hint, "__name__", str(hint)))
