"""A stop that was requested from outside, as by SIGTERM, and that long loops answer between their batches."""

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
    """Ask for a stop. A signal handler may call this: it only sets a flag."""
    _state["requested"] = True


def stop_requested() -> bool:
    """Whether this process was asked to stop. What calls this often shows that the process is not stuck."""
    _state["looked"] = time.monotonic()
    return _state["requested"]


def seconds_since_look() -> float:
    """Since this process last looked at whether it was asked to stop."""
    return time.monotonic() - _state["looked"]


def stop_answered() -> bool:
    """Whether the processes have agreed to stop, and do what is left to do."""
    return _state["answered"]


def clear_stop() -> None:
    """Forget a request, as at the start of a run."""
    _state["requested"] = _state["answered"] = False


def until_stopped(items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items` until a stop is requested.

    A signal reaches the processes of a run at different batches, and a process that left alone would let the others
    wait in their next collective. So each one leaves its loop by itself, and at the end of the loop all agree. Every
    process must run the loop, with any number of items.

    Raises:
        Stopped: a stop was requested in any process; on all of them.
    """
    for item in items:
        if stop_requested():
            break
        yield item
    stop_together()


def stop_agreed() -> bool:
    """Whether a process was asked to stop, and so all of them are. Every process must call this at the same point."""
    if world_size() > 1 and _state["world"] is not dist.group.WORLD:  # one group of hosts for each process group
        _state["world"], _state["hosts"] = dist.group.WORLD, host_group()
    if on_any(stop_requested(), _state["hosts"] if world_size() > 1 else None):
        _state["requested"] = _state["answered"] = True
    return _state["answered"]


def stop_together() -> None:
    """Raise Stopped on all processes if one was asked to stop. Every process must call this at the same point."""
    if stop_agreed():
        raise Stopped("a stop was requested")
