"""Batches for training and evaluation.

The order of training images is a function of (seed, epoch), and draws are functions of (seed, step, micro step, row). A
loader therefore starts at any step without replaying earlier ones, and the number of workers changes nothing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.seeding import generator
from .arrays import AnyImage, ArrayImage
from .augment import ViewConfig, view_boxes
from .crops import cut_and_resize, resize, to_unit
from .decoding import image_tensor, upright_size
from .shards import Shards
from .sources import Bad, CorruptImage, ImageSource
from .workers import BATCH_SECONDS, block_sigterm_in_children, explained_failures, outlive_sigterm, pass_on

if TYPE_CHECKING:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

CROP_FRACTION = 0.875
"""Side of the evaluated centre crop over the shortest edge, for images that are larger than the model's."""


class Item(NamedTuple):
    """One image of a micro-batch: its index in the dataset and its row among the rows of all processes."""

    index: int
    step: int
    micro_step: int
    row: int


def draw_order(num_images: int, seed: int, epoch: int, shards: Shards | None = None) -> Tensor:
    """Draw the (N,) order of the images of an epoch.

    Without shards it is a permutation. With shards, pieces of them come in a random order, and the images of a block of
    pieces are shuffled: so files are read nearly in sequence, and a shard of one class is mixed with others.
    """
    generate = generator(seed, "order", epoch)
    if shards is None:
        return torch.randperm(num_images, generator=generate)
    parts = torch.arange(num_images).split(shards.lengths.tolist())
    pieces = [piece for part in parts for piece in part.split(shards.piece)]
    drawn = torch.randperm(len(pieces), generator=generate).split(shards.pieces)
    blocks = [torch.cat([pieces[i] for i in block.tolist()]) for block in drawn]
    return torch.cat([block[torch.randperm(len(block), generator=generate)] for block in blocks])


class TrainSampler(Sampler[list[Item]]):
    """This process's batches of the optimizer steps `first_step` to `last_step` (exclusive).

    An epoch is a permutation of the dataset (`draw_order`) without its tail. In each step, each of `accumulation`
    micro-batches takes the next `world_size * batch_size_per_process` images, and each rank takes its consecutive rows
    of them.

    Raises ValueError for a dataset that is smaller than one step.
    """

    def __init__(
        self,
        num_images: int,
        batch_size_per_process: int,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        first_step: int = 0,
        last_step: int = 1,
        shards: Shards | None = None,
    ):
        self.shards = shards
        self.num_images, self.batch_size, self.accumulation = num_images, batch_size_per_process, accumulation
        self.global_batch = world_size * batch_size_per_process
        self.rows = slice(rank * batch_size_per_process, (rank + 1) * batch_size_per_process)
        self.seed, self.first_step, self.last_step = seed, first_step, last_step
        self.steps_per_epoch = num_images // (self.global_batch * accumulation)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training set has {num_images} images and one step takes {self.global_batch * accumulation} "
                f"({batch_size_per_process} per process x {world_size} processes x {accumulation} accumulated): "
                f"take a batch size of at most {num_images // (world_size * accumulation)} per process, or more images"
            )

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Item]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.first_step, self.last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = draw_order(self.num_images, self.seed, epoch, self.shards)
            for micro_step in range(self.accumulation):
                start = (step % self.steps_per_epoch * self.accumulation + micro_step) * self.global_batch
                mine = order[start : start + self.global_batch][self.rows].tolist()
                yield [Item(index, step, micro_step, row) for row, index in enumerate(mine, self.rows.start)]


class SizedBatches(Sampler[tuple[int, list[Item]]]):
    """The batches of a `TrainSampler`, each after the size in pixels of those of its views that have none of their own.

    `view_size(step)` is called in the process of the run, so that what it depends on, such as a Trainer, need not reach
    the workers.
    """

    def __init__(self, sampler: TrainSampler, view_size: Callable[[int], int]):
        self.sampler, self.view_size = sampler, view_size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, list[Item]]]:
        for items in self.sampler:
            yield self.view_size(items[0].step), items


class TrainImages(Dataset):
    """Micro-batches, as dictionaries for `make_views`."""

    def __init__(self, source: ImageSource, configs: Sequence[ViewConfig], seed: int, global_batch: int):
        self.source, self.configs, self.seed, self.global_batch = source, configs, seed, global_batch

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, batch: tuple[int, list[Item]]) -> dict[str, Any]:
        view_size, items = batch
        first = items[0]
        bad: list[Bad] = []
        rows = slice(first.row, first.row + len(items))
        made: dict[str, Any] = {"step": first.step, "micro_step": first.micro_step, "rows": rows, "bad": bad}
        made["global_batch"] = self.global_batch
        pixels = self.source.pixels
        if self.source.stored is not None:
            made |= self.source.stored.take(torch.tensor([item.index for item in items]))
        elif pixels is None:
            made["crops"], made["index"] = self._crops(items, view_size, bad)
        else:
            if pixels.stride(1) == 0:  # a gray set, repeated three times without taking memory
                pixels = pixels[:, :1]
            made["index"] = torch.tensor([item.index for item in items])
            made["images"] = pixels[made["index"]]
        return made

    def _crops(self, items: list[Item], view_size: int, bad: list[Bad]) -> tuple[list[Tensor], Tensor]:
        """Return one (B, C, S, S) per view, and the indices (B,) of the images that they were cut from.

        Each image is read and decoded once, at a size that suffices for its crops.
        """
        sizes = [config.size or view_size for config in self.configs]
        opened = [self._open(item, bad) for item in items]
        boxes = self._boxes(items, [image for _, image in opened])
        form = len(items), self.source.channels
        crops = [torch.empty(*form, size, size, dtype=self.source.dtype) for size in sizes]
        cut = [index for index, _ in opened]
        for position, (index, image) in enumerate(opened):
            full, mine = upright_size(image), boxes[:, position]
            try:
                pixels = self.source.decode_pixels(index, image, shrink=_shrink(mine, sizes))
            except CorruptImage as error:
                bad.append(error.bad)
                cut[position], image = self.source.next_readable((index + 1) % len(self), bad)
                full, mine = image.size, self._boxes([items[position]], [image])[:, 0]
                pixels = image_tensor(image)
            for view, box in enumerate(mine.tolist()):
                # NumPy takes half of torch's time to bring channels to the front.
                crops[view].numpy()[position] = _crop(pixels, full, box, sizes[view]).numpy()
        return crops, torch.tensor(cut)

    def _open(self, item: Item, bad: list[Bad]) -> tuple[int, AnyImage]:
        try:
            return item.index, self.source.open(item.index)
        except CorruptImage as error:
            bad.append(error.bad)
            return self.source.next_readable((item.index + 1) % len(self), bad)

    def _boxes(self, items: list[Item], images: list[AnyImage]) -> Tensor:
        """Draw the (views, B, 4) boxes of these rows, which are consecutive."""
        widths, heights = torch.tensor([upright_size(image) for image in images]).unbind(1)
        first = items[0]
        rows = slice(first.row, first.row + len(items))
        where = (self.seed, first.step, first.micro_step)
        boxes = [
            view_boxes(config, heights, widths, *where, view, rows, self.global_batch)
            for view, config in enumerate(self.configs)
        ]
        return torch.stack(boxes)


def _shrink(boxes: Tensor, sizes: Sequence[int]) -> float:
    """Return how much smaller an image may be decoded before one of its boxes (views, 4) is smaller than its view."""
    pairs = zip(boxes.tolist(), sizes, strict=True)
    return min(min(abs(right - left), abs(bottom - top)) / size for (left, top, right, bottom), size in pairs)


def _crop(image: Tensor, full: tuple[int, int], wanted: list[float], size: int) -> Tensor:
    """Cut a box out of an `image`, (C, H, W) of any size: (C, size, size).

    `wanted` counts pixels of the image's `full` (width, height). It is rounded to whole pixels of an image that was
    decoded smaller, which moves an edge of the crop by less than half a pixel of the view.
    """
    across, down = image.shape[2] / full[0], image.shape[1] / full[1]
    left, top, right, bottom = wanted
    return cut_and_resize(image, (left * across, top * down, right * across, bottom * down), size)


class EvalImages(Dataset):
    """Batches of normalised centre crops by index. The next image and its label replace one that cannot be read."""

    def __init__(self, source: ImageSource, size: int):
        self.source, self.size, self.resize = source, size, resize_edge(source, size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        bad: list[Bad] = []
        source, index = self.source, torch.tensor(indices)
        if source.pixels is not None and source.pixels.shape[2:] == (self.size, self.size) and self.resize == self.size:
            pixels = source.pixels[index]
        else:
            read = [source.next_readable(number, bad) for number in indices]
            index = torch.tensor([number for number, _ in read])
            pixels = torch.stack([_centre_crop(image, self.size, self.resize) for _, image in read])
        mean, std = (torch.tensor(value)[:, None, None] for value in (source.mean, source.std))
        batch = {"pixel_values": (to_unit(pixels) - mean) / std, "index": index, "bad": bad}
        if source.labels is not None:
            batch["labels"] = source.labels[index]
        return batch


def _centre_crop(image: AnyImage, size: int, edge: int) -> Tensor:
    """Resize the shortest edge to `edge` (antialiased, bilinear) and cut out the centre: (C, size, size)."""
    short = min(image.size)
    width, height = (int(edge * side / short) for side in image.size)
    if isinstance(image, ArrayImage):
        pixels = image_tensor(image)[None]
        pixels = pixels if (width, height) == image.size else resize(pixels, height, width)
        left, top = (width - size) // 2, (height - size) // 2
        return pixels[0, :, top : top + size, left : left + size]
    if (width, height) != image.size:
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image_tensor(image.crop((left, top, left + size, top + size)))


class ReportingLoader(DataLoader):
    """Reports to the source, in this process, which images its workers could not read."""

    def __init__(self, source: ImageSource, dataset: Dataset, seed: int, num_workers: int, **options: Any):
        if source.pixels is not None:
            num_workers = 0  # selecting rows is faster than passing them between processes
        super().__init__(
            dataset,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            timeout=BATCH_SECONDS if num_workers > 0 else 0,
            worker_init_fn=outlive_sigterm,
            collate_fn=pass_on,  # pyright: ignore[reportArgumentType]
            generator=generator(seed, "workers"),  # otherwise iterating advances the global generator
            **options,
        )
        self.source = source

    def __iter__(self) -> Iterator[dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with block_sigterm_in_children() if self.num_workers else nullcontext(), explained_failures():
            batches = super().__iter__()
        while True:
            with explained_failures():
                batch = next(batches, None)
            if batch is None:
                return
            self.source.report(batch["bad"])
            yield batch


def train_loader(
    source: ImageSource,
    sampler: TrainSampler,
    configs: Sequence[ViewConfig],
    view_size: Callable[[int], int],
    num_workers: int = 0,
    seed: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Load micro-batches for `make_views`, as dictionaries.

    Each has "step", "micro_step", "rows", "global_batch", "index" and "bad". For a source in memory
    it also has "images", uint8 or uint16 (B, C, H, W), with C = 1 for gray images. Otherwise it has "crops", one
    (B, C, S, S) per view, with S its config's size or `view_size(step)`; workers cut them with `make_views`' draws.

    Iterating raises CorruptDataError if more than 1% of the images cannot be read, and WorkersFailed if workers end or
    give no batch for BATCH_SECONDS.
    """
    dataset = TrainImages(source, configs, seed, sampler.global_batch)
    if source.stored is not None:
        num_workers, pin_memory = 0, pin_memory and source.stored.device.type == "cpu"
    batches = SizedBatches(sampler, view_size)
    return ReportingLoader(source, dataset, seed, num_workers, batch_sampler=batches, pin_memory=pin_memory)


class WholeRun:
    """A loader whose length is that of the whole run, wherever it starts. The Trainer counts its one epoch by it."""

    def __init__(self, loader: Any, length: int):
        self.loader, self.length, self.dataset = loader, length, loader.dataset

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        return iter(self.loader)


class StepBatches:
    """The micro-batches of one step, each taken from the loader when it is needed.

    Args:
        batches: the iterator of the loader.
        number: the number of micro-batches.
        waited: a function that gets the seconds for which each was waited.
    """

    def __init__(self, batches: Iterator[Any], number: int, waited: Callable[[float], None]):
        self.batches, self.number, self.waited = batches, number, waited

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.number):
            start = time.perf_counter()
            batch = next(self.batches, None)
            self.waited(time.perf_counter() - start)
            if batch is None:
                return
            yield batch
            del batch  # otherwise its memory would be held while the next one is made


def eval_loader(
    source: ImageSource, size: int, batch_size: int, num_workers: int = 0, rows: Sequence[int] | None = None
) -> DataLoader:
    """Load the images, or those of `rows`, in order, as `image_processor` makes them.

    Each batch is a dictionary with "pixel_values", float (B, C, size, size); "labels", int64 (B,), if there are any;
    "index", int64 (B,); and "bad".
    """
    return ReportingLoader(source, EvalImages(source, size), 0, num_workers, batch_size=batch_size, sampler=rows)


def resize_edge(source: ImageSource, size: int) -> int:
    """Return the shortest edge before the centre crop: size / 0.875 if the median image is larger, otherwise `size`."""
    edges = sorted(min(sides) for sides in source.sample_sizes())
    return round(size / CROP_FRACTION) if edges and edges[len(edges) // 2] > size else size


def image_processor(source: ImageSource, size: int) -> "BitImageProcessorPil":
    """Make the transformers image processor that does what `eval_loader` does, to save it beside the model."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    # Images of Pillow have 8 bits as RGB. Others come as arrays.
    other: Any = {"do_convert_rgb": False, "rescale_factor": 1 / torch.iinfo(source.dtype).max}
    other = {} if source.channels == 3 else other
    return BitImageProcessorPil(
        **other,
        size={"shortest_edge": resize_edge(source, size)},
        crop_size={"height": size, "width": size},
        resample=2,  # PIL.Image.Resampling.BILINEAR
        image_mean=list(source.mean),
        image_std=list(source.std),
    )
