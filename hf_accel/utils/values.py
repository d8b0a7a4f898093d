"""Values as the types that settings want, or an error that names setting, value and fix."""

import math
import types
import typing
from typing import Any, Literal

from .errors import SettingError, fail
from .strict_yaml import as_number

UNIONS = (types.UnionType, typing.Union)
"""What `int | str` and, as it holds a Literal, `int | Literal["auto"]` are instances of."""


def as_type(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or a SettingError.

    Whole numbers and numbers in exponent form may stand where floats belong, and a single value where a list does.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    for kind in kinds:
        matches, typed = _as_kind(key, value, kind)
        if matches:
            return typed
    for kind in kinds:
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is list and inner[0] is not Any and isinstance(value, str | int | float):
            return [as_type(key, value, inner[0])]
    raise SettingError(f"{key}={value!r}: expected {type_name(hint)}")


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
        names = typing.get_args(hint)
        return "one of " * (len(names) > 1) + ", ".join(names)
    if typing.get_origin(hint) in UNIONS:
        return " or ".join(type_name(part) for part in typing.get_args(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and inner[0] is not Any:
        return f"list of {type_name(inner[0])}"
    return {types.NoneType: "null"}.get(hint, getattr(origin or hint, "__name__", str(hint)))
