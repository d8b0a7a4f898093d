"""Schedules against each other: the same recipe, budget and seeds, kNN accuracy against the units spent.

    python -m benchmarks.schedules benchmarks/schedules_cifar10.yaml [--output FOLDER] [key=value ...]

Every run is one of the entry point's, in FOLDER/NAME-SEED, and is not repeated if it is complete: a killed benchmark
goes on where it was. A searched schedule comes from a pilot, the uncompressed run of the first seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.options import parser_of
from hf_accel.recipe import RECIPES, overrides_for
from hf_accel.report import environment
from hf_accel.report.curves import BLUE, COLORS, GRAY, MARKERS, ORANGE, STYLE
from hf_accel.tasks.search import SCHEDULE_NAME
from hf_accel.utils.strict_yaml import load_yaml
from hf_accel.utils.writing import write_json

ROOT = Path(__file__).parents[1]
PILOT = "uncompressed"
COLOR_OF_KIND = {"uncompressed": GRAY, "by hand": BLUE, "searched": ORANGE, "auto": COLORS[2], "constant": COLORS[3]}
"""The colour of each kind of schedule in every figure. A schedule whose name begins with no other kind is constant."""
KEYS = {"recipe", "seeds", "common", "search", "schedules"}


def load_plan(path: Path) -> dict[str, Any]:
    """The benchmark's file: `recipe`, `seeds`, `common` and `search` overrides, and `schedules`: overrides by name.

    Raises:
        ValueError: a key is missing or unknown, or a schedule is searched and there is no pilot.
    """
    plan = load_yaml(path.read_text())
    if not isinstance(plan, dict) or set(plan) != KEYS or not plan["schedules"] or not plan["seeds"]:
        raise ValueError(f"{path}: expected the keys {', '.join(sorted(KEYS))}, each with a value")
    searched = [name for name, keys in plan["schedules"].items() if "search" in keys]
    if searched and PILOT not in plan["schedules"]:
        raise ValueError(f"{path}: {', '.join(searched)} needs a schedule named {PILOT}, whose first seed is the pilot")
    return plan


def run_all(plan: Mapping[str, Any], output: Path, overrides: list[str]) -> None:
    """Every schedule with every seed, seed by seed, so that an unfinished benchmark compares all schedules."""
    for seed in plan["seeds"]:
        for name, keys in sorted(plan["schedules"].items(), key=lambda item: item[0] != PILOT):
            settings = {**plan["common"], **keys, "seed": seed}
            if name == PILOT and seed == plan["seeds"][0]:
                settings["keep_points"] = [0.0, 0.25, 0.5, 0.75, 1.0]
            if settings.pop("search", None) is not None:
                settings["schedule"] = str(search(name, plan, output, overrides))
            launch(plan["recipe"], folder_of(output, name, seed), settings, overrides)


def search(name: str, plan: Mapping[str, Any], output: Path, overrides: list[str]) -> Path:
    """The schedule file that `task=search` finds with the settings of this name, from the pilot."""
    seed = plan["seeds"][0]
    folder = output / f"{name}-search"
    if not (folder / SCHEDULE_NAME).exists():
        pilot = {"task": "search", "pilot": str(folder_of(output, PILOT, seed)), "schedule": None, "seed": seed}
        own = plan["schedules"][name]["search"]
        common = {key: value for key, value in plan["common"].items() if RECIPES["search"].reads(key)}
        launch(plan["recipe"], folder, {**common, **plan["search"], **own, **pilot}, overrides_for("search", overrides))
    return folder / SCHEDULE_NAME


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / f"{name.replace(' ', '_')}-{seed}"


def launch(recipe: str, folder: Path, settings: Mapping[str, Any], overrides: list[str]) -> None:
    """Raises CalledProcessError if the run fails; it has said why."""
    keys = [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**9)}" for key, value in settings.items()]
    keys = [key.removesuffix("\n").removesuffix("\n...") for key in keys]
    command = [sys.executable, "hf_accel/run.py", recipe, *keys, *overrides, f"output_dir={folder.resolve()}"]
    print(f"-- {folder.name}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"})


def curve_of(folder: Path) -> list[tuple[float, float]]:
    """(units, kNN top-1 in %) at the evaluation points of a complete run."""
    history = json.loads((folder / "log_history.json").read_text())["log_history"]
    return [(log["units"], 100 * log["eval_knn_top1"]) for log in history if "eval_knn_top1" in log]


def rows_of(plan: Mapping[str, Any], output: Path) -> list[dict[str, Any]]:
    """A row a schedule: its curves by seed, final accuracies, their mean and standard deviation, steps, and units."""
    rows = []
    for name in plan["schedules"]:
        folders = [folder_of(output, name, seed) for seed in plan["seeds"]]
        results = [json.loads((folder / "results.json").read_text()) for folder in folders]
        curves = [curve_of(folder) for folder in folders]
        final = [curve[-1][1] for curve in curves]
        rows.append(
            {
                "schedule": name,
                "top1": final,
                "mean": statistics.mean(final),
                "std": statistics.stdev(final) if len(final) > 1 else None,
                "steps": [result["steps"] for result in results],
                "units": [result["units"] for result in results],
                "seconds": [result["seconds"]["total"] for result in results],
                "stages": [result["schedule"] for result in results],
                "curves": curves,
            }
        )
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'schedule':<24} {'kNN top-1 by seed, %':<24} {'mean':>6} {'std':>5} {'steps':>7} {'units':>9}"]
    for row in sorted(rows, key=lambda row: -row["mean"]):
        single = " ".join(f"{value:.1f}" for value in row["top1"])
        spread = "" if row["std"] is None else f"{row['std']:.1f}"
        steps, units = statistics.mean(row["steps"]), statistics.mean(row["units"])
        lines.append(f"{row['schedule']:<24} {single:<24} {row['mean']:>6.1f} {spread:>5} {steps:>7.0f} {units:>9,.0f}")
    return "\n".join(lines)


def choose_looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Choose a colour and a marker for each schedule: the colour by its kind, the marker by its place in the kind."""
    looks: dict[str, tuple[str, str]] = {}
    for name in names:
        color = COLOR_OF_KIND[next((kind for kind in COLOR_OF_KIND if name.startswith(kind)), "constant")]
        looks[name] = color, MARKERS[sum(color == other for other, _ in looks.values())]
    return looks


def plot_schedules(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """kNN top-1 against units, a line a schedule: the mean over seeds, and from the least to the largest as a band."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        looks = choose_looks(row["schedule"] for row in rows)
        for row in sorted(rows, key=lambda row: -row["mean"]):
            color, marker = looks[row["schedule"]]
            units = np.mean([[u for u, _ in curve] for curve in row["curves"]], axis=0)
            values = np.array([[value for _, value in curve] for curve in row["curves"]])
            label = f"{row['schedule']}: {row['mean']:.1f}"
            axes.plot(units, values.mean(0), color=color, marker=marker, markersize=4, linewidth=1.6, label=label)
            if len(values) > 1:
                axes.fill_between(units, values.min(0), values.max(0), color=color, alpha=0.13, linewidth=0)
        axes.set_xlabel("units spent (1 unit: the encoder's forward pass on one uncompressed image)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel("kNN top-1 (%)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, title="at the end", title_fontsize=8)
        axes.set_title(title, fontsize=10)
        for suffix in (".png", ".svg"):
            figure.savefig(path.with_suffix(suffix), dpi=200)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("schedules", __doc__)
    parser.add_argument("plan", type=Path, help="YAML file of what is compared")
    parser.add_argument("--output", type=Path, default=Path("runs/schedules"), help="folder of runs, table and figure")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the recipe in every run")
    args: argparse.Namespace = parser.parse_intermixed_args(arguments)
    try:
        plan = load_plan(args.plan)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    try:
        run_all(plan, args.output, args.overrides)
    except subprocess.CalledProcessError as error:
        sys.exit(f"a run failed (exit code {error.returncode}); the same command goes on from the complete ones")
    rows = rows_of(plan, args.output)
    write_json(args.output / "schedules.json", {"plan": plan, "rows": rows, "environment": environment()})
    count = len(plan["seeds"])
    plot_schedules(rows, args.output / "schedules.png", f"{plan['recipe']}: mean and range over {count} seeds")
    print(format_rows(rows))
    print(f"saved to {args.output / 'schedules.json'}, schedules.png and schedules.svg")


if __name__ == "__main__":
    main()
