"""Files here or behind a URL that `fsspec` opens, read in parts."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")

Place = tuple[str, int, int, str]
"""Where an image lies in a shard: the path of the file, two numbers and a name, which depend on the kind of file."""

Row = tuple[Place, int, Any]
"""A row of an index: the place of an image, the number of its shard, and its label or None."""

PATIENCE = (1.0, 4.0, 16.0)
"""Seconds to wait before a part of a remote file is asked for again."""


def is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> Any:
    """Open a file for reading. Raises OSError, or another error of the file system behind the URL."""
    if not is_remote(path):
        return open(path, "rb")
    import fsspec

    return cast(Any, fsspec.open(path)).open()


def ask_patiently(path: str, read: Callable[[], T]) -> T:
    """Return what `read` returns. If it fails for a remote file, it is called again after a while."""
    for seconds in PATIENCE if is_remote(path) else ():
        try:
            return read()
        except Exception:  # Each file system has its own errors. The last call raises them.
            time.sleep(seconds)
    return read()


def file_state(path: str) -> tuple[int, Any]:
    """Return the size of a file, and what else tells that it has changed."""
    if not is_remote(path):
        return os.path.getsize(path), os.stat(path).st_mtime_ns
    import fsspec

    system, name = fsspec.url_to_fs(path)
    return system.size(name), system.ukey(name)
