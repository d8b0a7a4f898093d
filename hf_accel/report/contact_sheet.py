"""A contact sheet of a run's views: the images, and for each stage the views with the patches that each branch sees."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .curves import BLUE, GRAY, ORANGE
from .fonts import save_figure

CELL = 224
"""Side in pixels at which an image is drawn."""

FADED = 0.82
"""Share of paper gray in a dropped patch. What is left still shows which patch it was."""

PAPER = 0.88
INCHES, GAP, LABELS, STAGE = 1.32, 0.08, 1.5, 0.55
"""Inches of an image's side, between images, of the labels on the left, and of the title of a stage."""

BOXES = (BLUE, ORANGE)
"""The colours of the first and of the second view."""


@dataclass(frozen=True)
class SeenView:
    """One view of every image as a branch gets it.

    Args:
        view: number of the view, from 0.
        branch: which branch gets it, in words.
        images: (N, S, S, 3) in [0, 1].
        grid: number of patches along a side.
        kept: (N, grid, grid), whether the branch keeps the patch.
        note: what else the label says.
    """

    view: int
    branch: str
    images: np.ndarray
    grid: int
    kept: np.ndarray
    note: str = ""


@dataclass(frozen=True)
class StageViews:
    """The views of the first images of a stage's first step.

    Args:
        title: number and extent of the stage.
        originals: (H, W, 3) in [0, 1], of any sizes.
        boxes: for the first two views, (N, 4) left, top, right and bottom in pixels of the originals.
        seen: the views, in the order in which they are drawn.
    """

    title: str
    originals: Sequence[np.ndarray]
    boxes: Sequence[np.ndarray]
    seen: Sequence[SeenView]


def plot_contact_sheet(stages: Sequence[StageViews], path: Path, title: str, notes: Sequence[str] = ()) -> None:
    """Draw each stage: a row of originals with the boxes of their views, then a row for each view and branch."""
    columns = max(len(stage.originals) for stage in stages)
    width = LABELS + columns * (INCHES + GAP) + GAP
    lines = [line for note in notes for line in textwrap.wrap(note, int(width * 15))]
    rows = sum(1 + len(stage.seen) for stage in stages)
    height = 0.45 + len(stages) * STAGE + rows * (INCHES + GAP) + 0.17 * len(lines) + 0.25
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height))
        figure.text(GAP / width, 1 - 0.22 / height, title, fontsize=12, fontweight="bold", va="center")
        top = 0.45
        for stage in stages:
            place = GAP / width, 1 - (top + STAGE - 0.17) / height
            figure.text(*place, stage.title, fontsize=9.5, fontweight="bold", va="center")
            top += STAGE
            for row in (None, *stage.seen):
                place = LABELS / width, 1 - (top + INCHES) / height
                axes = figure.add_axes((*place, columns * (INCHES + GAP) / width, INCHES / height))
                axes.set_xlim(0, columns * (CELL + GAP / INCHES * CELL))
                axes.set_ylim(CELL, 0)
                axes.set_axis_off()
                _draw_originals(axes, stage) if row is None else _draw_seen(axes, row)
                label = "original image" if row is None else describe_seen(row)
                color = "black" if row is None else _color(row.view)
                figure.text(GAP / width, 1 - (top + INCHES / 2) / height, label, va="center", color=color)
                top += INCHES + GAP
        figure.text(GAP / width, 0.12 / height, "\n".join(lines), fontsize=8.5, color=GRAY, va="bottom")
        save_figure(figure, path, dpi=160)


def describe_seen(row: SeenView) -> str:
    """Return the label of a row."""
    patches, kept = row.grid**2, int(row.kept[0].sum())
    count = f"all {patches} patches" if kept == patches else f"{kept} of {patches} patches"
    return "\n".join(filter(None, [f"view {row.view + 1}", row.branch, count, row.note]))


def _color(view: int) -> str:
    return BOXES[view] if view < len(BOXES) else GRAY


def _draw_originals(axes: Axes, stage: StageViews) -> None:
    for number, image in enumerate(stage.originals):
        scale = CELL / max(image.shape[:2])
        height, width = (side * scale for side in image.shape[:2])
        left, top = _left(number) + (CELL - width) / 2, (CELL - height) / 2
        shown = _resize(image, round(width), round(height))
        axes.imshow(shown, extent=(left, left + width, top + height, top), interpolation="none", aspect="auto")
        for boxes, color in zip(stage.boxes, BOXES, strict=False):
            x0, y0, x1, y1 = boxes[number] * scale
            corner = left + min(x0, x1), top + y0
            axes.add_patch(Rectangle(corner, abs(x1 - x0), y1 - y0, fill=False, edgecolor=color, linewidth=1.6))


def _draw_seen(axes: Axes, row: SeenView) -> None:
    for number, image in enumerate(row.images):
        left = _left(number)
        shown = fade_dropped(_resize(image, CELL, CELL), row.kept[number])
        axes.imshow(shown, extent=(left, left + CELL, CELL, 0), interpolation="none", aspect="auto")
        for line in np.linspace(0, CELL, row.grid + 1):
            axes.plot([left, left + CELL], [line, line], color="white", linewidth=0.5, clip_on=False)
            axes.plot([left + line, left + line], [0, CELL], color="white", linewidth=0.5)


def _left(number: int) -> float:
    return number * CELL * (1 + GAP / INCHES)


def fade_dropped(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Fade the patches of an image (S, S, 3) in [0, 1] that `kept` (grid, grid) leaves out to a light gray."""
    side, grid = len(image), len(kept)
    patch = np.arange(side) * grid // side
    shown = kept[np.ix_(patch, patch)][..., None]
    gray = image @ np.array([0.299, 0.587, 0.114])
    return np.where(shown, image, FADED * PAPER + (1 - FADED) * gray[..., None])


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Enlarge without smoothing, so that the pixels of a small view can be seen, and shrink with it."""
    pixels = PIL.Image.fromarray((255 * image).round().clip(0, 255).astype(np.uint8))
    larger = width >= pixels.width
    resample = PIL.Image.Resampling.NEAREST if larger else PIL.Image.Resampling.LANCZOS
    return np.asarray(pixels.resize((width, height), resample)) / 255
