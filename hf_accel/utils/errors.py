"""The error of a setting that cannot be followed."""

from typing import Any, NoReturn


class SettingError(ValueError):
    """A setting that cannot be followed. The message names the setting, its value, and what to do instead."""


def fail(name: str, value: Any, problem: str) -> NoReturn:
    """Raise SettingError for a setting with this name and value."""
    raise SettingError(f"{name}={format_value(value)}: {problem}")


def format_value(value: Any) -> str:
    """Format the value of a setting as a user writes it, whole numbers without decimals."""
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)
