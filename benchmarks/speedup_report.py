"""Speedups from the records of a plan's finished runs: their definition, the JSON, the tables and the figure."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from hf_accel.recipe.values import join_names
from hf_accel.report.curves import BLUE, GRAY, STYLE
from hf_accel.utils.writing import write_json, write_text

Record = Mapping[str, Any]

NAMES = {"moco": "MoCo-v3", "simclr": "SimCLR", "dino": "DINO"}


def crossing(points: Iterable[tuple[float, float]], accuracy: float) -> float | None:
    """Where accuracy is first reached along (amount, accuracy) points, interpolated in the logarithm of the amount.

    The points are sorted by amount. Returns the smallest amount of all if its accuracy is enough, and None if none is.
    """
    before: tuple[float, float] | None = None
    for amount, reached in sorted(points):
        if reached >= accuracy:
            if before is None or before[0] <= 0:
                return amount
            share = (accuracy - before[1]) / (reached - before[1])
            return math.exp(math.log(before[0]) + share * (math.log(amount) - math.log(before[0])))
        before = (amount, reached)
    return None


def speedup(baseline: Sequence[Record], accelerated: Sequence[Record], amount: str) -> dict[str, float | None]:
    """The baseline's amount ("budget" or "seconds") over the least with which finished accelerated runs are as good.

    `baseline` are runs of the whole budget, `accelerated` those of all budgets; only seeds that both have count.
    `value` is that of the means over seeds; `low` and `high` are the extremes, each seed compared with itself. All are
    None where no accelerated run is as good; `low` is None also where that is so for a single seed.
    """
    seeds = _paired_seeds(baseline, accelerated)
    values = [_speedup_of_seed(baseline, accelerated, amount, seed) for seed in seeds]
    paired = [[record for record in records if record["seed"] in seeds] for records in (baseline, accelerated)]
    value = _ratio(*(_means(records, amount) for records in paired)) if seeds else None
    known = [single for single in values if single is not None]
    low = min(known) if known and len(known) == len(values) else None
    return {"value": value, "low": low, "high": max(known, default=None)}


def _paired_seeds(baseline: Sequence[Record], accelerated: Sequence[Record]) -> list[int]:
    return sorted({record["seed"] for record in baseline} & {record["seed"] for record in accelerated})


def _speedup_of_seed(baseline, accelerated, amount: str, seed: int) -> float | None:
    mine = [[(r[amount], r["knn"]) for r in records if r["seed"] == seed] for records in (baseline, accelerated)]
    return _ratio(*mine)


def _means(records: Sequence[Record], amount: str) -> list[tuple[float, float]]:
    """(mean amount, mean kNN accuracy) of each budget."""
    by_budget = _by(records, lambda record: record["budget"])
    return [(_mean(group, amount), _mean(group, "knn")) for group in by_budget.values()]


def _mean(records: Sequence[Record], key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def _ratio(baseline: Sequence[tuple[float, float]], accelerated: Sequence[tuple[float, float]]) -> float | None:
    ((whole, accuracy),) = baseline
    needed = crossing(accelerated, accuracy)
    return None if needed is None else whole / needed


def _by(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in sorted(records, key=lambda record: (-record["budget"], record["seed"])):
        groups.setdefault(key(record), []).append(record)
    return groups


def of_objective(name: str, plan_name: str, records: Sequence[Record]) -> dict[str, Any]:
    """One entry of `objectives` in the JSON, from this objective's records."""
    kinds = _by(records, lambda record: record["kind"])
    baseline, accelerated = kinds.get("baseline", []), kinds.get("accelerated", [])
    whole = [record for record in baseline if record["divisor"] == 1]
    main = [*baseline, *accelerated]
    entry: dict[str, Any] = {
        "objective": name,
        "plan": plan_name,
        "command": f"python -m benchmarks.speedup {plan_name}",
        "commit": _shared(records, "commit"),
        "hardware": _shared(records, "hardware"),
        "seeds": sorted({record["seed"] for record in main}),
        "baseline": (_rows(whole) or [None])[0],
        "smaller_baselines": _rows([record for record in baseline if record["divisor"] != 1]),
        "accelerated": _rows(accelerated),
        "raw_pixels_knn": next((r["raw_pixels_knn"] for r in main if r["raw_pixels_knn"] is not None), None),
        "random_knn": [r["random_knn"] for r in whole] or None,
        "crossing_units": None,
        "speedup_units": {"value": None, "low": None, "high": None},
        "speedup_seconds": {"value": None, "low": None, "high": None},
    }
    if whole and accelerated and has_learnt(entry):
        entry["speedup_units"] = speedup(whole, accelerated, "budget")
        entry["speedup_seconds"] = speedup(whole, accelerated, "seconds")
        long = [record for record in accelerated if record["divisor"] == 1]
        if long:
            curve = _mean_curve(long)
            entry["crossing_units"] = crossing(zip(*curve, strict=True), _mean(whole, "knn"))
    for kind in ("choice", "ablation"):
        named = _by(kinds.get(kind, []), lambda record: record["name"])
        entry[f"{kind}s"] = [{"name": label, **row} for label, group in named.items() for row in _rows(group)]
    by_peer = _by(kinds.get("peer", []), lambda record: (record["name"], record["peer"]))
    entry["peers"] = [
        {"name": name, "peer": peer, **row} for (name, peer), group in by_peer.items() for row in _rows(group)
    ]
    return entry


def has_learnt(entry: Mapping[str, Any]) -> bool:
    """Whether the baseline of the whole budget ends above its encoder before training. Otherwise nothing is gained."""
    before = [value for value in entry["random_knn"] or [] if value is not None]
    return not before or statistics.fmean(entry["baseline"]["knn"]) > statistics.fmean(before)


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a budget: lists with a value for each seed."""
    rows = []
    for budget, group in _by(records, lambda record: record["budget"]).items():
        lists = {key: [record[key] for record in group] for key in ("knn", "linear", "seconds", "steps", "seed")}
        rows.append({"budget": budget, **lists})
    return rows


def _mean_curve(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    curves = [record["curve"] for record in records]
    return tuple(np.mean([curve[key] for curve in curves], axis=0).tolist() for key in ("units", "knn"))  # pyright: ignore


def _shared(records: Sequence[Record], key: str) -> Any:
    """The value that all records have, or a list of the different ones."""
    values = []
    for record in records:
        if record[key] not in values:
            values.append(record[key])
    return values[0] if len(values) == 1 else values


def curve_of(record: Record) -> dict[str, Any]:
    """One entry of `curves`. Seconds are in proportion to units within a run, as its schedule's stages allow."""
    units = record["curve"]["units"]
    return {
        "objective": record["objective"],
        "schedule": record["name"],
        "budget": record["budget"],
        "seed": record["seed"],
        "units": units,
        "seconds": [record["seconds"] * spent / record["units"] for spent in units],
        "knn": record["curve"]["knn"],
    }


def write_report(name: str, plan: Mapping[str, Any], records: Sequence[Record], folder: Path) -> str:
    """Write NAME.json, NAME.md and, once both kinds of runs are there, the figure. Returns the tables."""
    by_objective = _by(records, lambda record: record["objective"])
    names = [objective for objective in plan["objectives"] if objective in by_objective]
    objectives = [of_objective(objective, name, by_objective[objective]) for objective in names]
    main = [record for record in records if record["kind"] in ("baseline", "accelerated")]
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "title": plan["title"],
        "clock": plan["clock"],
        "objectives": objectives,
        "curves": [*map(curve_of, main)],
    }
    write_json(folder / f"{name}.json", report)
    text = format_report(report)
    write_text(folder / f"{name}.md", text + "\n")
    drawn = [entry for entry in objectives if entry["baseline"] and entry["accelerated"]]
    if drawn:
        plot(drawn, plan["title"], plan["clock"], folder / f"{name}.png")
    return text


def format_report(report: Mapping[str, Any]) -> str:
    """Markdown tables of `NAME.json`, which holds every number of them."""
    seconds = "seconds of one core" if report["clock"] == "cpu" else "seconds"
    lines = [f"# {report['title']}"]
    for entry in report["objectives"]:
        lines += ["", f"## {NAMES[entry['objective']]}", "", format_speedups(entry)]
        baselines = [entry["baseline"]] if entry["baseline"] else []
        rows = [_line("uncompressed", row) for row in [*baselines, *entry["smaller_baselines"]]]
        rows += [_line("short sequences first", row) for row in entry["accelerated"]]
        rows += [_line(row["name"], row) for row in entry["ablations"]]
        rows += [_line(peer_label(row), row) for row in entry.get("peers", [])]
        if rows:
            lines += ["", f"| runs | budget | steps | {seconds} | kNN top-1, % | mean | linear, % |"]
            lines += ["|---|---:|---:|---:|---|---:|---|", *rows]
            lines += _references("the encoder before training", entry["random_knn"])
            lines += _references("raw pixels", [entry["raw_pixels_knn"]])
        lines += _choices(entry["choices"], seconds)
    return "\n".join(lines)


def peer_label(row: Mapping[str, Any]) -> str:
    """Name a row of `peers` and what the peer was built from, without the reason where lightly was not there."""
    return f"{row['name']}, by another library ({row['peer'].partition(',')[0]})"


def format_speedups(entry: Mapping[str, Any]) -> str:
    """One sentence about an objective's speedups in units and in seconds."""
    if not (entry["baseline"] and entry["accelerated"]):
        return "No speedup yet: it takes a finished baseline of the whole budget and a finished accelerated run."
    if not has_learnt(entry):
        ends, before = (statistics.fmean(values) for values in (entry["baseline"]["knn"], entry["random_knn"]))
        than = f"{ends:.1f}%, no higher than the encoder before training ({before:.1f}%)"
        return f"No speedup is given, as the uncompressed run of the whole budget ends at {than}."
    units, time = (_speedup_text(entry[f"speedup_{amount}"]) for amount in ("units", "seconds"))
    paired = set(entry["baseline"]["seed"]) & {seed for row in entry["accelerated"] for seed in row["seed"]}
    shared = join_names([str(seed) for seed in sorted(paired)])
    of = f" (by seed{'s' * (len(paired) > 1)} {shared}, which both have)" if set(entry["seeds"]) - paired else ""
    smallest = min(row["budget"] for row in entry["accelerated"])
    # Runs of the smallest budget are as accurate already, and a still smaller one might be.
    least = "at least " * (entry["speedup_units"]["value"] == entry["baseline"]["budget"] / smallest)
    return f"Speedup at equal kNN accuracy{of}: {least}{units} in units, {time} in seconds."


def _references(label: str, values: Sequence[float | None] | None) -> list[str]:
    known = [value for value in values or [] if value is not None]
    return [f"| {label} | | | | {_list(known)} | {statistics.fmean(known):.1f} | |"] if known else []


def _choices(rows: Sequence[Mapping[str, Any]], seconds: str) -> list[str]:
    """The table of what was tried, the best of each budget first."""
    if not rows:
        return []
    lines = [
        "",
        "What was tried to choose the settings, judged on a fifth of the training images, which was held out:",
        "",
    ]
    lines += [f"| tried | budget | steps | {seconds} | kNN top-1, % |", "|---|---:|---:|---:|---|"]
    for row in sorted(rows, key=lambda row: (row["budget"], -row["knn"][0])):
        numbers = f"{row['budget']:,.0f} | {_integers(row['steps'])} | {_integers(row['seconds'])}"
        lines.append(f"| {row['name']} | {numbers} | {_list(row['knn'])} |")
    return lines


def _speedup_text(value: Mapping[str, float | None]) -> str:
    if value["value"] is None:
        return "not reached"
    low, high = (value[key] for key in ("low", "high"))
    ends = (
        f" ({'not reached' if low is None else f'{low:.2f}'} to {high:.2f} over seeds)" if high and low != high else ""
    )
    return f"{value['value']:.2f}x{ends}"


def _line(label: str, row: Mapping[str, Any]) -> str:
    linear = [value for value in row["linear"] if value is not None]
    mean = statistics.fmean(row["knn"])
    return (
        f"| {label} | {row['budget']:,.0f} | {_integers(row['steps'])} | {_integers(row['seconds'])} "
        f"| {_list(row['knn'])} | {mean:.1f} | {_list(linear)} |"
    )


def _list(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)


def _integers(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):,.0f}"


def plot(objectives: Sequence[Mapping[str, Any]], title: str, clock: str, path: Path) -> None:
    """Accuracy of finished runs against units, on the left, and seconds, on the right; a row of panels an objective.

    Lines join means over seeds; bands reach from the least to the largest. The dashed line is the accuracy that the
    baseline ends at with the whole budget, and the arrow the speedup by it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.3 * len(objectives)), layout="constrained")
        grid = figure.subplots(len(objectives), 2, squeeze=False)
        for entry, panels in zip(objectives, grid, strict=True):
            for axes, amount in zip(panels, ("budget", "seconds"), strict=True):
                _panel(axes, entry, amount)
            panels[0].set_ylabel(f"{NAMES[entry['objective']]}: kNN top-1 (%)")
        grid[-1][0].set_xlabel("units of training (1 unit: a forward pass on one uncompressed image)")
        grid[-1][1].set_xlabel("seconds of one core" if clock == "cpu" else "seconds of training")
        figure.suptitle(title, fontsize=10)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
        figure.savefig(path.with_suffix(".png"), dpi=200)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})  # the same runs give the same file


def _panel(axes: Any, entry: Mapping[str, Any], amount: str) -> None:
    baselines = [entry["baseline"], *entry["smaller_baselines"]]
    for rows, color, marker, label in (
        (entry["accelerated"], BLUE, "o", "short sequences first"),
        (baselines, GRAY, "s", "uncompressed"),
    ):
        rows = sorted(rows, key=lambda row: row["budget"])
        amounts = [row["budget"] if amount == "budget" else statistics.fmean(row["seconds"]) for row in rows]
        means = [statistics.fmean(row["knn"]) for row in rows]
        axes.plot(amounts, means, color=color, marker=marker, markersize=5, linewidth=1.6, label=label)
        ends = [(min(row["knn"]), max(row["knn"])) for row in rows]
        axes.fill_between(amounts, *zip(*ends, strict=True), color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    accuracy = statistics.fmean(entry["baseline"]["knn"])
    axes.axhline(accuracy, color=GRAY, linestyle=(0, (5, 2)), linewidth=1)
    if entry["raw_pixels_knn"] is not None:
        axes.axhline(entry["raw_pixels_knn"], color="black", linestyle=(0, (1, 1.5)), linewidth=1)
        axes.annotate(
            "raw pixels", (0.01, entry["raw_pixels_knn"]), xycoords=("axes fraction", "data"), fontsize=7, va="bottom"
        )
    value = entry["speedup_units" if amount == "budget" else "speedup_seconds"]["value"]
    if value:
        end = entry["baseline"]["budget"] if amount == "budget" else statistics.fmean(entry["baseline"]["seconds"])
        arrow = {"arrowstyle": "<->", "color": "#222222"}
        axes.annotate("", (end, accuracy), (end / value, accuracy), arrowprops=arrow)
        place = {"ha": "center", "va": "bottom", "fontsize": 10, "weight": "bold"}
        axes.annotate(f"{value:.1f}x", (end / value**0.5, accuracy), **place)
