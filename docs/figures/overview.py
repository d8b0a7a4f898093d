"""Draw docs/figures/overview.png from docs/results/imagenette_cpu.json: python docs/figures/overview.py"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # benchmarks is no installed package

from benchmarks.speedup_figure import draw_panel, name_seconds  # noqa: E402
from hf_accel.data.bundled import digits  # noqa: E402
from hf_accel.report.curves import BLUE  # noqa: E402

STAGES = [(16, "first"), (8, "then"), (4, "last")]


def draw_patches(axes: Axes, pixels: Any, patch: int, stage: str) -> None:
    side = pixels.shape[-1]
    axes.imshow(pixels, cmap="Greys", extent=(0, side, side, 0))
    for line in range(0, side + 1, patch):
        axes.axhline(line, color=BLUE, linewidth=1)
        axes.axvline(line, color=BLUE, linewidth=1)
    axes.set(xticks=[], yticks=[], xlim=(0, side), ylim=(side, 0))
    axes.set_title(f"{stage}: {(side // patch) ** 2} tokens", fontsize=9, pad=4)


def main() -> None:
    report = json.loads((HERE.parent / "results/imagenette_cpu.json").read_text())
    (moco,) = (entry for entry in report["objectives"] if entry["objective"] == "moco")
    figure = plt.figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 5.5))[0]
    pixels = np.pad(digits()[0][3 * 500].numpy(), 2)  # of 32 px, so that patches are as many as on Imagenette at 64 px
    for axes, (patch, stage) in zip(left.subplots(3, 1), STAGES, strict=True):
        draw_patches(axes, pixels, patch, stage)
    panels = right.subplots(1, 2, sharey=True)
    for axes, amount in zip(panels, ("budget", "seconds"), strict=True):
        draw_panel(axes, moco, amount)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=9)
    panels[0].set_ylabel("kNN top-1 on Imagenette (%)", fontsize=9)
    panels[0].set_xlabel("budget in units, 1 unit: a forward pass on one full image", fontsize=9)
    panels[1].set_xlabel(name_seconds(report["clock"]), fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5, frameon=False
    )
    left.suptitle("A digit in tokens", fontsize=10)
    right.suptitle("MoCo-v3, small ViT, Imagenette at 64 px: finished runs (dots) and their means (lines)", fontsize=10)
    figure.savefig(HERE / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
