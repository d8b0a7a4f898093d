"""A map of features in two dimensions: points by group, and beside them the images in their places."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import COLORS
from .fonts import save_figure

PLACES = 15
"""Images along each side of the map of images."""

MORE = ["#7F3C8D", "#8C564B"]
"""Colours of the ninth and tenth group, beside those of the other figures."""

GROUP_COLORS = [*COLORS, *MORE]
OTHERS = "#BBBBBB"


def plot_feature_map(
    points: np.ndarray,
    groups: np.ndarray,
    names: Sequence[str],
    image: Callable[[int], np.ndarray],
    path: Path,
) -> None:
    """Draw points (N, 2) in the colours of their groups, and the images that lie nearest to the cells of a grid.

    Args:
        groups: (N,) from 0 to len(names), where len(names) stands for all other points.
        names: of the groups, at most ten.
        image: returns the image (H, W, 3) in [0, 1] of a row of `points`.
    """
    low, high = points.min(0), points.max(0)
    places = (points - low) / np.maximum(high - low, 1e-12)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(12, 6.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        handles, labels = [], []  # given to the legend by hand, as it leaves out names that begin with "_"
        colors = [*GROUP_COLORS[: len(names)], OTHERS]
        for group, (name, color) in enumerate(zip([*names, "other"], colors, strict=True)):
            rows = groups == group
            if rows.any():
                below = group == len(names)
                handles.append(left.scatter(*places[rows].T, s=7, color=color, zorder=1 if below else 2, linewidths=0))
                labels.append(name)
        _draw_images(right, places, image)
        for axes in (left, right):
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(-0.02, 1.02)
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color("#CCCCCC")
        columns = min(5, len(labels))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, markerscale=2.5)
        save_figure(figure, path, dpi=160)


def _draw_images(axes: Axes, places: np.ndarray, image: Callable[[int], np.ndarray]) -> None:
    """Draw for each cell of a grid the image whose point is nearest to the centre of the cell, if it has points."""
    cells = np.minimum((places * PLACES).astype(int), PLACES - 1)
    for cell in np.unique(cells, axis=0):
        rows = (cells == cell).all(1).nonzero()[0]
        centre = (cell + 0.5) / PLACES
        nearest = rows[((places[rows] - centre) ** 2).sum(1).argmin()]
        x, y = cell / PLACES
        extent = (x, x + 0.96 / PLACES, y, y + 0.96 / PLACES)
        axes.imshow(image(int(nearest)), extent=extent, interpolation="bilinear", aspect="auto")
