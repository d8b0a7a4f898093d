"""How long does a stage of the schedule search take? Every gradient of the grid, beside what plain training would take.

A stage is what `task=search` does at one checkpoint: for each draw the uncompressed gradient and one under each
strategy of the grid, and their sums. Here MoCo-v3 at random initialisation, on random images in memory; the grid is
every possible patch size times dropout ratios from 0. Predicted is the price of the gradients in units, at the seconds
a unit of uncompressed training steps of the same run. Run it from the project's root:

    python -m benchmarks.search --model vit_small --batch-size 256 --precision bf16 --draws 16 --dropouts 10
    python -m benchmarks.search --model vit_tiny --batch-size 4 --draws 3 --dropouts 2 --threads 1
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import cost
from benchmarks.options import UNITS, add_shared_options, parse, parser_of, settings_of
from hf_accel.compression import Compression, Strategy, forward_cost
from hf_accel.data import ImageSource
from hf_accel.recipe import PretrainRecipe, Recipe
from hf_accel.report import environment, format_table
from hf_accel.schedule_search.choose import build_grid
from hf_accel.schedule_search.gradient_error import chunks, estimate_errors
from hf_accel.schedule_search.gradient_probe import GradientProbe
from hf_accel.tasks.setup import build_objective, pretrain_config
from hf_accel.utils.writing import write_json


def seconds_per_unit(args: argparse.Namespace) -> float:
    """Of plain training: whole uncompressed steps, views and optimizer included (`benchmarks.cost`)."""
    step = cost.Step(args)
    base = cost.Case(Strategy(Compression(args.patch_size)), args.image_size)
    rounds = cost.measure(step, [base], args.repeats)[base]
    return statistics.median(sum(parts.values()) for parts in rounds) / (UNITS * args.batch_size)


class TimedProbe:
    """A `GradientProbe` that notes seconds, and peak memory on a GPU, of each gradient: `taken[patch size]`.

    Uncompressed gradients, which also make the views of a draw, are under `None`.
    """

    def __init__(self, probe: GradientProbe, args: argparse.Namespace):
        self.probe, self.args = probe, args
        self.taken: dict[int | None, list[float]] = {}
        self.peaks: dict[int | None, float] = {}

    def __call__(self, strategy: Strategy | None, draw: int) -> torch.Tensor:
        on_gpu, patch_size = self.args.device.type == "cuda", strategy and strategy.online.patch_size
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.args.device)
        watch = cost.Stopwatch(self.args)
        watch.mark()
        gradient = self.probe(strategy, draw)
        watch.mark()
        self.taken.setdefault(patch_size, []).extend(watch.seconds())
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.args.device) / 1e9
            self.peaks[patch_size] = max(peak, self.peaks.get(patch_size, 0.0))
        return gradient


def recipe_of(args: argparse.Namespace) -> Recipe:
    return PretrainRecipe(
        budget=1.0,
        model=args.model,
        image_size=args.image_size,
        patch_size=args.patch_size,
        objective_config={"projector_hidden_size": args.projector_hidden_size},
        batch_size=args.batch_size,
        mixed_precision="no" if args.precision == "fp32" else args.precision,
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times one stage; rows by patch size, and their sums."""
    per_unit = seconds_per_unit(args)
    recipe, side = recipe_of(args), round(args.image_size / 0.875)
    pixels = torch.randint(256, (2 * args.batch_size, 3, side, side), dtype=torch.uint8)
    torch.manual_seed(cost.SEED)
    model: Any = build_objective(recipe)
    model.to(args.device)
    grid = build_grid(args.image_size, args.patch_size, [index / args.dropouts for index in range(args.dropouts)])
    units = {
        strategy: args.batch_size * model.units_per_image(strategy, partial(forward_cost, model.config))
        for strategy in grid
    }
    base = grid[0]
    relative_cost = {strategy: units[strategy] / units[base] for strategy in grid}
    probe = GradientProbe(model, pretrain_config(recipe), ImageSource("noise", pixels=pixels))
    for strategy in {strategy.online.patch_size: strategy for strategy in grid}.values():
        probe(strategy, args.draws)  # caches, allocations, choice of kernels
    timed = TimedProbe(probe, args)
    size = sum(parameter.numel() for parameter in probe.parameters)
    passes = len(chunks(grid, max(1, int(args.memory * 1e9 // (8 * size)))))
    whole = cost.Stopwatch(args)
    whole.mark()
    estimate_errors(timed, relative_cost, range(args.draws), args.memory * 1e9, uncompressed=base)
    whole.mark()
    (seconds,) = whole.seconds()
    rows = rows_of(timed, units, base, per_unit)
    units_in_all, gradients = sum(row["units"] for row in rows), sum(row["seconds"] for row in rows)
    return {
        "seconds_per_unit": per_unit,
        "rows": rows,
        "passes": passes,
        "parameters": size,
        "units": units_in_all,
        "seconds": seconds,
        "seconds_of_gradients": gradients,
        "seconds_of_sums": seconds - gradients,
        "predicted_seconds": units_in_all * per_unit,
        "peak_gb": max(timed.peaks.values(), default=None),
    }


def rows_of(timed: TimedProbe, units: dict[Strategy, float], base: Strategy, per_unit: float) -> list[dict[str, Any]]:
    """One row for the uncompressed gradients, then one a patch size."""
    rows = []
    for patch_size, taken in sorted(timed.taken.items(), key=lambda item: item[0] or 0):
        mine = [units[s] for s in units if s != base and s.online.patch_size == patch_size] if patch_size else None
        # every strategy is asked for in each draw, so their mean price is that of a gradient of the row
        spent = len(taken) * (units[base] if mine is None else statistics.fmean(mine))
        row = {"patch_size": patch_size, "gradients": len(taken), "units": spent, "seconds": sum(taken)}
        rows.append({**row, "over_training": sum(taken) / spent / per_unit, "peak_gb": timed.peaks.get(patch_size)})
    return rows


def format_found(found: dict[str, Any]) -> str:
    header = ["patch", "gradients", "units", "seconds", "ms/gradient", "of training's seconds a unit", "peak GB"]
    lines = []
    for row in found["rows"]:
        counts = [str(row["patch_size"] or "uncompressed, and views"), str(row["gradients"]), f"{row['units']:,.0f}"]
        times = [row["seconds"], 1000 * row["seconds"] / row["gradients"], row["over_training"]]
        lines.append([*counts, *(f"{value:.2f}" for value in times), _gigabytes(row["peak_gb"])])
    sums = f"sums of {found['parameters'] / 1e6:.1f} M numbers, in {found['passes']} passes"
    lines.append([sums, "", "", f"{found['seconds_of_sums']:.2f}", "", "", ""])
    seconds, ratio = f"**{found['seconds']:.2f}**", f"{found['seconds'] / found['predicted_seconds']:.2f}"
    lines.append(["**the stage**", "", f"{found['units']:,.0f}", seconds, "", ratio, _gigabytes(found["peak_gb"])])
    return format_table(header, lines)


def _gigabytes(peak: float | None) -> str:
    return "" if peak is None else f"{peak:.1f}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("search", __doc__)
    add_shared_options(parser, image_size=240, batch_size=16, repeats=5)
    option = partial(parser.add_argument, metavar="")
    option("--draws", type=int, default=16, help="paired gradients of each strategy, at least 3 (default 16)")
    option("--dropouts", type=int, default=10, help="N dropout ratios 0, 1/N, 2/N ... (default 10)")
    option("--memory", type=float, default=4.0, help="GB for sums of gradients, as search_memory (default 4)")
    args = parse(parser, arguments)
    if args.draws < 3 or args.dropouts < 1:
        parser.error("--draws must be at least 3, of which an interval can be given, and --dropouts at least 1")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    found = measure(args)
    settings = {**settings_of(args, "draws", "dropouts", "memory"), "device": str(args.device)}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(format_found(found))
    print(
        f"{1000 * found['seconds_per_unit']:.4f} ms a unit in training; the stage: predicted "
        f"{found['predicted_seconds']:.1f} s, measured {found['seconds']:.1f} s"
    )
    if args.output:
        write_json(args.output, {**settings, **found, "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
