"""Numbers in README and docs that are generated from `docs/results/PLAN.json`.

A page marks the place with `<!-- PLAN -->` and `<!-- end PLAN -->`, each on a line of its own. What stands between them
is written by `python -m benchmarks.speedup PLAN`, and a test fails when it differs from the JSON.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speedup_report import NAMES, format_speedups, peer_label
from hf_accel.recipe.values import join_names
from hf_accel.utils.writing import write_text

ROOT = Path(__file__).parents[1]


def pages() -> list[Path]:
    """The pages that may hold marks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill(text: str, plan: str, block: str) -> str:
    """Put `block` between the marks of `plan`, if the text has any."""
    return re.sub(_marks(plan), lambda match: f"{match[1]}{block}\n{match[3]}", text, flags=re.DOTALL)


def _marks(plan: str) -> str:
    return rf"(<!-- {re.escape(plan)} -->\n)(.*?)(<!-- end {re.escape(plan)} -->)"


def plans_of(text: str) -> list[str]:
    """The plans that a page has marks of, in order."""
    return re.findall(r"^<!-- end (\S+) -->$", text, flags=re.MULTILINE)


def write_pages(plan: str, report: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Write the summary of a plan into every page that has its marks."""
    for path in paths:
        text = path.read_text()
        if plan in plans_of(text) and (filled := fill(text, plan, summarize(report))) != text:
            write_text(path, filled)


def summarize(report: Mapping[str, Any]) -> str:
    """Format a table of mean accuracies, with budgets as columns, and a line that says each objective's speedup."""
    entries = report["objectives"]
    rows = {(entry["objective"], label): means for entry in entries for label, means in _means(entry).items()}
    budgets = sorted({budget for row in rows.values() for budget in row})
    lines = ["| kNN top-1 (linear probe), % | " + " | ".join(f"{budget:,.0f} units" for budget in budgets) + " |"]
    lines.append("|---|" + "---:|" * len(budgets))
    for (objective, label), means in rows.items():
        if means:
            numbers = (means.get(budget, "") for budget in budgets)
            lines.append(f"| {NAMES[objective]}, {label} | " + " | ".join(numbers) + " |")
    return "\n".join([*lines, "", *(_sentence(entry) for entry in entries if entry["seeds"]), *_references(entries)])


def _means(entry: Mapping[str, Any]) -> dict[str, dict[float, str]]:
    """The cells of each kind of run, by budget."""
    whole = [entry["baseline"]] if entry["baseline"] else []
    kinds = {"short sequences first": entry["accelerated"], "uncompressed": [*whole, *entry["smaller_baselines"]]}
    for row in entry.get("ablations", []):
        kinds.setdefault(row["name"], []).append(row)
    for row in entry.get("peers", []):
        kinds.setdefault(peer_label(row), []).append(row)
    return {label: {row["budget"]: _cell(row, entry["seeds"]) for row in rows} for label, rows in kinds.items()}


def _cell(row: Mapping[str, Any], seeds: Sequence[int]) -> str:
    linear, runs = [value for value in row["linear"] if value is not None], len(row["knn"])
    mean = f"{statistics.fmean(row['knn']):.1f}" + (f" ({statistics.fmean(linear):.1f})" if linear else "")
    return mean if runs == len(seeds) else f"{mean}, {'one run' if runs == 1 else f'{runs} runs'}"


def _sentence(entry: Mapping[str, Any]) -> str:
    seeds = entry["seeds"]
    cells = "".join(cell for means in _means(entry).values() for cell in means.values())
    but = ", where no other number of runs is given" if " run" in cells else ""
    of = f"seed {seeds[0]}" if len(seeds) == 1 else f"means over seeds {join_names([*map(str, seeds)])}{but}"
    return f"- {NAMES[entry['objective']]}: {of}. {format_speedups(entry)}"


def _references(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line that says what raw pixels and encoders before training reach, as means over seeds."""
    raw = [entry["raw_pixels_knn"] for entry in entries if entry["raw_pixels_knn"] is not None]
    before, probed = (_mean_of_seeds(entries, f"random_{measure}") for measure in ("knn", "linear"))
    said = [f"raw pixels reach {statistics.fmean(raw):.1f}%"] if raw else []
    if before is not None:
        probe = f" ({probed:.1f}% by the linear probe)" if probed is not None else ""
        said.append(f"encoders before training {before:.1f}%{probe}")
    return [f"- For comparison, {' and '.join(said)}."] if said else []


def _mean_of_seeds(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of means over objectives, whose encoders with the same seed are one and the same."""
    by_seed: dict[int, list[float]] = {}
    for entry in entries:
        for seed, value in zip((entry["baseline"] or {}).get("seed", []), entry.get(key) or [], strict=False):
            if value is not None:
                by_seed.setdefault(seed, []).append(value)
    return statistics.fmean(map(statistics.fmean, by_seed.values())) if by_seed else None
