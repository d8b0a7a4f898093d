"""A stop that was requested from outside, as by SIGTERM, and that long loops answer between their batches."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from .distributed import host_group, on_any, world_size

Item = TypeVar("Item")

_state: dict[str, Any] = {"requested": False, "world": None, "hosts": None}


class Stopped(RuntimeError):
    """The work was left unfinished because a stop was requested."""


def request_stop() -> None:
    """Ask for a stop. A signal handler may call this: it only sets a flag."""
    _state["requested"] = True


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _state["requested"]


def clear_stop() -> None:
    """Forget a request, as at the start of a run."""
    _state["requested"] = False


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


def stop_together() -> None:
    """Raise Stopped on all processes if one was asked to stop. Every process must call this at the same point."""
    if on_any(stop_requested(), _hosts()):
        raise Stopped("a stop was requested")


def _hosts() -> Any:
    """The host group of the present process group, made once for each."""
    if world_size() == 1:
        return None
    if _state["world"] is not dist.group.WORLD:
        _state["world"], _state["hosts"] = dist.group.WORLD, host_group()
    return _state["hosts"]
