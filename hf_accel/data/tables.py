"""Load the tables of a dataset in any layout that `datasets` reads, and choose its splits and columns."""

import contextlib
import glob
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..utils.caches import describe_refusal, offer_room
from ..utils.causes import lacks_room, reason
from ..utils.errors import SettingError, fail
from ..utils.weight_files import may_be_hub_id
from .folders import Found, find_layout, read_image_folder, scan_folder, warn_of_left_out, warn_of_tables

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "valid", "val", "test")
NO_LABELS = "none"
"""The `label_column` with which labels are not read and folders are not classes."""


def load_tables(data: str, config: str | None) -> "dict[str, Dataset]":
    """Load every split of `data`, by name.

    Raises FileNotFoundError for a path that does not exist, and ValueError for data that cannot be read.
    """
    import datasets

    path = Path(data).expanduser()
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if config is not None and (path.is_file() or is_saved):
        fail("data_config", config, f"{data} has no configurations; leave it out")
    if path.is_file():
        builder = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
        if builder is None:
            fail("data", data, "a single file must be .parquet or .arrow")
        with explained():
            loaded = datasets.load_dataset(builder, data_files=glob.escape(str(path)))
    elif is_saved:
        with explained():
            loaded = datasets.load_from_disk(str(path))
    elif path.is_dir():
        return _load_folder(path, config)
    elif not may_be_hub_id(data):
        raise FileNotFoundError(f"data={data}: no such file or folder")
    else:
        with explained_hub():
            loaded = datasets.load_dataset(data, config)
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else {str(name): loaded[name] for name in loaded}


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn the errors of `datasets` into a ValueError (an OSError stays one) that names the innermost cause."""
    from datasets import config

    try:
        yield
    except Exception as error:  # from pyarrow, pandas and fsspec, each of which has its own errors
        cache = "HF_DATASETS_CACHE", config.HF_DATASETS_CACHE
        if refused := describe_refusal(error, *cache):
            raise SettingError(refused) from error
        text = reason(error) + (offer_room(*cache) if lacks_room(error) else "")
        raise (OSError if isinstance(error, OSError) else ValueError)(text) from error


@contextlib.contextmanager
def explained_hub() -> Iterator[None]:
    """Do as `explained` for a dataset on the Hub, and turn an OSError into a FileNotFoundError."""
    try:
        with explained():
            yield
    except OSError as error:
        raise FileNotFoundError(f"no such folder, and as a Hub id it cannot be opened: {error}") from error


def _load_folder(path: Path, config: str | None) -> "dict[str, Dataset]":
    """List image files here, let `datasets` read everything else, and warn of images that are left out."""
    import datasets

    declared = _read_declarations(path)
    root = os.path.realpath(path)
    # Images that the configurations of a README leave out are left out on purpose.
    found = Found(root) if "configs" in declared else scan_folder(root)
    if config is None and "dataset_info" not in declared and len(found.images) > len(found.tables):
        return _read_metadata(found) if found.metadata else read_image_folder(found)
    warn_of_left_out(found, [])
    try:
        with explained():
            loaded: Any = datasets.load_dataset(str(path), config)
            tables = {str(name): loaded[name] for name in loaded}
            tables = {name: _read_class_names(table, path, config, name) for name, table in tables.items()}
    except SettingError:  # It is not about the folder.
        raise
    except ValueError as error:
        archives = [name for name in found.tables if name.endswith((".zip", ".tar"))]
        raise ValueError(
            f"{error}; unpack {archives[0]} there, if it holds the images" if archives else error
        ) from error
    if found.images:
        listed = {name for table in tables.values() for name in _list_image_paths(table, found.root)}
        warn_of_left_out(Found(root), [name for name in found.images if name not in listed])
    return tables


def _read_declarations(path: Path) -> dict[str, Any]:
    """Read what a README.md declares: files by split in "configs", types of columns in "dataset_info"."""
    from huggingface_hub import metadata_load

    readme, declared = path / "README.md", {}
    with explained():
        if readme.is_file():
            declared |= metadata_load(readme) or {}
        if (path / ".huggingface.yaml").is_file():
            declared |= yaml.safe_load((path / ".huggingface.yaml").read_text()) or {}
    return declared


def _read_metadata(found: Found) -> "dict[str, Dataset]":
    """Load the images that metadata files list, with their columns, in splits by the names of the folders."""
    import datasets

    files = [glob.escape(os.path.join(found.root, name)) for name in found.metadata]
    with explained():
        loaded: Any = datasets.load_dataset("imagefolder", data_files={"train": files})
    table = loaded["train"]
    listed = _list_image_paths(table, found.root)
    names = sorted({name for name in listed if name is not None})
    warn_of_left_out(found, sorted(set(found.images).difference(names)))
    warn_of_tables(found)
    if not names:
        return {"train": table}
    split = dict(zip(names, find_layout(found.root, names).split, strict=True))
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(listed):
        rows.setdefault(split.get(name or "") or "", []).append(row)
    warn_of_left_out(Found(found.root), [listed[row] or f"row {row} of the metadata" for row in rows.pop("", [])])
    return {name: table.select(rows[name]) for name in rows}


def _list_image_paths(table: "Dataset", root: str) -> list[str | None]:
    """Return the path of each row's file, relative to `root`, by the first column of images; None for other rows."""
    import datasets

    column = next((name for name, feature in table.features.items() if isinstance(feature, datasets.Image)), None)
    if column is None:
        return [None] * len(table)
    chunks = table.data.column(column).chunks  # views of the file, if it contains the images themselves
    inside = [value for chunk in chunks for value in chunk.field("bytes").is_valid().to_pylist()]
    paths = [value for chunk in chunks for value in chunk.field("path").to_pylist()]
    return [
        os.path.relpath(path, root).replace(os.sep, "/") if path and not stored and os.path.isabs(path) else None
        for path, stored in zip(paths, inside, strict=True)
    ]


def _read_class_names(table: "Dataset", path: Path, config: str | None, split: str) -> "Dataset":
    """Give `table` the class names that the split's own parquet or arrow files declare.

    `datasets` gives every split the names that the first file of the first split declares, and leaves the numbers.
    """
    import datasets

    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not columns or table.info.builder_name not in ("parquet", "arrow"):
        return table
    files = datasets.load_dataset_builder(str(path), config).config.data_files or {}
    features = [_read_features(str(file), str(table.info.builder_name)) for file in files.get(split, [])]
    for column in columns:
        declared = [feature[column] for feature in features if isinstance(feature.get(column), datasets.ClassLabel)]
        names = {tuple(label.names) for label in declared}
        if len(names) > 1:
            raise ValueError(
                f"the files of the split {split} number the classes of the column {column} in different orders: "
                "save them again with one ClassLabel"
            )
        if declared and list(declared[0].names) != table.features[column].names:
            table = table.cast_column(column, declared[0])
    return table


def _read_features(file: str, kind: str) -> "Features":
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        return datasets.Features.from_arrow_schema(pq.read_schema(file))
    with pa.memory_map(file) as source:
        try:
            schema = pa.ipc.open_stream(source).schema
        except pa.ArrowInvalid:  # arrow has two formats
            schema = pa.ipc.open_file(source).schema
    return datasets.Features.from_arrow_schema(schema)


def choose_splits(data: str, splits: list[str], train: str | None, validation: str | None) -> tuple[str, str | None]:
    for key, wanted in (("train_split", train), ("validation_split", validation)):
        if wanted is not None and wanted.partition("[")[0] not in splits:
            raise ValueError(f"{key}={wanted}: {data} has the splits {', '.join(splits)}")
    if train is None:
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"{data} has no split 'train' but {', '.join(splits)}: set train_split to one of them")
        train = "train" if "train" in splits else splits[0]
    if validation is None:
        validation = next((name for name in VALIDATION_NAMES if name in splits and name != train), None)
    used = {name.partition("[")[0] for name in (train, validation) if name}
    if unused := [name for name in splits if name not in used]:
        logger.warning(
            "%s: not used: the split %s; choose with train_split and validation_split", data, ", ".join(unused)
        )
    return train, validation


def take_part(tables: "Mapping[str, Dataset]", split: str) -> "Dataset":
    """Return a split, or a part of one in the syntax of `datasets`: "train[:1000]", "train[10%:20%]"."""
    import datasets

    if "[" not in split:
        return tables[split]
    name = split.partition("[")[0]
    try:
        (rows,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(tables[name])})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split {split!r}: {error}; write it as train[:1000] or train[10%:20%]") from None
    return tables[name].select(range(rows.from_, rows.to))


def choose_columns(
    data: str, table: "Dataset", image_column: str | None, label_column: str | None, in_python: bool = False
) -> tuple[str, str | None]:
    """Choose unnamed columns by type: one Image, and at most one ClassLabel. "none" means no labels.

    Messages name the keys of a recipe or, with `in_python`, what a program does with its dataset.
    """
    import datasets

    described = {name: f"{name} ({type(feature).__name__})" for name, feature in table.features.items()}
    columns = ", ".join(described.values())

    def choose(key: str, named: str | None, kind: type) -> str | None:
        candidates = [name for name, feature in table.features.items() if isinstance(feature, kind)]
        if named is not None and named not in table.column_names:
            raise ValueError(f"{key}={named}: {data} has the columns {columns}")
        if named is None and len(candidates) > 1:
            none = f", or to {NO_LABELS}" * (kind is datasets.ClassLabel)
            listed = ", ".join(candidates)
            remedy = "keep one by dataset.remove_columns" if in_python else f"set {key} to one of"
            none *= not in_python
            raise ValueError(f"{data} has several {kind.__name__} columns: {remedy}: {listed}{none}")
        return named or next(iter(candidates), None)

    image_column = choose("image_column", image_column, datasets.Image)
    wants_labels = label_column != NO_LABELS
    label_column = choose("label_column", label_column, datasets.ClassLabel) if wants_labels else None
    if image_column is None:
        remedy = "cast one by dataset.cast_column(name, Image())" if in_python else "set image_column to one of them"
        raise ValueError(f"{data} has no column of type Image: {remedy}: {columns}")
    if label_column == image_column:
        raise ValueError(f"label_column={label_column}: this is the column of images; {data} has the columns {columns}")
    if label_column is None and wants_labels and len(table.column_names) > 1:
        remedy = "make one by dataset.class_encode_column(name) of" if in_python else "set label_column to use one of"
        values = [described[name] for name, feature in table.features.items() if isinstance(feature, datasets.Value)]
        remedy = f"; {remedy}" if values else ", and none of integers or text that could be one"
        logger.warning("%s has no column of type ClassLabel%s: %s", data, remedy, ", ".join(values) or columns)
    return image_column, label_column


def holds_lists(table: "Dataset", column: str) -> bool:
    """Whether there is such a column, and its rows are lists."""
    import datasets

    return isinstance(table.features.get(column), datasets.List | datasets.LargeList)


def select_undecoded(table: "Dataset", column: str) -> "Dataset":
    """Return the column of images, each as its file's bytes or path. Raises ValueError for a column of another kind."""
    import datasets

    try:
        return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow and numpy raise errors of several types
        kind = type(table.features[column]).__name__
        raise ValueError(
            f"image_column={column}: values of type {kind} are not one image a row; set image_column to a column "
            f"of images ({reason(error)})"
        ) from error


def name_origin(table: "Dataset", label_column: str | None) -> str:
    """Say where the labels of this column come from."""
    import datasets

    of_folders = table.info.builder_name == "imagefolder" and label_column == "label"
    of_folders &= isinstance(table.features[label_column], datasets.ClassLabel)
    return "folder names" if of_folders else f"column {label_column}"
