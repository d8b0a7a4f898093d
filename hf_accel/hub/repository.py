"""Uploads to the Hub: one commit at a time, never half of one, in the background while training runs."""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..utils.causes import causes
from ..utils.writing import write_json

logger = logging.getLogger(__name__)

Files = Mapping[str, Path | bytes]
"""What to upload: for each path in the repository a file, or its content."""

MARKER_NAME = "pushed.json"
"""The note of what was uploaded: it tells a relaunch what is left to do and which of the remote files are ours."""

MODEL_FILES = ("*config.json", "model*.safetensors", "model*.safetensors.index.json", "*.py")
"""The files of a checkpoint that open as a model. All others are for resuming, and this list keeps them here."""

ENGINE_SCRIPTS = ("zero_to_fp32.py",)
STATE_FOLDER = "last-checkpoint"
"""Folder of the repository that holds a checkpoint with the optimizer's state; the name is the Trainer's."""

WAITS = (5.0, 20.0, 60.0)
"""Seconds before the second, third and fourth attempt, where somebody waits for the result."""

TIMEOUT = (10.0, 300.0, 300.0, 300.0)
"""Seconds to connect, read, write and get a connection. huggingface_hub itself has no limit."""

TEMPORARY = (408, 409, 412, 423, 425, 429)
"""The 4xx answers that another attempt may not meet."""


T = TypeVar("T")


class PushFailed(RuntimeError):
    """An upload failed, and another attempt may succeed."""


class PushRefused(PushFailed):
    """The Hub refuses an upload for its token, name, licence or size. Another attempt is no use."""


class HubRepository:
    """A model repository that belongs to a run.

    Args:
        name: "user/name", or "name" in the account of the token.
        private: whether a repository that does not exist yet becomes private.
        folder: the folder on this machine for the note of what was uploaded and for what waits.
    """

    def __init__(self, name: str, private: bool, folder: Path):
        self.name, self.private, self.folder, self.api = name, private, folder, HfApi()
        self._is_open = False
        self._pushing = threading.RLock()  # One commit is made after the other.
        self._last: Future[None] | None = None

    @property
    def repo_id(self) -> str | None:
        """The full id, or None while the account of the token is not known because the Hub was not asked."""
        known = self.marker().get("repo_id")
        return self.name if "/" in self.name else known

    def open(self) -> str:
        """Make sure that the repository exists, and return its id.

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
        """Return {"repo_id", "files": {path: sha256, or None if it may be there}, "commit", "url"}, or {}."""
        path = self.folder / MARKER_NAME
        found = json.loads(path.read_text()) if path.exists() else {}
        same = found.get("repo_id", "") == self.name or found.get("repo_id", "").split("/")[-1] == self.name
        return found if same else {}

    def _write_marker(self, values: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / MARKER_NAME, values)

    def holds(self, files: Files) -> bool:
        """Whether the last successful push was of exactly these files."""
        return self.marker().get("files") == _digests(_additions(files))

    def push(self, files: Files, message: str) -> str:
        """Make one commit after which the repository holds these files and no other file of an earlier push.

        Files that others put there stay. Blobs that an interrupted push had uploaded are not sent again.

        Returns:
            The URL of the repository.

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
        # This is written first, because the commit may be made and the answer lost.
        unsure = {**dict.fromkeys(files), **dict.fromkeys(before["files"])}
        self._write_marker({"repo_id": repo_id, "files": unsure})
        operations = [*(CommitOperationDelete(path) for path in sorted(stale)), *additions.values()]
        commit = self.api.create_commit(repo_id, operations, commit_message=message)
        url = f"{self.api.endpoint}/{repo_id}"
        self._write_marker({"repo_id": repo_id, "files": _digests(additions), "commit": commit.oid, "url": url})
        return url

    def push_later(self, make_files: Callable[[str], Files], message: str, folder: Path) -> Future[None]:
        """Push in the background, and drop what still waits for that.

        A failure is a warning in the log: the next push brings what this one did not. The thread is a daemon, unlike
        those of `HfApi.run_as_future`: a run that stops or fails does not wait for an upload that hangs.

        Args:
            make_files: takes the repository's id and returns the files.
            folder: holds files of the push, and is removed after it.
        """
        self.drop_waiting()
        self._last = Future()
        self._last.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))
        arguments = (self._last, make_files, message)
        threading.Thread(target=self._push_in_turn, args=arguments, name="push to the Hub", daemon=True).start()
        return self._last

    def _push_in_turn(self, job: Future[None], make_files: Callable[[str], Files], message: str) -> None:
        with self._pushing:
            if not job.set_running_or_notify_cancel():  # It was dropped while it waited.
                return
            try:
                self.push(make_files(self.repo_id or self.open()), message)
            except Exception as error:  # Nobody would see an error of a thread.
                logger.warning("Not pushed to %s: %s (%s). The next checkpoint tries again", self.name, message, error)
            job.set_result(None)

    def drop_waiting(self) -> None:
        """Forget the push that waits, because something newer is about to be pushed. One under way goes on."""
        if self._last:
            self._last.cancel()


def patiently(act: Callable[[], T]) -> T:
    """Call `act`, again after each PushFailed, and return its result. Raises PushFailed, PushRefused."""
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
    """Return the error of an upload as one of ours, from the chain of causes that huggingface_hub wraps it in."""
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
    # A ValueError is a card that the Hub finds invalid, but an answer that is no JSON comes from something in between.
    refused = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    text = "; because of ".join(f"{type(link).__name__}: {' '.join(str(link).split())}" for link in (error, chain[-1]))
    return (PushRefused if refused else PushFailed)(text if len(chain) > 1 else text.partition("; because")[0])


def _additions(files: Files) -> dict[str, CommitOperationAdd]:
    return {
        path: CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in files.items()
    }


def _digests(additions: Mapping[str, CommitOperationAdd]) -> dict[str, str]:
    return {path: addition.upload_info.sha256.hex() for path, addition in additions.items()}


def stage(checkpoint: Path, folder: Path, optimizer: bool) -> dict[str, Path]:
    """Make hard links in `folder` to the files of a checkpoint that are to be uploaded, as it may be removed meanwhile.

    Args:
        optimizer: whether the whole checkpoint is uploaded, too, under STATE_FOLDER.

    Returns:
        For each path in the repository a link, or a copy where the file system has no links.
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
