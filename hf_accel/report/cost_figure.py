"""The cost of a forward pass over token dropout and patch size, analytic and measured, as figure and table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .fonts import save_figure
from .heatmap import draw_heatmap
from .tables import format_table

Rows = Sequence[Mapping[str, Any]]
"""Of "patch_size" (pixels), "token_dropout", "tokens", "analytic" and, where measured, "measured" (both in units)."""


def plot_cost(table: Rows, path: str | Path, title: str = "") -> None:
    """Draw heatmaps of the analytic cost, the measured cost and their ratio, or of the analytic cost alone.

    Args:
        table: one row a compression; combinations that are missing stay blank.
        path: image to write; its suffix says the format (png, pdf, svg).
    """
    analytic = {(row["patch_size"], row["token_dropout"]): row["analytic"] for row in table}
    measured = {
        (row["patch_size"], row["token_dropout"]): row["measured"] for row in table if row.get("measured") is not None
    }
    costs = [*analytic.values(), *measured.values()]
    cost_norm = LogNorm(min(costs), max(costs))
    panels = [("analytic cost (units)", analytic, cost_norm, "viridis")]
    if measured:
        ratio = {place: units / analytic[place] for place, units in measured.items()}
        reach = max(1.5, *ratio.values(), *(1 / value for value in ratio.values()))
        panels.append(("measured cost (units)", measured, cost_norm, "viridis"))
        panels.append(("measured / analytic", ratio, LogNorm(1 / reach, reach), "PuOr_r"))
    rows, columns = (sorted({row[key] for row in table}) for key in ("patch_size", "token_dropout"))
    with matplotlib.rc_context({"font.size": 9}):
        size = (max(3.2, 1.0 + 0.52 * len(columns)), (1.0 + 0.36 * len(rows)) * len(panels) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (name, values, norm, colors) in zip(grid, panels, strict=True):
            draw_heatmap(axes, values, rows, columns, norm, _format_cost, colors)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("token dropout")
            axes.set_ylabel("patch size (px)")
        if title:
            figure.suptitle(title, fontsize=10)
        save_figure(figure, path, dpi=160)


def format_cost_table(rows: Rows) -> str:
    """Format the rows as a table: costs in units, the ratio measured by analytic, "-" where nothing was measured."""
    header = ["patch size", "token dropout", "tokens", "analytic", "measured", "ratio"]
    lines = []
    for row in rows:
        cells = [f"{row['patch_size']}", f"{row['token_dropout']:.2f}", f"{row['tokens']}", f"{row['analytic']:.4f}"]
        units = row.get("measured")
        lines.append([*cells, *(["-", "-"] if units is None else [f"{units:.4f}", f"{units / row['analytic']:.2f}"])])
    return format_table(header, lines)


def _format_cost(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
