"""Images that are read where they lie: in tar files in the layout of webdataset, or in Parquet files.

One pass makes an index, a table of where each image lies, which `datasets` keeps in its cache. So any image can be read
at any time, and the order of a stream, its resume and its workers are those of every other dataset.
"""

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..utils.errors import fail
from ..utils.weight_files import may_be_hub_id
from .folders import find_layout, scan_folder
from .parquet_files import RowGroups, find_contents, read_features, scan_parquet
from .remote import Place, Row, file_state, is_remote
from .tables import NO_LABELS, choose_columns, explained, explained_hub
from .tar_files import TarMembers, scan_tars

if TYPE_CHECKING:
    from datasets import Dataset, Features

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
"""Numbers in a URL that stands for several files, as in train-{000..146}.tar."""

PLACE = re.compile(r"(.+?)\?(\d+)\+(\d+)#(.*)", re.DOTALL)
"""A `Place`, as an index holds it instead of the path of an image's file."""

IMAGE, SHARD = "_image", "_shard"
"""Columns of an index: the places of the images, and the numbers of their shards. Labels are a third one, if any."""

PIECE, PIECES = 256, 32
"""Consecutive images of a tar file that are read one after another, and how many such pieces are shuffled together."""

NOTHING_TO_STREAM = (
    "streaming reads Parquet files, or .tar files in the layout of webdataset, and there are none: leave it out"
)

SAMPLED_GROUPS = 4
"""From how many row groups a sample of images is taken."""


class Shards:
    """The shards that the images of a dataset lie in: tar files, or row groups of Parquet files.

    Attributes:
        number: (N,) the number of the shard of each image. It never decreases.
        piece: how many consecutive images of a shard are read one after another. A row group is one piece.
        pieces: how many pieces are shuffled together, which are about PIECE * PIECES images.
        reader: what reads the images.
    """

    def __init__(self, number: Tensor, are_row_groups: bool):
        self.number, self.are_row_groups = number, are_row_groups
        if are_row_groups:
            self.piece = int(self.lengths.max())
            self.pieces = max(1, PIECE * PIECES * len(self.lengths) // len(number))
            self.reader = RowGroups(self.pieces + 1)  # A batch may lie in two blocks.
        else:
            self.piece, self.pieces, self.reader = PIECE, PIECES, TarMembers()

    @classmethod
    def of_index(cls, index: "Dataset") -> "Shards":
        """Return the shards of an index, or of a part of one. Raises ValueError if it is empty."""
        if len(index) == 0:
            raise ValueError("a split, or the part of it that is asked for, holds no images")
        return cls(torch.tensor(index[SHARD][:]), not is_tar(_parse(index[0][IMAGE]["path"])[0]))

    @property
    def lengths(self) -> Tensor:
        """How many consecutive images lie in each shard."""
        return self.number.unique_consecutive(return_counts=True)[1]

    def select(self, rows: Tensor) -> "Shards":
        """Return the shards of some of the images."""
        return Shards(self.number[rows], self.are_row_groups)

    def sample(self, count: int) -> list[int]:
        """Return up to `count` images that are spread over the dataset, but lie in few row groups."""
        if not self.are_row_groups:
            return spread(0, len(self.number), count)
        lengths = self.lengths
        groups = spread(0, len(lengths), SAMPLED_GROUPS)
        starts = lengths.cumsum(0) - lengths
        each = count // len(groups)
        return [image for g in groups for image in spread(int(starts[g]), int(starts[g] + lengths[g]), each)]

    def read(self, place: str) -> bytes:
        """Return the file of an image."""
        return self.reader.read(*_parse(place))

    def name(self, place: str) -> str:
        """Return the name of an image, for messages."""
        return self.reader.name(*_parse(place))


def index_columns(index: "Dataset") -> tuple[str, str]:
    """Return the column of images and that of labels, or "none"."""
    return IMAGE, next((name for name in index.column_names if name not in (IMAGE, SHARD)), NO_LABELS)


def spread(start: int, end: int, count: int) -> list[int]:
    """Return up to `count` numbers that are spread from `start` to `end` (exclusive)."""
    return torch.linspace(start, end - 1, min(end - start, count)).long().tolist()


def _parse(place: str) -> Place:
    path, first, second, name = PLACE.fullmatch(place).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return path, int(first), int(second), name


def is_tar(path: str) -> bool:
    return path.endswith(".tar")


class ShardTables(Mapping[str, "Dataset"]):
    """The indices of a dataset by split. Each is made when it is first asked for.

    A row stands for an image. Its columns are IMAGE, SHARD and, if there are labels, one more.

    Args:
        data: a file, a folder, a URL or a dataset on the Hub.
        config: a configuration of the dataset, where it has several.
        image_column: of tar files the extension of the images, where samples have several.
        label_column: of tar files the extension or the JSON key of the labels. Default: cls, or a usual key. "none"
            reads no labels.

    Raises:
        FileNotFoundError: the path does not exist.
        OSError: a URL cannot be read.
        ValueError: there are no tar or Parquet files, or they cannot be read.
    """

    def __init__(self, data: str, config: str | None, image_column: str | None, label_column: str | None):
        self.data, self.columns = data, (image_column, label_column)
        self.files, self._declared = _find_files(data, config)
        self._indices: dict[str, Dataset] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, split: str) -> "Dataset":
        if split not in self._indices:
            make = self._index_tars if is_tar(self.files[split][0]) else self._index_parquet
            with explained():
                self._indices[split] = make(self.files[split])
        return self._indices[split]

    def _index_tars(self, files: list[str]) -> "Dataset":
        import datasets

        (image, label), labels = self.columns, {}
        if label != NO_LABELS:
            first = next((value for _, _, value in _scan(files[:1], image, label)), None)
            if first is not None:
                labels = {label or "label": datasets.Value("int64" if isinstance(first, int) else "string")}
            elif label is not None:
                raise ValueError(f"label_column={label}: the first sample of {files[0]} has none")
        return _index(files, image, label, labels)

    def _index_parquet(self, files: list[str]) -> "Dataset":
        """Index Parquet files. The first split that is asked for, which is trained on, decides about the columns."""
        import datasets

        features, schema = read_features(files[0], self._declared)
        empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        if not self._indices:
            image, label = choose_columns(self.data, empty, *self.columns)
            self.columns = image, label or NO_LABELS
        image, label = cast(tuple[str, str], self.columns)
        labels = {label: features[label]} if label in features else {}
        return _index(files, find_contents(schema, image), label if labels else NO_LABELS, labels)


def _index(files: list[str], image: str | None, label: str | None, labels: dict[str, Any]) -> "Dataset":
    """Make the index of a split, or take it from the cache of `datasets` if the files are those that it was made of.

    `labels` holds the name and the type of the column of labels, if there is one.
    """
    import datasets

    features = datasets.Features({IMAGE: datasets.Image(decode=False), SHARD: datasets.Value("int32"), **labels})
    # `datasets` takes a list for one that several processes may share.
    states = tuple(map(file_state, files))
    given = {"files": tuple(files), "image": image, "label": label, "columns": tuple(features), "states": states}
    return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=given)  # pyright: ignore


def _rows(
    files: Sequence[str], image: str | None, label: str | None, columns: Sequence[str], states: Any
) -> Iterator[dict]:
    """Yield the rows of an index. `datasets` keeps one for each combination of arguments, and so of `states`."""
    for (path, first, second, name), shard, value in _scan(files, image, label):
        place = {"bytes": None, "path": f"{path}?{first}+{second}#{name}"}
        yield dict(zip(columns, (place, shard, value), strict=False))


def _scan(files: Sequence[str], image: str | None, label: str | None) -> Iterator[Row]:
    """Yield a row for each image of these files."""
    return cast(Any, scan_tars if is_tar(files[0]) else scan_parquet)(files, image, label)


# Files


def _find_files(data: str, config: str | None) -> "tuple[dict[str, list[str]], Features | None]":
    """Find the files of each split, and the types of columns that the README of the dataset declares."""
    path, files = Path(data).expanduser(), {}
    if is_remote(data):
        with explained():
            files = _find_remote_files(data)
    elif path.is_dir():
        root = os.path.realpath(path)
        files = {name: os.path.join(root, name) for name in _of_one_kind(scan_folder(root).tables)}
        if files and not any(map(is_tar, files)):
            with explained():
                return _ask_datasets(data, str(path), config)
    elif path.exists():
        files = {name: os.path.realpath(path) for name in _of_one_kind([path.name])}
    elif may_be_hub_id(data):
        with explained_hub():
            return _ask_datasets(data, data, config)
    else:
        raise FileNotFoundError(f"data={data}: no such file or folder")
    if config is not None:
        fail("data_config", config, f"{data} has no configurations; leave it out")
    splits: dict[str, list[str]] = {}
    for name, split in zip(files, find_layout(data, [*files]).split if files else (), strict=True):
        if split is not None:
            splits.setdefault(split, []).append(files[name])
    if not splits:
        raise ValueError(NOTHING_TO_STREAM)
    return splits, None


def _ask_datasets(data: str, name: str, config: str | None) -> "tuple[dict[str, list[str]], Features | None]":
    """Do as `_find_files` for a dataset on the Hub, or for a folder with the layout of one."""
    import datasets

    builder = datasets.load_dataset_builder(name, config)
    kind = builder.info.builder_name
    if kind not in ("parquet", "webdataset"):
        raise ValueError(f"{NOTHING_TO_STREAM} ({data} is of the kind {kind})")
    files: Any = builder.config.data_files
    return {str(split): list(map(str, names)) for split, names in files.items()}, builder.info.features


def _of_one_kind(names: Iterable[str]) -> list[str]:
    """Return the tar files among `names`, or the Parquet files if there are none."""
    names = list(names)
    return [*filter(is_tar, names)] or [name for name in names if name.endswith(".parquet")]


def _find_remote_files(url: str) -> dict[str, str]:
    import fsspec

    if numbers := RANGE.search(url):
        first, last = numbers.groups()
        names = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        urls = [url[: numbers.start()] + name + url[numbers.end() :] for name in names]
    elif _of_one_kind([url]):
        urls = [url]
    else:
        system, folder = fsspec.url_to_fs(url)
        names = sorted(_of_one_kind(system.find(folder)))
        return {posixpath.relpath(name, folder): system.unstrip_protocol(name) for name in names}
    return {posixpath.basename(url): url for url in urls}
