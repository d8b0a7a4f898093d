"""Images by index: opened, decoded and labelled, from memory, from a table or from the shards that they lie in."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from ..distributed import all_gather_objects
from .arrays import AnyImage, NeedsTifffile, count_channels, open_array, open_image
from .decoding import (
    DEEP_RANGE,
    channels_fit,
    has_deep_pixels,
    image_pixels,
    image_tensor,
    is_deep,
    loses_contrast,
    upright,
    upright_size,
)
from .labels import UNLABELLED
from .parquet_files import UnreadableRowGroup
from .shards import Shards, spread

if TYPE_CHECKING:
    from datasets import Dataset

    from .cache import StoredImages

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

MEMORY_BYTES = 2**31
HEADER_SAMPLE = 64
DEEP_SAMPLE = 8
"""How many images of 16 or 32 bits are decoded to check that they use their range."""
MAX_BAD = 0.01
"""Share of the images that may be unreadable. One image always may be, because a held-out tenth can be small."""

Bad = tuple[int, str, str]
"""An image that could not be read: index, name, reason."""


class CorruptImage(Exception):
    """An image cannot be opened or decoded; `bad` says which one, and why."""

    def __init__(self, index: int, name: str, reason: str | Exception):
        if isinstance(reason, PIL.UnidentifiedImageError):
            reason = "not an image, or of no format that Pillow knows"
        elif isinstance(reason, Exception):
            reason = f"{type(reason).__name__}: {reason}"
        super().__init__(f"image {index} ({name}) cannot be read: {reason}")
        self.bad: Bad = (index, name, reason)


class CorruptDataError(RuntimeError):
    """More images cannot be read than may be skipped."""


class ImageSource:
    """A dataset of images with or without labels.

    Either all images are in memory, as `pixels`, uint8 (N, 3, H, W), or `read` decodes them one by one. Images may have
    other `channels` than RGB, and those of a `deep` set have 16 bits, as uint16. `labels` is
    int64 (N,), with -1 for an image without a label, or None. `class_names[label]` is the name of a class, and
    `labels_from` says where labels come from. `mean` and `std` normalise the channels of pixels in [0, 1]. `bad` holds
    the images that could not be read so far: index -> (name, reason). `made_of` describes the dataset of a program.
    `name` identifies the set, and `title` names it in messages.
    """

    made_of: str | None = None
    unlabelled: str | None = None
    """Why the images of a program's dataset have no labels, if it has something that may be meant as one."""
    shards: Shards | None = None
    """The shards that the images lie in, if they are read where they lie and trained on in an order by shards."""

    def __init__(
        self,
        name: str,
        table: "Dataset | None" = None,
        pixels: Tensor | None = None,
        labels: Tensor | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        labels_from: str | None = None,
        channels: int = 3,
    ):
        """Take either `pixels` or a `table`, which has one column of select_undecoded images."""
        if (table is None) == (pixels is None):
            raise ValueError("an ImageSource takes either a table or pixels")
        self.name, self.title, self._table, self.pixels, self.labels = name, name, table, pixels, labels
        self.class_names = list(class_names) if class_names is not None else None
        self.mean, self.std, self.labels_from = tuple(mean), tuple(std), labels_from
        self.channels = channels if pixels is None else pixels.shape[1]
        self.deep = pixels is not None and pixels.dtype == torch.uint16
        self.bad: dict[int, tuple[str, str]] = {}
        self.stored: StoredImages | None = None
        self._whole: tuple[ImageSource, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.pixels if self.pixels is not None else self._table)  # pyright: ignore[reportArgumentType]

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names is not None else None

    @property
    def dtype(self) -> torch.dtype:
        """Of decoded pixels."""
        return torch.uint16 if self.deep else torch.uint8

    def labelled(self) -> "ImageSource":
        """Return the images that have a label. The result shares `bad` with this source, or is this source itself.

        Raises ValueError if no image has a label.
        """
        rows = () if self.labels is None else (self.labels != UNLABELLED).nonzero()[:, 0]
        if self.labels is None or len(rows) == 0:
            raise ValueError(f"{self.title} has no labels")
        return self if len(rows) == len(self) else self.take(rows)

    @property
    def rows(self) -> Tensor | None:
        """The rows (N,) of the whole source, which `bad` counts, where this is a part of one."""
        return self._whole[1] if self._whole else None

    def take(self, rows: Tensor) -> "ImageSource":
        """Return the images of these rows. The result shares `bad` with this source, and reports to it."""
        table = self._table.select(rows) if self._table is not None else None
        pixels = self.pixels[rows] if self.pixels is not None else None
        labels = self.labels[rows] if self.labels is not None else None
        about = (self.class_names, self.mean, self.std, self.labels_from, self.channels)
        part = ImageSource(self.name, table, pixels, labels, *about)
        part.bad, part._whole, part.deep, part.title = self.bad, (self, rows), self.deep, self.title
        part.shards = self.shards and self.shards.select(rows)
        return part

    def has_paths(self) -> bool:
        """Whether the images have the names of files, by the first one. Rows of Parquet files have none."""
        first = {} if self._table is None else next(iter(self._table[0].values())) or {}
        return bool(first.get("path")) and not (self.shards and self.shards.are_row_groups)

    def renormalised(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> "ImageSource":
        """Return the same images, which are normalised otherwise; with None as they are."""
        if mean is None or std is None:
            return self
        other = copy(self)
        other.mean, other.std = tuple(mean), tuple(std)
        return other

    def file(self, index: int) -> Path | bytes:
        """Return the file of an image, or its content where it lies in a table."""
        if self.pixels is not None:
            return self.pixels[index].numpy().tobytes()
        record = next(iter(self._table[index].values())) or {}  # pyright: ignore[reportOptionalSubscript]
        content = record.get("bytes")
        return Path(record.get("path") or "") if content is None else content

    def file_name(self, index: int) -> str:
        """Return the path of an image, or set and number where it has none."""
        record = {} if self._table is None else next(iter(self._table[index].values())) or {}
        return record.get("path") or f"{self.name}[{index}]"

    def open(self, index: int) -> AnyImage:
        """Open an image, of which only the header is read. Raises CorruptImage."""
        if self.pixels is not None:
            pixels = self.pixels[index].permute(1, 2, 0).contiguous().numpy()
            return open_array(pixels) if self.channels != 3 or self.deep else PIL.Image.fromarray(pixels)
        (record,) = self._table[index].values()  # pyright: ignore[reportOptionalSubscript]
        return self._open(index, record)

    def _open(self, index: int, record: dict | None) -> AnyImage:
        record = record or {"path": None}
        row = index if self._whole is None else int(self._whole[1][index])
        path = record.get("path")
        name = self.shards.name(path) if self.shards and path else path or f"{self.name}[{row}]"
        try:
            if "image" in record:  # of a program's own dataset, or the error that it raised
                if isinstance(record["image"], Exception):
                    raise record["image"]
                record["image"].info["name"] = name
                return record["image"]
            content = record.get("bytes")
            if content is None:
                content = self.shards.read(record["path"]) if self.shards else Path(record["path"]).read_bytes()
            image = open_image(content, self.channels)
            image.info["name"] = name
            return image
        except UnreadableRowGroup as error:
            raise CorruptDataError(f"{self.name}: {error}") from error
        except NeedsTifffile as error:
            if self.channels == 3:  # Then it may be any broken file.
                raise CorruptImage(index, name, error) from error
            raise CorruptDataError(f"{self.name}: {name}: {error}") from error
        except Exception as error:  # Pillow's decoders raise errors of many types
            raise CorruptImage(index, name, error) from error

    def decode(self, index: int, image: AnyImage) -> AnyImage:
        """Decode an opened image as `decoding.upright` does, to this source's channels. Raises CorruptImage."""
        try:
            return upright(image, self.channels, self.deep)
        except Exception as error:
            raise CorruptImage(index, image.info.get("name", ""), error) from error

    def decode_pixels(self, index: int, image: AnyImage, shrink: float = 1.0) -> Tensor:
        """Decode an opened image as `decoding.image_pixels` does. Raises CorruptImage."""
        try:
            return image_pixels(image, shrink, self.channels, self.deep)
        except Exception as error:
            raise CorruptImage(index, image.info.get("name", ""), error) from error

    def read(self, index: int) -> AnyImage:
        """Read the image at `index`, decoded and upright. Raises CorruptImage."""
        return self.decode(index, self.open(index))

    def next_readable(self, index: int, bad: list[Bad]) -> tuple[int, AnyImage]:
        """Return the first readable image from `index` on (the first follows the last), and add skipped ones to `bad`.

        Raises CorruptDataError when more images have failed in a row than may be unreadable.
        """
        skipped: list[Bad] = []
        while not self._is_condemned_by(len(skipped)):
            try:
                image = self.read(index)
                bad.extend(skipped)
                return index, image
            except CorruptImage as error:
                skipped.append(error.bad)
                index = (index + 1) % len(self)
        raise self._too_many(skipped)

    def report(self, bad: Iterable[Bad]) -> None:
        """Count images that could not be read, and name each once. Raises CorruptDataError if there are too many."""
        if self._whole is not None:
            whole, rows = self._whole
            return whole.report((int(rows[index]), name, reason) for index, name, reason in bad)
        for index, name, reason in bad:
            if index not in self.bad:
                self.bad[index] = (name, reason)
                logger.warning("%s: image %d (%s) cannot be read and is skipped: %s", self.title, index, name, reason)
        if self._is_condemned_by(len(self.bad)):
            raise self._too_many([(index, *what) for index, what in self.bad.items()])

    def gather_bad(self) -> None:
        """Add the images to `bad` that other processes could not read. All processes must call this."""
        for found in all_gather_objects(self.bad):
            self.bad.update(found)

    def _is_condemned_by(self, unreadable: int) -> bool:
        """Whether this many images are more than may be skipped."""
        return unreadable > max(1, MAX_BAD * len(self)) or unreadable >= len(self)

    def _too_many(self, bad: Sequence[Bad]) -> CorruptDataError:
        examples = "\n".join(f"  {index}: {name}: {reason}" for index, name, reason in bad[:5])
        return CorruptDataError(
            f"{self.title}: at least {len(bad)} of {len(self)} images cannot be read, and at most {MAX_BAD:.0%}, or "
            f"one, may be skipped. Remove these files from the data set or replace them by good copies:\n{examples}"
        )

    def sample_sizes(self) -> list[tuple[int, int]]:
        """Read the (width, height) of up to HEADER_SAMPLE images, spread over the dataset, from their headers."""
        return [upright_size(image) for image in self._sample()]

    def sample(self, count: int) -> list[int]:
        """Return up to `count` images, spread over the dataset."""
        return self.shards.sample(count) if self.shards else spread(0, len(self), count)

    def _sample(self) -> Iterator[AnyImage]:
        """Open up to HEADER_SAMPLE images, spread over the dataset, without reading their pixels."""
        for index in self.sample(HEADER_SAMPLE):
            with contextlib.suppress(CorruptImage):
                yield self.open(index)

    def look_at_pixels(self, warns: bool = True) -> bool:
        """See by a few images how many bits are kept and whether channels fit, and return whether contrast is lost.

        It is if images of 16 or 32 bits are to become 8 bits, and use little of their range or exceed it.

        Args:
            warns: whether a warning says so.

        Raises:
            ValueError: most of the images have other channels.
        """
        seen, deep, odd, names = 0, 0, [], []
        for image in self._sample():
            seen += 1
            if not channels_fit(image, self.channels):
                odd.append(image)
                continue
            self.deep |= has_deep_pixels(image, self.channels)
            if self.channels == 3 and deep < DEEP_SAMPLE and is_deep(image):
                deep += 1
                with contextlib.suppress(Exception):  # from broken files, which decoding reports
                    if loses_contrast(image):
                        names.append(str(image.info["name"]))
        if 2 * len(odd) > seen:
            found = count_channels(odd[0])
            raise ValueError(
                f"{odd[0].info.get('name', self.name)} has {found} channels, and num_channels is {self.channels}: set "
                f"num_channels: {found}"
            )
        if names and warns:
            logger.warning(
                "%s: pixels of 16 or 32 bits are taken as 0 to %d, and of %d images that were looked at %d stay below "
                "an eighth of it or exceed it, so that they become nearly black or are clipped: rescale them to 8 "
                "bits, or keep 16 bits of gray images by num_channels: 1, for example %s",
                self.title,
                DEEP_RANGE - 1,
                deep,
                len(names),
                names[0],
            )
        return bool(names)

    def hold_in_memory(self) -> None:
        """Decode all images into `pixels`, if they share one size and take less than MEMORY_BYTES."""
        sizes = set(self.sample_sizes())
        if self.pixels is not None or len(sizes) != 1:
            return
        width, height = sizes.pop()
        if self.channels * height * width * len(self) * self.dtype.itemsize > MEMORY_BYTES:
            return
        pixels = torch.empty(len(self), self.channels, height, width, dtype=self.dtype)
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

        # With small images most of the time is spent in Python itself, where threads only slow each other down.
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
            if self.labels is not None and (self.labels == UNLABELLED).all():  # of the remaining images
                self.labels = None
        self.pixels, self._table = pixels, None
