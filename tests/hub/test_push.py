"""Pushes without a network: staging of checkpoints, the queue of uploads, and kinds of failures."""

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hf_accel.hub import HubRepository, PushFailed, PushRefused
from hf_accel.hub import repository as push
from hf_accel.hub.repository import patiently, push_failure, stage

MODEL = ["config.json", "model.safetensors", "modeling_accel_vit.py", "preprocessor_config.json"]
STATE = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "run_state.json"]
ENGINE = ["zero_to_fp32.py", "latest", "global_step2/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/a.distcp"]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-2"
    for name in [*MODEL, *STATE, *ENGINE]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("links", [True, False])
def test_staged_model_outlives_its_checkpoint(checkpoint, tmp_path, monkeypatch, links):
    if not links:

        def fail(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", fail)
    files = stage(checkpoint, tmp_path / "staged", optimizer=False)
    assert sorted(files) == sorted(MODEL)
    assert all(path.samefile(checkpoint / name) == links for name, path in files.items())
    for path in checkpoint.rglob("*"):
        path.unlink() if path.is_file() else None
    assert {name: path.read_text() for name, path in files.items()} == {name: name for name in MODEL}


def test_optimizer_is_staged_in_its_own_folder_if_asked_for(checkpoint, tmp_path):
    files = stage(checkpoint, tmp_path / "staged", optimizer=True)
    whole = {f"last-checkpoint/{name}" for name in [*MODEL, *STATE, *ENGINE]}
    assert set(files) == {*MODEL, *whole}


def http_error(status: int) -> HfHubHTTPError:
    response = httpx2.Response(status, request=httpx2.Request("POST", "http://hub"))
    return HfHubHTTPError(f"{status} from the server", response=response)


def wrapped(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (http_error(401), PushRefused, "401"),
        (wrapped(http_error(403)), PushRefused, "403"),
        (http_error(429), PushFailed, "429"),
        (http_error(412), PushFailed, "412"),
        (http_error(503), PushFailed, "503"),
        (wrapped(httpx2.ReadError("reset by peer")), PushFailed, "reset by peer"),
        (httpx2.ConnectTimeout("too long"), PushFailed, "ConnectTimeout: too long"),
        (HFValidationError("bad name"), PushRefused, "bad name"),
        (ValueError("Invalid metadata in README.md"), PushRefused, "Invalid metadata"),
        (json.JSONDecodeError("no JSON", "<html>", 0), PushFailed, "no JSON"),
    ],
)
def test_refusals_differ_from_failures_that_may_pass(error, kind, words):
    failure = push_failure(error)
    assert type(failure) is kind and words in str(failure)


def test_patience_tries_again_but_not_against_a_refusal(monkeypatch):
    waited, calls = [], []
    monkeypatch.setattr(push.time, "sleep", waited.append)

    def act(*errors):
        calls.append(1)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return "done"

    assert patiently(lambda: act(PushFailed("1"), PushFailed("2"))) == "done"
    assert waited == [5.0, 20.0]
    calls.clear()
    with pytest.raises(PushRefused):
        patiently(lambda: act(PushRefused("token")))
    assert len(calls) == 1
    calls.clear()
    with pytest.raises(PushFailed, match="4"):
        patiently(lambda: act(*(PushFailed(str(number)) for number in range(1, 9))))
    assert len(calls) == 4


@pytest.fixture
def hub(tmp_path) -> Any:
    return HubRepository("ann/model", private=False, folder=tmp_path / ".hub")


@pytest.fixture
def pushed(hub, monkeypatch) -> Iterator[list[tuple[str, dict]]]:
    """The pushes that have begun, the first of which hangs until `go_on` of the repository is set."""
    begun, hub.going, hub.go_on = [], threading.Event(), threading.Event()

    def slow(files, message):
        begun.append((message, dict(files)))
        hub.going.set()
        assert hub.go_on.wait(20)

    monkeypatch.setattr(hub, "push", slow)
    yield begun
    hub.go_on.set()


def test_newest_push_waits_and_older_ones_give_way(hub, pushed):
    folders = {name: hub.folder / name for name in ("first", "second", "third")}
    jobs = []
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        jobs.append(hub.push_later(lambda repo_id, name=name: {f"{repo_id}/{name}": b""}, name, folder))
        assert hub.going.wait(20)  # submitting does not wait: the first upload hangs until go_on
    assert not folders["second"].exists() and folders["third"].exists()
    hub.go_on.set()
    jobs[-1].result(20)
    with hub._pushing:  # The thread clears up before it lets go.
        assert not any(folder.exists() for folder in folders.values())
    assert pushed == [("first", {"ann/model/first": b""}), ("third", {"ann/model/third": b""})]


def test_waiting_push_can_be_dropped(hub, pushed):
    first = hub.push_later(lambda _: {}, "first", hub.folder / "first")
    assert hub.going.wait(20)
    (hub.folder / "second").mkdir(parents=True)
    second = hub.push_later(lambda _: {}, "second", hub.folder / "second")
    hub.drop_waiting()
    assert second.cancelled() and not (hub.folder / "second").exists()
    hub.go_on.set()
    first.result(20)
    assert pushed == [("first", {})]


def test_failure_in_the_background_is_a_warning(hub, monkeypatch, caplog):
    def fail(files, message):
        raise PushFailed("the line is cut")

    monkeypatch.setattr(hub, "push", fail)
    with caplog.at_level(logging.WARNING):
        hub.push_later(lambda _: {}, "Step 2", hub.folder / "staged").result(20)
    assert "Not pushed to ann/model: Step 2 (the line is cut)" in caplog.text


def test_note_of_another_repository_does_not_count(hub, tmp_path):
    hub._write_marker({"repo_id": "ann/model", "files": {"a": None}})
    assert HubRepository("model", False, hub.folder).repo_id == "ann/model"
    assert HubRepository("bob/model", False, hub.folder).marker() == {}
    assert HubRepository("other", False, hub.folder).repo_id is None
