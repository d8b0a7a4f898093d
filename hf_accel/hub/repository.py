"""Uploads to the Hub: one commit at a time, never half of one, in the background while training runs."""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..utils.causes import causes

logger = logging.getLogger(__name__)

Files = Mapping[str, Path | bytes]
"""What to upload: path in the repository -> file, or content."""

MARKER_NAME = "pushed.json"
"""What was uploaded, so that a relaunch knows what is left to do and which of the remote files are ours."""

MODEL_FILES = ("*config.json", "model*.safetensors", "model*.safetensors.index.json", "*.py")
"""Of a checkpoint, what opens as a model. The rest is for resuming: by this list no optimizer state slips through."""

ENGINE_SCRIPTS = ("zero_to_fp32.py",)
STATE_FOLDER = "last-checkpoint"
"""Folder of the repository that holds a checkpoint with the optimizer's state; the name is the Trainer's."""

WAITS = (5.0, 20.0, 60.0)
"""Seconds before the second, third and fourth attempt of what somebody waits for."""

TIMEOUT = (10.0, 300.0, 300.0, 300.0)
"""Seconds to connect, read, write and get a connection. huggingface_hub itself would wait for ever."""

TEMPORARY = (408, 409, 412, 423, 425, 429)
"""Of the 4xx answers, those that another attempt may not meet."""


T = TypeVar("T")


class PushFailed(RuntimeError):
    """An upload did not get through; another attempt may."""


class PushRefused(PushFailed):
    """The Hub will not take it, however often it is tried: token, name, licence, or no room."""


class HubRepository:
    """A model repository that belongs to a run.

    Args:
        name: "user/name", or "name" in the account of the token.
        private: of a repository that is not there yet.
        folder: on this machine, for the marker and for what waits to be uploaded.
    """

    def __init__(self, name: str, private: bool, folder: Path):
        self.name, self.private, self.folder, self.api = name, private, folder, HfApi()
        self._is_open = False
        self._pushing = threading.Lock()  # commits one after the other
        self._queue = threading.Lock()
        self._waiting: tuple[Callable[[str], Files], str, Path] | None = None
        self._thread: threading.Thread | None = None

    @property
    def repo_id(self) -> str | None:
        """None while it is the token's account that is missing, and the Hub was not asked."""
        known = self.marker().get("repo_id")
        return self.name if "/" in self.name else known

    def open(self) -> str:
        """Make sure that the repository is there; its id.

        Raises:
            PushFailed, PushRefused
        """
        get_session().timeout = TIMEOUT
        try:
            # None leaves it to the organisation whether a new repository is private
            url = self.api.create_repo(self.name, private=self.private or None, exist_ok=True)
        except Exception as error:
            raise push_failure(error) from error
        self._is_open = True
        if self.marker().get("repo_id") != url.repo_id:
            self._write_marker({"repo_id": url.repo_id, "files": {}})
        return url.repo_id

    def marker(self) -> dict[str, Any]:
        """{"repo_id", "files": {path: sha256, or None if it may be there}, "commit", "url"} or {}."""
        path = self.folder / MARKER_NAME
        found = json.loads(path.read_text()) if path.exists() else {}
        same = found.get("repo_id", "") == self.name or found.get("repo_id", "").split("/")[-1] == self.name
        return found if same else {}

    def _write_marker(self, values: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{MARKER_NAME}.tmp"
        temporary.write_text(json.dumps(values, indent=1))
        os.replace(temporary, self.folder / MARKER_NAME)

    def holds(self, files: Files) -> bool:
        """Whether the last push that got through was of just these files."""
        return self.marker().get("files") == {path: _sha256(add) for path, add in _additions(files).items()}

    def push(self, files: Files, message: str) -> str:
        """One commit after which the repository holds these files, and of earlier pushes none besides. Its URL.

        What others put there stays. Blobs that an interrupted push had uploaded are not sent again.

        Raises:
            PushFailed, PushRefused
        """
        with self._pushing:
            if not self._is_open:
                self.open()
            try:
                return self._commit(files, message)
            except Exception as error:
                raise push_failure(error) from error

    def _commit(self, files: Files, message: str) -> str:
        get_session().timeout = TIMEOUT
        before = self.marker()
        repo_id, additions = before["repo_id"], _additions(files)
        stale = before["files"].keys() - files.keys()
        stale = stale & set(self.api.list_repo_files(repo_id)) if stale else stale
        # Now, as the commit may be made and the answer lost
        unsure = {**dict.fromkeys(files), **dict.fromkeys(before["files"])}
        self._write_marker({"repo_id": repo_id, "files": unsure})
        operations = [*(CommitOperationDelete(path) for path in sorted(stale)), *additions.values()]
        commit = self.api.create_commit(repo_id, operations, commit_message=message)
        digests = {path: _sha256(add) for path, add in additions.items()}
        url = f"{self.api.endpoint}/{repo_id}"
        self._write_marker({"repo_id": repo_id, "files": digests, "commit": commit.oid, "url": url})
        return url

    def push_later(self, make_files: Callable[[str], Files], message: str, folder: Path) -> None:
        """Push in the background; what waits already gives way.

        A failure is a warning in the log: the next push brings what this one did not.

        Args:
            make_files: repository's id -> files.
            folder: holds files of it, and is removed afterwards.
        """
        with self._queue:
            replaced, self._waiting = self._waiting, (make_files, message, folder)
            if self._thread is None:
                self._thread = threading.Thread(target=self._push_waiting, name="push to the Hub", daemon=True)
                self._thread.start()
        if replaced:
            shutil.rmtree(replaced[2], ignore_errors=True)

    def _push_waiting(self) -> None:
        while True:
            with self._queue:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._thread = None
                    return
            make_files, message, folder = job
            try:
                self.push(make_files(self.repo_id or self.open()), message)
            except Exception as error:  # of a thread nobody would see it
                logger.warning("Not pushed to %s: %s (%s). The next checkpoint tries again", self.name, message, error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def drop_waiting(self) -> None:
        """Forget what waits, as something newer is about to be pushed. What is under way goes on."""
        with self._queue:
            dropped, self._waiting = self._waiting, None
        if dropped:
            shutil.rmtree(dropped[2], ignore_errors=True)


def patiently(act: Callable[[], T]) -> T:
    """What `act` returns, after further attempts where those make sense. Raises PushFailed, PushRefused."""
    for wait in WAITS:
        try:
            return act()
        except PushRefused:
            raise
        except PushFailed as error:
            logger.warning("The Hub was not reached (%s). Trying again in %g s", error, wait)
            time.sleep(wait)
    return act()


def push_failure(error: Exception) -> PushFailed:
    """The error of an upload as one of ours, from the chain of causes that huggingface_hub wraps it in."""
    if isinstance(error, PushFailed):
        return error
    chain = causes(error)
    for link in chain:
        if isinstance(link, HfHubHTTPError) and 400 <= link.response.status_code < 500:
            status = link.response.status_code
            kind = PushFailed if status in TEMPORARY else PushRefused
            return kind(f"{status}: {' '.join((link.server_message or str(link)).split())}")
        if isinstance(link, HFValidationError):
            return PushRefused(str(link))
    # A card that the Hub finds invalid; an answer that is no JSON comes from something in between
    refused = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    text = "; because of ".join(f"{type(link).__name__}: {' '.join(str(link).split())}" for link in (error, chain[-1]))
    return (PushRefused if refused else PushFailed)(text if len(chain) > 1 else text.partition("; because")[0])


def _additions(files: Files) -> dict[str, CommitOperationAdd]:
    return {
        path: CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in files.items()
    }


def _sha256(addition: CommitOperationAdd) -> str:
    return addition.upload_info.sha256.hex()


def stage(checkpoint: Path, folder: Path, optimizer: bool) -> dict[str, Path]:
    """Hard links in `folder` to what is to be uploaded of a checkpoint, which may be removed meanwhile.

    Args:
        optimizer: also everything else of it, under STATE_FOLDER.

    Returns:
        Path in the repository -> link, or copy where the file system has no links.
    """
    shutil.rmtree(folder, ignore_errors=True)
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        is_model = any(fnmatch(name, pattern) for pattern in MODEL_FILES) and name not in ENGINE_SCRIPTS
        if not (optimizer or (is_model and path.parent == checkpoint)):
            continue
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, link)
        except OSError:  # another file system, or one without links
            shutil.copy2(path, link)
        if is_model and path.parent == checkpoint:
            files[name] = link
        if optimizer:
            files[f"{STATE_FOLDER}/{name}"] = link
    return files
