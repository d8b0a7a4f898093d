"""Load the bundled digits, a dataset from the Hub, or image files in any layout that `datasets` reads."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed import warning_once
from .bundled import MNIST_MEAN, MNIST_STD, digits
from .labels import hold_out, read_labels
from .normalisation import measure_normalisation
from .shards import Shards, ShardTables, index_columns
from .sources import ImageSource
from .tables import NO_LABELS, choose_columns, choose_splits, load_tables, name_origin, select_undecoded, take_part

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HELD_OUT_NAME = "held-out"
"""The name of the images that are held out of the training split."""

NO_COMMON_CLASSES = (
    "%s: the split %s has no labels of the training split's classes, so no accuracy will be measured: set "
    "validation_split to one that has"
)


@warning_once()
def load_sources(
    data: str,
    train_split: str | None = None,
    validation_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    config: str | None = None,
    in_memory: bool = True,
    streaming: bool = False,
    only_train: bool = False,
    num_channels: int = 3,
) -> tuple[ImageSource, ImageSource | None]:
    """Load the training and validation images of `data`.

    `data` is "bundled", a dataset on the Hub, a folder of images (class folders, or train/ and validation/ with class
    folders in them), a parquet or arrow file or a folder of them, or what `datasets` saved with `save_to_disk`.
    `config` is one of the configurations that the README.md of a dataset may declare.

    Without a validation split, a tenth of each class of two or more images is held out, drawn from `seed`. Without
    labels there are no validation images. Classes are matched by name between splits. The label -1 marks images without
    a label, and validation images of a class that the training split lacks. `label_column="none"` reads no labels and
    takes no folders as classes. With `in_memory`, images of one size that are few enough are decoded at once.
    With `streaming`, the images of Parquet files, or of tar files in the layout of webdataset, are read where they lie:
    `data` is then such a file, a folder or URL of them, or a dataset on the Hub.
    With `only_train`, no image is held out, and there are no validation images.
    Images have `num_channels` channels. Those other than RGB are normalised by their own mean and deviation.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: data that cannot be read; missing or ambiguous splits or columns.
    """
    if data == "bundled":
        if num_channels != 3:
            raise ValueError(f"num_channels={num_channels}: the bundled digits have 3; leave it out")
        return _bundled(seed, label_column != NO_LABELS, only_train)
    tables = ShardTables(data, config, image_column, label_column) if streaming else load_tables(data, config)
    split_matters = bool(train_split or validation_split) or len(tables) > 1 or not Path(data).exists()
    train_split, validation_split = choose_splits(data, list(tables), train_split, validation_split)
    train = take_part(tables, train_split)
    if streaming:
        image_column, label_column = index_columns(train)
    image_column, label_column = choose_columns(data, train, image_column, label_column)
    labels, names = read_labels(train, label_column) if label_column else (None, None)
    if only_train:
        parts = [(train, labels, train_split)]
    elif validation_split is not None:
        held, held_labels = take_part(tables, validation_split), None
        if label_column in held.column_names:
            held_labels = read_labels(held, label_column, names, f"{data}/{validation_split}")[0]
        if labels is not None and held_labels is None:
            logger.warning(NO_COMMON_CLASSES, data, validation_split)
        parts = [(train, labels, train_split), (held, held_labels, validation_split)]
    elif labels is not None:
        parts = _hold_out_rows(data, train, labels, train_split, seed)
    else:
        parts = [(train, None, train_split)]
        logger.warning("%s has neither a validation split nor labels: no accuracy will be measured", data)
    origin = name_origin(train, label_column) if labels is not None else None
    sources, warned = [], False
    for table, part_labels, part in parts:
        name = "/".join(filter(None, (data, config, part)))
        images, about = select_undecoded(table, image_column), {"labels_from": origin, "channels": num_channels}
        source = ImageSource(name, images, None, part_labels, names, **about)
        source.title = _title("/".join(filter(None, (data, config))), part, split_matters)
        source.shards = Shards.of_index(table) if streaming else None
        warned |= source.look_at_pixels(warns=not warned)
        if num_channels != 3:
            known = (sources[0].mean, sources[0].std) if sources else measure_normalisation(source)
            source = source.renormalised(*known)
        if in_memory and not streaming:
            source.hold_in_memory()
        sources.append(source)
    return sources[0], sources[1] if len(sources) == 2 else None


def _title(data: str, part: str, split_matters: bool) -> str:
    """Name a part of the images as messages do: "photos", "photos/train" or "user/photos (split train)".

    Args:
        part: the name of a split, which `datasets` makes up where there is none, or HELD_OUT_NAME.
        split_matters: whether the data have several splits or are from the Hub, or a split was asked for.
    """
    if part == HELD_OUT_NAME:
        return f"{data} ({part})"
    if (Path(data) / part).is_dir():
        return f"{data}/{part}"
    return f"{data} (split {part})" if split_matters else data


def _hold_out_rows(
    data: str, train: "Dataset", labels: Tensor, split: str, seed: int
) -> "list[tuple[Dataset, Tensor | None, str]]":
    """Split into training and held-out images, each as table, labels and name. The latter are missing if impossible."""
    kept, out = hold_out(labels, seed)
    if len(out) == 0:
        logger.warning(
            "%s has no validation split, and no class has two images, of which one could be held out: no accuracy "
            "will be measured; label more images",
            data,
        )
        return [(train, labels, split)]
    logger.warning("%s has no validation split: %d of %d images are held out", data, len(out), len(labels))
    return [(train.select(rows), labels[rows], part) for rows, part in ((kept, "train"), (out, HELD_OUT_NAME))]


def _bundled(seed: int, with_labels: bool, only_train: bool) -> tuple[ImageSource, ImageSource | None]:
    pixels, labels = digits()
    sources, names = [], [str(digit) for digit in range(10)]
    parts = dict(zip(("bundled/train", "bundled/validation"), hold_out(labels, seed, one_in=5), strict=True))
    for name, rows in ({"bundled": torch.arange(len(labels))} if only_train else parts).items():
        colour = pixels[rows][:, None].expand(-1, 3, -1, -1)
        about = (labels[rows], names) if with_labels else (None, None)
        origin = "the bundled digits" if with_labels else None
        sources.append(ImageSource(name, None, colour, *about, MNIST_MEAN, MNIST_STD, origin))
    return sources[0], sources[1] if len(sources) == 2 else None
