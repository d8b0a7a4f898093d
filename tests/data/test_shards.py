"""Test that images of tar and Parquet files are read where they lie, and that their order goes by pieces of files."""

import io
import json
import os
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_accel.data import AUGMENTATIONS, TrainSampler, load_sources, remote, shards, train_loader
from hf_accel.data.loader import draw_order
from hf_accel.data.shards import PIECE, PIECES, Shards
from tests.data.test_loader import noise


def encode(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    noise(number, *size).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """Write samples, for each key the contents by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, count: int = 12, each: int = 4, split: str = "train") -> Path:
    """Write images 0, 1, ... of the classes 0 1 2 0 1 2 ... to tar files of `each` images."""
    for start in range(0, count, each):
        samples = {
            f"n/{number:04}": {"jpg": encode(number, (40 + number % 3, 30)), "cls": str(number % 3).encode()}
            for number in range(start, min(start + each, count))
        }
        write_tar(folder / f"{split}-{start // each:03}.tar", samples)
    return folder


def write_parquet(folder: Path, count: int = 12, each: int = 4, split: str = "train") -> Path:
    """Write the images of `write_shards` to Parquet files of one or two row groups of `each` images."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, start in enumerate(range(0, count, 2 * each)):
        numbers = range(start, min(start + 2 * each, count))
        images = [{"bytes": encode(number, (40 + number % 3, 30)), "path": f"{number:04}.jpg"} for number in numbers]
        columns = {"image": images, "label": [number % 3 for number in numbers]}
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["0", "1", "2"]))
        table = pa.table(columns, features.arrow_schema)
        pq.write_table(table, folder / f"{split}-{file:03}.parquet", row_group_size=each)
    return folder


WRITERS = {"tar": write_shards, "parquet": write_parquet}
both_kinds = pytest.mark.parametrize("kind", WRITERS)


def load(data: Path | str, **choices: Any) -> Any:
    return cast(Any, load_sources(str(data), streaming=True, **choices))


@both_kinds
def test_images_and_labels_are_those_of_the_files(kind, tmp_path):
    WRITERS[kind](tmp_path, 10)
    WRITERS[kind](tmp_path, 3, split="validation")
    train, validation = load(tmp_path)
    assert (len(train), len(validation)) == (10, 3) and train.shards.lengths.tolist() == [4, 4, 2]
    assert train.labels.tolist() == [number % 3 for number in range(10)] and train.class_names == ["0", "1", "2"]
    for number in (0, 5, 9):
        image = train.open(number)
        assert image.fp.getvalue() == encode(number, (40 + number % 3, 30))
        name = f"train-{number // 4:03}.tar/n/{number:04}.jpg"
        if kind == "parquet":
            name = f"train-{number // 8:03}.parquet, row {number % 4} of row group {number // 4 % 2}"
        assert image.info["name"] == f"{tmp_path}/{name}"
    assert validation.read(2).size == (42, 30) and train.pixels is None


def test_headers_are_read_once_for_the_same_files(tmp_path, monkeypatch):
    write_shards(tmp_path)
    load(tmp_path)
    true_rows, scans = shards._scan, []

    def scan(files, image, label):
        scans.append(len(files))
        return true_rows(files, image, label)

    monkeypatch.setattr(shards, "_scan", scan)
    load(tmp_path)
    assert scans == [1]  # the first header, which says whether there are labels
    write_tar(tmp_path / "train-001.tar", {"other": {"jpg": encode(50), "cls": b"7"}})
    train, _ = load(tmp_path, validation_split="train[:2]")
    assert scans == [1, 1, 3] and len(train) == 9 and train.class_names == ["0", "1", "2", "7"]
    assert train.open(4).fp.getvalue() == encode(50)


def test_labels_come_from_json_and_other_extensions(tmp_path):
    samples = {
        f"a.b/{number}": {
            "seg.png": b"",
            "JPG": encode(number),
            "json": json.dumps({"label": "cat" if number % 2 else "ant", "place": number % 4}).encode(),
            "kind": b"wild",
        }
        for number in range(8)
    }
    write_tar(tmp_path / "set.tar", samples)
    with pytest.raises(ValueError, match=r"0 has several images: set image_column to one of seg.png, jpg"):
        load(tmp_path / "set.tar")
    one = {"image_column": "jpg", "validation_split": "train[:2]"}
    assert load(tmp_path / "set.tar", **one)[0].class_names == ["ant", "cat"]
    assert load(tmp_path / "set.tar", **one, label_column="place")[0].labels.tolist() == [0, 1, 2, 3] * 2
    assert load(tmp_path / "set.tar", **one, label_column="kind")[0].class_names == ["wild"]
    assert load(tmp_path / "set.tar", **one, label_column="none")[0].labels is None
    with pytest.raises(ValueError, match=r"label_column=colour: the first sample of .*set.tar has none"):
        load(tmp_path / "set.tar", **one, label_column="colour")


def test_a_split_may_lack_labels(tmp_path):
    write_shards(tmp_path, 4, split="train")
    write_tar(tmp_path / "val-000.tar", {"0": {"jpg": encode(0)}})
    train, validation = load(tmp_path)
    assert train.labels.tolist() == [0, 1, 2, 0] and validation.labels is None
    train, validation = load(tmp_path, train_split="validation", validation_split="train")
    assert train.labels is None is validation.labels and len(train) == 1


def test_what_cannot_be_streamed_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: no such file or folder"):
        load(tmp_path / "missing")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(encode(0))
    for data in (tmp_path / "photos", tmp_path / "photos/a.jpg"):
        with pytest.raises(ValueError, match=r"streaming reads Parquet files, or \.tar .*, and there are none"):
            load(data)
    write_shards(tmp_path / "cut", 8, each=8)
    os.truncate(tmp_path / "cut/train-000.tar", 5000)
    with pytest.raises(ValueError, match=r"train-000.tar is no whole, uncompressed tar file: unexpected end of data"):
        load(tmp_path / "cut")


def test_broken_images_are_named_by_tar_file_and_member(tmp_path):
    samples = {f"{number}": {"jpg": encode(number), "cls": b"1"} for number in range(8)}
    write_tar(tmp_path / "train.tar", samples | {"3": {"jpg": encode(3)[:300], "cls": b"1"}})
    train, _ = load(tmp_path, validation_split="train[:2]")
    batches = train_loader(train, TrainSampler(8, 8), AUGMENTATIONS["moco"], lambda step: 16)
    (batch,) = list(batches)
    assert [name for name, _ in train.bad.values()] == [f"{tmp_path}/train.tar/3.jpg"] and 3 not in batch["index"]


# Remote files


class RangeHandler(BaseHTTPRequestHandler):
    """Serves the files of a folder in parts, as object stores do. Every fifth request for a part fails."""

    folder: Path
    parts: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        file = self.folder / self.path.strip("/")
        if not file.is_file():
            return self.send_error(404)
        content, whole = file.read_bytes(), file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            self.parts.append(self.path)
            if len(self.parts) % 5 == 0:
                return self.send_error(503)
            content = content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{whole}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path):
    """The URL of a server of `tmp_path`."""
    handler = type("Handler", (RangeHandler,), {"folder": tmp_path, "parts": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@both_kinds
def test_images_behind_a_url_are_those_of_the_files(kind, site, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", (0.0, 0.0, 0.0))
    WRITERS[kind](tmp_path, 12)
    near, _ = load(tmp_path, validation_split="train[:2]")
    files = "train-{000..002}.tar" if kind == "tar" else "train-{000..001}.parquet"
    far, _ = load(f"{site}/{files}", validation_split="train[:2]")
    assert far.shards.lengths.tolist() == [4, 4, 4] and torch.equal(far.labels, near.labels)
    assert [far.open(number).fp.getvalue() for number in range(12)] == [
        near.open(number).fp.getvalue() for number in range(12)
    ]
    assert far.open(5).info["name"] == near.open(5).info["name"].replace(str(tmp_path), site)
    views = AUGMENTATIONS["moco"], lambda step: 16
    batches = [
        list(
            train_loader(
                source, TrainSampler(12, 4, seed=5, last_step=3, shards=near.shards), *views, num_workers=workers
            )
        )
        for source, workers in ((near, 0), (far, 2))
    ]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["crops"][0], other["crops"][0])
    assert not far.bad


@both_kinds
def test_a_folder_behind_a_url_has_splits_and_is_indexed_again_if_it_changes(kind, tmp_path):
    store = fsspec.filesystem("memory")
    for split, count in (("train", 16), ("val", 3)):
        for file in WRITERS[kind](tmp_path, count, 8, split).glob(f"{split}-*.{kind}"):
            store.pipe_file(f"/{kind}/test-set/{split}/{file.name}", file.read_bytes())
    train, validation = load(f"memory://{kind}/test-set")
    assert (len(train), len(validation)) == (16, 3) and train.open(7).fp.getvalue() == encode(7, (41, 30))
    (new,) = WRITERS[kind](tmp_path / "new", 3, split="new").glob("*")
    store.pipe_file(f"/{kind}/test-set/train/train-000.{kind}", new.read_bytes())
    train, _ = load(f"memory://{kind}/test-set")
    assert len(train) == (11 if kind == "tar" else 3) and train.open(1).fp.getvalue() == encode(1, (41, 30))
    with pytest.raises(ValueError, match="and there are none: leave it out"):
        load("memory://nothing")


# The order


def test_an_order_by_shards_reads_pieces_of_files_together():
    lengths = torch.tensor([1000, 3000, 17, 5 * PIECE, 6000])
    count = int(lengths.sum())
    shard = torch.arange(5).repeat_interleave(lengths)
    tars = Shards(shard, are_row_groups=False)
    order = draw_order(count, 3, 1, tars)
    assert torch.equal(order.sort().values, torch.arange(count))
    assert torch.equal(order, draw_order(count, 3, 1, tars))
    assert not torch.equal(order, draw_order(count, 3, 2, tars))
    assert not torch.equal(order, draw_order(count, 4, 1, tars))
    starts = (lengths.cumsum(0) - lengths)[shard]
    piece = shard * 1000 + (torch.arange(count) - starts) // PIECE
    first = order[: PIECES * PIECE // 2]
    assert len(piece[first].unique()) <= PIECES < len(piece.unique())
    assert (first[1:] - first[:-1] == 1).float().mean() < 0.01  # and their images are shuffled


@pytest.mark.parametrize("are_row_groups, length", [(False, 1024), (True, 256)])
def test_shards_of_one_class_are_mixed(are_row_groups, length):
    number = torch.arange(64).repeat_interleave(length)
    order = draw_order(64 * length, 0, 0, Shards(number, are_row_groups))
    assert all(len((batch // length).unique()) > 16 for batch in order.split(512))


@both_kinds
def test_steps_hold_the_same_images_for_any_workers_and_start(kind, tmp_path):
    train, _ = load(WRITERS[kind](tmp_path, 24), validation_split="train[:2]")
    views = AUGMENTATIONS["moco"], lambda step: 16

    def batches(first: int, workers: int) -> list[dict[str, Any]]:
        sampler = TrainSampler(24, 8, seed=5, first_step=first, last_step=6, shards=train.shards)
        return list(train_loader(train, sampler, *views, num_workers=workers, seed=5))

    whole, resumed = batches(0, 0), batches(4, 2)
    assert len(whole) == 6 and len(resumed) == 2
    for one, other in zip(whole[4:], resumed, strict=True):
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["crops"][1], other["crops"][1])
    assert not torch.equal(whole[0]["index"], whole[3]["index"])  # the first step of each epoch


@both_kinds
def test_held_out_images_are_no_part_of_the_shards(kind, tmp_path):
    train, held = load(WRITERS[kind](tmp_path, 60, each=20))
    lengths = train.shards.lengths
    assert len(train) == int(lengths.sum()) == 54 and len(held) == 6 and len(lengths) == 3 and lengths.max() <= 20


@both_kinds
def test_ranks_share_the_batches_of_one_process(kind, tmp_path):
    WRITERS[kind](tmp_path, 24)

    def batches(world: int, rank: int) -> list[dict[str, Any]]:
        train, _ = load(tmp_path, validation_split="train[:2]")
        sampler = TrainSampler(24, 8 // world, world, rank, seed=5, last_step=6, shards=train.shards)
        return list(train_loader(train, sampler, AUGMENTATIONS["moco"], lambda step: 16, num_workers=rank, seed=5))

    for one, *parts in zip(batches(1, 0), batches(2, 0), batches(2, 1), strict=True):
        assert torch.equal(one["index"], torch.cat([part["index"] for part in parts]))
        assert torch.equal(one["crops"][1], torch.cat([part["crops"][1] for part in parts]))
