"""The labels of a table: numbers that mean the same class in every split, and -1 where an image has none."""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..utils.counts import count_of
from ..utils.seeding import generator
from .class_folders import shorten

if TYPE_CHECKING:
    from datasets import Dataset

    from .sources import ImageSource

logger = logging.getLogger(__name__)

HELD_OUT = 10
"""One in this many training images is held out for validation if the dataset has no such split."""

LABEL_KEYS = ("label", "labels", "target", "targets", "class")
"""The keys under which a label is looked for, where a sample is a dictionary."""

ONE_HOT = "take the argmax of one-hot labels"
"""The remedy where labels are lists."""

UNLABELLED = -1
"""The label of an image without a label, here and in many datasets."""


def given_labels(labels: Tensor | None, indices: list[int]) -> list[int | None]:
    """Return the label of each of these images, and None for an image without one."""
    found = [UNLABELLED] * len(indices) if labels is None else labels[indices].tolist()
    return [None if label == UNLABELLED else label for label in found]


def read_labels(
    table: "Dataset", column: str, class_names: list[str] | None = None, name: str = "", in_python: bool = False
) -> tuple[Tensor | None, list[str] | None]:
    """Return the labels int64 (N,) and the name of each class, or None first where no image has a label.

    Null, NaN and -1 mean that an image has no label, and so do empty text and "-1". Classes are matched by name: a
    ClassLabel names its numbers, text and other numbers name themselves.

    Args:
        class_names: the class names of the training split, whose numbers every other split follows. An image of another
            class counts as unlabelled, with a warning, because no accuracy can be measured on it.
        name: the name of the table, for messages.
        in_python: whether messages are for a program, which has no recipe with a `label_column`.

    Raises:
        ValueError: labels of another type.
    """
    import datasets

    values: list[Any] = [_plain(value) for value in table[column][:]]
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return None, class_names
    key, remedy = f"label_column={column}", "or train without labels: label_column: none"
    if in_python:
        key, remedy = f"{name}: column {column}", f"or train without labels: leave {column} out"
    if kinds not in ({int}, {str}, {bool}):
        got = ", ".join(sorted(kind.__name__ for kind in kinds)) + f"; {ONE_HOT}" * (list in kinds)
        raise ValueError(f"{key}: labels must be integers or text, one per image, and are {got}; {remedy}")
    present = sorted({value for value in values if value is not None})
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        low, high = present[0], present[-1]
        if low < 0 or high >= len(feature.names):
            wrong = low if low < 0 else high
            raise ValueError(f"{key}: there is a label {wrong}, and {count_of(len(feature.names), 'class')}; {remedy}")
        name_of = {value: feature.names[value] for value in present}
        class_names = class_names or list(feature.names)
    else:
        name_of = {value: str(value) for value in present}
        class_names = class_names or list(name_of.values())
    number = {class_name: label for label, class_name in enumerate(class_names)}
    unknown = sorted({name_of[value] for value in present} - set(number))
    label = {value: number.get(name_of[value], UNLABELLED) for value in present} | {None: UNLABELLED}
    labels = torch.tensor([label[value] for value in values], dtype=torch.int64)
    if unknown:
        count = sum(value is not None for value in values) - int((labels != UNLABELLED).sum())
        logger.warning(
            "%s: %d images are of classes that the training split lacks and count as images without a label: %s; "
            "the training split has %s",
            name or f"label_column={column}",
            count,
            shorten(unknown),
            shorten(class_names),
        )
    return (labels if len(unknown) < len(set(name_of.values())) else None), class_names


def _plain(value: Any) -> Any:
    """Return None for a value that means "no label", and an int for a float that pandas made of an integer."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, str):  # as in .csv files
        return None if value.strip() in ("", str(UNLABELLED)) else value
    return None if type(value) is int and value == UNLABELLED else value


def describe_labels(source: "ImageSource", validation: "ImageSource | None") -> str:
    """Say in one line where the labels come from, and how many images have none."""
    if source.labels is None or source.class_names is None:
        found = f"{source.title}: {source.unlabelled}" if source.unlabelled else ""
        if validation is not None and validation.labels is not None:
            found = f"{validation.title} has labels, {source.title} has none{found.removeprefix(source.title)}"
        return "Labels: none" + f" ({found})" * bool(found)
    listed = ", ".join(source.class_names[:5]) + ", ..." * (len(source.class_names) > 5)
    text = f"Labels: {source.labels_from}, {count_of(len(source.class_names), 'class')} ({listed})"
    for images in filter(None, (source, validation)):
        labelled = 0 if images.labels is None else int((images.labels != UNLABELLED).sum())
        if labelled < len(images):
            text += f"; {labelled:,} of {len(images):,} images of {images.title} have one"
            text += f" ({images.unlabelled})" if images.unlabelled else ""
    return text


def hold_out(labels: Tensor, seed: int, one_in: int = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Return the indices that are kept and those held out, both ascending.

    Every class of two or more images gives one in `one_in`, to within one, and never all. Images without a label and
    the only image of a class are kept, so it can happen that nothing is held out.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "hold out"))
    order = order[labels[order] != UNLABELLED]
    order = order[labels[order].argsort(stable=True)]
    classes, count = labels[order].unique(return_counts=True)
    order = order[~torch.isin(labels[order], classes[count == 1])]
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[::one_in]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
