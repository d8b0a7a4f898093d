"""What the branches of a run see at the start of each stage, from the code that the run itself calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compression import Strategy
from ..data.augment import view_boxes
from ..data.pictures import show_channels, to_picture
from ..models import AccelViTModel
from ..models.shortening_accel_vit import resize_to_multiple
from ..objectives import Draw
from ..report import SeenView, StageViews

SHOWN = 6
"""Images of a stage that are shown."""

LOCAL_SHOWN = 2
"""Local crops of an image that are shown."""


class EncoderCall(NamedTuple):
    """One call of an encoder: its pixels (B, C, S, S), patch size and kept tokens (B, K), and whether it learns."""

    pixels: Tensor
    patch_size: int
    kept_tokens: Tensor | None
    learns: bool


def collect_stage_views(trainer: Any) -> list[StageViews]:
    """Return the views of the first images of the first step of each stage of the trainer's plan.

    The objective takes a forward pass of them, from which it is read what each branch gets. BatchNorms and the like
    change by it, so the trainer should train nothing afterwards.
    """
    made, step, before = [], 0, trainer.plan.start
    ends, count = trainer.plan.stage_ends(), len(trainer.plan.segments)
    has_target = trainer.objective.has_target_branch
    for number, ((strategy, steps), (end, _)) in enumerate(zip(trainer.plan.stage_steps(), ends, strict=True)):
        until = 1.0 if number == count - 1 else trainer.plan.progress(end)
        extent = f"{trainer.plan.progress(before):.0%} to {until:.0%} of the budget, {steps:,} steps"
        title = f"Stage {number + 1} of {count}: {extent}. {describe_strategy(strategy, has_target)}"
        made.append(_collect_step(trainer, step, title))
        step, before = step + steps, end
    return made


def describe_strategy(strategy: Strategy, has_target_branch: bool = True) -> str:
    """Describe a strategy in words, with the target branch only where the objective has one."""

    def words(branch: Any) -> str:
        dropped = f", {branch.token_dropout:.0%} of the patches dropped" if branch.token_dropout else ""
        return f"patches of {branch.patch_size} px{dropped}"

    online, target = words(strategy.online), words(strategy.target_branch)
    differs = has_target_branch and target != online
    return f"{online[0].upper()}{online[1:]}" + (f" (target branch: {target})" if differs else "")


def _collect_step(trainer: Any, step: int, title: str) -> StageViews:
    trainer._first_step = step
    loader = trainer.get_train_dataloader().loader
    size, items = next(iter(loader.batch_sampler))
    batch = loader.dataset.__getitems__((size, items[:SHOWN]))
    originals = [to_picture(trainer.source.read(index)) for index in batch["index"].tolist()]
    boxes = _draw_boxes(trainer, batch, [image.size for image in originals])
    now, size = trainer.plan[step], trainer.view_size(step)
    views = trainer.views_of(trainer._prepare_inputs(batch), size)
    with recording_encoders(trainer.objective) as calls:
        trainer.objective(views, now.strategy, Draw(trainer.draw_seed, step), now.progress)
    seen = [row for call in calls for row in _split_call(trainer, call, views)]
    seen.sort(key=lambda row: (row.view, row.branch))
    return StageViews(title, [np.asarray(image) / 255 for image in originals], boxes, _merge_branches(seen))


def _merge_branches(seen: list[SeenView]) -> list[SeenView]:
    """Show a view once where both branches get the same of it."""
    merged: list[SeenView] = []
    for row in seen:
        before = merged[-1] if merged else None
        if before and before.view == row.view and np.array_equal(before.kept, row.kept):
            merged[-1] = replace(before, branch="both branches")
        else:
            merged.append(row)
    return merged


def _draw_boxes(trainer: Any, batch: dict[str, Any], sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Draw the boxes of the first two views again, in pixels of the originals."""
    widths, heights = torch.tensor(sizes).unbind(1)
    where = (trainer.draw_seed, batch["step"], batch["micro_step"])
    rows = (batch["rows"], batch["global_batch"])
    configs = trainer.view_configs[:2]
    return [view_boxes(c, heights, widths, *where, view, *rows).numpy() for view, c in enumerate(configs)]


@contextmanager
def recording_encoders(objective: torch.nn.Module) -> Iterator[list[EncoderCall]]:
    """Within it, note every call of an encoder of the objective. The target branch is called without gradient."""
    calls: list[EncoderCall] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(EncoderCall(args[0].detach(), args[1], kwargs.get("kept_tokens"), torch.is_grad_enabled()))

    encoders = [module for module in objective.modules() if isinstance(module, AccelViTModel)]
    hooks = [encoder.register_forward_pre_hook(note, with_kwargs=True) for encoder in encoders]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _split_call(trainer: Any, call: EncoderCall, views: list[Tensor]) -> Iterator[SeenView]:
    """Yield what a call shows of each of its views, which stand side by side for each image."""
    images = len(views[0])
    grid = call.pixels.shape[-1] // call.patch_size
    kept = torch.ones(len(call.pixels), grid**2, dtype=torch.bool)
    if call.kept_tokens is not None:
        kept = torch.zeros_like(kept).scatter_(1, call.kept_tokens.cpu(), True)
    mean, std = (torch.tensor(value)[:, None, None] for value in (trainer.source.mean, trainer.source.std))
    by_view = (rows.unflatten(0, (images, -1)).unbind(1) for rows in (call.pixels, kept))
    for pixels, mask in zip(*by_view, strict=True):
        number = next(n for n, view in enumerate(views) if _is_view(view, pixels, call.patch_size))
        local = trainer.view_configs[number].size is not None
        if local and number >= 2 + LOCAL_SHOWN:
            continue
        note = f"local crop, {len(views) - 2} in all" if local else f"made at {pixels.shape[-1]} px"
        shown = (pixels.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        shown = np.stack([show_channels(image) for image in shown])
        branch = "online branch" if call.learns else "target branch"
        yield SeenView(number, branch, shown, grid, mask.unflatten(1, (grid, grid)).numpy(), note)


def _is_view(view: Tensor, pixels: Tensor, patch_size: int) -> bool:
    fitted = resize_to_multiple(view, patch_size)
    return fitted.shape == pixels.shape and torch.equal(fitted.to(pixels.dtype), pixels)
