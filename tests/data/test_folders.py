"""Test that every image of a folder is loaded, or that a warning names it."""

import gc
import json
import logging
import os

import PIL.Image
import pytest

from hf_accel.data import describe_labels, load_sources
from hf_accel.data.folders import find_layout, image_suffixes, name_split, scan_folder


def write(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8)).save(root / path, "PNG")
    return root


def fill(root, *folders, count=3, suffix="png"):
    return write(root, *(f"{folder}/{number}.{suffix}" for folder in folders for number in range(count)))


def load(root, **options):
    """Return the loaded file names of each split, relative to `root`, and the training classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_accel.data.sources.MEMORY_BYTES", 0)
        parts = load_sources(str(root), **options)
    names = [
        sorted(os.path.relpath(part.open(index).info["name"], root) for index in range(len(part)))
        for part in parts
        if part is not None
    ]
    return names, parts[0].class_names


def flat(loaded):
    return sorted(path for part in loaded for path in part)


LAYOUTS = {
    "file named test": (["cats/1.png", "dogs/2.png", "dogs/test_shot.png"], None, ["cats", "dogs"]),
    "class named train": (["boats/1.png", "train/1.png"], None, ["boats", "train"]),
    "class named test": (["boats/1.png", "test/1.png"], None, ["boats", "test"]),
    "classes beside val": (["a/1.png", "b/1.png", "val/a/1.png", "val/b/1.png"], "validation", ["a", "b"]),
    "class train beside val": (
        ["a/1.png", "train/1.png", "val/a/1.png", "val/train/1.png"],
        "validation",
        ["a", "train"],
    ),
    "capitals": (["Train/a/1.png", "Train/b/1.png", "VAL/a/1.png", "VAL/b/1.png"], "validation", ["a", "b"]),
    "class test in splits": (["train/a/1.png", "train/test/1.png", "val/test/1.png"], "validation", ["a", "test"]),
    "flat test": (["train/a/1.png", "train/b/1.png", "test/1.png"], "test", ["a", "b"]),
    "deep": (["x/y/train2017/a/1.png", "x/y/train2017/b/1.png", "x/y/val2017/a/1.png"], "validation", ["a", "b"]),
    "split in class": (["a/train/1.png", "a/test/1.png", "b/train/1.png", "b/test/1.png"], "test", ["a", "b"]),
    "files named after splits": (["train_1.png", "train_2.png", "test_1.png"], "test", None),
    "one file deeper": (["a/1.png", "a/old/2.png", "b/1.png"], None, ["a", "b"]),
    "one file above": (["a/1.png", "b/1.png", "overview.png"], None, ["a", "b"]),
    "nested classes": (["set/x/a/1.png", "set/y/b/1.png"], None, ["a", "b"]),
    "flat files beside val": (["1.png", "2.png", "val/3.png"], "validation", None),
    "flat files beside train": (["1.png", "2.png", "train/3.png"], None, None),
    "splits without classes": (["train/1.png", "test/2.png"], "test", None),
    "a split below a split": (["my-train-set/train/1.png", "my-train-set/val/2.png"], "validation", None),
    "a single folder": (["photos/1.png", "photos/2.png"], None, None),
}


@pytest.mark.parametrize(("paths", "validation", "classes"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_image_of_a_clear_layout_is_loaded(tmp_path, caplog, paths, validation, classes):
    write(tmp_path, *paths)
    with caplog.at_level(logging.WARNING):
        loaded, names = load(tmp_path, label_column=None if classes else "none")
    assert flat(loaded) == sorted(paths) and names == classes
    assert "left out" not in caplog.text
    if validation:
        split = find_layout("x", sorted(paths)).split
        assert loaded[1] == [path for path, part in zip(sorted(paths), split, strict=True) if part == validation]


def test_origin_of_folder_labels_is_logged(tmp_path):
    fill(tmp_path, "a", "b", count=10)
    assert describe_labels(*load_sources(str(tmp_path))) == "Labels: folder names, 2 classes (a, b)"


def test_linked_folders_and_files_are_loaded(tmp_path):
    photos = fill(tmp_path / "photos", "a", "b")
    fill(tmp_path / "elsewhere", "c")
    os.symlink(tmp_path / "elsewhere" / "c", photos / "c")
    os.symlink(tmp_path / "elsewhere" / "c" / "0.png", photos / "a" / "link.png")
    loaded, classes = load(photos)
    assert classes == ["a", "b", "c"] and len(flat(loaded)) == 10


def test_links_that_lead_nowhere_or_back_are_named(tmp_path, caplog):
    fill(tmp_path, "a", "b")
    os.symlink(tmp_path / "gone.png", tmp_path / "a" / "link.png")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    os.symlink(tmp_path / "a" / "self.png", tmp_path / "a" / "self.png")
    loaded, _ = load(tmp_path)
    assert len(flat(loaded)) == 6
    assert "leads nowhere: restore the file that it names: a/link.png, a/self.png" in caplog.text
    assert "leads back to a folder that it is in: remove it: b/loop" in caplog.text


@pytest.mark.parametrize("suffix", ["Jpeg", "JPG", "PNG", "avif", "qoi", "Tif", "webp"])
def test_every_suffix_that_pillow_opens_is_loaded(tmp_path, suffix):
    fill(tmp_path, "a", "b")
    fill(tmp_path, "a", count=4, suffix=suffix)
    assert len(scan_folder(tmp_path).images) == 3 * 2 + 4 - 3 * (suffix == "png")


def test_formats_that_cannot_be_decoded_are_no_images():
    assert {".mpg", ".h5", ".grib", ".bufr"}.isdisjoint(image_suffixes())


def test_images_that_pillow_does_not_open_are_named(tmp_path, caplog):
    fill(tmp_path, "a", "b")
    (tmp_path / "a" / "IMG_1.HEIC").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a" / "._0.png").touch()
    load(tmp_path)
    assert "Pillow does not open .heic files: convert them, to PNG for example: a/IMG_1.HEIC" in caplog.text
    assert "notes.txt" not in caplog.text and "._0" not in caplog.text


@pytest.mark.parametrize(("suffix", "what"), [("", "no suffix"), (".orig", "the suffix .orig")])
def test_images_without_an_images_suffix_are_named(tmp_path, caplog, suffix, what):
    fill(tmp_path, "a", "b")
    write(tmp_path, *(f"b/IMG_{number}{suffix}" for number in range(7)))
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "a.txt").write_text("a caption")
    loaded, _ = load(tmp_path)
    assert len(flat(loaded)) == 6 and "a.txt" not in caplog.text
    assert f"as files with {what} are not loaded, and of these some are images: name them .jpg" in caplog.text
    assert all(f"b/IMG_{number}{suffix}" in caplog.text for number in range(4))


def test_few_files_without_an_images_suffix_are_opened(tmp_path, monkeypatch):
    fill(tmp_path, "a")
    for number in range(200):
        (tmp_path / f"notes{number}").write_text("x")
        (tmp_path / f"notes.{number}").write_text("x")
    opened, original = [], PIL.Image.open
    monkeypatch.setattr("PIL.Image.open", lambda *args, **rest: opened.append(args) or original(*args, **rest))
    assert scan_folder(tmp_path).unusable == {} and 3 < len(opened) <= 60


def test_tables_and_archives_beside_images_are_named(tmp_path, caplog):
    fill(tmp_path, "train/a", "train/b")
    (tmp_path / "test.parquet").touch()
    (tmp_path / "c.zip").touch()
    load(tmp_path)
    assert "without tables and archives: c.zip, test.parquet; unpack them" in caplog.text


def test_metadata_in_capitals_is_named(tmp_path, caplog):
    fill(tmp_path, "a", "b")
    (tmp_path / "Metadata.CSV").write_text("file_name,kind\na/0.png,x\n")
    load(tmp_path)
    assert "metadata is read from metadata.csv only, in lower case: rename it: Metadata.CSV" in caplog.text


def test_folder_of_unusable_images_alone_names_them(tmp_path, caplog):
    write(tmp_path, "one", "two")
    with pytest.raises((ValueError, OSError)):
        load(tmp_path)
    assert "files with no suffix are not loaded, and of these some are images: name them" in caplog.text


def test_name_that_is_no_utf8_is_left_out(tmp_path, caplog):
    fill(tmp_path, "a", "b")
    name = os.fsencode(tmp_path / "a") + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write((tmp_path / "a" / "0.png").read_bytes())
    loaded, _ = load(tmp_path)
    assert len(flat(loaded)) == 6 and r"not valid UTF-8: rename it: a/caf\udce9.png" in caplog.text


def test_folders_beside_splits_are_named_as_left_out(tmp_path, caplog):
    fill(tmp_path, "train/a", "train/b", "test/a", "extra", count=8)
    loaded, _ = load(tmp_path)
    assert len(flat(loaded)) == 24
    assert f"{tmp_path}: 8 images are left out: 8 in extra/" in caplog.text


def test_folder_beside_splits_without_classes_is_left_out(tmp_path, caplog):
    fill(tmp_path, "train", "val", "extra", count=8)
    loaded, classes = load(tmp_path)
    assert [len(part) for part in loaded] == [8, 8] and classes is None
    assert "8 images are left out: 8 in extra/" in caplog.text


def test_third_split_is_named_as_not_used(tmp_path, caplog):
    fill(tmp_path, "train/a", "train/b", "val/a", "val/b", "test/a")
    load(tmp_path)
    assert "not used: the split test" in caplog.text


def test_class_named_like_a_split_is_warned_of(tmp_path, caplog):
    fill(tmp_path, "boats", "train")
    load(tmp_path)
    assert "train/ is taken as a class" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves a .csv file open
def test_images_that_metadata_does_not_list_are_named(tmp_path, caplog):
    fill(tmp_path, "a", "b")
    (tmp_path / "metadata.csv").write_text("file_name,kind\na/0.png,x\na/1.png,y\nb/0.png,x\n")
    ((loaded,), _) = load(tmp_path)
    assert loaded == ["a/0.png", "a/1.png", "b/0.png"]
    assert "3 images are left out: a/2.png, b/1.png, b/2.png" in caplog.text
    gc.collect()


def test_metadata_above_split_folders_keeps_the_splits(tmp_path, caplog):
    paths = ["train/0.png", "train/test_1.png", "train/2.png", "test/0.png"]
    write(tmp_path, *paths)
    rows = [json.dumps({"file_name": path, "kind": path[:2]}) for path in paths]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    loaded, classes = load(tmp_path, label_column=None)
    assert loaded == [sorted(paths[:3]), paths[3:]] and classes is None
    assert "left out" not in caplog.text


def test_images_beside_tables_are_named(tmp_path, caplog):
    import datasets

    pictures = [PIL.Image.new("RGB", (8, 8))] * 4
    table = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features(image=datasets.Image()))
    for shard in range(2):
        table.to_parquet(tmp_path / f"train-{shard}.parquet")
    write(tmp_path, "preview.png")
    source, _ = load_sources(str(tmp_path))
    assert len(source) == 8 and "1 images are left out: preview.png" in caplog.text


def test_images_are_compared_under_a_readme_that_declares_types(tmp_path, caplog):
    fill(tmp_path, "a", "b", count=4)
    write(tmp_path, "a/test_shot.png")
    (tmp_path / "README.md").write_text("---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n---\n")
    load(tmp_path)
    assert "8 images are left out" in caplog.text


def test_readme_that_declares_files_decides(tmp_path):
    fill(tmp_path, "small", "large", count=4)
    readme = "---\nconfigs:\n- config_name: default\n  data_files: small/*\n---\n"
    (tmp_path / "README.md").write_text(readme)
    assert load(tmp_path)[0] == [[f"small/{number}.png" for number in range(4)]]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Photos\n")
    assert len(flat(load(tmp_path)[0])) == 8


def test_split_names_are_whole_words_of_any_case():
    names = {"train": ["train", "my-training_set"], "validation": ["Val", "VALID", "ILSVRC_val"], "test": ["test2017"]}
    assert {split: [name for name in group if name_split(name) == split] for split, group in names.items()} == names
    assert not any(map(name_split, ("trains", "contest", "trainer")))


def test_scan_opens_no_file(tmp_path, monkeypatch):
    fill(tmp_path, "a", "b")
    image_suffixes()
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr("PIL.Image.open", None)
    assert len(scan_folder(tmp_path).images) == 6
