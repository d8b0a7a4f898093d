"""Datasets of every form that a program may pass, as image sources."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import Dataset

from hf_accel.data import image_source

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


def test_floats_and_items_without_image_are_refused():
    with pytest.raises(TypeError, match=r"float32.*leave transforms to the trainer"):
        image_source(Items(lambda i: tensor(i) / 255), "mine")
    with pytest.raises(TypeError, match="item 0 holds no image but int, str"):
        image_source(Items(lambda i: {"a": 3, "b": "c"}), "mine")
    with pytest.raises(TypeError, match="no length"):
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
