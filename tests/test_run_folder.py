"""What is resumed from, what is removed and when, and what is said where nothing can be written."""

import errno
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_accel.run_folder import (
    WriteFailed,
    damage,
    last_complete_checkpoint,
    remove_interrupted,
    remove_old,
    seal,
    writing,
)

SHARD = "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def checkpoint(output: Path, step: int, sealed: bool = True) -> Path:
    folder = output / f"checkpoint-{step}"
    for name, text in (("model.safetensors", "weights"), (SHARD, "moments")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if sealed:
        seal(folder, {"step": step})
    return folder


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


def test_a_checkpoint_torn_by_a_kill_is_not_resumed_from(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        checkpoint(tmp_path, step, sealed=step < 100)
    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "checkpoint-of-mine" / "run_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert "checkpoint-100/run_state.json" in str(damage(tmp_path / "checkpoint-100"))


@pytest.mark.parametrize("name", ["model.safetensors", SHARD, "run_state.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_checkpoint_that_was_damaged_later_is_not_resumed_from_and_the_file_is_named(tmp_path, name, how):
    whole, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert damage(torn) is None and last_complete_checkpoint(tmp_path) == torn
    if how == "missing":
        (torn / name).unlink()
    else:
        (torn / name).write_bytes((torn / name).read_bytes()[:-3])
    assert str(torn / name) in str(damage(torn))
    assert last_complete_checkpoint(tmp_path) == whole


def test_checkpoints_of_earlier_versions_have_no_sizes_and_are_resumed_from(tmp_path):
    (checkpoint(tmp_path, 1) / "run_state.json").write_text(json.dumps({"step": 1}))
    assert last_complete_checkpoint(tmp_path) is not None


def test_no_complete_checkpoint_makes_room_for_one_that_is_not(tmp_path):
    # As after a SIGTERM whose checkpoint-13 was not finished in time
    for step in (8, 10, 13):
        checkpoint(tmp_path, step, sealed=step < 13)
    remove_interrupted(tmp_path, 20)
    assert names(tmp_path) == {"checkpoint-8", "checkpoint-10"}
    checkpoint(tmp_path, 20, sealed=False)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    seal(tmp_path / "checkpoint-20", {"step": 20})
    remove_old(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-20"}


def test_a_damaged_one_is_no_reason_to_remove_a_complete_one(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-6" / SHARD).unlink()
    (tmp_path / "checkpoint-8" / SHARD).unlink()
    remove_interrupted(tmp_path, 6)  # written anew, of nothing but new files
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-8"}
    checkpoint(tmp_path, 6)
    remove_old(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-6"}


def of_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)


def of_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path)


@pytest.mark.parametrize("save", [of_torch, of_safetensors])
def test_whoever_saves_what_cannot_be_written_is_named_with_the_path(save, tmp_path):
    path, limits = tmp_path / "weights", resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(WriteFailed) as caught, writing(path, "Do this"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(rf"{path} cannot be written \([\d,]+ MB are free there\): .*\. Do this$", str(caught.value))


def test_an_error_without_a_path_gets_one_and_others_pass(tmp_path):
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
def test_who_reads_too_is_told_of_a_full_disk(error, tmp_path):
    with pytest.raises(WriteFailed, match=r"run .*\. Do this"), writing(tmp_path / "run", "Do this", reads_too=True):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), SafetensorError("Error while deserializing header")]
)
def test_who_reads_too_hears_of_what_cannot_be_read_as_it_is(error, tmp_path):
    with pytest.raises(type(error)) as caught, writing(tmp_path, "Do this", reads_too=True):
        raise error
    assert caught.value is error
