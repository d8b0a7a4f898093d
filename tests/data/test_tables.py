"""Test tables of files: the class names that each file declares, and errors that name their cause."""

import errno
import io
import os

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError

from hf_accel.data import load_sources
from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.tasks.setup import images_of


def png():
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(labels, names):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_dict({"image": [png()] * len(labels), "label": labels}, features=features)


def save(split, path, kind):
    if kind == "parquet":
        split.to_parquet(path.with_suffix(".parquet"))
        return
    new = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
    with new(str(path.with_suffix(".arrow")), split.data.schema) as writer:
        writer.write_table(split.data.table)


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_each_file_numbers_its_own_class_names(tmp_path, kind):
    save(table([0, 1, 2], ["cat", "dog", "owl"]), tmp_path / "train", kind)
    save(table([0, 1], ["dog", "owl"]), tmp_path / "test", kind)
    train, test = load_sources(str(tmp_path))
    assert test is not None and train.labels is not None and test.labels is not None
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [1, 2]
    assert train.class_names == test.class_names == ["cat", "dog", "owl"]


def test_files_of_one_split_with_other_orders_are_refused(tmp_path):
    save(table([0, 1], ["cat", "dog"]), tmp_path / "train-0", "parquet")
    save(table([0, 1], ["dog", "cat"]), tmp_path / "train-1", "parquet")
    with pytest.raises(ValueError, match="split train number the classes of the column label in different orders"):
        load_sources(str(tmp_path))


def error_of(data, *settings):
    with pytest.raises(RecipeError) as caught:
        images_of(load_recipe(None, [f"data={data}", "budget=64", *settings]))
    return str(caught.value)


def test_full_disk_of_the_cache_is_named_with_a_remedy(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise DatasetGenerationError("An error occurred while generating the dataset") from error

    table([0], ["cat"]).to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for data in (tmp_path, tmp_path / "train.parquet", "user/images"):
        message = error_of(data)
        assert "No space left on device" in message and "set HF_DATASETS_CACHE to a folder on another disk" in message
        assert "\n" not in message


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("place", ["home", "home/datasets/parquet", "elsewhere/train.parquet"])
def test_unwritable_cache_is_named_with_a_remedy(tmp_path, monkeypatch, number, place):
    cache = tmp_path / "home/datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)

    def load_dataset(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / place))

    table([0], ["cat"]).to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for data in (tmp_path, tmp_path / "train.parquet", "user/images"):
        message = error_of(data)
        if place.startswith("elsewhere"):  # an image that may not be read
            assert "HF_HOME" not in message
            continue
        assert message.startswith("the cache of Hugging Face cannot be written: [Errno "), message
        assert f"set HF_HOME, or HF_DATASETS_CACHE (now {cache}), to a folder that can be written" in message


def test_column_of_lists_is_named_with_a_remedy(tmp_path):
    pq.write_table(pa.table({"images": [[png()]] * 4}), tmp_path / "train.parquet")
    assert "image_column=images: values of type List are not one image" in error_of(tmp_path, "image_column=images")


def test_zip_of_class_folders_says_to_unpack_it(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"{'ab'[number % 2]}/{number}.png", png()["bytes"])
    assert "unpack images.zip" in error_of(tmp_path)


def test_pascal_voc_folder_is_loaded(tmp_path):
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        (tmp_path / "JPEGImages" / f"{number}.png").write_bytes(png()["bytes"])
        (tmp_path / "Annotations" / f"{number}.xml").write_text("<annotation/>")
    source, _ = load_sources(str(tmp_path))
    assert len(source) == 4 and source.labels is None
