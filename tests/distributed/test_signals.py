"""SIGTERM requests a stop and is announced at once; a second one, or one without an answer, ends the process."""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_accel.distributed import signals
from hf_accel.distributed.signals import STOPPED, launcher_ended, stopping_on_sigterm
from hf_accel.distributed.stopping import request_stop, stop_agreed, stop_requested

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests fork")


class Run:
    """A process that does `act` while SIGTERM requests a stop; its output goes to a file."""

    def __init__(self, folder: Path, act: Callable[[], None]):
        self.file = folder / "output"
        self.file.touch()
        self.process = multiprocessing.get_context("fork").Process(target=self._live, args=[act], daemon=True)
        self.process.start()
        self.wait_for("ready")

    def _live(self, act: Callable[[], None]) -> None:
        sys.stdout = sys.stderr = self.file.open("w")
        with stopping_on_sigterm():
            print("ready", flush=True)
            act()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.file.read_text():
            assert time.monotonic() < deadline, self.file.read_text()
            time.sleep(0.01)

    def terminate(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGTERM)

    def end(self) -> int | None:
        self.process.join(30)
        return self.process.exitcode


def look_until_asked(then: Callable[[], Any] = lambda: None) -> None:
    while not stop_requested():
        time.sleep(0.01)
    then()


def compute_without_end() -> None:
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # as a device would be waited for: Python handles no signals


def look_without_end() -> None:
    while True:
        stop_requested()
        time.sleep(0.01)


def test_sigterm_requests_a_stop_and_is_announced(capsys):
    handler, wakeup = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with stopping_on_sigterm():
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
        deadline = time.monotonic() + 10
        while not (said := capsys.readouterr().out):
            assert time.monotonic() < deadline
        assert said.startswith("SIGTERM has arrived: the run saves a checkpoint")
    assert not stop_requested()
    assert signal.getsignal(signal.SIGTERM) is handler and signal.set_wakeup_fd(-1) == wakeup == -1


def test_sigterm_is_announced_while_the_main_thread_is_busy(tmp_path):
    run = Run(tmp_path, compute_without_end)
    run.terminate()
    run.wait_for("SIGTERM has arrived")
    run.process.kill()


def test_a_second_sigterm_ends_a_run_at_once(tmp_path):
    run = Run(tmp_path, compute_without_end)
    run.terminate()
    run.wait_for("SIGTERM has arrived")
    time.sleep(signals.SAME_SIGNAL + 0.1)
    run.terminate()
    assert run.end() == STOPPED == 143
    assert "SIGTERM has arrived again: the run ends without saving" in run.file.read_text()


def test_a_sigterm_sent_twice_in_a_moment_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "SAME_SIGNAL", 60.0)
    run = Run(tmp_path, lambda: look_until_asked(lambda: (time.sleep(0.3), sys.exit(7))))
    run.terminate()
    run.wait_for("SIGTERM has arrived")
    run.terminate()
    assert run.end() == 7


def test_torchs_launcher_may_hand_a_sigterm_on_late(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stopping_on_sigterm():
        assert signals._watches[0].same_signal == 5


def test_a_sigterm_without_an_answer_ends_a_run(tmp_path, monkeypatch):
    assert signals.PATIENCE == 30
    monkeypatch.setattr(signals, "PATIENCE", 0.5)
    started, run = time.monotonic(), Run(tmp_path, compute_without_end)
    run.terminate()
    assert run.end() == STOPPED and time.monotonic() - started > 0.5
    assert "SIGTERM was not answered for 0.5 s: the run ends without saving" in run.file.read_text()


def test_a_run_that_still_looks_is_left_to_reach_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.3)
    run = Run(tmp_path, look_without_end)
    run.terminate()
    time.sleep(1)
    assert run.process.is_alive()
    run.process.kill()


def test_a_run_that_has_answered_has_time_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    run = Run(tmp_path, lambda: look_until_asked(lambda: (stop_agreed(), time.sleep(1), sys.exit(7))))
    run.terminate()
    assert run.end() == 7


def test_children_end_with_a_run_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.2)

    def act():
        multiprocessing.current_process()._config["daemon"] = False  # pyright: ignore[reportAttributeAccessIssue]
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600], daemon=True)
        child.start()
        print(f"child {child.pid}.", flush=True)
        compute_without_end()

    run = Run(tmp_path, act)
    run.wait_for(".")
    child = int(run.file.read_text().split("child ")[1].split(".")[0])
    run.terminate()
    assert run.end() == STOPPED
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_ended_launcher_requests_a_stop_and_is_no_sigterm(tmp_path):
    def act():
        assert launcher_ended()
        look_until_asked()
        time.sleep(signals.SAME_SIGNAL + 0.1)
        launcher_ended()
        time.sleep(0.2)
        sys.exit(7)

    run = Run(tmp_path, act)
    assert run.end() == 7 and "The launcher has ended: the run saves" in run.file.read_text()
    assert not launcher_ended()  # no run is here


def test_a_signal_to_a_forked_child_is_none_to_the_run(capsys):
    with stopping_on_sigterm():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[1])
        child.start()
        os.kill(child.pid or 0, signal.SIGTERM)
        child.join()
        assert not stop_requested() and not capsys.readouterr().out


def test_in_another_thread_sigterm_stays_what_it_was():
    handler, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with stopping_on_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))
            request_stop()
            found.append(stop_requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [handler, True] and not stop_requested()  # the next run in this process is not stopped
