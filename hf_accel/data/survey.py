"""A look at a set of images: how many, how large, of which kinds, and which are unreadable or there twice."""

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..utils.seeding import generator
from .arrays import AnyImage, ArrayImage, open_image
from .decoding import is_deep, upright_size
from .labels import UNLABELLED
from .sources import CorruptImage, ImageSource

LOOK_SECONDS = 15.0
"""Images are decoded for so long, in a random order, so that those that were decoded stand for all."""

COMPARE_SECONDS = 15.0
"""Images are compared with each other for so long."""

CHUNK = 64
ENDS = 4096
"""Bytes at the end of a file that are compared first: those of two photographs hardly ever agree."""

KINDS = {
    **{"RGB": "RGB", "L": "gray", "1": "black and white", "P": "palette", "RGBA": "RGB with transparency"},
    **{"LA": "gray with transparency", "CMYK": "CMYK", "YCbCr": "YCbCr", "F": "gray, floating point"},
}
"""What the modes of Pillow are, in words. Those with I have 16 or 32 bits."""


Place = tuple[ImageSource, int]
"""An image: a set, and the number in it."""


class Look(NamedTuple):
    """What one image is: (width, height) as it is shown, its format, and its channels in words."""

    size: tuple[int, int]
    format: str
    kind: str


@dataclass
class Survey:
    """What a look at a set of images has found.

    Attributes:
        images, held_out: training images, and those that accuracy is measured on.
        looks: what each of the readable images is, of those that were decoded.
        unreadable: name and reason of each of the others.
        compared: images that were compared with each other.
        copies: name of each image that equals an earlier one to the byte, and the name of that one.
        classes: training images of each class, or nothing without labels.
        unlabelled: training images without a label.
        labels_from: where the labels come from.
    """

    images: int
    held_out: int
    looks: list[Look]
    unreadable: list[tuple[str, str]]
    compared: int
    copies: list[tuple[str, str]]
    classes: dict[str, int]
    unlabelled: int
    labels_from: str | None

    @property
    def looked_at(self) -> int:
        """How many images were decoded, or could not be."""
        return len(self.looks) + len(self.unreadable)

    def short_sides(self) -> list[int]:
        """The short side of each readable image in pixels, ascending."""
        return sorted(min(look.size) for look in self.looks)

    def median_side(self) -> int:
        """The median of the short sides."""
        sides = self.short_sides()
        return sides[len(sides) // 2]


def guess_channels(files: Sequence[str | Path]) -> int:
    """Return the channels that images are to be read with: 3, unless most of these files hold what RGB would lose.

    That is more channels, or gray of 16 bits. Gray of 8 bits is repeated without loss.
    """
    counts: Counter[int] = Counter()
    for file in files:
        with contextlib.suppress(Exception):  # what cannot be read is reported later
            image = open_image(Path(file).read_bytes(), channels=0)
            counts[image.channels if isinstance(image, ArrayImage) else 1 if is_deep(image) else 3] += 1
    return counts.most_common(1)[0][0] if counts else 3


def survey(source: ImageSource, validation: ImageSource | None) -> Survey:
    """Decode images and compare files of both sets, for at most LOOK_SECONDS and COMPARE_SECONDS."""
    places = [(part, row) for part in (source, validation) if part is not None for row in range(len(part))]
    looks, unreadable = look_at(places)
    compared, copies = find_copies(places)
    classes: dict[str, int] = {}
    unlabelled = len(source)
    if source.labels is not None and source.class_names is not None:
        labels = source.labels[source.labels != UNLABELLED]
        counts = torch.bincount(labels, minlength=len(source.class_names)).tolist()
        classes = {name: count for name, count in zip(source.class_names, counts, strict=True) if count}
        unlabelled -= len(labels)
    held_out = 0 if validation is None else len(validation)
    about = (compared, copies, classes, unlabelled, source.labels_from)
    return Survey(len(source), held_out, looks, unreadable, *about)


def look_at(places: Sequence[Place]) -> tuple[list[Look], list[tuple[str, str]]]:
    """Decode images in a random order. Return what each is, and name and reason of each unreadable one."""
    looks: list[Look] = []
    bad: list[tuple[str, str]] = []

    def look(place: int) -> None:
        source, index = places[place]
        try:
            image = source.open(index)
            # Decoding changes what the header says.
            found = Look(upright_size(image), image.format or "array", _kind(image))
            source.decode(index, image)
        except CorruptImage as error:
            bad.append(error.bad[1:])
        else:
            looks.append(found)

    order, end = torch.randperm(len(places), generator=generator(0, "survey")).tolist(), time.monotonic() + LOOK_SECONDS
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(order), CHUNK):
            list(pool.map(look, order[start : start + CHUNK]))
            if time.monotonic() > end:
                break
    return looks, sorted(bad)


def _kind(image: AnyImage) -> str:
    """Describe the channels and bits of an opened image."""
    if isinstance(image, ArrayImage):
        return f"{image.channels} channels of {8 * image.dtype.itemsize} bits"
    return KINDS.get(image.mode) or ("gray of 16 or 32 bits" if image.mode.startswith("I") else image.mode)


def find_copies(places: Sequence[Place]) -> tuple[int, list[tuple[str, str]]]:
    """Find images whose files are equal to the byte.

    Few files are read: only those of the same size, and in full only those whose last bytes agree, too.

    Returns:
        How many images were compared, and for each that equals an earlier one both names.
    """

    def file(place: int) -> Path | bytes:
        source, index = places[place]
        return source.file(index)

    end, sizes = time.monotonic() + COMPARE_SECONDS, {}
    for place in range(len(places)):
        sizes.setdefault(_size(file(place)), []).append(place)
        if time.monotonic() > end:
            break
    compared = sum(map(len, sizes.values()))
    copies: list[tuple[int, int]] = []
    for size, equal in sizes.items():
        if len(equal) == 1 or not size:  # Empty files are unreadable, and no copies.
            continue
        if time.monotonic() > end:
            compared -= len(equal)
            continue
        for similar in _group(equal, lambda place: _digest(file(place), ENDS)):
            for first, *others in _group(similar, lambda place: _digest(file(place))):
                copies += [(place, first) for place in others]
    names = [[source.file_name(index) for source, index in map(places.__getitem__, pair)] for pair in sorted(copies)]
    return compared, [(copy, first) for copy, first in names]


def _group(places: Iterable[int], key: Callable[[int], bytes]) -> list[list[int]]:
    """Return the groups of two or more places that have a key in common."""
    groups: dict[bytes, list[int]] = {}
    for place in places:
        groups.setdefault(key(place), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _size(file: Path | bytes) -> int:
    """Bytes of a file; 0 for one that is not there."""
    if isinstance(file, bytes):
        return len(file)
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _digest(file: Path | bytes, last: int | None = None) -> bytes:
    """Return a digest of a file or of its last bytes; of one that cannot be read, one that no other has."""
    try:
        if isinstance(file, Path):
            with file.open("rb") as stream:
                if last and file.stat().st_size > last:
                    stream.seek(-last, os.SEEK_END)
                content = stream.read()
        else:
            content = file[-last:] if last else file
    except OSError:
        content = str(file).encode(errors="surrogateescape") + os.urandom(16)
    return hashlib.blake2b(content, digest_size=16).digest()


def count_kinds(looks: Iterable[Look]) -> tuple[Counter[str], Counter[str]]:
    """Count formats, and channels in words."""
    looks = list(looks)
    return Counter(look.format for look in looks), Counter(look.kind for look in looks)
