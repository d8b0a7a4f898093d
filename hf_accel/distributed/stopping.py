"""Stop long loops between their batches when a stop is requested from outside, for example by SIGTERM."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from . import host_group, on_any, world_size

Item = TypeVar("Item")

_state: dict[str, Any] = {"requested": False, "answered": False, "looked": 0.0, "world": None, "hosts": None}


class Stopped(RuntimeError):
    """The work was left unfinished because a stop was requested."""


def request_stop() -> None:
    """Request a stop. This only sets a flag, so signal handlers may call it."""
    _state["requested"] = True


def stop_requested() -> bool:
    """Return whether this process was asked to stop. Calling this also shows that the process is not stuck."""
    _state["looked"] = time.monotonic()
    return _state["requested"]


def seconds_since_look() -> float:
    """Return the seconds since the last call of `stop_requested`."""
    return time.monotonic() - _state["looked"]


def stop_answered() -> bool:
    """Return whether the processes have agreed to stop and are finishing their work."""
    return _state["answered"]


def clear_stop() -> None:
    """Forget an earlier request."""
    _state["requested"] = _state["answered"] = False


def until_stopped(items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items` until a stop is requested.

    A signal reaches the processes of a run at different batches, and if one left alone, the others would wait for it in
    their next collective. So each process leaves its loop by itself, and all agree at its end. Every process must run
    the loop, with any number of items.

    Raises:
        Stopped: a stop was requested in any process. All processes raise it.
    """
    for item in items:
        if stop_requested():
            break
        yield item
    stop_together()


def stop_agreed() -> bool:
    """Return whether any process was asked to stop. Every process must call this at the same point."""
    if world_size() > 1 and _state["world"] is not dist.group.WORLD:  # one group of hosts for each process group
        _state["world"], _state["hosts"] = dist.group.WORLD, host_group()
    if on_any(stop_requested(), _state["hosts"] if world_size() > 1 else None):
        _state["requested"] = _state["answered"] = True
    return _state["answered"]


def stop_together() -> None:
    """Raise Stopped on all processes if one was asked to stop. Every process must call this at the same point."""
    if stop_agreed():
        raise Stopped("a stop was requested")
