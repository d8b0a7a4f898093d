"""How a run makes its views: operation by operation, or by compiled graphs in fewer passes over memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..data import FusedViews
from ..distributed import broadcast_object, is_main, say
from ..utils.errors import fail

WORTH = 300.0
"""Seconds that the views of a run must take operation by operation for a compilation to be tried."""


def choose_views(trainer: Any) -> str:
    """Choose "eager" or "fused" for `view_backend="auto"`: a resumed run keeps what it began with.

    A run begins with compiled views if those of all its steps would otherwise take longer than WORTH, and if one batch
    of them is made faster. The main process measures.
    """
    if trainer.args.view_backend != "auto":
        return trainer.args.view_backend
    if trainer.view_backend:
        return trainer.view_backend
    chosen = "eager"
    from torch._dynamo.exc import TorchDynamoException  # an import of seconds

    if is_main():
        steps = _steps_by_size(trainer)
        images = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
        eager = {size: steps[size] * images * _seconds_per_image(trainer, size) for size in steps}
        if sum(eager.values()) > WORTH:
            size = max(steps, key=lambda size: eager[size])
            before = _seconds(trainer, size)
            trainer.render = FusedViews(trainer.args.autocast_dtype or torch.float32)
            try:
                chosen = "fused" if _seconds(trainer, size) < before else "eager"
            except TorchDynamoException as error:
                say(f"Note: views are made operation by operation, as torch.compile fails: {_first_line(error)}")
            trainer.render = None
    return broadcast_object(chosen)


def start_views(trainer: Any) -> None:
    """Set `view_backend` and `render` of the trainer, and compile before the first step. All processes must call it.

    Raises:
        SettingError: compiled views are asked for, or were begun with, and there is no compiler.
    """
    trainer.view_backend = choose_views(trainer)
    if trainer.view_backend == "eager":
        return
    trainer.render = FusedViews(trainer.args.autocast_dtype or torch.float32)
    from torch._dynamo.exc import TorchDynamoException

    start = time.perf_counter()
    try:
        for size in _steps_by_size(trainer):
            trainer.views_of(_example(trainer, size), size)
    except TorchDynamoException as error:
        fail("view_backend", "fused", f"torch.compile fails: {_first_line(error)}; take view_backend=eager")
    say(f"Views are compiled ({time.perf_counter() - start:.0f} s)")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _steps_by_size(trainer: Any) -> dict[int, int]:
    """How many of the steps that are left have views of each size."""
    steps: dict[int, int] = {}
    end = 0
    for strategy, count in trainer.plan.stage_steps():
        begin, end = max(end, trainer._first_step), end + count
        if begin < end:
            size = trainer.size_under(strategy)
            steps[size] = steps.get(size, 0) + end - begin
    return steps


def _example(trainer: Any, size: int, most: int | None = None) -> dict[str, Any]:
    """A micro-batch of noise in the shapes of the loader's, of at most `most` images."""
    count, device = trainer.args.per_device_train_batch_size, trainer.args.device
    count = min(count, most or count)

    def noise(*shape: int) -> torch.Tensor:
        levels = torch.iinfo(trainer.source.dtype).max + 1
        made = torch.randint(levels, shape, generator=torch.Generator().manual_seed(0))
        return made.to(trainer.source.dtype).to(device)

    batch: dict[str, Any] = {"step": 0, "micro_step": 0, "rows": slice(0, count), "global_batch": count}
    if trainer.source.stored is not None:
        batch |= trainer.source.stored.take(torch.arange(count) % len(trainer.source))
        return batch | {"images": batch["images"].to(device)}
    pixels = trainer.source.pixels
    if pixels is not None:
        return {**batch, "images": noise(count, *pixels.shape[1:])}
    sides = [config.size or trainer.crop_size(size) for config in trainer.view_configs]
    return {**batch, "crops": [noise(count, trainer.source.channels, side, side) for side in sides]}


def _seconds_per_image(trainer: Any, size: int) -> float:
    """A first look: on a CPU a few images tell, and a GPU is busy only with the whole micro-batch."""
    few = 16 if trainer.args.device.type == "cpu" else trainer.args.per_device_train_batch_size
    batch = _example(trainer, size, few)
    return _seconds(trainer, size, batch, 1) / batch["global_batch"]


def _seconds(trainer: Any, size: int, batch: dict[str, Any] | None = None, repeats: int = 3) -> float:
    """The median seconds of the views of a micro-batch, after a warm-up."""
    batch, device = batch or _example(trainer, size), trainer.args.device
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    # On a CPU the seconds that its threads compute, as other programs may share the cores while it measures.
    on_cpu = device.type == "cpu"
    clock, threads = (time.process_time, torch.get_num_threads()) if on_cpu else (time.perf_counter, 1)
    taken = []
    for _ in range(1 + repeats):
        wait()
        start = clock()
        trainer.views_of(batch, size)
        wait()
        taken.append((clock() - start) / threads)
    return statistics.median(taken[1:])
