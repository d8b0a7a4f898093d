"""Read a folder of image files: what it contains, which split each file belongs to, and which classes it has."""

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image

from .class_folders import NAMED, name_classes, shorten

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words by which `datasets` recognises splits, too."""

_WORDS = "|".join(f"(?P<{split}>{'|'.join(words)})" for split, words in SPLIT_WORDS.items())
SPLIT_PATTERN = re.compile(rf"(?:^|[-._ 0-9])(?:{_WORDS})(?:[-._ 0-9]|$)", re.IGNORECASE)

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLE_SUFFIXES = {".parquet", ".geoparquet", ".gpq", ".arrow", ".tar", ".zip", ".h5", ".hdf5", ".lance"}
"""Files that hold many images each. If they are the majority, `datasets` reads the folder."""

UNDECODABLE = {"BUFR", "GRIB", "HDF5", "MPEG"}
"""Formats that Pillow recognises and cannot decode."""

ARRAY_SUFFIX = ".npy"
"""Files of one array each. Beside images they are often something else, such as masks."""

OTHER_IMAGES = {".heic", ".heif", ".jxl", ".svg", ".exr", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf"}
"""Images of formats that Pillow does not open without a plugin."""

SNIFFED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
"""Formats by which an image without an image's suffix is recognised."""

SNIFFED = (3, 60)
"""How many files of one suffix, and how many in all, are opened to see whether they are images."""

SKIPPED_FOLDERS = {"__MACOSX", "__pycache__"}


@dataclass
class Found:
    """The files below a folder, as sorted relative paths. Links are followed, and hidden names are skipped."""

    root: str
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)
    """Images that cannot be used, with the reason."""


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the formats that this Pillow and its plugins decode."""
    PIL.Image.init()
    formats = set(PIL.Image.OPEN) - UNDECODABLE
    return frozenset(suffix.lower() for suffix, name in PIL.Image.EXTENSION.items() if name in formats)


def scan_folder(root: str | Path) -> Found:
    """List the files below `root` in one walk. It opens only a few files, of those without an image's suffix.

    Raises OSError for a folder that cannot be listed.
    """
    found, suffixes = Found(str(root)), image_suffixes()
    others: dict[str, list[str]] = {}
    for path, entry in _walk(found, "", found.root, frozenset()):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name in METADATA_NAMES:
            found.metadata.append(path)
        elif entry.name.lower() in METADATA_NAMES:
            found.unusable[path] = f"metadata is read from {entry.name.lower()} only, in lower case: rename it"
        elif suffix in TABLE_SUFFIXES:
            found.tables.append(path)
        elif suffix in OTHER_IMAGES - suffixes:
            found.unusable[path] = f"Pillow does not open {suffix} files: convert them, to PNG for example"
        elif suffix not in suffixes:
            others.setdefault(suffix, []).append(path)
        elif entry.is_symlink() and not os.path.isfile(entry.path):
            found.unusable[path] = "the link leads nowhere: restore the file that it names"
        elif path.encode(errors="ignore").decode() != path:
            found.unusable[path] = "the name is not valid UTF-8: rename it"
        else:
            found.images.append(path)
    arrays = others.pop(ARRAY_SUFFIX, [])
    if found.images:
        reason = f"{ARRAY_SUFFIX} files are taken as images only where there are no others: keep them in a folder apart"
        found.unusable |= dict.fromkeys(arrays, reason)
    else:
        found.images = arrays
    _sniff(found, others)
    for paths in (found.images, found.metadata, found.tables):
        paths.sort()
    return found


def _sniff(found: Found, others: dict[str, list[str]]) -> None:
    """Add all files of a suffix to the unusable ones if one of the few that are opened is an image.

    Args:
        others: files by suffix, for suffixes that do not belong to images.
    """
    each, left = SNIFFED
    for suffix, paths in sorted(others.items()):  # "" first: files without a suffix
        for path in sorted(paths)[: min(each, left)]:
            left -= 1
            with contextlib.suppress(Exception):  # for a file that is not an image
                PIL.Image.open(os.path.join(found.root, path), formats=SNIFFED_FORMATS).close()
                what = f"the suffix {suffix}" if suffix else "no suffix"
                reason = f"files with {what} are not loaded, and of these some are images: name them .jpg or .png"
                found.unusable |= dict.fromkeys(paths, reason)
                break


def _walk(
    found: Found, prefix: str, folder: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, os.DirEntry]]:
    """Yield every file with its relative path. `above` identifies its parent folders, to which a link may lead back."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        found.unusable[prefix] = "the link leads back to a folder that it is in: remove it"
        return
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not os.path.isdir(entry.path) if entry.is_symlink() else not entry.is_dir():
                yield prefix + entry.name, entry
            elif entry.name not in SKIPPED_FOLDERS:
                folders.append((prefix + entry.name + "/", entry.path))
    for inner, path in folders:
        yield from _walk(found, inner, path, above | {here})


@lru_cache(maxsize=65536)
def name_split(name: str) -> str | None:
    """Return the split in the name of a file or folder, as in `train`, `Val` or `test2017`, or None."""
    match = SPLIT_PATTERN.search(name)
    return match.lastgroup if match else None


@dataclass
class Layout:
    """What the names in a folder say: the split of each image, and the folders that distinguish classes."""

    split: list[str | None]
    """The split of each image; None for an image that is left out."""
    folders: list[tuple[str, ...]]
    """The folders that each image is in, without those that all images share and without the split's."""


def find_layout(name: str, images: list[str]) -> Layout:
    """Find the layout of `images`, sorted relative paths. `name` is for warnings."""
    folder_of = [path.rpartition("/")[0] for path in images]
    distinct = sorted(set(folder_of))  # few, so that the work does not grow with the images
    above = os.path.commonpath(distinct)
    shared = above.split("/") if above else []
    parts: dict[str, tuple[str, ...]] = {
        folder: tuple(folder.split("/"))[len(shared) :] if folder else () for folder in distinct
    }
    place: dict[str, tuple[str | None, tuple[str, ...]]] = {}
    file_splits = None
    levels = {folder: [i for i, part in enumerate(names) if name_split(part)] for folder, names in parts.items()}
    if all(levels.values()):  # every image is in a folder that is named after a split, at any depth
        for folder, names in parts.items():
            level = levels[folder][0]
            place[folder] = (name_split(names[level]), names[:level] + names[level + 1 :])
    else:
        by_folder = _find_top_splits(name, parts.values())
        only = next(filter(None, map(name_split, shared)), "train")
        rest = only if not by_folder else None if "train" in by_folder.values() else "train"
        for folder, names in parts.items():
            inside = bool(names) and names[0] in by_folder
            place[folder] = (by_folder[names[0]], names[1:]) if inside else (rest, names)
        file_splits = _find_file_splits(images) if not by_folder else None
    splits = file_splits or [place[folder][0] for folder in folder_of]
    return Layout(splits, [place[folder][1] for folder in folder_of])


def _find_file_splits(images: list[str]) -> list[str | None] | None:
    """Return the split in each file's name, if every file has one and they are not all the same."""
    splits: list[str | None] = []
    for path in images:
        splits.append(name_split(path.rpartition("/")[2]))
        if splits[-1] is None:
            return None
    return splits if len(set(splits)) > 1 and "train" in splits else None


def _find_top_splits(name: str, parts: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Find the topmost folders that are splits, by their names, although other images lie beside them."""
    nested: dict[str, bool] = {}
    for top, *below in filter(None, parts):
        nested[top] = nested.get(top, False) or bool(below)
    splits = {folder: split for folder in nested if (split := name_split(folder))}
    train = [folder for folder, split in splits.items() if split == "train"]
    held = [folder for folder in splits if folder not in train]
    if train and (any(nested[t] for t in train) or (held and not any(nested[h] for h in held))):
        return splits
    if any(nested[h] for h in held) or (held and len(splits) == len(nested)):
        splits = {folder: splits[folder] for folder in held}
        classes = train
    else:
        splits, classes = {}, list(splits)
    if classes and len(nested) > 1:
        logger.warning(
            "%s: %s is taken as a class, as the folders beside it are, and not as a split: it has no class folders",
            name,
            ", ".join(f"{folder}/" for folder in classes),
        )
    return splits


def read_image_folder(found: Found) -> "dict[str, Dataset]":
    """Read every split of a folder of image files without metadata, with a column "label" if folders name classes."""
    layout = find_layout(found.root, found.images)
    rows: dict[str, list[int]] = {}
    for row, split in enumerate(layout.split):
        rows.setdefault(split or "", []).append(row)
    warn_of_left_out(found, [found.images[row] for row in rows.pop("", [])])
    warn_of_tables(found)
    ordered = {split: rows[split] for split in SPLIT_WORDS if split in rows}
    classes = name_classes(
        found.root, {split: [layout.folders[row] for row in these] for split, these in ordered.items()}
    )
    known = [{name for name in names if name is not None} for names in classes.values()]
    names = set().union(*(some for some in known if len(some) > 1))  # a single folder distinguishes nothing
    return {
        split: _build_table([os.path.join(found.root, found.images[row]) for row in these], classes[split], names)
        for split, these in ordered.items()
    }


def _build_table(paths: list[str], classes: list[str | None], telling: set[str]) -> "Dataset":
    """Make the table of a split with its own classes, out of `telling`, which may differ from other splits' numbers."""
    import datasets
    import pyarrow as pa

    names = sorted(telling.intersection(filter(None, classes)))
    number = {name: label for label, name in enumerate(names)}
    labels = [number.get(name) if name is not None else None for name in classes]
    empty = pa.nulls(len(paths), pa.binary())
    columns = {"image": pa.StructArray.from_arrays([empty, pa.array(paths, pa.string())], ["bytes", "path"])}
    features = datasets.Features({"image": datasets.Image()})
    if any(label is not None for label in labels):
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = datasets.ClassLabel(names=names)
    info = datasets.DatasetInfo(features=features, builder_name="imagefolder")
    return datasets.Dataset(pa.table(columns, schema=features.arrow_schema), info=info)


def warn_of_tables(found: Found) -> None:
    """Warn of files with many images each, which are left out if image files are the majority."""
    if found.tables:
        logger.warning(
            "%s: left out, as a folder of image files is loaded without tables and archives: %s; unpack them, or set "
            "data to a folder of them alone",
            found.root,
            shorten(found.tables),
        )


def warn_of_left_out(found: Found, images: Sequence[str]) -> None:
    """Warn of files that are in the folder and not in the tables: `images`, and those that cannot be used."""
    if images:
        count = Counter(os.path.dirname(path) for path in images)
        folders = [f"{number} in {folder or '.'}/" for folder, number in count.most_common()]
        named = list(images) if len(images) <= NAMED else folders
        logger.warning("%s: %d images are left out: %s", found.root, len(images), shorten(named))
    for reason in dict.fromkeys(found.unusable.values()):
        named = [path for path, why in sorted(found.unusable.items()) if why == reason]
        logger.warning("%s: left out, as %s: %s", found.root, reason, shorten(named))
