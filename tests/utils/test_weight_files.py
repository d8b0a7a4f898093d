"""Weight files that cannot be read are named with their cause and a remedy, by every task that opens them."""

import argparse
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from hf_accel.checkpoints import read_checkpoint, stated_licence
from hf_accel.evaluation import load_encoder, load_processor
from hf_accel.utils.weight_files import opening, read_tensors, refuse_pointers
from tests.tasks.test_export import export

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
TENSORS = {"a": torch.arange(2000.0), "b": torch.ones(2, 2)}
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])


def saved(value: Any, path: Path, **options: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(value, path)
    else:
        torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_tensors_are_found_with_settings_beside_them(tmp_path, name, key):
    if name.endswith("pth"):
        settings = {"args": argparse.Namespace(lr=1.0, betas=(0.9, 0.95)), "epoch": 3}
        value = {**(TENSORS if key is None else {key: TENSORS}), **settings}
    else:
        value = TENSORS
    found = read_tensors(saved(value, tmp_path / name))
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_takes_no_download_is_named_with_a_remedy(tmp_path, monkeypatch, number):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def download(*_, **__):
        try:
            raise OSError(number, os.strerror(number), str(cache / "models--ann--vit"))
        except PermissionError as error:  # as transformers does
            raise OSError("Check cache directory permissions.\nCommon causes: 1) ...") from error

    for module in ("reading", "licence", "processor"):
        monkeypatch.setattr(f"hf_accel.checkpoints.{module}.cached_file", download)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", download)
    path, remedy = f"'{cache}/models--ann--vit'", f"set HF_HOME, or HF_HUB_CACHE (now {cache}), to a folder that can"
    end = f"cannot be written: [Errno {number}] {os.strerror(number)}: {path}; {remedy} be written"
    if number == errno.ENOSPC:
        end = f"No space left on device: {path}; make room in {cache}, or set HF_HUB_CACHE to a folder on another disk"
    for open_from_hub in (read_checkpoint, load_encoder, load_processor, lambda name: stated_licence(name, {})):
        with pytest.raises(ValueError) as error:
            open_from_hub("ann/vit")
        assert str(error.value).endswith(end) and "\n" not in str(error.value)


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer.pth": (lambda path: path.write_text(POINTER), "only points to a file in Git LFS: run `git lfs pull`"),
    "pointer.safetensors": (lambda path: path.write_text(POINTER), "only points to a file in Git LFS"),
    "cut.pth": (lambda path: cut(saved(TENSORS, path)), "cut short or damaged"),
    "old_cut.pth": (
        lambda path: cut(saved(TENSORS, path, _use_new_zipfile_serialization=False)),
        "cut short or damaged",
    ),
    "cut.safetensors": (lambda path: cut(saved(TENSORS, path)), r"cut short or damaged \(.*file not fully covered"),
    "empty.pth": (lambda path: path.touch(), "cut short or damaged"),
    "empty.safetensors": (lambda path: path.touch(), "cut short or damaged"),
    "text.pth": (lambda path: path.write_text("hello"), "cannot be opened"),
    "numpy.pth": (lambda path: saved({"model": TENSORS, "best": np.float64(1)}, path), r"objects of numpy.*\.scalar"),
    "module.pth": (lambda path: saved(torch.nn.Linear(1, 1), path), "objects of torch.nn.modules.linear.Linear"),
    "other.pth": (lambda path: saved({"epoch": 3}, path), "holds no tensors by name, but names such as epoch"),
    "list.pth": (lambda path: saved([torch.ones(1)], path), "holds no tensors by name, but <class 'list'>"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name):
    make, message = UNREADABLE[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / name)
    with pytest.raises(SystemExit, match=f"^SettingError: checkpoint='.*{name}': .*{message}"):
        export(tmp_path / name, tmp_path / "out", "accel_vit", "model_config.num_attention_heads=2")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    Dinov2Model(Dinov2Config(**SIZES, image_size=16, patch_size=4)).save_pretrained(folder)
    return folder


def as_bin(folder: Path, damage: Callable[[Path], Any]) -> None:
    """The same weights as older versions of transformers wrote them, then `damage`."""
    weights = folder / "model.safetensors"
    torch.save(read_tensors(weights), folder / "pytorch_model.bin")
    weights.unlink()
    damage(folder / "pytorch_model.bin")


DAMAGED_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda folder: cut(folder / "model.safetensors"), "cut short or damaged"),
    "pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "model.safetensors in .*Git LFS"),
    "bin cut": (lambda folder: as_bin(folder, cut), "cut short or damaged"),
    "bin pointer": (lambda folder: as_bin(folder, lambda path: path.write_text(POINTER)), "pytorch_model.bin in .*LFS"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "configuration cut": (lambda folder: cut(folder / "config.json"), r"cannot be opened: .*"),
    "configuration pointer": (lambda folder: (folder / "config.json").write_text(POINTER), "config.json in .*Git LFS"),
    "wrong type": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "dinov2", "hidden_size": "x"}'),
        "expected int, got str",
    ),
    "other size": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "mlp_ratio": 2})
        ),
        r"encoder\.layer\.0\.mlp\.fc1",
    ),
}


@pytest.mark.parametrize("name", DAMAGED_FOLDERS)
def test_a_damaged_folder_says_why(encoder, tmp_path, name):
    make, message = DAMAGED_FOLDERS[name]
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    make(folder)
    with pytest.raises(ValueError, match=message):
        load_encoder(str(folder))
    with pytest.raises(SystemExit, match=f"^SettingError: checkpoint='.*encoder': .*{message}"):
        export(folder, tmp_path / "out", "accel_vit")


def test_a_damaged_processor_says_why(encoder, tmp_path):
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    (folder / "preprocessor_config.json").write_text('{"image_')
    with pytest.raises(ValueError, match=r"image processor cannot be opened: .*Unterminated string"):
        load_processor(str(folder))


def test_foreign_code_is_refused_without_a_question(encoder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(own))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_encoder(str(folder))


def test_what_can_be_opened_passes(encoder):
    refuse_pointers(encoder)
    with opening(str(encoder)):
        assert load_encoder(str(encoder)).config.hidden_size == 16


def test_an_error_keeps_its_innermost_cause(tmp_path):
    with pytest.raises(ValueError, match="outer; because of inner"), opening("me/nowhere"):
        try:
            raise OSError("inner")
        except OSError as error:
            raise RuntimeError("outer") from error
