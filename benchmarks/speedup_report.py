"""Speedups from the records of a plan's finished runs: their definition, the JSON, the tables and the figure."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_accel.recipe.values import join_names
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


def speedup(
    baseline: Sequence[Record], accelerated: Sequence[Record], amount: str, accuracy: str = "knn"
) -> dict[str, float | None]:
    """The baseline's amount ("budget" or "seconds") over the least with which finished accelerated runs are as good.

    `baseline` are runs of the whole budget, `accelerated` those of all budgets; only seeds that both have count.
    `value` is that of the means over seeds; `low` and `high` are the extremes, each seed compared with itself. All are
    None where no accelerated run is as good; `low` is None also where that is so for a single seed.
    """
    seeds = _paired_seeds(baseline, accelerated)
    both = (baseline, accelerated)
    of_seeds = [[[record for record in records if record["seed"] == seed] for records in both] for seed in seeds]
    values = [_ratio(*(_means(records, amount, accuracy) for records in pair)) for pair in of_seeds]
    paired = [[record for record in records if record["seed"] in seeds] for records in both]
    value = _ratio(*(_means(records, amount, accuracy) for records in paired)) if seeds else None
    known = [single for single in values if single is not None]
    low = min(known) if known and len(known) == len(values) else None
    return {"value": value, "low": low, "high": max(known, default=None)}


def _paired_seeds(baseline: Sequence[Record], accelerated: Sequence[Record]) -> list[int]:
    return sorted({record["seed"] for record in baseline} & {record["seed"] for record in accelerated})


def _means(records: Sequence[Record], amount: str, accuracy: str) -> list[tuple[float, float]]:
    """(mean amount, mean accuracy) of each budget."""
    by_budget = _by(records, lambda record: record["budget"])
    return [(_mean(group, amount), _mean(group, accuracy)) for group in by_budget.values()]


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
        "random_linear": [r.get("random_linear") for r in whole] or None,
        "crossing_units": None,
        "speedup_units": {"value": None, "low": None, "high": None},
        "speedup_seconds": {"value": None, "low": None, "high": None},
        "speedup_units_linear": {"value": None, "low": None, "high": None},
    }
    if whole and accelerated and has_learnt(entry):
        entry["speedup_units"] = speedup(whole, accelerated, "budget")
        entry["speedup_seconds"] = speedup(whole, accelerated, "seconds")
        if all(record["linear"] is not None for record in [*whole, *accelerated]):
            entry["speedup_units_linear"] = speedup(whole, accelerated, "budget", "linear")
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
    """Write NAME.json and NAME.md. Returns the tables."""
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
            lines += _references("the encoder before training", entry["random_knn"], entry["random_linear"])
            lines += _references("raw pixels", [entry["raw_pixels_knn"]])
        lines += _choices(entry["choices"], seconds)
    return "\n".join(lines)


def peer_label(row: Mapping[str, Any]) -> str:
    """Name a row of `peers` and what the peer was built from, without the reason where lightly was not there."""
    return f"{row['name']}, another implementation ({row['peer'].partition(',')[0]})"


def format_speedups(entry: Mapping[str, Any]) -> str:
    """Two sentences about an objective's speedups, in units and in seconds, and by the linear probe."""
    if not (entry["baseline"] and entry["accelerated"]):
        return "No speedup yet: it takes a finished baseline of the whole budget and a finished accelerated run."
    if not has_learnt(entry):
        ends, before = (statistics.fmean(values) for values in (entry["baseline"]["knn"], entry["random_knn"]))
        than = f"{ends:.1f}%, no higher than the encoder before training ({before:.1f}%)"
        short = ""
        for row in entry["accelerated"]:
            if row["budget"] == entry["baseline"]["budget"]:
                short = f" Short sequences first end at {statistics.fmean(row['knn']):.1f}% with as many units."
        return f"No speedup is given, as the uncompressed run of the whole budget ends at {than}.{short}"
    smallest = min(row["budget"] for row in entry["accelerated"])
    # Runs of the smallest budget may be as accurate already, and still smaller ones might be.
    most = entry["baseline"]["budget"] / smallest
    units, linear = (_speedup_text(entry[f"speedup_{amount}"], most) for amount in ("units", "units_linear"))
    time = _speedup_text(entry["speedup_seconds"], math.inf)
    paired = set(entry["baseline"]["seed"]) & {seed for row in entry["accelerated"] for seed in row["seed"]}
    shared = join_names([str(seed) for seed in sorted(paired)])
    of = f" (by seed{'s' * (len(paired) > 1)} {shared}, which both have)" if set(entry["seeds"]) - paired else ""
    by_probe = f" At equal accuracy of the linear probe: {linear} in units." if any(entry["baseline"]["linear"]) else ""
    return f"Speedup at equal kNN accuracy{of}: {units} in units, {time} in seconds.{by_probe}"


def _references(
    label: str, knn: Sequence[float | None] | None, linear: Sequence[float | None] | None = None
) -> list[str]:
    known, probed = ([value for value in values or [] if value is not None] for values in (knn, linear))
    return [f"| {label} | | | | {_list(known)} | {statistics.fmean(known):.1f} | {_list(probed)} |"] if known else []


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


def _speedup_text(speedup: Mapping[str, float | None], most: float) -> str:
    """`most` is the speedup by the smallest budget that was tried."""

    def number(value: float | None) -> str:
        if value is None:
            return "not reached"
        return f"at least {value:.1f}" if value >= most else f"{value:.1f}"

    value, low, high = (speedup[key] for key in ("value", "low", "high"))
    ends = f" ({number(low)} to {number(high)} over seeds)" if value and low != high else ""
    return f"{number(value)}{'x' if value else ''}{ends}"


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
