"""Write the features of a dataset to a Parquet file, in its order and in memory that does not grow with it.

The images are divided into parts of PART consecutive ones. Each part is a file of a hidden folder, which gets its name
when it is complete. So an interrupted run, of any number of processes, goes on with the parts that are missing. Once
all are there, they are joined into one file.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import CorruptImage, ImageSource
from ..data.labels import given_labels
from ..data.loader import ReportingLoader
from ..data.packing import relative_name
from ..data.sources import Bad
from ..distributed import rank, world_size
from ..utils.writing import replacing
from .features import CPU_ROWS
from .pooling import check_encoder

PART = 1024
"""Images of a part: at most so many are encoded once more after an interruption, for each process."""

GPU_ROWS = 256
"""Images that a GPU encodes at a time."""

ABOUT, UNREADABLE = b"hf_accel", b"unreadable"
"""The keys of the schema's metadata: what the embeddings are of, and the images of a part that cannot be read."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class ReadableImages(Dataset):
    """Batches by index, as an image processor makes them, without the images that cannot be read.

    They are dictionaries with "pixel_values" (B, C, H, W), "index" and "name", lists of B, and "bad".
    """

    def __init__(self, source: ImageSource, processor: Any):
        self.source, self.processor = source, processor

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        images, bad, batch = [], list[Bad](), {"index": list[int](), "name": list[str]()}
        for index in indices:
            try:
                opened = self.source.open(index)
                name = opened.info.get("name", "")
                images.append(self.source.decode(index, opened))
            except CorruptImage as error:
                bad.append(error.bad)
                continue
            batch["index"].append(index)
            batch["name"].append(name)
        made = self.processor(images=images, return_tensors="pt")["pixel_values"] if images else torch.empty(0)
        return {**batch, "pixel_values": made, "bad": bad}


class EmbeddingTable:
    """`embeddings.parquet` in a folder, and the parts of it that are there while it is written.

    A row has the "path" of the image relative to `root`, or its "index" if images have no paths, its "label" if there
    are labels, and its "embedding".

    Args:
        folder: where the file is written.
        about: what the embeddings are of, in values of JSON. The file holds it in its metadata.
        source: the images.
        root: the folder to which paths become relative.
        dtype: of the numbers of an embedding.

    Raises:
        ValueError: the folder holds embeddings of something else.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], source: ImageSource, root: str, dtype: Literal["fp32", "fp16"]
    ):
        import datasets

        self.path, self._hidden = folder / "embeddings.parquet", folder / ".embeddings"
        self._source, self._root, self._dtype = source, root, dtype
        self._about = json.loads(json.dumps(about))
        self._has_paths = source.has_paths()
        key = {"path": datasets.Value("string")} if self._has_paths else {"index": datasets.Value("int64")}
        features = datasets.Features(key)
        if source.labels is not None:
            features["label"] = datasets.ClassLabel(names=source.class_names or [])
        features["embedding"] = datasets.List(datasets.Value({"fp32": "float32", "fp16": "float16"}[dtype]))
        self._schema: Any = features.arrow_schema
        self._refuse_other()
        if self.is_complete():  # A kill may have left the parts.
            shutil.rmtree(self._hidden, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self._hidden / f"part-{number:06}.parquet"

    def _refuse_other(self) -> None:
        parts = sorted(self._hidden.glob("part-*.parquet"))
        for path in [self.path] * self.path.exists() + parts[:1]:
            found = json.loads(_metadata(path).get(ABOUT, b"{}"))
            for key, value in self._about.items():
                if found.get(key) != value:
                    raise ValueError(
                        f"{path} holds embeddings with {key}={found.get(key)!r}, and not {value!r}; choose another "
                        "output_dir, or remove that file"
                    )

    def is_complete(self) -> bool:
        """Whether embeddings.parquet is written."""
        return self.path.exists()

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not there yet. Every process must call this before any writes."""
        return [number for number in range(-(-len(self._source) // PART)) if not self._part(number).exists()]

    def images_of(self, number: int) -> range:
        """Return the indices of the images of a part."""
        return range(number * PART, min((number + 1) * PART, len(self._source)))

    def write(
        self,
        parts: Sequence[int],
        encode: Callable[[Tensor], Tensor],
        model: torch.nn.Module,
        processor: Any,
        device: torch.device,
        num_workers: int = 0,
    ) -> Iterator[int]:
        """Write this process's share of the parts, and yield the number of images of each batch that is done.

        Raises:
            CorruptDataError: more images cannot be read than may be left out.
            ValueError: the model gives no features of images, or features that are not finite.
        """
        self._hidden.mkdir(exist_ok=True)
        mine = parts[rank() :: world_size()]
        rows = CPU_ROWS if device.type == "cpu" else GPU_ROWS
        batches: list[Any] = [chunk for number in mine for chunk in self._chunks(number, rows)]
        images = ReadableImages(self._source, processor)
        loader = iter(ReportingLoader(self._source, images, 0, num_workers, batch_sampler=batches))
        is_checked = False
        for number in mine:
            index, names, bad, features = list[int](), list[str](), list[Bad](), list[Tensor]()
            for chunk in self._chunks(number, rows):
                batch = next(loader)
                index, names, bad = index + batch["index"], names + batch["name"], bad + batch["bad"]
                if batch["index"]:
                    pixels = batch["pixel_values"].to(device, non_blocking=True)
                    if not is_checked:
                        check_encoder(encode, model, pixels[:1])
                        is_checked = True
                    features.append(encode(pixels).float().cpu())
                yield len(chunk)
            self._write_part(number, index, names, bad, torch.cat(features) if features else torch.empty(0, 0))

    def _chunks(self, number: int, rows: int) -> list[range]:
        """Return the images of a part in batches of at most so many."""
        images = self.images_of(number)
        return [images[start : start + rows] for start in range(0, len(images), rows)]

    def _write_part(self, number: int, index: list[int], names: list[str], bad: list[Bad], features: Tensor) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        stored = features.to(DTYPES[self._dtype])
        if not stored.isfinite().all():
            why = "has training diverged?" if not features.isfinite().all() else "take embedding_dtype=fp32"
            raise ValueError(f"embeddings hold numbers that {self._dtype} cannot hold, such as NaN or infinity; {why}")
        starts = pa.array(range(0, stored.numel() + 1, max(1, stored.shape[1])), pa.int32())
        columns: dict[str, Any] = {"embedding": pa.ListArray.from_arrays(starts, stored.flatten().numpy())}
        if self._has_paths:
            columns["path"] = [relative_name(name, self._root) for name in names]
        else:
            columns["index"] = index
        if self._source.labels is not None:
            columns["label"] = given_labels(self._source.labels, index)
        notes = {ABOUT: json.dumps(self._about), UNREADABLE: json.dumps(bad)}
        table = pa.table(columns, self._schema.with_metadata({**self._schema.metadata, **notes}))
        with replacing(self._part(number)) as file:
            pq.write_table(table, file, use_dictionary=False)

    def join(self) -> int:
        """Join all parts into embeddings.parquet, and remove them. Only one process may call this.

        Returns:
            The number of images that were left out because they cannot be read.

        Raises:
            CorruptDataError: more images cannot be read than may be left out.
        """
        import pyarrow.parquet as pq

        parts = sorted(self._hidden.glob("part-*.parquet"))
        bad: list[Bad] = [tuple(found) for path in parts for found in json.loads(_metadata(path)[UNREADABLE])]
        self._source.report(bad)
        schema = self._schema.with_metadata({**self._schema.metadata, ABOUT: json.dumps(self._about)})
        whole = self._hidden / self.path.name
        with replacing(whole) as file, pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
            for path in parts:
                writer.write_table(pq.read_table(path).cast(schema))
        os.replace(whole, self.path)
        shutil.rmtree(self._hidden)
        return len(bad)


def _metadata(path: Path) -> dict[bytes, bytes]:
    import pyarrow.parquet as pq

    return pq.read_schema(path).metadata or {}
