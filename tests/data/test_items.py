"""Datasets of every form that a program may pass, as image sources."""

from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from hf_accel.data import describe_labels, image_source
from hf_accel.data.labels import LABEL_KEYS

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]
NAMES = ["cat", "dog", "owl"]


class Items(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return self.make(index)


def pil(index):
    return PIL.Image.fromarray(PIXELS[index])


def tensor(index):
    return torch.from_numpy(PIXELS[index]).permute(2, 0, 1)


FORMS = {
    "PIL images": (pil, False),
    "uint8 tensors": (tensor, False),
    "arrays": (lambda i: PIXELS[i], False),
    "tuples": (lambda i: (pil(i), LABELS[i]), True),
    "tuples of tensors": (lambda i: (tensor(i), torch.tensor(LABELS[i])), True),
    "dicts": (lambda i: {"label": NAMES[LABELS[i]], "image": tensor(i)}, True),
    "other keys": (lambda i: {"name": "x", "picture": pil(i), "target": LABELS[i]}, True),
}


@pytest.mark.parametrize("make, labelled", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_pixels_and_labels(make, labelled):
    source = image_source(Items(make), "mine")
    for index in range(len(PIXELS)):
        assert np.array_equal(np.asarray(source.read(index)), PIXELS[index])
    assert (source.labels.tolist() if source.labels is not None else None) == (LABELS if labelled else None)


def test_gray_tensors_become_rgb():
    source = image_source(Items(lambda i: tensor(i)[:1]), "gray")
    assert np.array_equal(np.asarray(source.read(2)), PIXELS[2][..., :1].repeat(3, -1))


def test_images_of_several_sizes_are_read_one_by_one():
    source = image_source(Items(lambda i: pil(i).resize((8 + i, 8))), "mine")
    assert source.pixels is None and source.read(3).size == (11, 8)


def table(**columns):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    return datasets.Dataset.from_dict({"image": [pil(i) for i in range(6)], "label": LABELS}, features)


def test_a_dataset_of_datasets_is_read_by_its_columns():
    source = image_source(table().with_format("torch"), "photos")
    assert source.class_names == NAMES and source.labels is not None and source.labels.tolist() == LABELS
    assert np.array_equal(np.asarray(source.read(4)), PIXELS[4]) and source.labels_from == "column label"


def test_a_transform_of_datasets_is_followed():
    def darken(batch):
        return {"image": [image.point(lambda value: value // 2) for image in batch["image"]], "label": batch["label"]}

    source = image_source(table().with_transform(darken), "photos")
    assert np.array_equal(np.asarray(source.read(4)), PIXELS[4] // 2)


def test_labels_of_validation_follow_the_training_classes():
    class Named(Items):
        classes = ["owl", "cat", "dog"]
        targets = [0, 1, 2, 0, 1, 2]

    train = image_source(table(), "train")
    held = image_source(Named(pil), "held", like=train)
    assert held.labels is not None and held.labels.tolist() == [2, 0, 1, 2, 0, 1]


def test_a_list_of_targets_is_taken_before_the_items():
    class Listed(Items):
        targets = LABELS

    source = image_source(Listed(lambda index: (pil(index), 7)), "mine")
    assert source.labels is not None and source.labels.tolist() == LABELS


MISSING = [None, 1, 2, None, 1, 2]
HOLES = {
    "tuples": lambda i: (pil(i), MISSING[i]),
    "dicts of None": lambda i: {"image": pil(i), "label": MISSING[i]},
    "dicts without the key": lambda i: {"image": pil(i)} | ({"label": MISSING[i]} if MISSING[i] else {}),
    "NaN": lambda i: (pil(i), float("nan") if MISSING[i] is None else float(MISSING[i])),
    "-1": lambda i: (pil(i), torch.tensor(MISSING[i] or -1)),
    "text": lambda i: (pil(i), NAMES[MISSING[i]] if MISSING[i] else ""),
}


@pytest.mark.parametrize("make", HOLES.values(), ids=HOLES)
def test_a_first_item_without_a_label_leaves_the_others_theirs(make):
    source = image_source(Items(make), "mine")
    assert source.labels is not None and source.labels.tolist() == [-1, 0, 1, -1, 0, 1]


def test_a_list_of_targets_and_classes_may_have_holes():
    class Listed(Items):
        targets, classes = MISSING, NAMES

    source = image_source(Listed(pil), "mine")
    assert source.labels is not None and source.labels.tolist() == [-1, 1, 2, -1, 1, 2] and source.class_names == NAMES


def test_targets_of_a_regression_are_no_labels():
    assert image_source(Items(lambda i: (pil(i), i / 4)), "mine").labels is None


def test_labels_under_another_key_are_pointed_out(caplog):
    image_source(Items(lambda i: {"image": pil(i), "fine": LABELS[i], "box": [1, 2], "weight": 0.5}), "mine")
    assert "mine: no labels, as only the keys label, labels, " in caplog.text and "rename it: fine\n" in caplog.text
    caplog.clear()
    image_source(Items(lambda i: {"image": pil(i), "label": LABELS[i], "fine": 1}), "mine")
    assert not caplog.text


ONE_HOT_LABELS = " (train: a list of 3 values is neither an integer nor text; take the argmax of one-hot labels)"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (pil, ""),
        (lambda i: (pil(i), i / 4), " (train: 0.25 is neither an integer nor text)"),
        (lambda i: (pil(i), torch.eye(3)[i % 3]), ONE_HOT_LABELS),
        (lambda i: (pil(i), np.eye(3)[i % 3]), ONE_HOT_LABELS),
        (lambda i: {"image": tensor(i), "label": [0, 1, 0]}, ONE_HOT_LABELS),
        (lambda i: (tensor(i), tensor(i), pil(i)), ""),
        (lambda i: {"image": pil(i), "fine": 1}, f" (train: it has none of the keys {', '.join(LABEL_KEYS)})"),
    ],
    ids=["bare", "floats", "one-hot tensors", "one-hot arrays", "one-hot lists", "more images", "other key"],
)
def test_the_line_of_labels_says_why_there_are_none(make, expected):
    train = image_source(Items(make), "train")
    labelled = image_source(Items(lambda i: (pil(i), LABELS[i])), "test", train)
    assert describe_labels(train, None) == f"Labels: none{expected}"
    both = expected.replace("(train", "(test has labels, train has none") or " (test has labels, train has none)"
    assert describe_labels(train, labelled) == f"Labels: none{both}"
    why = expected.replace("train: ", "")
    assert describe_labels(labelled, train).endswith(f"; 0 of 6 images of train have one{why}")


def test_the_line_of_labels_names_columns_that_are_no_classes():
    features = datasets.Features(image=datasets.Image(), labels=datasets.Value("int64"))
    table = datasets.Dataset.from_dict({"image": [pil(i) for i in range(6)], "labels": [0, 1] * 3}, features=features)
    line = describe_labels(image_source(table, "train"), None)
    assert line == "Labels: none (train: no ClassLabel among its columns image, labels)"


def test_the_line_of_labels_says_that_a_column_holds_lists(caplog):
    features = datasets.Features(image=datasets.Image(), label=datasets.List(datasets.Value("float32")))
    values = {"image": [pil(i) for i in range(6)], "label": np.eye(6).tolist()}
    source = image_source(datasets.Dataset.from_dict(values, features=features), "train")
    why = "column label holds lists, neither integers nor text; take the argmax of one-hot labels"
    assert describe_labels(source, None) == f"Labels: none (train: {why})"
    assert "ClassLabel, and none of integers or text that could be one: image (Image), label (List)\n" in caplog.text


class Counted(Items):
    def __init__(self, make, length=6):
        super().__init__(make)
        self.calls, self.length = Counter(), length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.calls[index] += 1
        return self.make(index % 6)


@pytest.mark.parametrize("make", [pil, lambda i: (pil(i), LABELS[i])], ids=["bare", "labelled"])
def test_each_item_is_read_once(make):
    dataset = Counted(make, 200)
    source = image_source(dataset, "mine")
    assert source.pixels is not None and np.array_equal(np.asarray(source.read(100)), PIXELS[4])
    assert set(dataset.calls.values()) == {1} and len(dataset.calls) == 200


def test_images_that_are_not_held_are_read_once_for_labels():
    dataset = Counted(lambda i: (pil(i).resize((8 + i, 8)), LABELS[i]), 300)
    source = image_source(dataset, "mine")
    assert source.pixels is None and set(dataset.calls.values()) == {1} and len(dataset.calls) == 300
    source.read(7)
    source.read(7)
    assert dataset.calls[7] == 3  # No image is kept once training begins.


def test_no_item_is_read_only_to_find_that_nothing_has_labels():
    dataset = Counted(lambda i: pil(i).resize((8 + i, 8)), 300)
    image_source(dataset, "mine")
    assert dataset.calls.total() == 64


def test_images_that_need_too_much_memory_are_not_kept(monkeypatch):
    monkeypatch.setattr("hf_accel.data.items.KEPT_BYTES", 4 * 80 * 100)  # a hundred of these images
    dataset = Counted(lambda i: (pil(i), LABELS[i]), 200)
    source = image_source(dataset, "mine")
    assert source.pixels is not None and dataset.calls.total() == 2 * 200 - 64


def test_files_that_items_open_are_closed(tmp_path):
    pil(0).save(tmp_path / "image.png")
    opened = []

    def lazy(index):
        opened.append(PIL.Image.open(tmp_path / "image.png"))
        return opened[-1], 1

    image_source(Items(lazy), "mine")
    assert len(opened) == 6 and all(image.fp is None for image in opened)


def test_a_long_reading_says_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr("hf_accel.data.items.SILENT_SECONDS", 0.0)
    image_source(Items(pil), "mine")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Reading mine once: 1 of 6 items, about ")


def test_a_broken_item_loses_its_label_only():
    def broken(index):
        if index == 0:
            raise OSError("no such file")
        return pil(index), LABELS[index]

    source = image_source(Items(broken), "mine")
    assert source.bad == {0: ("mine[0]", "OSError: no such file")} and source.labels is not None
    assert source.labels.tolist() == [1, 1, 2, 0, 1, 2]  # The next image takes the place of the broken one.


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by 0"), KeyError("imge"), NameError("x"), TypeError("y")], ids=repr
)
def test_an_error_of_the_program_is_not_a_broken_image(error):
    def wrong(index):
        if index == 3:
            raise error
        return pil(index).resize((8 + index, 8))

    with pytest.raises(
        RuntimeError, match=rf"mine\[3\] raises {type(error).__name__}: .*Correct the dataset"
    ) as raised:
        image_source(Items(wrong), "mine")
    assert raised.value.__cause__ is error


def test_an_error_of_the_program_also_ends_training():
    source = image_source(Items(lambda i: pil(i).resize((8 + i, 8))), "mine")
    source._table.dataset.make = lambda index: 1 / 0  # pyright: ignore
    with pytest.raises(RuntimeError, match=r"mine\[2\] raises ZeroDivisionError"):
        source.next_readable(2, [])


def test_what_is_no_dataset_is_refused_with_the_way():
    with pytest.raises(
        TypeError, match=r"mine: it holds the splits train, test; pass one of them, e.g. dataset\['train'\]"
    ):
        image_source(datasets.DatasetDict({"train": table(), "test": table()}), "mine")
    with pytest.raises(TypeError, match="mine: 'photos' is a name and not a dataset; load it first"):
        image_source("photos", "mine")
    with pytest.raises(TypeError, match=r"item 0 holds no image but Tensor \(8, 10, 3\): return"):
        image_source(Items(lambda i: torch.from_numpy(PIXELS[i])), "mine")


def test_floats_and_items_without_image_are_refused():
    with pytest.raises(TypeError, match=r"float32.*leave transforms to the trainer"):
        image_source(Items(lambda i: tensor(i) / 255), "mine")
    with pytest.raises(TypeError, match="item 0 holds no image but int, str"):
        image_source(Items(lambda i: {"a": 3, "b": "c"}), "mine")
    with pytest.raises(TypeError, match="list_iterator is not map-style"):
        image_source(iter([pil(0)]), "mine")
    with pytest.raises(ValueError, match="empty"):
        image_source([], "mine")


def test_an_item_that_fails_is_skipped_and_counted():
    def broken(index):
        if index == 3:
            raise OSError("no such file")
        return pil(index)

    source = image_source(Items(broken), "mine")
    assert source.bad == {3: ("mine[3]", "OSError: no such file")}


def test_messages_about_columns_say_what_a_program_can_do(caplog):
    words = table().cast_column("label", datasets.Value("string")).rename_column("label", "kind")
    image_source(words, "mine")
    assert "class_encode_column(name) of: kind (Value)\n" in caplog.text
    two = table().add_column("twin", [{"bytes": None, "path": "x"}] * 6).cast_column("twin", datasets.Image())
    with pytest.raises(ValueError, match=r"several Image columns: keep one by dataset.remove_columns: image, twin$"):
        image_source(two, "mine")
    with pytest.raises(ValueError, match=r"^mine: labels must all be integers or all text, and are int and str"):
        image_source(Items(lambda i: (pil(i), i if i % 2 else "x")), "mine")


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 6

    def __iter__(self):
        return map(pil, range(6))


@pytest.mark.parametrize("stream", [Stream(), table().to_iterable_dataset(), table().to_iterable_dataset().shuffle(0)])
def test_a_stream_is_refused_with_what_to_do_instead(stream):
    with pytest.raises(TypeError, match=r"cannot be drawn or resumed exactly: .*load_sources\(.*streaming=True\)"):
        image_source(stream, "mine")
