"""Request a stop at SIGTERM, say so at once, and end a run that does not answer the request.

The loops of a run answer by calling `stopping.stop_requested()` between their batches.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from . import is_main
from .stopping import clear_stop, request_stop, seconds_since_look, stop_answered

STOPPED = 128 + signal.SIGTERM
"""The exit code of a run that was stopped, as a shell reports it for a process that SIGTERM has ended."""

PATIENCE = 30.0
"""Seconds after which a run that does not answer a SIGTERM ends."""

SAME_SIGNAL, SAME_SIGNAL_OF_LAUNCHER = 0.5, 5.0
"""Seconds within which another SIGTERM counts as the same one. `timeout` sends one to the process and one to its group,
and torch's launcher passes on a signal that the processes have already got."""

_LEAVE, _LAUNCHER_ENDED = 0, 255  # messages beside the numbers of signals

_watches: list["_Watch"] = []


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Let SIGTERM request a stop in this context.

    Python handles signals in the main thread only. In another thread, as in a notebook's server, this changes nothing.
    """
    clear_stop()
    if threading.current_thread() is not threading.main_thread():
        try:
            yield
        finally:
            clear_stop()
        return
    watch = _Watch()
    before = signal.signal(signal.SIGTERM, lambda *_: request_stop())
    wakeup = signal.set_wakeup_fd(watch.letterbox.fileno(), warn_on_full_buffer=False)
    _watches.append(watch)
    watch.start()
    try:
        yield
    finally:
        _watches.remove(watch)
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        watch.leave()
        clear_stop()


def launcher_ended() -> bool:
    """Request a stop because the launcher is gone, and return whether there is a run to stop."""
    for watch in _watches:
        watch.letterbox.send(bytes([_LAUNCHER_ENDED]))
    return bool(_watches)


class _Watch(threading.Thread):
    """Receives signals while the main thread waits for a device or another process.

    Python's own handlers run only after such a wait.
    """

    def __init__(self):
        super().__init__(name="sigterm", daemon=True)
        self.inbox, self.letterbox = socket.socketpair()
        self.letterbox.setblocking(False)
        self.asked: float | None = None
        by_launcher = "TORCHELASTIC_RUN_ID" in os.environ
        self.same_signal = SAME_SIGNAL_OF_LAUNCHER if by_launcher else SAME_SIGNAL

    def run(self) -> None:
        while True:
            left = self._seconds_left()
            if left == 0:
                _end(f"SIGTERM was not answered for {PATIENCE:g} s")
            self.inbox.settimeout(left)
            try:
                letters = self.inbox.recv(64)
            except TimeoutError:
                continue
            if _LEAVE in letters:
                return
            for letter in letters:
                self._read(letter)

    def _read(self, letter: int) -> None:
        if letter not in (signal.SIGTERM, _LAUNCHER_ENDED):  # another signal, which has its own handler
            return
        if self.asked is None:
            self.asked = time.monotonic()
            request_stop()
            what = "SIGTERM has arrived" if letter == signal.SIGTERM else "The launcher has ended"
            if is_main():
                _tell(f"{what}: the run saves a checkpoint after this step and stops. Another SIGTERM ends it at once")
        elif letter == signal.SIGTERM and time.monotonic() - self.asked > self.same_signal:
            _end("SIGTERM has arrived again")

    def _seconds_left(self) -> float | None:
        """Return the seconds that are left to answer, or None if no answer is due."""
        if self.asked is None or stop_answered():
            return None
        return max(0.0, PATIENCE - min(time.monotonic() - self.asked, seconds_since_look()))

    def leave(self) -> None:
        self.letterbox.setblocking(True)
        self.letterbox.send(bytes([_LEAVE]))
        self.join()
        self.inbox.close()
        self.letterbox.close()


def _end(why: str) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    _tell(f"{why}: the run ends without saving. The same command resumes from the last checkpoint", sys.stderr)
    os._exit(STOPPED)


def _tell(text: str, file: TextIO | None = None) -> None:
    """Print, and wait for at most a second, because the run may hang at a full pipe."""
    thread = threading.Thread(target=print, args=[text], kwargs={"file": file, "flush": True}, daemon=True)
    thread.start()
    thread.join(1)


# A forked process shares the letterbox. SIGTERM is blocked until the child no longer writes its own signals into it.

_masks = threading.local()


def _before_fork() -> None:
    _masks.saved = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if _watches else set())


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.saved)


def _after_fork_in_child() -> None:
    if _watches:
        _watches.clear()
        signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.saved)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
