"""Test that packed shards hold what crops need, and that an interrupted packing is never taken for a whole."""

import io
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

from hf_accel.data import load_sources, packing
from hf_accel.data.cache import decode_at
from hf_accel.data.packing import PackedFolder
from hf_accel.data.sources import CorruptDataError, ImageSource
from tests.data.test_loader import folder, noise

SIDE = 30
SIZES = ((80, 60), (30, 40), (50, 90), (20, 20), (300, 40))
"""Widths and heights; the second and the fourth need no shrinking."""


def pack(path: Path, splits: dict[str, ImageSource], workers: int = 0, root: Path | None = None) -> PackedFolder:
    path.mkdir(exist_ok=True)
    packed = PackedFolder(path, {"images": {split: len(source) for split, source in splits.items()}})
    for split, source in splits.items():
        packed.add(split, source, SIDE, str(root or path), workers)
    packed.finish()
    return packed


def rows(path: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for file in sorted(path.glob(f"data/{split}-*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def small_shards(monkeypatch):
    """A batch has four images, and a shard has one or two batches."""
    monkeypatch.setattr(packing, "ROWS", 4)
    monkeypatch.setattr(packing, "SHARD_BYTES", 12_000)


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_large_images_are_shrunk_and_others_keep_their_bytes(extension, tmp_path):
    source = folder(tmp_path / "set", 10, SIZES, extension)
    for number, file in enumerate(sorted((tmp_path / "set").iterdir())):
        noise(number, *SIZES[number % 5], smooth=20).save(file, quality=95)
    packed = pack(tmp_path / "out", {"train": source}, root=tmp_path)
    found = rows(tmp_path / "out")
    assert [row["image"]["path"] for row in found] == [f"set/{number:03}.{extension}" for number in range(10)]
    sizes = ((40, 30), (30, 40), (30, 54), (20, 20), (120, 16))
    for index, row in enumerate(found):
        image = PIL.Image.open(io.BytesIO(content := row["image"]["bytes"]))
        assert image.size == sizes[index % 5]
        file = (tmp_path / row["image"]["path"]).read_bytes()
        if index % 5 in (1, 3):
            assert content == file
            continue
        expected = decode_at(source, index, source.open(index), image.height, image.width).numpy()
        error = np.asarray(image.convert("RGB")).astype(float) - expected
        assert image.format == "JPEG" and np.abs(error).mean() < 4 < 0.1 * expected.std()
    assert (packed.total("shrunk"), packed.total("images")) == (6, 10)
    files = [tmp_path / row["image"]["path"] for row in found]
    assert packed.total("original_bytes") == sum(file.stat().st_size for file in files)


def test_packed_labels_are_those_of_the_dataset(tmp_path):
    source, held = folder(tmp_path / "a", 9), folder(tmp_path / "b", 5)
    source.labels[4] = -1
    pack(tmp_path / "out", {"train": source, "validation": held})
    train, validation = cast(Any, load_sources(str(tmp_path / "out")))
    assert torch.equal(train.labels, source.labels) and train.class_names == source.class_names
    assert torch.equal(validation.labels, held.labels) and len(validation) == 5
    held.labels = None  # of classes that the training split lacks
    pack(tmp_path / "other", {"train": source, "validation": held})
    train, validation = cast(Any, load_sources(str(tmp_path / "other")))
    assert torch.equal(train.labels, source.labels) and validation.labels is None


def test_a_set_without_labels_has_no_column_of_labels(tmp_path):
    source = folder(tmp_path / "set", 5)
    source.labels = source.class_names = None
    pack(tmp_path / "out", {"train": source})
    assert [*rows(tmp_path / "out")[0]] == ["image"]


def test_without_a_bar_all_images_are_packed(small_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "tqdm", partial(packing.tqdm, disable=True))  # as TQDM_DISABLE=1 does
    source = folder(tmp_path / "set", 10, SIZES, "jpg")
    packed = pack(tmp_path / "packed", {"train": source})
    assert len(rows(tmp_path / "packed")) == 10 and packed.shards[-1]["end"] == 10


@pytest.mark.usefixtures("small_shards")
def test_workers_write_the_same_shards(tmp_path):
    source = folder(tmp_path / "set", 26, SIZES)
    files = []
    for workers in (0, 2):
        pack(tmp_path / f"out{workers}", {"train": source, "validation": source}, workers)
        files.append({file.name: file.read_bytes() for file in (tmp_path / f"out{workers}/data").iterdir()})
    assert files[0] == files[1] and len(files[0]) > 4
    sizes = [len(content) for content in files[0].values()]
    assert max(sizes) < 12_000 + 4 * 6_000 and len(rows(tmp_path / "out0")) == 26
    group = pq.ParquetFile(tmp_path / "out0/data/train-00000.parquet").metadata.row_group(0)
    assert group.num_rows == 4


def interrupt(monkeypatch, path: Path, splits: dict[str, ImageSource], batches: int) -> None:
    """Pack until a number of batches is written, as if the process was killed then."""
    true_add, count = packing._Shard.add, [0]

    def add(self, batch):
        count[0] += 1
        if count[0] > batches:
            raise KeyboardInterrupt
        true_add(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing._Shard, "add", add)
        pack(path, splits)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("batches", [3, 9])
def test_an_interrupted_packing_goes_on_behind_its_last_shard(batches, tmp_path, monkeypatch):
    splits = {"train": folder(tmp_path / "a", 26, SIZES, broken=(1,)), "validation": folder(tmp_path / "b", 11, SIZES)}
    pack(tmp_path / "whole", splits)
    splits["train"].bad.clear()
    interrupt(monkeypatch, tmp_path / "out", splits, batches)
    begun = json.loads((tmp_path / "out/pack.json").read_text())["shards"]
    assert not (tmp_path / "out/data").exists() and len(begun) > 0
    with pytest.raises(ValueError):
        load_sources(str(tmp_path / "out"))
    opened, true_open = [], ImageSource.open
    splits["train"].bad.clear()
    monkeypatch.setattr(ImageSource, "open", lambda self, index: opened.append(index) or true_open(self, index))
    packed = pack(tmp_path / "out", splits)
    assert len(opened) == 26 + 11 - sum(s["images"] + len(s["unreadable"]) for s in begun)
    assert splits["train"].bad.keys() == {1}
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / name / "data").iterdir()} for name in ("whole", "out")
    ]
    assert files[0] == files[1]
    assert json.loads((tmp_path / "out/pack.json").read_text()) == json.loads(
        (tmp_path / "whole/pack.json").read_text()
    )
    assert packed.total("images") == 36


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_is_written_again(tmp_path, monkeypatch):
    splits = {"train": folder(tmp_path / "a", 26, SIZES)}
    pack(tmp_path / "whole", splits)
    interrupt(monkeypatch, tmp_path / "out", splits, 6)
    first, *_ = shards = sorted((tmp_path / "out/.incomplete").glob("*.parquet"))
    assert len(shards) > 1
    os.truncate(first, 100)
    pack(tmp_path / "out", splits)
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_a_dataset_that_has_changed_is_not_packed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "ROWS", 2)
    monkeypatch.setattr(packing, "SHARD_BYTES", 1)
    interrupt(monkeypatch, tmp_path / "out", {"train": folder(tmp_path / "a", 6)}, 1)
    with pytest.raises(
        ValueError, match=r"there are \{'train': 7\} images, and there were \{'train': 6\} when packing"
    ):
        pack(tmp_path / "out", {"train": folder(tmp_path / "b", 7)})


def test_unreadable_images_are_left_out_and_counted(tmp_path, caplog):
    source = folder(tmp_path / "set", 8, broken=(3,))
    packed = pack(tmp_path / "out", {"train": source})
    ((index, name, _),) = packed.shards[0]["unreadable"]
    assert (index, Path(name).name) == (3, "003.png") and "003.png" in caplog.text
    assert [row["label"] for row in rows(tmp_path / "out")] == [0, 1, 2, 1, 2, 0, 1]
    with pytest.raises(CorruptDataError, match="at least 2 of 8 images cannot be read"):
        pack(tmp_path / "other", {"train": folder(tmp_path / "broken", 8, broken=(3, 4))})


def test_names_reveal_no_folder_outside_of_the_dataset(tmp_path):
    source = folder(tmp_path / "elsewhere", 2)
    (tmp_path / "root").mkdir()
    pack(tmp_path / "out", {"train": source}, root=tmp_path / "root")
    assert [row["image"]["path"] for row in rows(tmp_path / "out")] == ["000.png", "001.png"]


def test_turned_images_are_packed_upright(tmp_path):
    source = folder(tmp_path / "set", 1, extension="jpg")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    noise(0, 80, 60, smooth=20).save(tmp_path / "set/000.jpg", exif=exif, quality=95)
    pack(tmp_path / "out", {"train": source})
    (row,) = rows(tmp_path / "out")
    packed, upright = PIL.Image.open(io.BytesIO(row["image"]["bytes"])), source.read(0).resize((30, 40))
    assert packed.size == (30, 40) and not packed.getexif()
    assert np.abs(np.asarray(packed).astype(float) - np.asarray(upright)).mean() < 4
