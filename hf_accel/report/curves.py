"""Training curves against the units spent, with the compression beneath."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..compression import Plan
from .fonts import save_figure

BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#555555"  # of Okabe and Ito's palette, for the colour-blind, too
COLORS = [BLUE, ORANGE, "#009E73", "#CC79A7", GRAY, "#E69F00", "#56B4E9", "#000000"]  # the rest of the palette
MARKERS = "osDPX^pv"
DASHES = [(0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2))]
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "hf_accel",  # without it the names in an SVG are drawn at random, and equal figures differ
}
UNITS_SPENT = "units spent (1 unit: the encoder's forward pass on one uncompressed image)"
SMOOTHED_FROM = 40
"""Number of logged losses from which on a running mean over a twentieth of them is drawn, too."""

Series = tuple[np.ndarray, np.ndarray]
Logs = Sequence[Mapping[str, Any]]


def plot_curves(
    log_history: Logs,
    path: str | Path,
    *,
    plan: Plan,
    image_size: int,
    title: str = "",
    baselines: Mapping[str, float] | None = None,
    rank_me_start: float | None = None,
    has_target_branch: bool = True,
) -> None:
    """Draw what evaluations measured, loss, patch tokens, patch size and token dropout against the units spent.

    What was not logged is left out, as are NaN values.

    Args:
        log_history: that of the Trainer, with "units" and, in some logs, "loss" or what an evaluation measures.
        path: image to write; its suffix says the format (png, pdf, svg).
        plan: that of the run. Compression is drawn exactly where it changes.
        image_size: pixels of a view.
        baselines: kNN accuracies in [0, 1] to draw as dashed lines, such as {"random initialisation": 0.4}.
        rank_me_start: RankMe of the released weights that training started from, to draw as a dashed line.
        has_target_branch: whether the objective has one, whose compression is drawn then.
    """
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    accuracy, loss = (_series(log_history, key) for key in ("eval_knn_top1", "loss"))
    if len(accuracy[0]):
        linear = _series(log_history, "eval_ridge_top1")
        panels.append((3, lambda axes: _accuracy(axes, accuracy, linear, baselines or {})))
    measures = {"eval_rank_me": "RankMe", "eval_alpha_req": "alpha-ReQ", "eval_lidar": "LiDAR"}
    for key, label in measures.items():
        if len((series := _series(log_history, key))[0]):
            start = rank_me_start if key == "eval_rank_me" else None
            panels.append((1.2, partial(_measure, series=series, label=label, start=start)))
    if len(loss[0]):
        panels.append((3, lambda axes: _loss(axes, loss)))
    stages = _planned(plan, image_size)
    for key, label, height in (
        ("tokens", "patch tokens\nper image", 1.6),
        ("patch_size", "patch size\n(px)", 1.2),
        ("token_dropout", "token\ndropout", 1.2),
    ):
        branches = _series(stages, key), _series(stages, f"target_{key}" if has_target_branch else key)
        panels.append((height, lambda axes, of=branches, label=label: _compression(axes, *of, label)))

    heights = [height for height, _ in panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.8 + 0.8 * sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (_, draw) in zip(grid, panels, strict=True):
            draw(axes)
        grid[-1].set_xlabel(UNITS_SPENT)
        grid[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
        grid[-1].set_xlim(left=0)
        figure.align_ylabels(grid)
        if title:
            figure.suptitle(title, fontsize=10)
        save_figure(figure, path, dpi=160)


def plot_accuracies(names: Sequence[str], logs: Sequence[Logs], batch_sizes: Sequence[int], path: Path) -> None:
    """Draw the kNN accuracy of several runs against the units spent, and against the seconds of training.

    Where no run has measured any, draw RankMe.

    Args:
        names: of the runs, for the legend.
        logs: the Trainer's log history of each run.
        batch_sizes: images per step of each run.
        path: image to write.
    """
    key, factor, measure = "eval_knn_top1", 100, "kNN top-1 (%)"
    if not any(_finite(log.get(key)) for log_history in logs for log in log_history):
        key, factor, measure = "eval_rank_me", 1, "RankMe"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.4 + 0.2 * len(names)), layout="constrained")
        by_units, by_seconds = figure.subplots(1, 2, sharey=True)
        for name, log_history, batch_size, color, marker in zip(
            names, logs, batch_sizes, cycle(COLORS), cycle(MARKERS), strict=False
        ):
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "label": name}
            units, values = _series(log_history, key)
            by_units.plot(units, factor * values, **style)
            seconds, values = _series(_with_seconds(log_history, batch_size), key, "seconds")
            by_seconds.plot(seconds, factor * values, **style)
        by_units.set_ylabel(measure)
        for axes, label in (by_units, UNITS_SPENT), (by_seconds, "seconds of training, without evaluations"):
            axes.set_xlabel(label)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlim(left=0)
        figure.legend(by_units.lines, names, loc="outside lower center", ncols=1, fontsize=8)
        save_figure(figure, path, dpi=160)


def _with_seconds(log_history: Logs, batch_size: int) -> Logs:
    """Add "seconds" of training to each log, from the images per second between logs."""
    steps, seconds = [0], [0.0]
    for log in log_history:
        if _finite(log.get("images_per_second")):
            steps.append(log["step"])
            seconds.append(seconds[-1] + (steps[-1] - steps[-2]) * batch_size / log["images_per_second"])
    return [{**log, "seconds": np.interp(log["step"], steps, seconds)} for log in log_history]


def _planned(plan: Plan, image_size: int) -> Logs:
    """Build what logs would hold at the end of each stage of the plan, with patch tokens only."""
    stages = []
    for units, strategy in plan.stage_ends():
        values: dict[str, float] = {"units": units}
        for prefix, branch in (("", strategy.online), ("target_", strategy.target_branch)):
            values |= branch.to_dict(prefix) | {f"{prefix}tokens": branch.kept_tokens(image_size)}
        stages.append(values)
    return stages


def _series(logs: Logs, key: str, against: str = "units") -> Series:
    points = [(log[against], log[key]) for log in logs if _finite(log.get(against)) and _finite(log.get(key))]
    places, values = np.array(points, dtype=float).reshape(-1, 2).T
    return places, values


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _put_legend_above(axes: Axes) -> None:
    """Put the legend above the axes, where it covers no line, however many there are."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=3, fontsize=8)


def _measure(axes: Axes, series: Series, label: str, start: float | None) -> None:
    axes.plot(*series, color=BLUE, marker="o", markersize=4)
    if start is not None:
        axes.axhline(start, color=GRAY, linestyle=DASHES[0], label=f"start: {start:.1f}")
        _put_legend_above(axes)
    axes.margins(y=0.2)
    axes.set_ylabel(label)


def _accuracy(axes: Axes, accuracy: Series, linear: Series, baselines: Mapping[str, float]) -> None:
    units, values = accuracy
    axes.plot(units, 100 * values, color=BLUE, marker="o", markersize=4, label="kNN" if len(linear[0]) else None)
    if len(linear[0]):
        axes.plot(linear[0], 100 * linear[1], color=ORANGE, marker="s", markersize=3, label="linear (ridge regression)")
    axes.annotate(
        f"{100 * values[-1]:.1f}",
        (units[-1], 100 * values[-1]),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=BLUE,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
    for number, (name, value) in enumerate(baselines.items()):
        if _finite(value):
            label = f"{name}: {100 * value:.1f}"
            axes.axhline(100 * value, color=GRAY, linestyle=DASHES[number % len(DASHES)], label=label)
    if axes.get_legend_handles_labels()[0]:
        _put_legend_above(axes)
    axes.margins(y=0.15)
    axes.set_ylabel("top-1 (%)" if len(linear[0]) else "kNN top-1 (%)")


def _loss(axes: Axes, loss: Series) -> None:
    units, values = loss
    if len(values) < SMOOTHED_FROM:
        axes.plot(units, values, color=BLUE)
    else:
        axes.plot(units, values, color=BLUE, alpha=0.3, linewidth=0.8)
        width = len(values) // 20
        mean_units, mean = (np.convolve(series, np.full(width, 1 / width), "valid") for series in loss)
        axes.plot(mean_units, mean, color=BLUE, label=f"mean of {width} logs")
        _put_legend_above(axes)
    axes.set_ylabel("training loss")


def _compression(axes: Axes, online: Series, target: Series, label: str) -> None:
    """Draw steps: a value holds from the units of the value before it to its own."""
    differ = not np.array_equal(target[1], online[1])
    branches = [(online, "online" if differ else "", BLUE, "-", 1.8)]
    if differ:
        branches.insert(0, (target, "target", ORANGE, "--", 1.5))
    for (units, values), name, color, line, width in branches:
        from_zero = np.concatenate([[0], units]), np.concatenate([values[:1], values])
        axes.step(*from_zero, where="pre", color=color, linestyle=line, linewidth=width, label=name)
    if differ:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, reverse=True)
    top = max(values.max() for (_, values), *_ in branches) or 1
    axes.set_ylim(-0.08 * top, 1.12 * top)  # room for a line at 0 to be seen
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylabel(label)
