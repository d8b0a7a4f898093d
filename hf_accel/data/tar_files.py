"""Tar files in the layout of webdataset: a sample is a run of members with one key, as KEY.jpg and KEY.cls."""

import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from .folders import ARRAY_SUFFIX, image_suffixes
from .labels import LABEL_KEYS
from .remote import Row, ask_patiently, is_remote, open_file
from .tables import NO_LABELS

SAMPLE = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]*)", re.DOTALL)
"""The key of a member and its extension, which begins at the first dot of the file's name."""


class TarMembers:
    """Reads the members of tar files, each on its own."""

    def read(self, path: str, start: int, size: int, member: str) -> bytes:
        content = ask_patiently(path, lambda: _read_part(path, start, start + size))
        if len(content) != size:
            raise OSError(f"{path} gave {len(content)} bytes in place of {size}: it has changed, or takes no ranges")
        return content

    def name(self, path: str, start: int, size: int, member: str) -> str:
        """Return the name of an image's file, as if the tar file was a folder."""
        return f"{path}/{member}"


def _read_part(path: str, start: int, end: int) -> bytes:
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    import fsspec

    system, name = fsspec.url_to_fs(path)
    return system.cat_file(name, start=start, end=end)


def scan_tars(files: Sequence[str], image: str | None, label: str | None) -> Iterator[Row]:
    """Yield a row for each sample that has an image, from the headers of the tar files."""
    for shard, path in enumerate(files):
        try:
            with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for key, members in itertools.groupby(filter(_key, archive), _key):
                    by_extension = {SAMPLE.fullmatch(member.name)[2].lower(): member for member in members}  # pyright: ignore
                    found = _choose_image(f"{path}: {key}", by_extension, image)
                    if found is not None:
                        value = None if label == NO_LABELS else _read_label(archive, by_extension, label)
                        yield (path, found.offset_data, found.size, found.name), shard, value
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no whole, uncompressed tar file: {error}; copy or write it again") from None


def _key(member: tarfile.TarInfo) -> str | None:
    match = SAMPLE.fullmatch(member.name) if member.isfile() else None
    return match and match[1]


def _choose_image(sample: str, members: dict[str, tarfile.TarInfo], wanted: str | None) -> tarfile.TarInfo | None:
    if wanted is not None:
        return members.get(wanted)
    found = [extension for extension in members if f".{extension.rpartition('.')[2]}" in image_suffixes()]
    found = found or [extension for extension in members if extension == ARRAY_SUFFIX[1:]]
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
