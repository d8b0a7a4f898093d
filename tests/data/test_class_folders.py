"""Test that folders of one class get the same number in every split, whatever their depth and spelling."""

import unicodedata

import PIL.Image
import pytest

from hf_accel.data import load_sources


def labels_of(root, folders, validation_split=None):
    """Return the training classes, and the name of each folder's label, or None if its images have none."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(3):
            PIL.Image.new("RGB", (8, 8)).save(root / folder / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_accel.data.sources.MEMORY_BYTES", 0)
        parts = load_sources(str(root), validation_split=validation_split)
    classes, found = parts[0].class_names, {}
    for part in filter(None, parts):
        for index in range(len(part)):
            folder = part.open(index).info["name"].removeprefix(f"{root}/").rpartition("/")[0]
            label = -1 if part.labels is None else int(part.labels[index])
            found[folder] = classes[label] if label >= 0 and classes else None
    return classes, found


def test_names_that_differ_in_case_are_one_class(tmp_path, caplog):
    folders = ["train/Cats", "train/Dogs", "val/cats", "val/dogs"]
    classes, found = labels_of(tmp_path, folders)
    assert classes == ["Cats", "Dogs"]
    assert found == dict(zip(folders, ["Cats", "Dogs"] * 2, strict=True))
    assert "folders that differ in case are one class: cats as Cats, dogs as Dogs" in caplog.text


def test_case_that_tells_classes_of_one_split_apart_is_kept(tmp_path, caplog):
    folders = ["train/a", "train/A", "val/a", "val/A"]
    classes, found = labels_of(tmp_path, folders)
    assert classes == ["A", "a"] and all(name == folder[-1] for folder, name in found.items())
    assert "differ in case" not in caplog.text


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "B\u00e4r") for form in ("NFC", "NFD"))
    classes, found = labels_of(tmp_path, [f"train/{composed}", "train/Kuh", f"val/{decomposed}", "val/Kuh"])
    assert classes == [composed, "Kuh"]
    assert found[f"train/{composed}"] == found[f"val/{decomposed}"] == composed


def test_classes_of_the_validation_split_alone_are_not_counted(tmp_path, caplog):
    classes, found = labels_of(tmp_path, ["train/a", "train/b", "val/a", "val/c"])
    assert classes == ["a", "b"]
    assert found == {"train/a": "a", "train/b": "b", "val/a": "a", "val/c": None}
    assert "3 images are of classes that the training split lacks" in caplog.text


def test_splits_of_other_classes_measure_no_accuracy(tmp_path, caplog):
    classes, found = labels_of(tmp_path, ["train/a", "train/b", "val/c", "val/d"])
    assert classes == ["a", "b"] and found["val/c"] is found["val/d"] is None
    assert "without a label: c, d; the training split has a, b" in caplog.text
    assert "no accuracy will be measured" in caplog.text


LEVELS = {
    "years below training classes": ["train/cats/2019", "train/cats/2020", "train/dogs/2019", "val/cats", "val/dogs"],
    "years below validation classes": ["train/cats", "train/dogs", "val/cats/2019", "val/dogs/2019", "val/dogs/2020"],
    "years above training classes": ["train/2019/cats", "train/2020/dogs", "val/cats", "val/dogs"],
    "patients below classes": ["train/cats/p1", "train/dogs/p2", "val/cats/p3", "val/dogs/p4"],
    "sites above": ["train/x/cats", "train/x/dogs", "val/x/cats", "val/x/dogs"],
    "sites and years": ["train/x/cats/2019", "train/y/dogs/2020", "val/z/cats/2021", "val/z/dogs/2022"],
    "one class in validation": ["train/x/cats", "train/x/dogs", "val/x/cats"],
    "an old folder": ["train/cats", "train/dogs", "val/cats", "val/cats/old", "val/dogs"],
}


@pytest.mark.parametrize("folders", LEVELS.values(), ids=LEVELS)
def test_class_is_the_level_whose_names_recur(tmp_path, folders):
    classes, found = labels_of(tmp_path, folders)
    assert classes == ["cats", "dogs"]
    assert all(name is not None and name in folder.split("/") for folder, name in found.items())


def test_level_is_that_of_training_where_the_rest_has_none(tmp_path):
    classes, found = labels_of(tmp_path, ["train/x/a", "train/x/b", "test/unknown"])
    assert classes == ["a", "b"] and found["test/unknown"] is None


def test_folders_of_one_name_that_merge_are_named(tmp_path, caplog):
    classes, _ = labels_of(tmp_path, ["ford/other", "ford/focus", "bmw/other", "bmw/x5"])
    assert classes == ["focus", "other", "x5"]
    assert "folders of the same name are one class: bmw/other, ford/other; rename them" in caplog.text


def test_equal_classes_of_two_splits_are_no_merge(tmp_path, caplog):
    labels_of(tmp_path, ["train/a", "train/b", "val/a", "val/b"])
    assert "one class" not in caplog.text
