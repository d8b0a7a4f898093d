"""The evaluations in a `results.json`, with an entry for each question and a run for each seed, and their table."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..run_folder import RunFolder
from .tables import format_table


def find_run(folder: str | Path, question: Mapping[str, Any], seed: int | None) -> dict[str, Any] | None:
    """Return the run that has answered this question with this seed, if there is one."""
    for entry in RunFolder(folder).read_results().get("evaluations", []):
        if _same(entry, question):
            return next((run for run in entry["runs"] if run["seed"] == seed), None)
    return None


def add_run(folder: str | Path, question: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Add a run to `results.json`, to the entry of the same question or to a new one. Everything else there stays.

    Args:
        question: what was evaluated on what, and how; "validation_images" is the number of test images.
        run: "seed" (None where nothing is drawn), "top1", "top5", and whatever else is worth keeping.
    """
    with RunFolder(folder).update_results() as results:
        entries = results.setdefault("evaluations", [])
        entry = next((entry for entry in entries if _same(entry, question)), None)
        if entry is None:
            entry = {**question, "runs": []}
            entries.append(entry)
        entry["runs"].append(run)
        entry["seeds"] = [run["seed"] for run in entry["runs"]]
        for name in ("top1", "top5"):
            values = [run[name] for run in entry["runs"]]
            mean = statistics.fmean(values)
            entry[name] = mean
            entry[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
            entry[f"{name}_ci95"] = list(wilson_interval(mean, entry["validation_images"]))


def _same(entry: Mapping[str, Any], question: Mapping[str, Any]) -> bool:
    asked = json.loads(json.dumps(question))  # as it would come back from the file
    return all(name in entry and entry[name] == value for name, value in asked.items())


def format_evaluations(
    entries: Sequence[Mapping[str, Any]], skipped: Sequence[tuple[str, str, int | None, str]] = ()
) -> str:
    """Format a table: encoder, evaluation, patch size, training images, top-1 mean and std over seeds, 95% interval.

    The settings in which entries of one evaluation differ follow its name.

    Args:
        skipped: (encoder, evaluation, patch size, reason) of what was asked for and not done.
    """
    header = ["encoder", "evaluation", "patch", "labels", "seeds", "top-1, %", "95% interval"]
    rows = []
    for entry in sorted(entries, key=lambda e: (e["evaluation"], e["train_images"], e["patch_size"] or 0)):
        std = "" if entry["top1_std"] is None else f" ± {100 * entry['top1_std']:.1f}"
        low, high = (f"{100 * end:.1f}" for end in entry["top1_ci95"])
        settings = describe_differences(entry, entries)
        name = entry["evaluation"] + f" ({settings})" * bool(settings)
        numbers = [str(value) for value in (entry["patch_size"] or "", entry["train_images"], len(entry["seeds"]))]
        rows.append([entry["checkpoint"], name, *numbers, f"{100 * entry['top1']:.1f}{std}", f"{low} to {high}"])
    for encoder, name, patch_size, reason in skipped:
        rows.append([encoder, name, str(patch_size or ""), "", "", "skipped", reason])
    return format_table(header, rows)


def describe_differences(entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Name the settings of one of `entries` in which others of the same evaluation differ."""
    alike = [other.get("settings", {}) for other in entries if other["evaluation"] == entry["evaluation"]]
    named = entry.get("settings", {}).items()
    return ", ".join(f"{name}={value}" for name, value in named if any(o.get(name) != value for o in alike))


def wilson_interval(accuracy: float, num_samples: int) -> tuple[float, float]:
    """Return the 95% confidence interval of an accuracy measured on `num_samples` test images (Wilson, JASA 1927).

    It covers the draw of the test images only. It does not cover the draw of the training images, pretraining, or the
    seed of a probe, whose spread is the standard deviation over seeds.
    """
    z = 1.959964
    centre = (accuracy + z**2 / (2 * num_samples)) / (1 + z**2 / num_samples)
    variance = accuracy * (1 - accuracy) / num_samples + z**2 / (4 * num_samples**2)
    half = z * variance**0.5 / (1 + z**2 / num_samples)
    return max(0.0, centre - half), min(1.0, centre + half)
