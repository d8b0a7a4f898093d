"""Test that labels mean the same class in every split, and that images without one are never evaluated."""

from typing import Any

import datasets
import PIL.Image
import pytest
import torch

from hf_accel.data import ImageSource, describe_labels, load_sources
from hf_accel.data.labels import hold_out, read_labels

DatasetDict: Any = datasets.DatasetDict
PIXELS = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8)


def column(values, feature):
    return datasets.Dataset.from_dict({"label": values}, features=datasets.Features(label=feature))


def image_table(values, feature):
    """Return a table with one black image for each label."""
    images = [PIL.Image.new("RGB", (8, 8))] * len(values)
    features = datasets.Features(image=datasets.Image(), label=feature)
    return datasets.Dataset.from_dict({"image": images, "label": values}, features=features)


def class_label(*names):
    return datasets.ClassLabel(names=list(names))


TEXT, NUMBER, REAL = (datasets.Value(kind) for kind in ("string", "int64", "float64"))


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        (([0, 1, 2], class_label("cat", "dog", "owl")), ([0, 1], class_label("dog", "owl"))),
        ((["cat", "dog", "owl"], TEXT), ([1, 0], class_label("owl", "dog"))),
        (([0, 1, 2], class_label("cat", "dog", "owl")), (["dog", "owl"], TEXT)),
        (([5, 7, 12], NUMBER), (["7", "12"], TEXT)),
    ],
    ids=["other order", "text and names", "names and text", "numbers and text"],
)
def test_classes_are_matched_by_name_across_splits(train, validation):
    labels, names = read_labels(column(*train), "label")
    assert labels is not None and labels.tolist() == [0, 1, 2]
    held, same = read_labels(column(*validation), "label", names)
    assert held is not None and held.tolist() == [1, 2] and same == names


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        (["a", None, "b", None], TEXT),
        (["a", "", "b", "-1"], TEXT),
        ([0, -1, 1, None], class_label("a", "b")),
        ([3, -1, 4, -1], NUMBER),
        ([3.0, None, 4.0, float("nan")], REAL),
        ([False, None, True, None], datasets.Value("bool")),
    ],
)
def test_null_and_minus_one_mean_no_label(values, feature):
    labels, names = read_labels(column(values, feature), "label")
    assert labels is not None and labels.tolist() == [0, -1, 1, -1]
    assert names is not None and len(names) == 2


def test_one_hot_labels_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="one per image, and are list; take the argmax of one-hot labels; or train"):
        read_labels(column([[0, 1], [1, 0]], datasets.List(NUMBER)), "label")


@pytest.mark.parametrize(
    ("values", "feature"), [([None, None], TEXT), ([-1, -1], class_label("a", "b")), ([None, -1], NUMBER)]
)
def test_column_without_any_label_gives_none(values, feature):
    assert read_labels(column(values, feature), "label")[0] is None


def test_images_of_classes_that_training_lacks_have_no_label(caplog):
    labels, names = read_labels(column([0, 1, 0, 1], class_label("dog", "owl")), "label", ["dog", "cat"], "zoo/test")
    assert labels is not None and labels.tolist() == [0, -1, 0, -1] and names == ["dog", "cat"]
    assert "zoo/test: 2 images are of classes that the training split lacks" in caplog.text
    assert "a label: owl; the training split has dog, cat" in caplog.text


def test_held_out_images_all_have_a_label():
    labels = torch.tensor([0, -1, 1, -1] * 25)
    kept, held = hold_out(labels, seed=0)
    assert len(kept) + len(held) == 100 and set(labels[held].tolist()) == {0, 1}
    assert (labels[kept] == -1).sum() == 50


def test_single_image_of_a_class_is_never_held_out():
    labels = torch.tensor([0, 1, 2, 3, 3, -1])
    for seed in range(5):
        kept, held = hold_out(labels, seed, one_in=2)
        assert labels[held].tolist() == [3] and len(kept) == 5
    assert len(hold_out(labels[:3], 0)[1]) == 0


@pytest.mark.parametrize("values", [[None, "a"] + [None] * 8, ["a", "b", "c"]], ids=["one label", "one of each class"])
def test_nothing_to_hold_out_leaves_no_validation_images(tmp_path, caplog, values):
    image_table(values, TEXT).save_to_disk(tmp_path / "set")
    source, validation = load_sources(str(tmp_path / "set"), label_column="label")
    assert validation is None and len(source) == len(values) and source.labels is not None
    assert "no class has two images, of which one could be held out: no accuracy will be measured" in caplog.text


def test_set_whose_labelled_image_is_unreadable_has_no_labels(tmp_path):
    good = image_table([None] * 10, TEXT)
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"", "path": None}], "label": ["a"]}, features=good.features
    )
    datasets.concatenate_datasets([good, broken]).save_to_disk(tmp_path / "set")
    source, validation = load_sources(str(tmp_path / "set"), label_column="label")
    assert source.labels is None and validation is None and list(source.bad) == [10]


def test_source_of_unlabelled_images_alone_has_no_labelled_part():
    with pytest.raises(ValueError, match="no labels"):
        ImageSource("x", pixels=PIXELS, labels=torch.full((6,), -1)).labelled()


def test_labelled_part_has_the_right_images():
    source = ImageSource("x", pixels=PIXELS, labels=torch.tensor([0, -1, 1, -1, 0, 1]), class_names=["a", "b"])
    part = source.labelled()
    assert part.pixels is not None and part.pixels[:, 0, 0, 0].tolist() == [0, 2, 4, 5]
    assert part.labels is not None and part.labels.tolist() == [0, 1, 0, 1] and part.class_names == ["a", "b"]
    whole = ImageSource("x", pixels=PIXELS, labels=torch.zeros(6, dtype=torch.long), class_names=["a"])
    assert whole.labelled() is whole


def test_labelled_part_reports_unreadable_images_of_the_whole(monkeypatch):
    monkeypatch.setattr("hf_accel.data.sources.MAX_BAD", 0.2)
    source = ImageSource("x", pixels=PIXELS, labels=torch.tensor([0, -1, 1, -1, 0, 1]))
    source.labelled().report([(2, "four.png", "truncated")])
    assert source.bad == {4: ("four.png", "truncated")} and source.labelled().bad is source.bad


def test_partly_labelled_set_trains_on_all_images(tmp_path):
    train = image_table(["a", None, "b", None] * 10, TEXT)
    DatasetDict(train=train, test=image_table(["b", None], TEXT)).save_to_disk(tmp_path / "set")
    source, validation = load_sources(str(tmp_path / "set"), label_column="label")
    assert len(source) == 40 and len(source.labelled()) == 20
    assert validation is not None and len(validation.labelled()) == 1
    assert describe_labels(source, validation) == (
        f"Labels: column label, 2 classes (a, b); 20 of 40 images of {tmp_path}/set/train have one; "
        f"1 of 2 images of {tmp_path}/set/test have one"
    )


def test_label_column_none_turns_labels_off(tmp_path, caplog):
    image_table([0, 1] * 10, class_label("a", "b")).save_to_disk(tmp_path / "set")
    for data in (str(tmp_path / "set"), "bundled"):
        source, _ = load_sources(data, label_column="none")
        assert source.labels is None and source.class_names is None
        assert describe_labels(source, None) == "Labels: none"
    assert "set label_column" not in caplog.text
