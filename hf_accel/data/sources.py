"""Where images come from: the bundled digits, a Hub data set, or files in any layout that `datasets` reads."""

import contextlib
import io
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import PIL.ImageOps
import torch
from PIL.Image import Image
from torch import Tensor

from ..draws import generator
from .bundled import MNIST_MEAN, MNIST_STD, digits
from .decoding import image_tensor, upright_rgb, upright_size

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

VALIDATION_NAMES = ("validation", "valid", "val", "test")
HELD_OUT = 10
"""One in so many training images is kept for validation where the data have no such split."""

MEMORY_BYTES = 2**31
HEADER_SAMPLE = 64
MAX_BAD = 0.01

Bad = tuple[int, str, str]
"""An image that could not be read: index, name, reason."""


class CorruptImage(Exception):
    """One image cannot be opened or decoded; `bad` says which and why."""

    def __init__(self, index: int, name: str, reason: str | Exception):
        if isinstance(reason, PIL.UnidentifiedImageError):
            reason = "not an image, or of no format that Pillow knows"
        elif isinstance(reason, Exception):
            reason = f"{type(reason).__name__}: {reason}"
        super().__init__(f"image {index} ({name}) cannot be read: {reason}")
        self.bad: Bad = (index, name, reason)


class CorruptDataError(RuntimeError):
    """More images of a set cannot be read than may be skipped."""


class ImageSource:
    """A set of images with or without labels.

    Either all of them are in memory, as `pixels`, uint8 (N, 3, H, W), or `read` decodes them one by one.
    `labels` is int64 (N,) or None, and `class_names[label]` says what a label means. `mean` and `std` normalise the
    channels of pixels in [0, 1]. `bad` holds the images that could not be read so far: index -> (name, reason).
    """

    def __init__(
        self,
        name: str,
        table: "Dataset | None" = None,
        pixels: Tensor | None = None,
        labels: Tensor | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        """`table` has one column, of undecoded images; give it or `pixels`."""
        if (table is None) == (pixels is None):
            raise ValueError("an ImageSource takes either a table or pixels")
        self.name, self._table, self.pixels, self.labels = name, table, pixels, labels
        self.class_names = list(class_names) if class_names is not None else None
        self.mean, self.std = tuple(mean), tuple(std)
        self.bad: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self.pixels if self.pixels is not None else self._table)  # pyright: ignore[reportArgumentType]

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names is not None else None

    def open(self, index: int) -> Image:
        """The image with its header read and its pixels not yet. Raises CorruptImage."""
        if self.pixels is not None:
            return PIL.Image.fromarray(self.pixels[index].permute(1, 2, 0).contiguous().numpy())
        (record,) = self._table[index].values()  # pyright: ignore[reportOptionalSubscript]
        return self._open(index, record)

    def _open(self, index: int, record: dict | None) -> Image:
        record = record or {"path": None}
        name = record.get("path") or f"{self.name}[{index}]"
        try:
            content = record.get("bytes")
            image = PIL.Image.open(io.BytesIO(Path(record["path"]).read_bytes() if content is None else content))
            image.info["name"] = name
            return image
        except Exception as error:  # Pillow's decoders raise all sorts
            raise CorruptImage(index, name, error) from error

    def decode(self, index: int, image: Image, shrink: float = 1.0) -> Image:
        """The pixels of what `open` gave: upright RGB. Raises CorruptImage.

        A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, much more cheaply, but never smaller than 1/`shrink`.
        """
        try:
            if shrink >= 2:
                image.draft("RGB", (int(image.width / shrink), int(image.height / shrink)))
            return upright_rgb(image)
        except Exception as error:
            raise CorruptImage(index, image.info.get("name", ""), error) from error

    def read(self, index: int) -> Image:
        """Image number `index`, upright RGB. Raises CorruptImage."""
        return self.decode(index, self.open(index))

    def next_readable(self, index: int, bad: list[Bad]) -> tuple[int, Image]:
        """The first readable image at or after `index` (the first follows the last); adds what it skips to `bad`.

        Raises CorruptDataError after as many failures in a row as condemn the set.
        """
        skipped: list[Bad] = []
        while len(skipped) <= MAX_BAD * len(self):
            try:
                image = self.read(index)
                bad.extend(skipped)
                return index, image
            except CorruptImage as error:
                skipped.append(error.bad)
                index = (index + 1) % len(self)
        raise self._too_many(skipped)

    def report(self, bad: Iterable[Bad]) -> None:
        """Count images that could not be read, and name each once. Raises CorruptDataError beyond 1% of the set."""
        for index, name, reason in bad:
            if index not in self.bad:
                self.bad[index] = (name, reason)
                logger.warning("%s: image %d (%s) cannot be read and is skipped: %s", self.name, index, name, reason)
        if len(self.bad) > MAX_BAD * len(self):
            raise self._too_many([(index, *what) for index, what in self.bad.items()])

    def _too_many(self, bad: Sequence[Bad]) -> CorruptDataError:
        examples = "\n".join(f"  {index}: {name}: {reason}" for index, name, reason in bad[:5])
        return CorruptDataError(
            f"{self.name}: at least {len(bad)} of {len(self)} images cannot be read, and at most {MAX_BAD:.0%} may be "
            f"skipped. For example:\n{examples}\nRemove these files from the data set or replace them by good copies."
        )

    def sample_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of up to HEADER_SAMPLE images spread over the set, from their headers."""
        sizes = []
        for index in torch.linspace(0, len(self) - 1, min(len(self), HEADER_SAMPLE)).long().tolist():
            with contextlib.suppress(CorruptImage):
                sizes.append(upright_size(self.open(index)))
        return sizes

    def hold_in_memory(self) -> None:
        """Decode the whole set into `pixels`, if its images share one size and take less than MEMORY_BYTES."""
        sizes = set(self.sample_sizes())
        if self.pixels is not None or len(sizes) != 1:
            return
        width, height = sizes.pop()
        if 3 * height * width * len(self) > MEMORY_BYTES:
            return
        pixels = torch.empty(len(self), 3, height, width, dtype=torch.uint8)
        failures: list[Bad] = []

        def decode(start: int) -> bool:
            (records,) = self._table[start : start + 64].values()  # pyright: ignore[reportOptionalSubscript]
            for index, record in enumerate(records, start):
                try:
                    image = self.decode(index, self._open(index, record))
                except CorruptImage as error:
                    failures.append(error.bad)
                    continue
                if image.size != (width, height):
                    return False
                pixels[index] = image_tensor(image)
            return True

        # Small images spend their time in Python itself, where threads only get into each other's way
        with ThreadPoolExecutor(1 if height * width < 64**2 else None) as pool:
            starts = range(0, len(self), 64)
            for position in range(0, len(starts), 64):
                if not all(pool.map(decode, starts[position : position + 64])):
                    return
        self.report(sorted(failures))
        kept = torch.arange(len(self))
        for index in self.bad:
            while int(kept[index]) in self.bad:
                kept[index] = (kept[index] + 1) % len(self)
        if self.bad:
            pixels = pixels[kept]
            self.labels = self.labels[kept] if self.labels is not None else None
        self.pixels, self._table = pixels, None


def load_sources(
    data: str,
    train_split: str | None = None,
    validation_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    config: str | None = None,
) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images of `data`.

    `data` is "bundled", a Hub data set, a folder of images (class folders, or train/ and validation/ with class folders
    in them), a parquet or arrow file or a folder of them, or what `datasets` saved with `save_to_disk`. Where there is
    no validation split but labels, a tenth of each class is held out, drawn from `seed`; without labels there is none.
    `config` is one of those that the README.md of a Hub data set or folder may declare. Raises FileNotFoundError for a
    path that is not there, ValueError for missing or ambiguous splits and columns.
    """
    if data == "bundled":
        return _bundled(seed)
    import datasets

    tables = _load_tables(data, config)
    train_split, validation_split = _choose_splits(data, list(tables), train_split, validation_split)
    train = _part(tables, train_split)
    image_column, label_column = _choose_columns(data, train, image_column, label_column)
    labels, names = _labels(train, label_column) if label_column else (None, None)
    if validation_split is not None:
        held = _part(tables, validation_split)
        held_labels = _labels(held, label_column, names)[0] if label_column in held.column_names else None
        parts = [(train, labels, train_split), (held, held_labels, validation_split)]
    elif labels is not None:
        kept, out = hold_out(labels, seed)
        parts = [(train.select(rows), labels[rows], part) for rows, part in ((kept, "train"), (out, "held-out"))]
        logger.warning("%s has no validation split: %d of %d images are held out", data, len(out), len(labels))
    else:
        parts = [(train, None, train_split)]
        logger.warning("%s has neither a validation split nor labels: no accuracy will be measured", data)
    sources = []
    for table, part_labels, part in parts:
        table = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        source = ImageSource("/".join(filter(None, (data, config, part))), table, labels=part_labels, class_names=names)
        source.hold_in_memory()
        sources.append(source)
    return sources[0], sources[1] if len(sources) == 2 else None


def _bundled(seed: int) -> tuple[ImageSource, ImageSource]:
    pixels, labels = digits()
    sources, names = [], [str(digit) for digit in range(10)]
    for rows, part in zip(hold_out(labels, seed, one_in=5), ("train", "validation"), strict=True):
        colour = pixels[rows][:, None].expand(-1, 3, -1, -1)
        sources.append(ImageSource(f"bundled/{part}", None, colour, labels[rows], names, MNIST_MEAN, MNIST_STD))
    return sources[0], sources[1]


def hold_out(labels: Tensor, seed: int, one_in: int = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Indices kept and held out, both ascending; every class gives one in `one_in`, to within one image."""
    order = torch.randperm(len(labels), generator=generator(seed, "hold out"))
    order = order[labels[order].argsort(stable=True)]
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[::one_in]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _load_tables(data: str, config: str | None) -> "dict[str, Dataset]":
    """Every split of `data`, by name."""
    import datasets

    path = Path(data).expanduser()
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if config is not None and (path.is_file() or is_saved):
        raise ValueError(f"data_config={config}: {data} has no configurations; leave it out")
    if path.is_file():
        builder = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
        if builder is None:
            raise ValueError(f"data={data}: a single file must be .parquet or .arrow")
        loaded = datasets.load_dataset(builder, data_files=str(path))
    elif is_saved:
        loaded = datasets.load_from_disk(str(path))
    elif not path.is_dir() and (data.startswith((".", "/", "~")) or data.count("/") > 1):
        raise FileNotFoundError(f"data={data}: no such file or folder")
    else:
        try:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else data, config)
        except OSError as error:
            if path.is_dir():
                raise
            raise FileNotFoundError(f"no such folder, and as a Hub id it cannot be opened: {error}") from error
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else {str(name): loaded[name] for name in loaded}


def _choose_splits(data: str, splits: list[str], train: str | None, validation: str | None) -> tuple[str, str | None]:
    for key, wanted in (("train_split", train), ("validation_split", validation)):
        if wanted is not None and wanted.partition("[")[0] not in splits:
            raise ValueError(f"{key}={wanted}: {data} has the splits {', '.join(splits)}")
    if train is None:
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"{data} has no split 'train' but {', '.join(splits)}: set train_split to one of them")
        train = "train" if "train" in splits else splits[0]
    if validation is None:
        validation = next((name for name in VALIDATION_NAMES if name in splits and name != train), None)
    return train, validation


def _part(tables: "dict[str, Dataset]", split: str) -> "Dataset":
    """A split, or a part of one in the syntax of `datasets`: "train[:1000]", "train[10%:20%]"."""
    import datasets

    if "[" not in split:
        return tables[split]
    name = split.partition("[")[0]
    try:
        (rows,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(tables[name])})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split {split!r}: {error}; write it as train[:1000] or train[10%:20%]") from None
    return tables[name].select(range(rows.from_, rows.to))


def _choose_columns(
    data: str, table: "Dataset", image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """Columns by feature type where they are not named: one Image, at most one ClassLabel."""
    import datasets

    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())

    def choose(key: str, named: str | None, kind: type) -> str | None:
        candidates = [name for name, feature in table.features.items() if isinstance(feature, kind)]
        if named is not None and named not in table.column_names:
            raise ValueError(f"{key}={named}: {data} has the columns {columns}")
        if named is None and len(candidates) > 1:
            raise ValueError(f"{data} has several {kind.__name__} columns: set {key} to one of {', '.join(candidates)}")
        return named or next(iter(candidates), None)

    image_column = choose("image_column", image_column, datasets.Image)
    label_column = choose("label_column", label_column, datasets.ClassLabel)
    if image_column is None:
        raise ValueError(f"{data} has no column of type Image: set image_column to one of its columns: {columns}")
    if label_column == image_column:
        raise ValueError(f"label_column={label_column}: this is the column of images; {data} has the columns {columns}")
    if label_column is None and len(table.column_names) > 1:
        logger.warning("%s has no column of type ClassLabel; set label_column to use one of: %s", data, columns)
    return image_column, label_column


def _labels(table: "Dataset", column: str, names: list[str] | None = None) -> tuple[Tensor | None, list[str] | None]:
    """int64 (N,) and what each value means, or None first where nothing is labelled (-1 or null, as in test splits).

    `names` are those of the training split, which text and plain integers have to follow: these may have gaps, as
    identifiers do, and their classes are the values that occur.
    """
    import datasets

    values: list[Any] = table[column][:]
    kinds = {type(value) for value in values}
    if kinds <= {type(None)}:
        return None, names
    if kinds not in ({int}, {str}, {bool}):
        got = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"label_column={column}: labels must be integers or text, one per image, and are {got}")
    if kinds == {int} and min(values) < 0:
        if max(values) < 0:
            return None, names
        missing = sum(value < 0 for value in values)
        raise ValueError(f"label_column={column}: {missing} of {len(values)} labels are negative; leave them out")
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        if max(values) >= len(names):
            raise ValueError(f"label_column={column}: there is a label {max(values)}, and {len(names)} classes")
    else:
        names = names or [str(value) for value in sorted(set(values))]
        number = {name: label for label, name in enumerate(names)}
        unknown = sorted({str(value) for value in values} - set(names))
        if unknown:
            raise ValueError(f"label_column={column}: the training split lacks the classes {', '.join(unknown[:5])}")
        values = [number[str(value)] for value in values]
    return torch.tensor(values, dtype=torch.int64), names
