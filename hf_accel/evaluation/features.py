"""Extract features of all images of a loader, from any vision encoder or from raw pixels as a baseline."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.data_loader import DataLoaderStateMixin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.labels import UNLABELLED
from ..data.loader import ReportingLoader
from ..distributed import all_gather, rank, world_size
from ..distributed.stopping import until_stopped
from .pooling import check_encoder, pool

RAW_PIXEL_SIZE = 32
GATHER_ROWS = 65536
"""Rows that a collective moves at a time, so that the device never holds the whole bank."""

CPU_ROWS = 32
"""Rows that a CPU encodes at a time. A ViT-S takes half a minute for 256, during which it cannot answer a stop."""

Batch = dict[str, Any]


def extract_features(
    model: nn.Module,
    loader: Iterable[Batch],
    device: torch.device | str,
    patch_size: int | None = None,
    dtype: torch.dtype | None = None,
    prepare: Callable[[Batch], Batch] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return features (N, D) in fp32 and labels (N,) of every sample of the loader, once each, in order, on the CPU.

    Labels are -1 where the batches have none.

    The feature is `pooler_output`, or the CLS token, or the mean over patches or map (see `pooling.pool`). The model
    must be on `device`. It is in eval mode meanwhile and restored afterwards; no random state changes.

    In a distributed run, all processes call this with the same plain loader. Each takes every world-th batch, and all
    get all features.

    Args:
        loader: dictionaries with "pixel_values" (B, C, H, W), as the model expects them, and "labels" (B,)
            if there are any.
        patch_size: pixels, for encoders that take a patch size; None means the encoder's own.
        dtype: bf16 or fp16 for autocast; None means no autocast.
        prepare: what makes such a dictionary of a batch of the loader, called in the process that encodes it.

    Raises:
        ValueError: no samples, or a model whose outputs hold no feature of an image, or a different one each time.
        Stopped: a stop was requested.
        KeyError: a batch without "pixel_values".
        TypeError: a loader that accelerate has sharded already.
    """
    device = torch.device(device)
    with encoding(model, device, patch_size, dtype) as encode:
        return _collect(encode, loader, device, partial(check_encoder, encode, model), prepare)


@contextmanager
def encoding(
    model: nn.Module, device: torch.device, patch_size: int | None = None, dtype: torch.dtype | None = None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function of images (B, C, H, W) on the device that returns features (B, D), as `extract_features` does."""
    options = {} if patch_size is None else {"patch_size": patch_size}

    @torch.no_grad()
    def encode(pixel_values: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model(pixel_values=pixel_values, **options)
            return pool(outputs, model, (pixel_values.shape[-2], pixel_values.shape[-1]))

    with eval_mode(model):
        yield encode


def raw_pixel_features(loader: Iterable[Batch], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return features (N, C * h * w) and labels (N,) like `extract_features`, but of the pixels, as a baseline.

    Images larger than 32 px a side are averaged down to it, so that all of them fit into memory.
    """

    def flatten(pixel_values: Tensor) -> Tensor:
        height, width = (min(side, RAW_PIXEL_SIZE) for side in pixel_values.shape[-2:])
        return F.adaptive_avg_pool2d(pixel_values.float(), (height, width)).flatten(1)

    return _collect(flatten, loader, torch.device(device))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode. Afterwards each of its modules is in the mode of before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# Not inference_mode, because resized kernels that the model caches here must serve a later backward pass.
@torch.no_grad()
def _collect(
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    device: torch.device,
    check: Callable[[Tensor], None] | None = None,
    prepare: Callable[[Batch], Batch] | None = None,
) -> tuple[Tensor, Tensor]:
    """Collect rows and labels; `check` gets the first image on the device."""
    features, tags = [torch.empty(0, 0)], [torch.empty(0, 2, dtype=torch.long)]  # tags: number of the batch, label
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed from the global generator
        most = CPU_ROWS if device.type == "cpu" else None
        batches = _take_own_batches(loader)
        if prepare is not None:
            batches = ((number, prepare(batch)) for number, batch in batches)
        for number, rows, labels in until_stopped(_split_batches(batches, most)):
            pixels = rows.to(device, non_blocking=True)
            if check is not None:
                check(pixels[:1])
                check = None
            features.append(encode(pixels).float().cpu())
            tags.append(torch.stack([torch.full_like(labels, number), labels], 1))
    rows, tag = torch.cat(features[1:] or features), torch.cat(tags)
    if world_size() > 1:
        tag = _gather_rows(tag, device)
        in_order = tag[:, 0].argsort(stable=True)
        rows, tag = _gather_rows(rows, device)[in_order], tag[in_order]
    if len(tag) == 0:
        raise ValueError("the loader has no samples")
    return rows, tag[:, 1]


def _split_batches(batches: Iterable[tuple[int, Batch]], most: int | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (number, pixels, labels) of each batch, in parts of at most this many rows."""
    for number, batch in batches:
        if "pixel_values" not in batch:
            raise KeyError(f"evaluation needs 'pixel_values' in every batch, got {sorted(batch)}")
        pixels = batch["pixel_values"]
        labels = torch.as_tensor(batch.get("labels", [UNLABELLED] * len(pixels))).cpu().long()
        size = most or max(1, len(pixels))
        for rows, classes in zip(pixels.split(size), labels.split(size), strict=True):
            yield number, rows, classes


def _take_own_batches(loader: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """Yield (number, batch) of every world-th batch from this process's rank on. A DataLoader loads no others."""
    if world_size() == 1:
        yield from enumerate(loader)
        return
    if isinstance(loader, DataLoaderStateMixin):
        raise TypeError("the loader is sharded already: pass it as it was before accelerator.prepare")
    own = slice(rank(), None, world_size())
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        batches = DataLoader(
            loader.dataset,
            batch_sampler=list(loader.batch_sampler)[own],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
        )
    else:
        batches = islice(loader, own.start, None, own.step)
    for position, batch in enumerate(batches):
        if isinstance(loader, ReportingLoader):  # which this replaces the iteration of
            loader.source.report(batch["bad"])
        yield own.start + position * own.step, batch


def _gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Gather (n, D) from each process, with any n, into (sum of n, D) in rank order, on the CPU."""
    shapes = all_gather(torch.tensor([rows.shape], device=device)).cpu()
    counts, width = shapes[:, 0].tolist(), int(shapes[:, 1].max())
    parts: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), GATHER_ROWS):
        size = min(GATHER_ROWS, max(counts) - start)
        padded = torch.zeros(size, width, dtype=rows.dtype)
        own = rows[start : start + size]
        if len(own):
            padded[: len(own)] = own
        gathered = all_gather(padded.to(device)).cpu().split(size)
        for part, block, count in zip(parts, gathered, counts, strict=True):
            part.append(block[: max(0, count - start)])
    return torch.cat([block for part in parts for block in part]) if max(counts) else rows
