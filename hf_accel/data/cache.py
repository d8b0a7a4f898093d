"""Images that are decoded once, and stored at the resolution that their crops need.

An image is shrunk until its short side is `storage_side`, and keeps its aspect ratio. Images wider than high are stored
turned, so that every long side runs down the rows of one table, and rows have room for the longest short side: a set of
one aspect ratio wastes nothing. A batch selects the rows of its images.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..distributed import is_main, processes_on_node, warning_once
from .arrays import AnyImage
from .augment import ViewConfig
from .crops import resize
from .decoding import image_tensor, upright_size
from .sources import Bad, CorruptImage, ImageSource
from .workers import cores_of_process

LONGEST = 4
"""Long side over the stored short side, at most. Longer images are shrunk further: their crops are near squares."""

CHUNK = 1024
"""Images that are handed to the decoding threads at once."""

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says how much memory a container may have."""


def storage_side(configs: Sequence[ViewConfig], view_size: int) -> int:
    """Return the short side at which images are stored, in pixels: the median crop is not enlarged by any view.

    The area of a crop is uniform in `crop_scale`, so the median crop of an image with the short side s has sides of
    about `s * sqrt(mean(crop_scale))`. For MoCo-v3's views of 224 pixels s is 305.
    """
    return max(math.ceil((config.size or view_size) / math.sqrt(sum(config.crop_scale) / 2)) for config in configs)


def stored_sizes(own: Tensor, side: int) -> Tensor:
    """Return the (N, 2) sizes at which images of the sizes `own` (N, 2) are stored. None is enlarged."""
    short, long = own.amin(1).double(), own.amax(1).double()
    scale = torch.minimum(side / short.clamp(min=1), LONGEST * side / long.clamp(min=1)).clamp(max=1)
    return (own * scale[:, None]).round().long().clamp(min=1)


def storage_bytes(own: Tensor, side: int, pixel_bytes: int = 3) -> int:
    """Return the memory in bytes that images of the sizes `own` (N, 2) take."""
    sizes = stored_sizes(own, side)
    return int(sizes.amax(1).sum()) * int(sizes.amin(1).max()) * pixel_bytes


def _pixel_bytes(source: ImageSource) -> int:
    return source.channels * source.dtype.itemsize


def estimate_bytes(source: ImageSource, side: int) -> int:
    """Estimate the memory in bytes that all images take, from the headers of a few of them."""
    if source.pixels is not None:
        return source.pixels[:, :1].nbytes if source.pixels.stride(1) == 0 else source.pixels.nbytes
    sample = torch.tensor(source.sample_sizes() or [(1, 1)])
    return storage_bytes(sample, side, _pixel_bytes(source)) * len(source) // len(sample)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may take: of the device, or its share of the machine's or the container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free // processes_on_node()


@dataclass(frozen=True)
class StoredSizes:
    """How the images of a batch are stored: (B, 2) heights and widths of their own, and (B, 2) as they are stored.

    `turned` (B,) says which of them are stored with rows and columns exchanged.
    """

    own: Tensor
    stored: Tensor
    turned: Tensor

    def place(self, boxes: Tensor) -> Tensor:
        """Turn (B, 4) boxes on the images' own pixels into boxes on whole stored pixels, of at least one pixel."""
        scale = (self.stored.double() / self.own).flip(1)  # of columns, then of rows
        corners = boxes.double().view(-1, 2, 2) * scale[:, None]
        first, last = corners.amin(1).round(), corners.amax(1).round()
        first = torch.minimum(first, self.stored.flip(1) - 1)
        last = torch.maximum(last, first + 1)
        mirrored = boxes[:, :1] > boxes[:, 2:3]
        left = torch.where(mirrored, last[:, :1], first[:, :1])
        right = torch.where(mirrored, first[:, :1], last[:, :1])
        placed = torch.cat([left, first[:, 1:], right, last[:, 1:]], 1)
        return torch.where(self.turned[:, None], placed[:, [1, 0, 3, 2]], placed).float()


class StoredImages:
    """All images of a dataset in one table of pixels, on the CPU or on an accelerator.

    Args:
        rows: uint8 or uint16 (R, W, C), the rows of all images one after another.
        own: (N, 2) heights and widths of the images themselves; 0 for those that cannot be read.
        sizes: (N, 2) heights and widths as they are stored.
        turned: (N,) whether their rows and columns are exchanged.
        kept: (N,) the image that each index stands for: the next one in place of one that cannot be read.
    """

    def __init__(self, rows: Tensor, own: Tensor, sizes: Tensor, turned: Tensor, kept: Tensor):
        self.rows, self.own, self.sizes, self.turned, self.kept = rows, own, sizes, turned, kept
        self.lengths = torch.where(turned, sizes[:, 1], sizes[:, 0])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.alike = bool((self.own == self.sizes).all() and (sizes == sizes[0]).all() and not self.turned.any())

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def take(self, indices: Tensor) -> dict[str, Any]:
        """Return the part of a batch that holds these images.

        "images" is (B, C, H, W), below and beside which images that are smaller than others are padded. "stored"
        (`StoredSizes`) says where they lie, unless all images have one size. "index" holds the images that they are.
        """
        index = self.kept[indices]
        lengths, starts = self.lengths[index], self.starts[index]
        inside = torch.minimum(torch.arange(int(lengths.max())), lengths[:, None] - 1)
        chosen = (starts[:, None] + inside).flatten().to(self.device, non_blocking=True)
        # Accelerators select no uint16.
        rows = self.rows.view(torch.int16) if self.rows.dtype == torch.uint16 else self.rows
        taken = rows.index_select(0, chosen).view(self.rows.dtype)
        images = taken.view(len(index), -1, *self.rows.shape[1:]).permute(0, 3, 1, 2)
        if self.alike:
            return {"images": images, "index": index}
        stored = StoredSizes(self.own[index], self.sizes[index], self.turned[index])
        return {"images": images, "index": index, "stored": stored}


@warning_once()
def store_images(source: ImageSource, side: int, device: torch.device) -> StoredImages:
    """Decode all images once, in threads, and store them on `device`. Their labels and files stay where they are.

    Each process stores all images, as any of them may come in any of its batches.

    Raises:
        CorruptDataError: more images cannot be read than may be skipped.
        MemoryError: they take more memory than is free.
    """
    if source.pixels is not None:
        return _store_pixels(source.pixels, device)
    with ThreadPoolExecutor(max(1, cores_of_process())) as pool:
        own = torch.tensor(list(_run(pool, lambda index: _read_size(source, index), len(source), "reading sizes")))
        _check_memory(storage_bytes(own, side, _pixel_bytes(source)), device)
        sizes = stored_sizes(own, side)
        lengths, width = sizes.amax(1), int(sizes.amin(1).max())
        shape = int(lengths.sum()), width, source.channels
        rows, start = torch.empty(shape, dtype=source.dtype, device=device), 0
        failures: list[Bad] = []
        heights_and_widths = sizes.tolist()

        def decode(index: int) -> Tensor | Bad:
            return _decode(source, index, *heights_and_widths[index])

        for index, image in enumerate(_run(pool, decode, len(source), "decoding images")):
            if isinstance(image, Tensor):
                rows[start : start + len(image), : image.shape[1]] = image
            else:
                failures.append(image)
            start += int(lengths[index])
    source.report(failures)
    kept = _next_good(len(source), {index for index, _, _ in failures})
    return StoredImages(rows, own, sizes, sizes[:, 1] > sizes[:, 0], kept)


def _store_pixels(pixels: Tensor, device: torch.device) -> StoredImages:
    """Store images that are held in memory already, as they are."""
    pixels = pixels[:, :1] if pixels.stride(1) == 0 else pixels  # a gray set, repeated three times
    count, channels, height, width = pixels.shape
    _check_memory(pixels.nbytes, device)
    rows = pixels.to(device).permute(0, 2, 3, 1).reshape(count * height, width, channels)
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    return StoredImages(rows, sizes, sizes, torch.zeros(count, dtype=torch.bool), torch.arange(count))


def _check_memory(needed: int, device: torch.device) -> None:
    free = free_memory(device)
    if needed > free:
        where = f"on {device}" if device.type != "cpu" else "for this process"
        raise MemoryError(f"the stored images take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free {where}")


def _run(pool: ThreadPoolExecutor, function: Any, count: int, what: str) -> Iterator[Any]:
    """Yield `function(index)` for all indices in order, with a progress bar."""
    chunks: Iterable[range] = (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
    results = itertools.chain.from_iterable(pool.map(function, chunk) for chunk in chunks)
    return iter(tqdm(results, what, count, leave=False, disable=not is_main(), file=sys.stderr))


def _read_size(source: ImageSource, index: int) -> tuple[int, int]:
    try:
        width, height = upright_size(source.open(index))
    except CorruptImage:
        return 0, 0
    return height, width


def decode_at(source: ImageSource, index: int, image: AnyImage, height: int, width: int) -> Tensor:
    """Decode an opened image at this size: (height, width, C) of 8 or 16 bits. Raises CorruptImage."""
    short = min(upright_size(image)) / min(height, width)
    pixels = source.decode_pixels(index, image, shrink=short).permute(1, 2, 0)
    if pixels.shape[:2] == (height, width):
        return pixels
    if source.channels != 3 or source.deep:
        return resize(pixels.permute(2, 0, 1)[None], height, width, "bicubic")[0].permute(1, 2, 0)
    shrunk = PIL.Image.fromarray(pixels.numpy()).resize((width, height), PIL.Image.Resampling.BICUBIC)
    return image_tensor(shrunk).permute(1, 2, 0)


def _decode(source: ImageSource, index: int, height: int, width: int) -> Tensor | Bad:
    """Decode an image as it is stored: (long side, short side, C)."""
    try:
        pixels = decode_at(source, index, source.open(index), height, width)
    except CorruptImage as error:
        return error.bad
    return pixels.transpose(0, 1) if width > height else pixels


def _next_good(count: int, bad: set[int]) -> Tensor:
    """(count,): each index or, if that is bad, the next one that is not."""
    kept = list(range(count))
    for index in bad:
        while kept[index] in bad:
            kept[index] = (kept[index] + 1) % count
    return torch.tensor(kept)
