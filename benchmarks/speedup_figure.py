"""The figure of `benchmarks.speedup`: accuracy of finished runs against units and against seconds."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from benchmarks.speedup_report import NAMES
from hf_accel.report.curves import BLUE, GRAY, ORANGE, STYLE

UNITS = "budget, in units (1 unit: a forward pass on one full image)"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw a row of panels for each objective of NAME.json that has both kinds of runs, as PNG and as SVG."""
    objectives = [entry for entry in report["objectives"] if entry["baseline"] and entry["accelerated"]]
    if not objectives:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.3 * len(objectives)), layout="constrained")
        grid = figure.subplots(len(objectives), 2, squeeze=False, sharey="row")
        for entry, panels in zip(objectives, grid, strict=True):
            for axes, amount in zip(panels, ("budget", "seconds"), strict=True):
                draw_panel(axes, entry, amount)
            panels[0].set_ylabel(f"{NAMES[entry['objective']]}: kNN top-1 (%)")
        grid[-1][0].set_xlabel(UNITS)
        grid[-1][1].set_xlabel(name_seconds(report["clock"]))
        figure.suptitle(report["title"], fontsize=10)
        labels = {
            label: handle
            for axes in grid[:, 0]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=8)
        figure.savefig(path.with_suffix(".png"), dpi=200)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})  # the same runs give the same file


def name_seconds(clock: str) -> str:
    return "seconds of one core" if clock == "cpu" else "seconds of training"


def draw_panel(axes: Any, entry: Mapping[str, Any], amount: str) -> None:
    """Draw an objective's finished runs against `amount`, "budget" (units) or "seconds".

    A dot is a run, a hollow one that of an ablation, and a line joins means over seeds. The dashed line is the accuracy
    that the baseline ends at with the whole budget, and the arrow the speedup by it, if there is one. Dotted lines are
    raw pixels and the encoder before training.
    """
    for rows, color, marker, label in (
        (entry["accelerated"], BLUE, "o", "short sequences first"),
        ([entry["baseline"], *entry["smaller_baselines"]], GRAY, "s", "uncompressed"),
        (entry["peers"], ORANGE, "D", "uncompressed, another implementation"),
    ):
        if rows:
            _draw_runs(axes, rows, amount, color, marker, label)
    names = dict.fromkeys(row["name"] for row in entry["ablations"])
    for name, marker in zip(names, itertools.cycle("^vd")):
        rows = [row for row in entry["ablations"] if row["name"] == name]
        _draw_runs(axes, rows, amount, GRAY if name.startswith("uncompressed") else BLUE, marker, name, filled=False)
    _draw_amounts(axes)
    for value, words in (
        (entry["raw_pixels_knn"], "raw pixels"),
        (_mean(entry["random_knn"]), "encoder before training"),
    ):
        if value is not None:
            axes.axhline(value, color="black", linestyle=(0, (1, 1.5)), linewidth=1)
            axes.annotate(
                words, (0.01, value), xycoords=("axes fraction", "data"), fontsize=7, va=_side(entry, value), ha="left"
            )
    _draw_speedup(axes, entry, amount)


def _draw_runs(
    axes: Any, rows: Sequence[Mapping[str, Any]], amount: str, color: str, marker: str, label: str, filled: bool = True
) -> None:
    rows = sorted(rows, key=lambda row: row["budget"])
    amounts = [_amounts(row, amount) for row in rows]
    means = [statistics.fmean(row["knn"]) for row in rows]
    axes.plot([*map(statistics.fmean, amounts)], means, color=color, linewidth=1.6)
    every = [(x, y) for xs, row in zip(amounts, rows, strict=True) for x, y in zip(xs, row["knn"], strict=True)]
    inside = {} if filled else {"markerfacecolor": "white", "markersize": 5}
    dots = {"color": color, "marker": marker, "markersize": 4, "linestyle": "", "alpha": 0.8} | inside
    axes.plot(*zip(*every, strict=True), label=label, **dots)


def _amounts(row: Mapping[str, Any], amount: str) -> list[float]:
    return [row["budget"]] * len(row["knn"]) if amount == "budget" else row["seconds"]


def _draw_amounts(axes: Any) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_speedup(axes: Any, entry: Mapping[str, Any], amount: str) -> None:
    accuracy = statistics.fmean(entry["baseline"]["knn"])
    axes.axhline(accuracy, color=GRAY, linestyle=(0, (5, 2)), linewidth=1)
    value = entry["speedup_units" if amount == "budget" else "speedup_seconds"]["value"]
    if value:
        end = statistics.fmean(_amounts(entry["baseline"], amount))
        arrow = {"arrowstyle": "<->", "color": "#222222"}
        axes.annotate("", (end, accuracy), (end / value, accuracy), arrowprops=arrow)
        place = {"ha": "center", "va": "bottom", "fontsize": 10, "weight": "bold"}
        axes.annotate(f"{value:.1f}x", (end / value**0.5, accuracy), **place)


def _mean(values: Sequence[float | None] | None) -> float | None:
    known = [value for value in values or [] if value is not None]
    return statistics.fmean(known) if known else None


def _side(entry: Mapping[str, Any], value: float) -> str:
    """Above its line or below, so that the words of two lines that are close do not overlap."""
    others = [entry["raw_pixels_knn"], _mean(entry["random_knn"])]
    return "bottom" if value == max(other for other in others if other is not None) else "top"
