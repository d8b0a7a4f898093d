"""Write a dataset to Parquet shards, whose images are no larger than their crops need.

The shards lie in a hidden folder until all of them are there. Each one is noted as soon as it is complete, so that an
interrupted packing goes on behind the last one.
"""

import io
import itertools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import PIL.Image
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..utils.writing import replacing, write_json
from .cache import decode_at, stored_sizes
from .decoding import upright_size
from .labels import given_labels
from .loader import ReportingLoader
from .sources import Bad, CorruptImage, ImageSource

SHARD_BYTES = 2**28
"""A shard that has reached this size is complete."""

ROWS = 64
"""Images of a batch and of a row group."""

JPEG_QUALITY = 90
"""Of images that are shrunk. Other images keep the bytes of their files."""


def relative_name(name: str, root: str) -> str:
    """Return the name of a file relative to the folder `root`, or without its folder if it lies elsewhere."""
    path = os.path.relpath(name, root) if os.path.isabs(name) else name
    return os.path.basename(name) if path.startswith("..") else path


class PackedFile(NamedTuple):
    """An image as it is packed."""

    index: int
    name: str
    size: int
    original_bytes: int
    shrunk: bool


class PackedImages(Dataset):
    """Batches of images by index, as dictionaries with "files" (`PackedFile`), their "contents" and "bad".

    The contents of all files are one tensor, which reaches the run through shared memory: a worker that writes much
    into a pipe would never end if the run was killed.
    """

    def __init__(self, source: ImageSource, side: int):
        self.source, self.side = source, side

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        files: list[PackedFile] = []
        contents = bytearray()
        bad: list[Bad] = []
        for index in indices:
            try:
                file, content = self._pack(index)
            except CorruptImage as error:
                bad.append(error.bad)
                continue
            files.append(file)
            contents += content
        made = torch.frombuffer(contents, dtype=torch.uint8) if contents else torch.empty(0, dtype=torch.uint8)
        return {"files": files, "contents": made, "bad": bad}

    def _pack(self, index: int) -> tuple[PackedFile, bytes]:
        image = self.source.open(index)
        name, content = image.info["name"], cast(io.BytesIO, cast(Any, image).fp).getvalue()
        width, height = upright_size(image)
        wanted = stored_sizes(torch.tensor([[height, width]]), self.side)[0].tolist()
        pixels = decode_at(self.source, index, image, *wanted)  # also of a kept file, to see whether it can be read
        if wanted == [height, width]:
            return PackedFile(index, name, len(content), len(content), shrunk=False), content
        packed = io.BytesIO()
        PIL.Image.fromarray(pixels.contiguous().numpy()).save(packed, "JPEG", quality=JPEG_QUALITY)
        return PackedFile(index, name, packed.tell(), len(content), shrunk=True), packed.getvalue()


class PackedFolder:
    """The folder of a packed dataset: its shards in `data/`, and `pack.json`, which says what was done.

    Args:
        path: an empty folder, or one in which the same dataset is packed already, perhaps in part.
        about: what pack.json holds beside the shards. Its "images" is the number of images of each split.

    Attributes:
        data: the folder of the shards, which is there once all of them are complete.
        shards: of each complete shard its file, its split, its images and bytes, the index behind its last image, the
            bytes of the original files, how many images were shrunk, and those that could not be read.

    Raises:
        ValueError: the dataset had other numbers of images when packing it began.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.data, self._hidden, self._record = path / "data", path / ".incomplete", path / "pack.json"
        self._about, self.shards = about, list[dict[str, Any]]()
        if not self._record.exists():
            return
        begun = json.loads(self._record.read_text())
        if begun["images"] != about["images"]:
            raise ValueError(
                f"there are {about['images']} images, and there were {begun['images']} when packing them into {path} "
                "began; remove that folder to start over"
            )
        self.shards = list(itertools.takewhile(self._is_there, begun["shards"]))

    def _is_there(self, shard: dict[str, Any]) -> bool:
        file = (self.data if self.data.exists() else self._hidden) / shard["file"]
        return file.is_file() and file.stat().st_size == shard["bytes"]

    def total(self, key: str) -> int:
        """Sum a number over all shards."""
        return sum(shard[key] for shard in self.shards)

    def add(self, split: str, source: ImageSource, side: int, root: str, num_workers: int) -> None:
        """Write those shards of a split that are not there yet.

        Args:
            side: the short side to which images are shrunk.
            root: the folder to which names of files become relative.
            num_workers: the number of processes that decode images.

        Raises:
            CorruptDataError: more images cannot be read than may be left out.
            OSError: a shard cannot be written.
        """
        self._hidden.mkdir(exist_ok=True)
        done = [shard for shard in self.shards if shard["split"] == split]
        source.report(bad for shard in done for bad in shard["unreadable"])
        start = done[-1]["end"] if done else 0
        order: Any = range(start, len(source))
        loader = ReportingLoader(source, PackedImages(source, side), 0, num_workers, batch_size=ROWS, sampler=order)
        options: Any = {"total": len(source), "initial": start, "unit": "image", "leave": False, "file": sys.stderr}
        with tqdm(desc=f"packing {split}", **options) as bar:
            batches, at = iter(loader), start  # A bar that the user has turned off does not count.
            while at < len(source):
                with _Shard(self._hidden / f"{split}-{len(done):05}.parquet", source, root) as shard:
                    while at < len(source) and shard.content_bytes < SHARD_BYTES:
                        shard.add(next(batches))
                        count = min(ROWS, len(source) - at)
                        at += count
                        bar.update(count)
                done.append({"split": split, "end": at, **shard.describe()})
                self.shards.append(done[-1])
                self._save()

    def finish(self) -> None:
        """Give the folder of the shards its name, which says that they are complete."""
        self._save(**{key: self.total(key) for key in ("bytes", "original_bytes", "shrunk")})
        for file in set(self._hidden.iterdir()).difference(self._hidden / shard["file"] for shard in self.shards):
            file.unlink()
        self._hidden.rename(self.data)

    def _save(self, **totals: int) -> None:
        write_json(self._record, {**self._about, **totals, "shards": self.shards})


class _Shard:
    """A shard while it is written. The file gets its name when it is complete."""

    def __init__(self, path: Path, source: ImageSource, root: str):
        import datasets
        import pyarrow.parquet as pq

        self._path, self._source, self._root = path, source, root
        features = datasets.Features({"image": datasets.Image()})
        if source.class_names is not None:
            features["label"] = datasets.ClassLabel(names=source.class_names)
        self._schema = features.arrow_schema
        self._opened = ExitStack()
        options: Any = {"compression": "none", "use_dictionary": False}
        file = self._opened.enter_context(replacing(path))
        self._writer = self._opened.enter_context(pq.ParquetWriter(file, self._schema, **options))
        self.images = self.content_bytes = self.original_bytes = self.shrunk = 0
        self.unreadable: list[Bad] = []

    def __enter__(self) -> "_Shard":
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def add(self, batch: dict[str, Any]) -> None:
        """Write a batch of `PackedImages` as one row group."""
        import pyarrow as pa

        files: list[PackedFile] = batch["files"]
        contents = io.BytesIO(batch["contents"].numpy().tobytes())
        columns: dict[str, Any] = {
            "image": [
                {"bytes": contents.read(file.size), "path": relative_name(file.name, self._root)} for file in files
            ]
        }
        if self._source.class_names is not None:
            columns["label"] = given_labels(self._source.labels, [file.index for file in files])
        self._writer.write_table(pa.table(columns, self._schema))
        self.images += len(files)
        self.content_bytes += sum(file.size for file in files)
        self.original_bytes += sum(file.original_bytes for file in files)
        self.shrunk += sum(file.shrunk for file in files)
        self.unreadable += batch["bad"]

    def describe(self) -> dict[str, Any]:
        """Return what pack.json holds of a complete shard."""
        numbers = {key: getattr(self, key) for key in ("images", "original_bytes", "shrunk", "unreadable")}
        return {"file": self._path.name, "bytes": self._path.stat().st_size, **numbers}
