"""Draw docs/figures/overview.png from docs/results/imagenette_cpu.json: python docs/figures/overview.py"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from hf_accel.data.bundled import digits
from hf_accel.report.curves import BLUE, GRAY

HERE = Path(__file__).parent


def draw_patches(axes: Axes, pixels, patch: int, title: str) -> None:
    side = pixels.shape[-1]
    axes.imshow(pixels, cmap="Greys", extent=(0, side, side, 0))
    for line in range(0, side + 1, patch):
        axes.axhline(line, color=BLUE, linewidth=1.2)
        axes.axvline(line, color=BLUE, linewidth=1.2)
    axes.set(xticks=[], yticks=[], xlim=(0, side), ylim=(side, 0))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(f"{(side // patch) ** 2} tokens", fontsize=10)


def draw_accuracy(axes: Axes, report: dict[str, Any]) -> None:
    """Draw the accuracy along runs of the whole budget and along those of a quarter of it.

    Lines are means over seeds, and bands reach from the least to the largest.
    """
    (moco,) = (entry for entry in report["objectives"] if entry["objective"] == "moco")
    whole = moco["baseline"]["budget"]
    for kind, budget, color, label in (
        ("baseline", whole, GRAY, "uncompressed"),
        ("accelerated", whole / 4, BLUE, "a quarter of\nthe budget"),
        ("accelerated", whole, BLUE, "short sequences first"),
    ):
        curves = [run for run in report["curves"] if (run["objective"], run["schedule"]) == ("moco", kind)]
        curves = [run for run in curves if run["budget"] == budget]
        if not curves:
            continue
        units, knn = (np.array([run[key] for run in curves]) for key in ("units", "knn"))
        axes.plot(units.mean(0), knn.mean(0), "-o", color=color, linewidth=2, markersize=4)
        axes.fill_between(units.mean(0), knn.min(0), knn.max(0), color=color, alpha=0.2, linewidth=0)
        end = (units.mean(0)[-1], knn.mean(0)[-1])
        axes.annotate(f"{end[1]:.1f}", end, (0, 8), textcoords="offset points", ha="center")
        words = f"{label}, {len(curves)} run{'s' * (len(curves) > 1)}"
        if budget < whole:
            beside, place = end, (-72, 22)
        else:
            beside, place = (whole / 2, float(np.interp(whole / 2, units.mean(0), knn.mean(0)))), (0, -22)
        axes.annotate(words, beside, place, textcoords="offset points", color=color, fontsize=9)
    axes.axhline(moco["raw_pixels_knn"], color="black", linewidth=1, linestyle=":")
    axes.annotate("raw pixels", (whole, moco["raw_pixels_knn"] - 0.3), fontsize=8, ha="right", va="top")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("units spent along the runs (one unit: a forward pass on one full image)", fontsize=8)
    axes.set_ylabel("kNN top-1 on Imagenette, 64 px (%)", fontsize=9)
    axes.set_title("Short sequences first: better with a quarter of the budget", fontsize=10)
    axes.margins(0.06, 0.1)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    pixels = digits()[0][3 * 500].numpy()
    figure = plt.figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    stages = [(14, "first: large patches"), (7, "then"), (4, "last: the base patch")]
    for axes, (patch, title) in zip(left.subplots(1, 3), stages, strict=True):
        draw_patches(axes, pixels, patch, title)
    draw_accuracy(right.subplots(), json.loads((HERE.parent / "results/imagenette_cpu.json").read_text()))
    figure.savefig(HERE / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
