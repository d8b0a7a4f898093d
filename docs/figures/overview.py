"""Draw docs/figures/overview.png from docs/results/cifar10_moco.json: python docs/figures/overview.py"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

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


def draw_accuracy(axes: Axes, results: dict) -> None:
    for name, colour in (("short sequences first", BLUE), ("full sequences throughout", GRAY)):
        by_budget = {int(budget) / 1000: seeds for budget, seeds in results[name].items()}
        means = {budget: sum(seeds) / len(seeds) for budget, seeds in by_budget.items()}
        axes.plot([*means], [*means.values()], "-o", color=colour, linewidth=2)
        for budget, seeds in by_budget.items():
            axes.plot([budget] * len(seeds), seeds, "_", color=colour, markersize=12)
            axes.annotate(f"{means[budget]:.1f}", (budget, means[budget]), (9, -11), textcoords="offset points")
        axes.annotate(
            name, (150, sum(means.values()) / 2 + 0.3), (-4, 6), textcoords="offset points", color=colour, ha="right"
        )
    start = sum(results["random encoder"]) / 3
    axes.axhline(start, color=GRAY, linewidth=1, linestyle=":")
    axes.annotate("random encoder", (262, start + 0.2), color=GRAY, fontsize=8, ha="right")
    axes.set(xlim=(40, 265), xticks=(60, 240), xticklabels=("60k", "240k"), ylim=(29, 43.5))
    axes.set_xlabel("budget in units (one unit: a forward pass of the encoder on a full image)", fontsize=8)
    axes.set_ylabel("kNN top-1 on CIFAR-10 (%)", fontsize=9)
    axes.set_title("A quarter of the budget reaches the same accuracy", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    pixels = digits()[0][3 * 500].numpy()
    figure = plt.figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    stages = [(14, "first: large patches"), (7, "then"), (4, "last: the base patch")]
    for axes, (patch, title) in zip(left.subplots(1, 3), stages, strict=True):
        draw_patches(axes, pixels, patch, title)
    draw_accuracy(right.subplots(), json.loads((HERE.parent / "results/cifar10_moco.json").read_text()))
    figure.savefig(HERE / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
