"""Draw the figures of schedules in docs/results from their schedules.json: `python -m docs.figures.schedules`."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.schedules import choose_looks
from hf_accel.report.curves import STYLE

RESULTS = Path(__file__).parents[1] / "results"
RANDOM = "random encoder"


def draw(path: Path, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Draw a line for each schedule, from best to worst: a point for each seed, and a bar at their mean."""
    looks = {**choose_looks(name for name in rows if name != RANDOM), RANDOM: ("black", "*")}
    best_last = sorted(rows, key=lambda name: rows[name]["mean"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.32 * len(rows)), layout="constrained")
        axes: Any = figure.subplots()
        for line, name in enumerate(best_last):
            (color, marker), seeds, mean = looks[name], rows[name]["seeds"], rows[name]["mean"]
            axes.scatter(seeds, [line] * len(seeds), color=color, marker=marker, s=26, alpha=0.75, linewidth=0)
            axes.plot([mean, mean], [line - 0.3, line + 0.3], color=color, linewidth=2.2)
            axes.annotate(f"{mean:.1f}", (1.01, line), xycoords=("axes fraction", "data"), va="center", color=color)
        labels = [f"{name} (1 seed)" if len(rows[name]["seeds"]) == 1 else name for name in best_last]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("kNN top-1 at the end (%): seeds, and their mean as a bar")
        axes.set_title(title, fontsize=10)
        figure.savefig(path, dpi=200)


def main() -> None:
    figures = json.loads((RESULTS / "schedules.json").read_text(encoding="utf-8"))["figures"]
    for name, figure in figures.items():
        draw(RESULTS / f"{name}.png", figure["title"], figure["rows"])


if __name__ == "__main__":
    main()
