"""Test how Parquet files are read where they lie: by row groups, with the columns and labels of loaded tables."""

import pickle
import time
from functools import lru_cache
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_accel.data import AUGMENTATIONS, CorruptDataError, TrainSampler, load_sources, parquet_files, train_loader
from hf_accel.data.shards import PIECE, PIECES, SAMPLED_GROUPS, Shards
from tests.data.test_shards import encode, load, write_parquet


@pytest.fixture
def groups_read(monkeypatch):
    """The row groups that are read, as (name of the file, number)."""
    true_read, groups = parquet_files._read_row_group, []

    def read(path, group, values):
        groups.append((path.rpartition("/")[2], group))
        return true_read(path, group, values)

    monkeypatch.setattr(parquet_files, "_read_row_group", read)
    return groups


def save(path, columns, features=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, datasets.Features(features).arrow_schema if features else None), path, **options)


def images(*numbers):
    return [{"bytes": encode(number), "path": None} for number in numbers]


# Row groups


def test_an_epoch_reads_each_row_group_once_and_holds_few(tmp_path, groups_read, monkeypatch):
    monkeypatch.setattr("hf_accel.data.shards.PIECES", 2)
    monkeypatch.setattr("hf_accel.data.shards.PIECE", 4)
    train, _ = load(write_parquet(tmp_path, 64), label_column="none")
    train.shards = Shards(train.shards.number, are_row_groups=True)  # The sample of the load is not held in this one.
    groups_read.clear()
    sampler = TrainSampler(64, 6, last_step=10, shards=train.shards)
    list(train_loader(train, sampler, AUGMENTATIONS["moco"], lambda step: 16))
    assert len(groups_read) == len(set(groups_read)) == 16
    assert train.shards.pieces == 2 and cast(Any, train.shards.reader)._group.cache_info().currsize == 3


@pytest.mark.parametrize("length, pieces", [(32, 256), (1000, 8), (50_000, 1)])
def test_a_block_is_of_about_as_many_images_as_of_tar_files(length, pieces):
    shards: Any = Shards(torch.arange(300).repeat_interleave(length), are_row_groups=True)
    assert (shards.piece, shards.pieces, shards.reader.kept) == (length, pieces, pieces + 1)
    assert pieces == 1 or pieces * length <= PIECE * PIECES


def test_an_index_reads_no_images_and_a_look_few_row_groups(tmp_path, groups_read):
    train, _ = load(write_parquet(tmp_path, 96), label_column="none")
    assert len(train.shards.lengths) == 24 and len(set(groups_read)) <= SAMPLED_GROUPS
    assert len(train.sample_sizes()) == 16 and set(train.sample_sizes()) == {(40, 30), (41, 30), (42, 30)}
    assert len(groups_read) == len(set(groups_read)) == SAMPLED_GROUPS


def test_threads_read_a_row_group_once(tmp_path, groups_read, monkeypatch):
    from hf_accel.data.cache import store_images

    train, _ = load(write_parquet(tmp_path, 48, each=6), label_column="none")
    groups_read.clear()
    true_read = train.shards.reader._group.__wrapped__
    slow = lru_cache(8)(lambda *words: time.sleep(0.02) or true_read(*words))
    monkeypatch.setattr(train.shards.reader, "_group", slow)
    monkeypatch.setattr("hf_accel.data.cache.cores_of_process", lambda: 4)
    stored = store_images(train, 32, torch.device("cpu"))
    assert len(groups_read) == 8 and len(stored.own) == 48


def test_unused_splits_are_not_opened(tmp_path):
    write_parquet(tmp_path, 12)
    write_parquet(tmp_path, 4, split="validation")
    (tmp_path / "test-000.parquet").write_bytes(b"nothing")
    assert list(map(len, load(tmp_path))) == [12, 4]


# Columns


def test_columns_and_labels_are_those_of_the_loaded_tables(tmp_path):
    def features(names):
        kinds = datasets.ClassLabel(names=names), datasets.Image(), datasets.Value("string")
        return dict(zip(("fine", "photo", "place"), kinds, strict=True))

    columns = {"fine": [0, 1, 2, None, 0, 1], "photo": images(*range(6)), "place": ["x", "y", "x", "", "z", "x"]}
    both = tmp_path / "both"
    save(both / "train-0.parquet", columns, features(["cat", "dog", "owl"]), row_group_size=4)
    held = {key: values[1:] for key, values in columns.items()}
    save(both / "test-0.parquet", held, features(["owl", "cat", "dog"]))
    save(tmp_path / "alone/train-0.parquet", columns, features(["cat", "dog", "owl"]))
    for data, choice in (
        (both, {}),
        (both, {"label_column": "place"}),
        (both, {"label_column": "none"}),
        (tmp_path / "alone", {}),
        (both / "train-0.parquet", {"train_split": "train[:4]"}),
    ):
        pairs: Any = zip(
            load(data, **choice), cast(Any, load_sources)(str(data), in_memory=False, **choice), strict=True
        )
        for streamed, loaded in pairs:
            assert (streamed is None) == (loaded is None)
            if loaded is None:
                continue
            assert streamed.class_names == loaded.class_names and streamed.labels_from == loaded.labels_from
            assert str(streamed.labels) == str(loaded.labels)
            assert all(streamed.read(i).tobytes() == loaded.read(i).tobytes() for i in range(len(loaded)))
            assert not streamed.has_paths()
    labelled, whole = load(both)[0].labelled(), load(both)[0]
    assert labelled.read(3).tobytes() == whole.read(4).tobytes() and labelled.shards.lengths.tolist() == [3, 2]
    assert pickle.loads(pickle.dumps(whole)).read(4).tobytes() == whole.read(4).tobytes()


def test_a_readme_declares_splits_types_and_configurations(tmp_path):
    contents = [image["bytes"] for image in images(*range(6))]
    save(tmp_path / "a/one.parquet", {"photo": contents, "kind": [0, 1, 0, 1, 0, 1]})
    save(tmp_path / "b/two.parquet", {"photo": contents[:3]})
    (tmp_path / "README.md").write_text("""---
configs:
- config_name: all
  data_files: [{split: train, path: a/*}, {split: test, path: b/*}]
- config_name: few
  data_files: [{split: train, path: b/*}]
dataset_info:
- config_name: all
  features:
  - {name: photo, dtype: image}
  - {name: kind, dtype: {class_label: {names: {'0': cat, '1': dog}}}}
---
""")
    train, test = load(tmp_path, config="all")
    assert (len(train), len(test)) == (6, 3) and train.class_names == ["cat", "dog"] and test.labels is None
    assert train.open(4).fp.getvalue() == contents[4]
    assert len(load(tmp_path, config="few", image_column="photo")[0]) == 3
    with pytest.raises(ValueError, match=r"data_config='few': .*one.parquet has no configurations; leave it out"):
        load(tmp_path / "a/one.parquet", config="few")


@pytest.mark.parametrize(
    "columns, features, choices, message",
    [
        ({"name": ["a"] * 4}, None, {}, "has no column of type Image: set image_column to one of them: name"),
        (
            {"photo": ["a.jpg"] * 4},
            {"photo": datasets.Value("string")},
            {"image_column": "photo"},
            "no images there but",
        ),
        ({"photo": [["a"]] * 4}, None, {"image_column": "photo"}, "hold no images there but list"),
        ({"a": images(0), "b": images(0)}, dict.fromkeys("ab", datasets.Image()), {}, "several Image columns"),
        (
            {"a": images(0)},
            {"a": datasets.Image()},
            {"label_column": "kind"},
            "label_column=kind: .* has the columns a",
        ),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path, columns, features, choices, message):
    save(tmp_path / "train.parquet", columns, features)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **choices)


def test_files_of_a_split_must_agree_about_columns_and_classes(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    columns = {"image": images(0, 1), "label": [0, 1]}
    save(tmp_path / "train-0.parquet", columns, features)
    save(tmp_path / "train-1.parquet", columns, features | {"label": datasets.ClassLabel(names=["dog", "cat"])})
    with pytest.raises(
        ValueError, match=r"train-0.* and .*train-1.* number the classes of the column label in other orders"
    ):
        load(tmp_path)
    save(tmp_path / "train-1.parquet", {"image": columns["image"]}, {"image": features["image"]})
    with pytest.raises(ValueError, match=r"train-1.parquet cannot be read as Parquet: it has no column label"):
        load(tmp_path)
    save(tmp_path / "train-1.parquet", {"label": columns["label"]}, {"label": features["label"]})
    with pytest.raises(ValueError, match=r"train-1.parquet cannot be read as Parquet: it has no column image.bytes"):
        load(tmp_path)


# Damage


def test_a_damaged_file_is_named(tmp_path):
    write_parquet(tmp_path, 16)
    file = tmp_path / "train-001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-001.parquet cannot be read as Parquet"):
        load(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_group_that_cannot_be_read_ends_the_run_by_name(workers, tmp_path):
    train, _ = load(write_parquet(tmp_path, 32), label_column="none")
    file = tmp_path / "train-002.parquet"
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    content[chunk.data_page_offset :][: chunk.total_compressed_size] = b""
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(content)
    loader = train_loader(train, TrainSampler(32, 8, last_step=4), AUGMENTATIONS["moco"], lambda step: 16, workers)
    with pytest.raises(
        CorruptDataError, match=r"^\S*/train: row group 1 of .*train-002.parquet cannot be read: .*; copy or write"
    ):
        list(loader)


def test_rows_that_hold_no_image_are_skipped_and_named(tmp_path):
    columns: dict[str, Any] = {"image": images(*range(200))}
    columns["image"][7] = {"bytes": encode(7)[:200], "path": None}
    columns["image"][150] = None
    save(tmp_path / "train.parquet", columns, {"image": datasets.Image()}, row_group_size=50)
    train, _ = load(tmp_path)
    sampler = TrainSampler(200, 50, last_step=4, shards=train.shards)
    batches = list(train_loader(train, sampler, AUGMENTATIONS["moco"], lambda step: 8))
    names = {index: name.rpartition("/")[2] for index, (name, _) in train.bad.items()}
    assert names == {7: "train.parquet, row 7 of row group 0", 150: "train.parquet, row 0 of row group 3"}
    assert not {7, 150}.intersection(torch.cat([batch["index"] for batch in batches]).tolist())
