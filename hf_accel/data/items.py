"""Datasets that a program passes, as image sources: `datasets.Dataset`, or any torch `Dataset` of images."""

import contextlib
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from ..distributed import is_main, say, warning_once
from ..utils.counts import count_of
from .arrays import AnyImage, open_array
from .labels import LABEL_KEYS, ONE_HOT, UNLABELLED, read_labels
from .normalisation import measure_normalisation
from .sources import HEADER_SAMPLE, ImageSource
from .tables import choose_columns, holds_lists, name_origin, select_undecoded

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "jpg", "png")

KEPT_BYTES = 2**31
"""Images that are fetched together with their labels are kept for the next look at them, up to this size."""

SILENT_SECONDS = 10.0
"""After so much time a line says that all items are read, and how long this takes."""

PROGRAM_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(MemoryError, NameError, NotImplementedError, TypeError),
)
"""Errors of a dataset's own code. Other ones, such as OSError and ValueError, are those of an unreadable file."""


@warning_once()
def image_source(dataset: Any, name: str, like: ImageSource | None = None, num_channels: int = 3) -> ImageSource:
    """Return the images of `dataset`, with their labels if it has any.

    Args:
        dataset: an `ImageSource`, a `datasets.Dataset` with a column of images, or a torch `Dataset` (anything with a
            length and an index) of PIL images, of tensors (C, H, W) or (H, W) or of NumPy's arrays (H, W, C) or
            (H, W), of uint8 or uint16. An item is an image, or a dict or tuple that holds one, and perhaps an integer
            or text as label. Each item is read at most once here, apart from a few whose images are looked at.
        name: of the set, for messages.
        like: the training images, whose classes a validation set follows by name.
        num_channels: of the images. Those other than RGB are normalised by their own mean and deviation.

    Raises:
        TypeError: a dataset that has no length, or whose items hold no image.
        ValueError: columns that cannot be told apart, or labels of another type.
        RuntimeError: the dataset's own code raised an error that is not one of an unreadable file.
    """
    if isinstance(dataset, ImageSource):
        return dataset
    _refuse_other_data(dataset, name)
    by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not by_number:
        raise TypeError(
            f"{name}: {type(dataset).__name__} is not map-style (it lacks a length or an index), so its order cannot "
            "be drawn or resumed exactly: pass a datasets.Dataset or a torch Dataset. To read Parquet or tar files "
            "where they lie, pass what hf_accel.data.load_sources(PATH, streaming=True) returns; PATH may be a Hub id"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: the dataset is empty")
    names = like.class_names if like else None
    if _is_table(dataset):
        table, source = None, _from_table(dataset, name, names)
    else:
        table: Any = _Items(dataset, name, num_channels)
        labels, names, origin, why = _read_item_labels(table, names)
        source = ImageSource(name, table, None, labels, names, labels_from=origin)
        source.unlabelled = why
    source.channels = num_channels
    source.made_of = _describe(dataset)
    source.look_at_pixels()
    if like:
        source.mean, source.std = like.mean, like.std
    elif num_channels != 3:
        source = source.renormalised(*measure_normalisation(source))
    source.hold_in_memory()
    if isinstance(table, _Items):
        table.end_first_look()
    return source


def _refuse_other_data(dataset: Any, name: str) -> None:
    """Refuse what is often passed in place of a dataset. Raises TypeError."""
    from datasets import DatasetDict

    if isinstance(dataset, DatasetDict):
        splits = [str(split) for split in dataset]
        raise TypeError(
            f"{name}: it holds the splits {', '.join(splits)}; pass one of them, e.g. dataset[{splits[0]!r}]"
        )
    if isinstance(dataset, str | os.PathLike):
        raise TypeError(
            f"{name}: {os.fspath(dataset)!r} is a name and not a dataset; load it first, e.g. with "
            "datasets.load_dataset('imagefolder', data_dir=..., split='train')"
        )


def _describe(dataset: Any) -> str:
    """Name a dataset by what it was loaded from, or by its class."""
    from datasets import Dataset

    if isinstance(dataset, Dataset) and dataset.info.dataset_name:
        return dataset.info.dataset_name + (f", split {dataset.split}" if dataset.split else "")
    inner = getattr(dataset, "dataset", None)
    return type(dataset).__name__ + (f" of {_describe(inner)}" if hasattr(inner, "__len__") else "")


def _is_table(dataset: Any) -> bool:
    """Whether `datasets` holds the images as files, untransformed: only what an item needs is then read."""
    from datasets import Dataset, Image

    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return False
    return any(isinstance(feature, Image) for feature in dataset.features.values())


def _from_table(table: "Dataset", name: str, class_names: list[str] | None) -> ImageSource:
    table = table.with_format(None)
    image_column, label_column = choose_columns(name, table, None, None, in_python=True)
    labels = None
    if label_column:
        labels, class_names = read_labels(table, label_column, class_names, name, in_python=True)
    origin = name_origin(table, label_column) if labels is not None else None
    images = select_undecoded(table, image_column)
    source = ImageSource(name, images, None, labels, class_names if labels is not None else None, labels_from=origin)
    if len(table.column_names) > 1 and not label_column:
        source.unlabelled = f"no ClassLabel among its columns {', '.join(table.column_names)}"
        if lists := [name for name in LABEL_KEYS if holds_lists(table, name)]:
            source.unlabelled = f"column {lists[0]} holds lists, neither integers nor text; {ONE_HOT}"
    return source


class _Item(NamedTuple):
    """What one item holds: its image, or why there is none, and the values that may be its label.

    `other_keys` are those that hold a value that would be a label if it were named as one, and `vectors` the lengths of
    what cannot be a label because it is a list, such as a one-hot label.
    """

    image: AnyImage | Exception
    labels: Sequence[Any] = ()
    other_keys: Sequence[str] = ()
    vectors: Sequence[int] = ()


class _Items:
    """The images of a dataset's items by row, in the form in which an `ImageSource` reads a table.

    Until `end_first_look`, images that are needed again are kept, as far as KEPT_BYTES suffice.
    """

    def __init__(self, dataset: Any, name: str, channels: int, rows: Sequence[int] | None = None):
        self.channels = channels
        self.dataset, self.name, self.rows = dataset, name, range(len(dataset)) if rows is None else rows
        self._kept: dict[int, _Item] | None = {} if rows is None else None
        self._room = KEPT_BYTES
        self._count = 0
        self._bar: Any = None
        self._started = self._said = 0.0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> dict[str, Any]:
        if isinstance(index, slice):
            records = [{"image": self.item(row).image} for row in self.rows[index]]
            if self._kept:
                self._drop(self.rows[index])  # They are decoded now.
            return {"image": records}
        return {"image": {"image": self.item(self.rows[index]).image}}

    def select(self, rows: Any) -> "_Items":
        return _Items(self.dataset, self.name, self.channels, [self.rows[int(row)] for row in rows])

    def item(self, row: int, keep: bool = True) -> _Item:
        """Read an item. Raises RuntimeError if the dataset's own code fails."""
        if self._kept is None:
            return self._read(row)
        if row in self._kept:
            return self._kept[row]
        item = self._read(row)
        self._show_progress()
        size = _bytes_of(item.image)
        if keep and size <= self._room:
            self._kept[row], self._room = item, self._room - size
        return item

    def keep_only(self, rows: Sequence[int]) -> None:
        """Drop the images of all other rows."""
        self._drop(sorted(set(self._kept or ()).difference(rows)))

    def _drop(self, rows: Iterable[int]) -> None:
        for row in rows:
            if self._kept and row in self._kept:
                self._room += _bytes_of(self._kept.pop(row).image)

    def end_first_look(self) -> None:
        """From now on, read each item as often as it is asked for."""
        if self._bar is not None:
            self._bar.close()
        self._kept = self._bar = None

    def _show_progress(self) -> None:
        """Show a bar on a terminal, and elsewhere one line if this takes long."""
        self._started = self._started or time.monotonic()
        self._count += 1
        if self._bar is None:
            hidden = not (is_main() and sys.stderr.isatty())
            self._bar = tqdm(desc=f"Reading {self.name}", total=len(self), delay=1, leave=False, disable=hidden)
        self._bar.update()
        taken = time.monotonic() - self._started
        if self._bar.disable and not self._said and taken > SILENT_SECONDS:
            self._said = taken
            left = taken * (len(self) / self._count - 1)
            say(f"Reading {self.name} once: {self._count:,} of {len(self):,} items, about {left:.0f} s are left")

    def _read(self, row: int) -> _Item:
        try:
            item = self.dataset[row]
        except Exception as error:  # A dataset's own code may raise anything; `ImageSource` counts unreadable files.
            source = traceback.extract_tb(error.__traceback__)[-1].filename
            if isinstance(error, PROGRAM_ERRORS) and f"{os.sep}PIL{os.sep}" not in source:
                raise RuntimeError(
                    f"{self.name}[{row}] raises {type(error).__name__}: {error}. Correct the dataset; only unreadable "
                    "files, for example an OSError or ValueError, are skipped"
                ) from error
            return _Item(error)
        found = _find_labels(item), _find_other_keys(item), _find_vectors(item)
        try:
            return _Item(_as_image(item, row, self.channels), *found)
        except TypeError as error:
            if row == 0:
                raise  # An error of the program, and not a broken image.
            return _Item(error, *found)


def _bytes_of(image: AnyImage | Exception) -> int:
    if isinstance(image, Exception):
        return 0
    pixel = 4 if isinstance(image, Image) else image.channels * image.dtype.itemsize
    return pixel * image.width * image.height


def _as_image(item: Any, row: int, channels: int) -> AnyImage:
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
            if array.dtype not in (np.uint8, np.uint16):
                raise TypeError(
                    f"item {row} holds an image of {array.dtype}: leave transforms to the trainer, which makes the "
                    "views, and return PIL images, or tensors of uint8 or uint16"
                )
            if array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2] in (1, 3)):
                return PIL.Image.fromarray(array.squeeze() if array.shape[-1] == 1 else np.ascontiguousarray(array))
            if array.ndim == 2 or array.shape[2] in (1, 3, channels):
                return open_array(array)
    found = ", ".join(
        type(value).__name__ + (f" {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else "")
        for value in values
    )
    raise TypeError(
        f"item {row} holds no image but {found}: return PIL images, or uint8 tensors (C, H, W) with C = num_channels = "
        f"{channels}"
    )


def _read_item_labels(
    items: _Items, class_names: list[str] | None
) -> tuple[Tensor | None, list[str] | None, str | None, str | None]:
    """Labels, class names and where the labels come from; all None without labels, and then why there are none."""
    from datasets import ClassLabel, Dataset, Features

    dataset, name = items.dataset, items.name
    sample = torch.linspace(0, len(items) - 1, min(len(items), HEADER_SAMPLE)).long().tolist()
    labelled = any([items.item(row).labels for row in sample])
    values, origin = next(
        (([*values], f"the dataset's {key}") for key in ("targets", "labels") if (values := _listed(dataset, key))),
        ([], None),
    )
    if not values and labelled:
        values, origin = _read_all_labels(items, sample), "the dataset's items"
    values = [_as_label(value) for value in values]
    if all(value is None for value in values) or any(isinstance(value, float) for value in values):
        why = next((f"{value:g} is neither an integer nor text" for value in values if type(value) is float), None)
        if (lengths := items.item(0).vectors) and not labelled:
            why = f"a list of {count_of(lengths[0], 'value')} is neither an integer nor text; {ONE_HOT}"
        elif (keys := items.item(0).other_keys) and not labelled:
            why = f"it has none of the keys {', '.join(LABEL_KEYS)}"
            logger.warning(
                "%s: no labels, as only the keys %s are looked at; to use one of these, rename it: %s",
                *(name, ", ".join(LABEL_KEYS), ", ".join(keys)),
            )
        return None, None, None, why
    kinds = {type(value).__name__ for value in values if value is not None}
    if len(kinds) > 1:
        got = " and ".join(sorted(kinds))
        raise ValueError(f"{name}: labels must all be integers or all text, and are {got}; correct or leave them out")
    declared = [str(one) for one in getattr(dataset, "classes", None) or []]
    if declared and all(v is None or (isinstance(v, int) and UNLABELLED <= v < len(declared)) for v in values):
        table = Dataset.from_dict({"label": values}, Features(label=ClassLabel(names=declared)))
    else:
        table = Dataset.from_dict({"label": values})
    labels, names = read_labels(table, "label", class_names, name, in_python=True)
    return (labels, names, origin, None) if labels is not None else (None, None, None, None)


def _read_all_labels(items: _Items, sample: Sequence[int]) -> list[Any]:
    """Read every item for its label, and keep the images if all of them may be held in memory."""
    labels, keep, sizes = [], True, set()
    for row in range(len(items)):
        image, values, *_ = items.item(row, keep)
        labels.append(next((value for value in map(_as_label, values) if value is not None), None))
        if not keep or isinstance(image, Exception):
            continue
        sizes.add(image.size)
        keep = len(sizes) == 1 and _bytes_of(image) * len(items) <= KEPT_BYTES
        if not keep:
            items.keep_only(sample)
        elif isinstance(image, Image) and getattr(image, "fp", None):
            with contextlib.suppress(Exception):  # A broken image is found when it is decoded.
                image.load()  # Otherwise its file would stay open.
    return labels


def _listed(dataset: Any, key: str) -> list[Any]:
    """The labels that a dataset keeps as a list, as torchvision's do."""
    values = getattr(dataset, key, None)
    if values is None or not hasattr(values, "__len__") or len(values) != len(dataset):
        return []
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else [*values]
    return values if all(isinstance(value, int | float | str | None) for value in values) else []


def _find_labels(item: Any) -> list[Any]:
    """The values in an item that may be its label. A missing label is None or NaN."""
    values = _list_beside_image(item)
    scalars = (v.item() if isinstance(v, Tensor | np.generic | np.ndarray) and v.ndim == 0 else v for v in values)
    return [value for value in scalars if isinstance(value, int | float | str | None)]


def _find_vectors(item: Any) -> list[int]:
    """The lengths of the lists, arrays and tensors of one axis where the label of an item is looked for."""
    kinds = (list, tuple, Tensor, np.ndarray)
    return [len(v) for v in _list_beside_image(item) if isinstance(v, kinds) and getattr(v, "ndim", 1) == 1]


def _list_beside_image(item: Any) -> list[Any]:
    """The values among which the label of an item is looked for."""
    if isinstance(item, Mapping):
        return [item[key] for key in LABEL_KEYS if key in item]
    return [*item[1:]] if isinstance(item, list | tuple) else []


def _as_label(value: Any) -> Any:
    """Return None for NaN, and an int for a float that stands for one, as in columns that lack some labels."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _find_other_keys(item: Any) -> list[str]:
    keys = [key for key in item if key not in IMAGE_KEYS + LABEL_KEYS] if isinstance(item, Mapping) else []
    return [str(key) for key in keys if any(isinstance(v, int | str) for v in _find_labels({"label": item[key]}))]
