"""The time that a processor computes, which other work on the machine hardly changes."""

import os


def cpu_seconds() -> float:
    """Return the processor seconds of this process and its children that have ended, such as compilers and workers."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
