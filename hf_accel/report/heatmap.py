"""A heatmap over patch size and token dropout with the numbers in its cells."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm


def draw_heatmap(
    axes: Axes,
    values: Mapping[tuple[int, float], float],
    patch_sizes: Sequence[int],
    token_dropouts: Sequence[float],
    norm: LogNorm,
    write: Callable[[float], str],
    colors: str = "viridis",
) -> None:
    """Draw values by (patch size, token dropout) on logarithmic colours; what has no value stays blank.

    Args:
        write: the text of a cell.
        colors: name of a colour map of matplotlib.
    """
    cells = np.array([[values.get((p, r), np.nan) for r in token_dropouts] for p in patch_sizes])
    shown = np.maximum(cells, norm.vmin or 0.0)  # zero and what is negative have no logarithm
    image = axes.imshow(shown, cmap=colors, norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            red, green, blue, _ = image.to_rgba(shown[row : row + 1, column])[0]
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.42
            style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": "white" if is_dark else "black"}
            axes.text(column, row, write(value), **style)
    axes.set_xticks(range(len(token_dropouts)), [f"{value:g}" for value in token_dropouts])
    axes.set_yticks(range(len(patch_sizes)), [f"{value:g}" for value in patch_sizes])
    axes.tick_params(length=0)
