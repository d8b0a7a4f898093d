"""The cost of a forward pass over token dropout and patch size, analytic beside measured: figure and text table."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
"""Of "patch_size" (pixels), "token_dropout", "tokens", "analytic" and, where measured, "measured" (both in units)."""


def plot_cost(table: Rows, path: str | Path, title: str = "") -> None:
    """Heatmaps of the analytic cost, the measured cost and their ratio; without measurements the analytic one alone.

    Args:
        table: one row a compression; combinations that are missing stay blank.
        path: image to write; its suffix says the format (png, pdf, svg).

    Raises:
        ValueError: no rows.
    """
    if not table:
        raise ValueError("the cost table has no rows")
    analytic, measured = _grid(table, "analytic"), _grid(table, "measured")
    cost_norm = LogNorm(np.nanmin([analytic, measured]), np.nanmax([analytic, measured]))
    panels = [("analytic cost (units)", analytic, "viridis", cost_norm)]
    if not np.isnan(measured).all():
        ratio = measured / analytic
        reach = max(1.5, np.nanmax(ratio), np.nanmax(1 / ratio))
        panels += [
            ("measured cost (units)", measured, "viridis", cost_norm),
            ("measured / analytic", ratio, "PuOr_r", LogNorm(1 / reach, reach)),
        ]
    columns, rows = _axis(table, "token_dropout"), _axis(table, "patch_size")
    with matplotlib.rc_context({"font.size": 9}):
        size = (max(3.2, 1.0 + 0.52 * len(columns)), (1.0 + 0.36 * len(rows)) * len(panels) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _heatmap(axes, *panel)
            axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
            axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
            axes.set_xlabel("token dropout")
            axes.set_ylabel("patch size (px)")
        if title:
            figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=160)


def format_cost_table(rows: Rows) -> str:
    """The rows as an aligned text table, costs in units, the ratio measured by analytic; "-" where not measured."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "patch size": lambda row: f"{row['patch_size']}",
        "token dropout": lambda row: f"{row['token_dropout']:.2f}",
        "tokens": lambda row: f"{row['tokens']}",
        "analytic": lambda row: f"{row['analytic']:.4f}",
        "measured": lambda row: "-" if row.get("measured") is None else f"{row['measured']:.4f}",
        "ratio": lambda row: "-" if row.get("measured") is None else f"{row['measured'] / row['analytic']:.2f}",
    }
    lines = [list(columns), *([text(row) for text in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _axis(table: Rows, key: str) -> list[float]:
    return sorted({row[key] for row in table})


def _grid(table: Rows, key: str) -> np.ndarray:
    """(patch sizes, token dropouts), NaN where the table has nothing."""
    rows, columns = _axis(table, "patch_size"), _axis(table, "token_dropout")
    grid = np.full((len(rows), len(columns)), np.nan)
    for row in table:
        if row.get(key) is not None:
            grid[rows.index(row["patch_size"]), columns.index(row["token_dropout"])] = row[key]
    return grid


def _heatmap(axes: Axes, title: str, values: np.ndarray, colors: str, norm: Normalize) -> None:
    image = axes.imshow(values, cmap=colors, norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = image.to_rgba(np.array([value]))[0]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.42
            text = f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.tick_params(length=0)
