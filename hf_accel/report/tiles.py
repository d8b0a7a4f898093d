"""Figures of small images in rows, with labels."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .fonts import save_figure

GAP, MARGIN, LINE = 0.08, 0.08, 0.155
"""Inches between images, around the figure, and of a line of text."""


class Tile(NamedTuple):
    """An image (H, W, 3) in [0, 1], a short text beneath it, and the colour of its frame and text."""

    image: np.ndarray
    text: str = ""
    color: str | None = None


def plot_tiles(
    rows: Sequence[Sequence[Tile]],
    path: Path,
    labels: Sequence[str] = (),
    inches: float = 1.1,
    apart: Sequence[int] = (),
) -> None:
    """Draw rows of square images.

    Args:
        labels: a text on the left of each row.
        inches: side of an image.
        apart: columns, from 1, before which there is more room.
    """
    lines = max((tile.text.count("\n") + 1 if tile.text else 0 for row in rows for tile in row), default=0)
    labels_width = 1.15 if any(labels) else 0.0
    lefts, left = [], MARGIN + labels_width
    for column in range(max(map(len, rows))):
        left += 0.2 * (column in apart)
        lefts.append(left)
        left += inches + GAP
    step = inches + lines * LINE + GAP
    width, height = left - GAP + MARGIN, len(rows) * step + MARGIN
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(width, height))
        for number, row in enumerate(rows):
            top = MARGIN + number * step
            if labels:
                place = MARGIN / width, 1 - (top + inches / 2) / height
                figure.text(*place, textwrap.fill(labels[number], 18), va="center", fontsize=9)
            for left, tile in zip(lefts, row, strict=False):
                place = (left / width, 1 - (top + inches) / height, inches / width, inches / height)
                axes = figure.add_axes(place)
                axes.imshow(tile.image.clip(0, 1), interpolation="nearest", aspect="auto")
                axes.set_axis_off()
                if tile.color:
                    frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, clip_on=False)
                    frame.set(edgecolor=tile.color, linewidth=2.4)
                    axes.add_patch(frame)
                place = (left + inches / 2) / width, 1 - (top + inches + 0.03) / height
                figure.text(*place, tile.text, ha="center", va="top", color=tile.color or "black")
        save_figure(figure, path, dpi=130)
