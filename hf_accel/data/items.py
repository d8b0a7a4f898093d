"""Datasets that a program passes, as image sources: `datasets.Dataset`, or any torch `Dataset` of images."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from PIL.Image import Image
from torch import Tensor

from .labels import UNLABELLED, read_labels
from .sources import ImageSource
from .tables import choose_columns, name_origin, select_undecoded

if TYPE_CHECKING:
    from datasets import Dataset

LABEL_KEYS = ("label", "labels", "target", "targets", "class")
IMAGE_KEYS = ("image", "images", "img", "pixel_values", "jpg", "png")


def image_source(dataset: Any, name: str, like: ImageSource | None = None) -> ImageSource:
    """Return the images of `dataset`, with their labels if it has any.

    Args:
        dataset: an `ImageSource`, a `datasets.Dataset` with a column of images, or a torch `Dataset` (anything with a
            length and items by number) of PIL images or uint8 tensors (C, H, W) or (H, W). An item is an image, or a
            dict or tuple that holds one, and perhaps an integer or text as label.
        name: of the set, for messages.
        like: the training images, whose classes a validation set follows by name.

    Raises:
        TypeError: a dataset that has no length, or whose items hold no image.
        ValueError: columns that cannot be told apart, or labels of another type.
    """
    if isinstance(dataset, ImageSource):
        return dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{name}: a {type(dataset).__name__} has no length or no items by number, so no order can be drawn: pass a "
            "datasets.Dataset or a torch Dataset; a stream has to be saved first"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: the dataset is empty")
    names = like.class_names if like else None
    if _is_table(dataset):
        source = _from_table(dataset, name, names)
    else:
        labels, names, origin = _item_labels(dataset, name, names)
        table: Any = _Items(dataset)
        table.image(0)  # What is no image is an error of the program, and not a broken image.
        source = ImageSource(name, table, None, labels, names, labels_from=origin)
    if like:
        source.mean, source.std = like.mean, like.std
    source.warn_of_lost_contrast()
    source.hold_in_memory()
    return source


def _is_table(dataset: Any) -> bool:
    """Whether `datasets` holds the images as files, untransformed: only what an item needs is then read."""
    from datasets import Dataset, Image

    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return False
    return any(isinstance(feature, Image) for feature in dataset.features.values())


def _from_table(table: "Dataset", name: str, class_names: list[str] | None) -> ImageSource:
    table = table.with_format(None)
    image_column, label_column = choose_columns(name, table, None, None)
    labels = None
    if label_column:
        labels, class_names = read_labels(table, label_column, class_names, name)
    origin = name_origin(table, label_column) if labels is not None else None
    images = select_undecoded(table, image_column)
    return ImageSource(name, images, None, labels, class_names if labels is not None else None, labels_from=origin)


class _Items:
    """The images of a dataset's items by row, in the form in which an `ImageSource` reads a table."""

    def __init__(self, dataset: Any, rows: Sequence[int] | None = None):
        self.dataset, self.rows = dataset, range(len(dataset)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> dict[str, Any]:
        if isinstance(index, slice):
            return {"image": [self._record(row) for row in self.rows[index]]}
        return {"image": self._record(self.rows[index])}

    def select(self, rows: Any) -> "_Items":
        return _Items(self.dataset, [self.rows[int(row)] for row in rows])

    def image(self, index: int) -> Image:
        return _as_image(self.dataset[self.rows[index]], self.rows[index])

    def _record(self, row: int) -> dict[str, Any]:
        try:
            return {"image": _as_image(self.dataset[row], row)}
        except Exception as error:  # A dataset's own code may raise anything; `ImageSource` counts what fails.
            return {"image": error}


def _as_image(item: Any, row: int) -> Image:
    """The image in an item. Raises TypeError if there is none."""
    if isinstance(item, Mapping):
        values = [item[key] for key in IMAGE_KEYS if key in item] or [*item.values()]
    else:
        values = [*item] if isinstance(item, list | tuple) else [item]
    for value in values:
        if isinstance(value, Image):
            return value
        if isinstance(value, Tensor) and value.ndim == 3:
            value = value.permute(1, 2, 0)
        if isinstance(value, Tensor | np.ndarray) and value.ndim in (2, 3):
            array = np.asarray(value)
            if array.dtype != np.uint8:
                raise TypeError(
                    f"item {row} holds an image of {array.dtype}: leave transforms to the trainer, which makes the "
                    "views, and return PIL images or uint8 tensors"
                )
            if array.ndim == 2 or array.shape[2] in (1, 3):
                return PIL.Image.fromarray(array.squeeze() if array.shape[-1] == 1 else np.ascontiguousarray(array))
    found = ", ".join(type(value).__name__ for value in values)
    raise TypeError(f"item {row} holds no image but {found}: return PIL images or uint8 tensors (C, H, W)")


def _item_labels(
    dataset: Any, name: str, class_names: list[str] | None
) -> tuple[Tensor | None, list[str] | None, str | None]:
    """Labels, class names and where the labels come from; all None where the items have no labels."""
    from datasets import ClassLabel, Dataset, Features

    values, origin = next(
        (([*values], f"the dataset's {key}") for key in ("targets", "labels") if (values := _listed(dataset, key))),
        ([], None),
    )
    if not values and _label(dataset[0]) is not None:
        values, origin = [_label(dataset[row]) for row in range(len(dataset))], "the dataset's items"
    if not values:
        return None, None, None
    declared = [str(one) for one in getattr(dataset, "classes", None) or []]
    if declared and all(isinstance(value, int) and UNLABELLED <= value < len(declared) for value in values):
        table = Dataset.from_dict({"label": values}, Features(label=ClassLabel(names=declared)))
    else:
        table = Dataset.from_dict({"label": values})
    labels, names = read_labels(table, "label", class_names, name)
    return (labels, names, origin) if labels is not None else (None, None, None)


def _listed(dataset: Any, key: str) -> list[Any]:
    """The labels that a dataset keeps as a list, as torchvision's do."""
    values = getattr(dataset, key, None)
    if values is None or not hasattr(values, "__len__") or len(values) != len(dataset):
        return []
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else [*values]
    return values if all(isinstance(value, int | str | None) for value in values) else []


def _label(item: Any) -> int | str | None:
    """The label in an item, if it has one."""
    if isinstance(item, Mapping):
        values = [item[key] for key in LABEL_KEYS if key in item]
    else:
        values = [*item[1:]] if isinstance(item, list | tuple) else []
    for value in values:
        if isinstance(value, Tensor | np.generic) and value.ndim == 0:
            value = value.item()
        if isinstance(value, int | str):
            return value
    return None
