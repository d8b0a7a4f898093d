"""Parquet files that hold images. Row groups are read one at a time, and an image is a row of its row group."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..utils.causes import reason
from .remote import Row, ask_patiently, open_file
from .tables import NO_LABELS

if TYPE_CHECKING:
    from datasets import Features

THREADS = 16
"""How many files are opened at the same time to make an index."""


class UnreadableRowGroup(Exception):
    """A row group cannot be read, so that all of its images are missing."""


class RowGroups:
    """Reads rows of Parquet files, and holds the last `kept` row groups that it has read in memory."""

    def __init__(self, kept: int):
        self.kept, self._lock, self._group = kept, threading.Lock(), lru_cache(kept)(_read_row_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.kept,)

    def read(self, path: str, group: int, row: int, values: str) -> bytes:
        """Return the file of an image. `values` is the path of the contents in the schema.

        Raises UnreadableRowGroup.
        """
        with self._lock:  # Threads that need the same row group wait for the first of them.
            rows = self._group(path, group, values)
        value = rows[row].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise ValueError("the row holds no image")
        return content

    def name(self, path: str, group: int, row: int, values: str) -> str:
        return f"{path}, row {row} of row group {group}"


def _read_row_group(path: str, group: int, values: str) -> Any:
    import pyarrow.parquet as pq

    def read() -> Any:
        with open_file(path) as file:
            return pq.ParquetFile(file).read_row_group(group, [values], use_threads=False).column(0)

    try:
        return ask_patiently(path, read)
    except Exception as error:  # of pyarrow, or of the file system behind a URL
        text = f"row group {group} of {path} cannot be read: {reason(error)}; copy or write this file again"
        raise UnreadableRowGroup(text) from error


def read_features(path: str, declared: "Features | None") -> "tuple[Features, Any]":
    """Return the types of a Parquet file's columns, as `datasets` and as pyarrow name them.

    `declared` holds what the README of a dataset says about types that the file itself does not name.
    """
    import datasets

    schema = _ask(path, lambda file: file.schema_arrow)
    features = datasets.Features.from_arrow_schema(schema)
    for name, feature in (declared or {}).items():
        if name in features and not isinstance(features[name], datasets.ClassLabel | datasets.Image):
            features[name] = feature
    return features, schema


def find_contents(schema: Any, image_column: str) -> str:
    """Return the path in the schema of the contents of images. Raises ValueError if there are only paths of files."""
    import pyarrow as pa

    kind = schema.field(image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{image_column}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return image_column
    raise ValueError(
        f"image_column={image_column}: the Parquet files hold no images there but {kind}; set image_column to a column "
        "of images, or leave streaming out"
    )


def scan_parquet(files: Sequence[str], values: str, label: str) -> Iterator[Row]:
    """Yield a row for each row of the files. Their footers and labels are read, and no images.

    Raises:
        ValueError: a file is damaged or lacks a column, or two files number their classes in different orders.
    """
    import datasets

    def read(file: Any) -> tuple[Any, list[int], Any]:
        lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        paths = [file.schema.column(column).path for column in range(len(file.schema))]
        missing = [name for name in (values, label) if name not in [*paths, *file.schema_arrow.names, NO_LABELS]]
        if missing:
            raise ValueError(f"it has no column {missing[0]}")
        if label == NO_LABELS:
            return None, lengths, itertools.repeat(None)
        feature = datasets.Features.from_arrow_schema(file.schema_arrow)[label]
        return feature, lengths, file.read([label], use_threads=False).column(0).to_pylist()

    numbers, first = itertools.count(), None
    with ThreadPoolExecutor(THREADS) as pool:
        read_files = pool.map(lambda path: _ask(path, read), files)
        for path, (feature, lengths, labels) in zip(files, read_files, strict=True):
            first = first or feature
            if feature != first:
                raise ValueError(
                    f"{files[0]} and {path} number the classes of the column {label} in other orders: save them again "
                    "with one ClassLabel"
                )
            labels = iter(labels)
            for group, length in enumerate(lengths):
                number = next(numbers)
                for row in range(length):
                    yield (path, group, row, values), number, next(labels)


def _ask(path: str, question: Any) -> Any:
    """Return the answer of a function of the opened Parquet file. Raises ValueError for a damaged file."""
    import pyarrow.parquet as pq

    def read() -> Any:
        with open_file(path) as file:
            return question(pq.ParquetFile(file))

    try:
        return ask_patiently(path, read)
    except Exception as error:  # of pyarrow, or of the file system behind a URL
        raise ValueError(f"{path} cannot be read as Parquet: {reason(error)}") from None
