"""Texts and settings without the local paths of the machine on which they were made, for publication."""

import re
from collections.abc import Mapping
from typing import Any

# A path from the root, a home or a drive, inside a text: not the slashes of "a/b", "../a" or "https://a".
_ABSOLUTE = re.compile(r"(?<![\w:/.~])(?:~\w*/|/|[A-Za-z]:[\\/])[^\s'\"`,;:()\[\]{}<>]+")


def without_local_paths(value: Any) -> Any:
    """Return `value`, text or anything that YAML can hold, with absolute paths cut down to "…/" and their last part."""
    if isinstance(value, Mapping):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and re.match(r"(?:~\w*/|/|[A-Za-z]:[\\/])", value):  # all of it, spaces and brackets, too
        return _shortened(value)
    return _ABSOLUTE.sub(lambda found: _shortened(found.group()), value)


def _shortened(path: str) -> str:
    return "…/" + re.split(r"[\\/]", path.rstrip("\\/"))[-1]
