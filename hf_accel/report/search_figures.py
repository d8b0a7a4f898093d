"""Figures of a search: gradient errors against strategy and as heatmaps, and the schedule found."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from ..compression import Schedule, Strategy
from ..schedule_search.error_table import ErrorTable, percent
from .curves import BLUE, COLORS, GRAY, MARKERS, ORANGE, STYLE
from .fonts import save_figure
from .heatmap import draw_heatmap

DECADES = 5
"""Powers of ten that a logarithmic axis reaches below its largest value."""
CA_MSE = {True: "CA-MSE / ‖G‖²", False: "CA-MSE"}
GAIN = {True: "gain / uncompressed", False: "gain"}
"""Names of the criteria, by whether the table's values are relative."""
NARROW = 0.12
"""Share of progress below which the name of a compression does not fit and is turned upright."""


def plot_gradient_error(table: ErrorTable, path: Path, title: str = "") -> None:
    """Draw squared bias, cost-adjusted variance, CA-MSE and gain by strategy, a line a stage, with 95% intervals.

    The strategies run downwards, so that the names of sixty can be read. All figures here are written with the
    suffixes .png and .svg.
    """
    unit = " / ‖G‖²" if table.relative else ""
    count = len(table.strategies)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 2.0 + 0.165 * count), layout="constrained")
        grid = figure.subplots(1, 4, sharey=True)
        clipped = [
            _errors(grid[0], table, "bias2", f"bias²{unit}", interval=True),
            _errors(grid[1], table, "ca_variance", f"cost-adjusted variance{unit}", interval=False),
            _errors(grid[2], table, "ca_mse", CA_MSE[table.relative], interval=True),
            _errors(grid[3], table, "gain", GAIN[table.relative], interval=True),
        ]
        grid[0].set_yticks(range(count), [table.label(strategy) for strategy in table.strategies], fontsize=8)
        grid[0].set_ylim(count - 0.4, -0.6)
        for axes in grid[1:]:
            axes.tick_params(axis="y", length=0)
        for place, cost in enumerate(table.cost.values()):
            grid[3].text(1.04, place, f"{cost:.3f}", transform=grid[3].get_yaxis_transform(), va="center", fontsize=8)
        grid[3].annotate("cost", (1.04, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", fontsize=8)
        keys = "p: patch size in px, d: token dropout, cost: relative to uncompressed"
        if len(table.symmetries) > 1:
            keys += "; online | target, where they differ"
        handles = _handles(table, any(clipped))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, title=keys, title_fontsize=8)
        _save(figure, path, title)


def _handles(table: ErrorTable, clipped: bool) -> list[Line2D]:
    """Build the entries of the legend."""
    black: dict[str, Any] = {"color": "black", "linestyle": "none", "fillstyle": "none"}
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=4, label=f"progress {percent(progress)}")
        for progress, color, marker in _styles(table.points)
    ]
    handles.append(Line2D([], [], marker="o", markersize=10, label="chosen", **black))
    if clipped:
        handles.append(Line2D([], [], marker="<", label="below the axis, or ≤ 0", **black))
    return handles


def _styles(points: Sequence[float]) -> list[tuple[float, str, str]]:
    """Return (progress, colour, marker) of each stage."""
    return list(zip(points, cycle(COLORS), cycle(MARKERS), strict=False))


def _errors(axes: Axes, table: ErrorTable, name: str, label: str, interval: bool) -> bool:
    """Draw one panel. Return whether a value lies below the axis and was drawn at its end."""
    values = {progress: table.values(name, progress) for progress in table.points}
    floor = _floor(np.concatenate(list(values.values())))
    any_clipped = False
    for (progress, color, marker), offset in zip(_styles(table.points), _offsets(len(table.points)), strict=True):
        places = np.arange(len(table.strategies)) + offset
        shown, clipped = np.maximum(values[progress], floor), values[progress] <= floor
        axes.plot(shown, places, color=color, linewidth=0.8, alpha=0.6)
        axes.plot(shown[~clipped], places[~clipped], color=color, marker=marker, markersize=3.5, linestyle="none")
        if clipped.any():
            below: dict[str, Any] = {"marker": "<", "markersize": 5, "fillstyle": "none", "linestyle": "none"}
            axes.plot(shown[clipped], places[clipped], color=color, clip_on=False, **below)
        if interval:
            low, high = (np.maximum(table.values(f"{name}_{end}", progress), floor) for end in ("low", "high"))
            axes.hlines(places, low, high, color=color, linewidth=1.1)
        for strategy in table.chosen(progress):
            at = table.strategies.index(strategy)
            ring: dict[str, Any] = {"marker": "o", "markersize": 10, "fillstyle": "none", "clip_on": False}
            axes.plot(shown[at], places[at], color="black", linestyle="none", zorder=5, **ring)
        any_clipped |= bool(clipped.any())
    _log_axis(axes, floor, np.nanmax([axes.dataLim.x1, floor]))
    axes.set_xlabel(label)
    return any_clipped


def _log_axis(axes: Axes, low: float, high: float) -> None:
    """Make the x axis logarithmic, with numbers at powers of ten, or also at 2 and 5 if those are few."""
    axes.set_xscale("log")
    axes.set_xlim(low / 1.15, max(1.15 * high, 5 * low))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e4 else compact(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _offsets(count: int) -> np.ndarray:
    """Return the offsets of the stages, so that their intervals do not hide each other."""
    return np.linspace(-0.3, 0.3, count) if count > 1 else np.zeros(1)


def _floor(values: np.ndarray) -> float:
    """Return the lower end of a logarithmic axis of these values. Zero and negative values lie below it."""
    positive = values[values > 0]
    return max(positive.min() / 1.25, positive.max() / 10**DECADES) if len(positive) else 1e-3


def plot_heatmap(table: ErrorTable, path: Path, title: str = "", criterion: str = "ca_mse") -> None:
    """Draw a criterion over token dropout and patch size, a panel a stage, each symmetry in rows of its own.

    Each stage has its own colours, from its least to its largest value, because a schedule chooses within a stage. The
    numbers can be compared between stages.

    Args:
        criterion: "ca_mse" or "gain".
    """
    strategies = table.strategies
    columns = sorted({strategy.online.token_dropout for strategy in strategies})
    rows = sorted({strategy.online.patch_size for strategy in strategies})
    width, height = max(2.2, 0.6 + 0.42 * len(columns)), 0.85 + 0.3 * len(rows)
    lines = math.ceil(len(table.points) / max(1, int(10 // width)))
    across = math.ceil(len(table.points) / lines)
    with matplotlib.rc_context({"font.size": 9}):
        size = (max(5.6, across * width), lines * len(table.symmetries) * height + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines * len(table.symmetries), across, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for block, (symmetry, members) in enumerate(table.symmetries.items()):
            for number, progress in enumerate(table.points):
                axes = grid[block * lines + number // across, number % across]
                axes.set_axis_on()
                _heatmap(axes, table, criterion, progress, members, rows, columns)
                name = f"{symmetry}, " if len(table.symmetries) > 1 else ""
                axes.set_title(f"{name}progress {percent(progress)}", fontsize=9)
                if number % across == 0:
                    axes.set_ylabel("patch size (px)")
                if number + across >= len(table.points):
                    axes.set_xlabel("token dropout")
        name = {"ca_mse": CA_MSE, "gain": GAIN}[criterion][table.relative]
        figure.supxlabel(f"{name}; colours from each stage's least (dark) to its largest; framed: chosen", fontsize=8)
        _save(figure, path, title)


def _heatmap(
    axes: Axes,
    table: ErrorTable,
    criterion: str,
    progress: float,
    members: Sequence[Strategy],
    rows: Sequence[int],
    columns: Sequence[float],
) -> None:
    values = dict(zip(table.strategies, table.values(criterion, progress), strict=True))
    positive = [value for value in values.values() if value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else 2 * low)
    places = {s: (s.online.patch_size, s.online.token_dropout) for s in members}
    draw_heatmap(axes, {place: values[s] for s, place in places.items()}, rows, columns, norm, compact)
    for strategy in table.chosen(progress):
        if strategy in places:
            row, column = rows.index(places[strategy][0]), columns.index(places[strategy][1])
            for color, line in (("white", 4), (ORANGE, 2)):
                frame = {"fill": False, "edgecolor": color, "linewidth": line, "clip_on": False, "zorder": 3}
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))


def compact(value: float) -> str:
    """Write two significant digits in as few characters as possible."""
    if value <= 0:
        return "≤0"
    if 0.00995 <= value < 995:
        return f"{float(f'{value:.2g}'):.0f}" if value >= 99.5 else f"{value:#.2g}".rstrip(".")
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def plot_schedule(
    schedule: Schedule,
    cost: Mapping[Strategy, float],
    image_size: int,
    path: Path,
    title: str = "",
    has_target_branch: bool = True,
) -> None:
    """Draw tokens per image of each branch, their compressions, and the cost per image, over progress.

    Args:
        cost: of a training image under each strategy, relative to the uncompressed one's.
        image_size: pixels of a view.
        has_target_branch: whether the objective has one, which is drawn then.
    """
    starts = [0.0, *(stage.until for stage in schedule.stages)]
    strategies = [stage.strategy for stage in schedule.stages]
    online = [strategy.online.kept_tokens(image_size) for strategy in strategies]
    target = [strategy.target_branch.kept_tokens(image_size) for strategy in strategies]
    narrow = min(end - start for start, end in pairwise(starts)) < NARROW
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.2 if narrow else 4.7), layout="constrained")
        grid = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2.2 if narrow else 1.2, 2.4])
        _steps(grid[0], starts, online, BLUE, "-", "online")
        if has_target_branch:
            _steps(grid[0], starts, target, ORANGE, "--", "target")
        grid[0].yaxis.set_major_locator(MaxNLocator(6, integer=True))
        grid[0].set_ylabel("patch tokens\nper image")
        grid[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        _names(grid[1], starts, strategies, ("online", "target") if has_target_branch else ("online",))
        _steps(grid[2], starts, [cost[strategy] for strategy in strategies], BLUE, "-", "")
        grid[2].set_ylabel("cost per image\n(uncompressed: 1)")
        grid[2].set_xlim(0, 1)
        grid[2].xaxis.set_major_formatter(PercentFormatter(1.0))
        grid[2].set_xlabel("progress (share of the budget spent)")
        figure.align_ylabels(grid)
        _save(figure, path, title)


def _steps(axes: Axes, starts: Sequence[float], values: Sequence[float], color: str, line: str, label: str) -> None:
    axes.step(starts, [*values, values[-1]], where="post", color=color, linestyle=line, linewidth=1.8, label=label)
    axes.set_ylim(0, max(1.12 * max(values), axes.get_ylim()[1]))


def _names(axes: Axes, starts: Sequence[float], strategies: Sequence[Strategy], branches: Sequence[str]) -> None:
    """Write the compressions as text, a line a branch."""
    for (start, end), strategy in zip(pairwise(starts), strategies, strict=True):
        for line, compression in enumerate((strategy.online, strategy.target_branch)[: len(branches)]):
            options = {"ha": "center", "va": "center", "fontsize": 8, "rotation": 90 if end - start < NARROW else 0}
            axes.text((start + end) / 2, line, compression.abbreviate(), color=(BLUE, ORANGE)[line], **options)
        axes.axvline(end, color=GRAY, linewidth=0.6)
    axes.axvline(0, color=GRAY, linewidth=0.6)
    axes.set_ylim(len(branches) - 0.5, -0.5)
    axes.set_yticks(range(len(branches)), branches)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)


def _save(figure: Figure, path: Path, title: str) -> None:
    if title:
        figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=10)
    for suffix in (".png", ".svg"):
        save_figure(figure, path.with_suffix(suffix), dpi=220)
