"""Where a run keeps the images that it has decoded: nowhere, in memory, or on the accelerator."""

import time
from typing import Any

import torch

from ..data.cache import estimate_bytes, free_memory, storage_side, store_images
from ..distributed import all_gather_objects, say
from ..utils.errors import fail

SHARE = 0.5
"""Of the free memory, what `cache="auto"` takes at most."""

LEAST_PASSES = 2
"""Passes over the images that a run must make for `cache="auto"` to store them."""


def choose_cache(trainer: Any, side: int) -> str:
    """Choose "none", "ram" or "device" for `cache="auto"`, the same on all processes.

    A resumed run keeps what it began with.
    """
    if trainer.args.cache != "auto":
        return trainer.args.cache
    if trainer.cache:
        return trainer.cache
    passes = trainer.plan.num_steps * trainer.plan.batch_size / len(trainer.source)
    if passes < LEAST_PASSES:
        return "none"
    needed, device = estimate_bytes(trainer.source, side), trainer.args.device
    fits = {"device": device.type != "cpu" and needed <= SHARE * free_memory(device)}
    fits["ram"] = needed <= SHARE * free_memory(torch.device("cpu"))
    return next((place for place, here in fits.items() if all(all_gather_objects(here))), "none")


def start_cache(trainer: Any) -> None:
    """Set `cache` of the trainer, and decode the images if it stores them. All processes must call this.

    Raises:
        SettingError: the images do not fit into the memory.
        CorruptDataError: more images cannot be read than may be skipped.
    """
    source, start = trainer.source, time.perf_counter()
    side = storage_side(trainer.view_configs, trainer.objective.config.image_size)
    trainer.cache = choose_cache(trainer, side)
    source.stored = None
    device = trainer.args.device if trainer.cache == "device" else torch.device("cpu")
    if trainer.cache == "none" or (source.pixels is not None and device.type == "cpu"):
        return
    try:
        source.stored = store_images(source, side, device)
    except MemoryError as error:
        fail("cache", trainer.args.cache, f"{error}; take cache=none, more memory or a smaller part of the data")
    taken = time.perf_counter() - start
    trainer.seconds["data"] += taken
    rows = source.stored.rows
    say(f"Images are stored in {rows.numel() / 1e9:.2f} GB, short side at most {rows.shape[1]} pixels ({taken:.0f} s)")
