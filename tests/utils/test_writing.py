"""An error of writing names what could not be written, and what to do."""

import errno
import json
import re
import resource
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_accel.utils.writing import WriteFailed, write_json, writing


def of_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)


def of_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path)


@pytest.mark.parametrize("save", [of_torch, of_safetensors])
def test_error_of_a_library_that_saves_names_the_path(save, tmp_path):
    path, limits = tmp_path / "weights", resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(WriteFailed) as caught, writing(path, "Do this"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(rf"{path} cannot be written \([\d,]+ MB are free there\): .*\. Do this$", str(caught.value))


def test_write_error_gets_a_path_and_others_pass(tmp_path):
    path = tmp_path / "not" / "yet"
    message = r"not/yet cannot be written .*No space left on device\. Do this"
    with pytest.raises(WriteFailed, match=message), writing(path, "Do this"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError, match=r"^Connection closed"), writing(path, "Do this"):
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_full_disk_is_named_where_files_are_also_read(error, tmp_path):
    with pytest.raises(WriteFailed, match=r"run .*\. Do this"), writing(tmp_path / "run", "Do this", reads_too=True):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), SafetensorError("Error while deserializing header")]
)
def test_error_of_reading_passes_unchanged(error, tmp_path):
    with pytest.raises(type(error)) as caught, writing(tmp_path, "Do this", reads_too=True):
        raise error
    assert caught.value is error


def test_a_write_error_is_wrapped_once(tmp_path):
    error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    with pytest.raises(WriteFailed) as caught, writing(tmp_path, "Outer"), writing(tmp_path / "run", "Inner"):
        raise error
    assert str(caught.value).endswith("Inner") and "Outer" not in str(caught.value)


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr("os.replace", MagicMock(side_effect=OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
