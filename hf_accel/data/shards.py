"""Tar files in the layout of webdataset, whose images are read where they lie.

A sample is a run of members with one key: KEY.jpg beside KEY.cls or KEY.json. One pass over the headers makes a table
of where each image lies, which `datasets` keeps in its cache. So any image can be read at any time, and the order of a
stream, its resume and its workers are those of every other dataset.
"""

import contextlib
import itertools
import json
import os
import posixpath
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .folders import find_layout, image_suffixes, scan_folder
from .labels import LABEL_KEYS
from .tables import NO_LABELS, explained

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]*)", re.DOTALL)
"""The key of a member and its extension, which begins at the first dot of the file's name."""

PART = re.compile(r"(.+?\.tar)\?(\d+)\+(\d+)#(.*)", re.DOTALL)
"""Where an image lies, in place of the path of its file: tar file, offset, size and name of the member."""


RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
"""Numbers in a URL that stands for several files, as in train-{000..146}.tar."""

PATIENCE = (1.0, 4.0, 16.0)
"""Seconds to wait before a part of a remote file is asked for again."""


def read_file(path: str) -> bytes:
    """Read the file of an image, or the part of a tar file that holds it."""
    part = PART.fullmatch(path)
    if part is None:
        return Path(path).read_bytes()
    start, size = int(part[2]), int(part[3])
    if _is_remote(part[1]):
        content = _fetch(part[1], start, start + size)
    else:
        with open(part[1], "rb") as file:
            file.seek(start)
            content = file.read(size)
    if len(content) != size:
        raise OSError(f"{part[1]} gave {len(content)} bytes in place of {size}: it has changed, or takes no ranges")
    return content


def _is_remote(path: str) -> bool:
    return "://" in path


def _fetch(url: str, start: int, end: int) -> bytes:
    import fsspec

    system, path = fsspec.url_to_fs(url)
    for seconds in PATIENCE:
        with contextlib.suppress(Exception):  # Each file system has its own errors.
            return system.cat_file(path, start=start, end=end)
        time.sleep(seconds)
    return system.cat_file(path, start=start, end=end)


def name_file(path: str) -> str:
    """Return the name of an image's file. One in a tar file is named as if that was a folder."""
    return PART.sub(r"\1/\4", path)


def load_shards(data: str, image_column: str | None, label_column: str | None) -> "dict[str, Dataset]":
    """Index the tar files of `data`, a file, folder or URL, by split: a row for each sample with an image.

    The tables have the columns "image", "shard", which is the number of the tar file, and "label" if there are labels.

    Args:
        image_column: the extension of the images, where samples have several.
        label_column: the extension or the JSON key of the labels, or "none". Default: cls, or a usual key.

    Raises:
        FileNotFoundError: the path does not exist.
        OSError: a URL cannot be read.
        ValueError: there are no tar files, or they cannot be read.
    """
    splits: dict[str | None, list[str]] = {}
    files = _find_files(data)
    for path, split in zip(files.values(), find_layout(data, [*files]).split if files else (), strict=True):
        splits.setdefault(split, []).append(path)
    splits.pop(None, None)
    if not splits:
        raise ValueError("streaming reads .tar files in the layout of webdataset, and there are none: leave it out")
    with explained():
        return {str(split): _index(paths, image_column, label_column) for split, paths in splits.items()}


def _find_files(data: str) -> dict[str, str]:
    """Find the tar files of a file, a folder or a URL, by their names relative to the folder."""
    if _is_remote(data):
        with explained():
            return _find_remote_files(data)
    path = Path(data).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"data={data}: no such file or folder; streaming reads tar files in a folder or at a URL"
        )
    root = os.path.realpath(path)
    if path.is_file():
        return {path.name: root} if path.suffix == ".tar" else {}
    return {name: os.path.join(root, name) for name in scan_folder(root).tables if name.endswith(".tar")}


def _find_remote_files(url: str) -> dict[str, str]:
    import fsspec

    if numbers := RANGE.search(url):
        first, last = numbers.groups()
        names = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        urls = [url[: numbers.start()] + name + url[numbers.end() :] for name in names]
    elif url.endswith(".tar"):
        urls = [url]
    else:
        system, folder = fsspec.url_to_fs(url)
        names = sorted(name for name in system.find(folder) if name.endswith(".tar"))
        return {posixpath.relpath(name, folder): system.unstrip_protocol(name) for name in names}
    return {posixpath.basename(url): url for url in urls}


def _state(path: str) -> tuple[int, Any]:
    """Return the size of a tar file, and what else tells that it has changed."""
    if not _is_remote(path):
        return os.path.getsize(path), os.stat(path).st_mtime_ns
    import fsspec

    system, name = fsspec.url_to_fs(path)
    return system.size(name), system.ukey(name)


def _open_tar(path: str) -> Any:
    if not _is_remote(path):
        return open(path, "rb")
    import fsspec

    return cast(Any, fsspec.open(path)).open()


def _index(files: list[str], image: str | None, label: str | None) -> "Dataset":
    """Make the table of a split, or take it from the cache of `datasets` if the files are those that it was made of."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "shard": datasets.Value("int32")})
    if label != NO_LABELS:
        first = next((row["label"] for row in _scan(files[:1], image, label)), None)
        if first is not None:
            features["label"] = datasets.Value("int64" if isinstance(first, int) else "string")
        elif label is not None:
            raise ValueError(f"label_column={label}: the first sample of {files[0]} has none")
    # `datasets` takes a list for one that several processes may share.
    states = tuple(map(_state, files))
    given = {"files": tuple(files), "image": image, "label": label, "columns": tuple(features), "states": states}
    return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=given)  # pyright: ignore


def _rows(
    files: Sequence[str], image: str | None, label: str | None, columns: Sequence[str], states: Any
) -> Iterator[dict]:
    """Yield the rows of a table. `datasets` keeps one for each combination of arguments, and so of `states`."""
    for row in _scan(files, image, label):
        yield {column: row[column] for column in columns}


def _scan(files: Sequence[str], image: str | None, label: str | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each sample that has an image, from the headers of the tar files."""
    for shard, path in enumerate(files):
        try:
            with _open_tar(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for key, members in itertools.groupby(filter(_key, archive), _key):
                    by_extension = {SAMPLE.fullmatch(member.name)[2].lower(): member for member in members}  # pyright: ignore
                    found = _choose_image(f"{path}: {key}", by_extension, image)
                    if found is not None:
                        place = f"{path}?{found.offset_data}+{found.size}#{found.name}"
                        value = None if label == NO_LABELS else _read_label(archive, by_extension, label)
                        yield {"image": {"bytes": None, "path": place}, "shard": shard, "label": value}
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no whole, uncompressed tar file: {error}; copy or write it again") from None


def _key(member: tarfile.TarInfo) -> str | None:
    match = SAMPLE.fullmatch(member.name) if member.isfile() else None
    return match and match[1]


def _choose_image(sample: str, members: dict[str, tarfile.TarInfo], wanted: str | None) -> tarfile.TarInfo | None:
    if wanted is not None:
        return members.get(wanted)
    found = [extension for extension in members if f".{extension.rpartition('.')[2]}" in image_suffixes()]
    if len(found) > 1:
        raise ValueError(f"{sample} has several images: set image_column to one of {', '.join(found)}")
    return members[found[0]] if found else None


def _read_label(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], wanted: str | None) -> Any:
    """Return the label of a sample, an integer or text, or None if it has none."""

    def read(extension: str) -> str:
        return archive.extractfile(members[extension]).read().decode().strip()  # pyright: ignore

    extension = wanted or "cls"
    if extension in members:
        text = read(extension)
        return int(text) if re.fullmatch(r"-?\d+", text) else text
    values = json.loads(read("json")) if "json" in members else {}
    return next((values[key] for key in ([wanted] if wanted else LABEL_KEYS) if key in values), None)


def shard_lengths(table: "Dataset") -> Tensor:
    """Return how many consecutive rows of a table each shard has."""
    return torch.tensor(table["shard"][:]).unique_consecutive(return_counts=True)[1]
