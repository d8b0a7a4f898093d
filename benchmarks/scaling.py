"""How long will a recipe take on N GPUs, under which engine? A prediction from one GPU's measured seconds and payloads.

`docs/scaling.md` has the formula. Seconds a unit come from `python -m benchmarks.step` on one GPU: ms/step of our
uncompressed row, over batch size and units an image. Run it from the project's root:

    python -m benchmarks.scaling recipes/imagenet1k/moco_vit_b16.yaml --ms-per-unit 0.11
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.options import parser_of
from hf_accel.compression import Plan, forward_cost
from hf_accel.recipe import load_recipe
from hf_accel.report import environment, format_table
from hf_accel.tasks.setup import build_objective
from hf_accel.utils.writing import write_json

BYTES = 4  # weights and gradients are fp32 under every engine
ENGINES = {"ddp": (2, 0), "zero1": (2, 0), "zero2": (2, 0), "zero3": (3, 1), "fsdp2": (3, 1)}
"""How often the trained parameters, and those of the target branch, pass through a ring each step.

DDP: an all-reduce is a reduce-scatter and an all-gather. ZeRO-1 and 2: the same two, the second one of weights.
ZeRO-3 and FSDP2: gathered for the forward, again for the backward, reduced once; the target gathered for its forward.
"""


@dataclass(frozen=True)
class Run:
    """What a recipe asks of the machines."""

    units: float
    steps: int
    trained: int  # parameters
    target: int


def run_of(path: str) -> Run:
    recipe = load_recipe(path, [])
    with torch.device("meta"):
        model = build_objective(recipe)
    units = partial(model.units_per_image, forward_cost=partial(forward_cost, model.config))
    plan = Plan(float(recipe.budget), recipe.compression_schedule(), recipe.batch_size, units)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    target = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Run(plan.total_cost, plan.num_steps, trained, target)


def payload(run: Run, engine: str, gpus: int) -> float:
    """Bytes that each GPU sends in a step, by rings."""
    trained, target = ENGINES[engine]
    return (gpus - 1) / gpus * BYTES * (trained * run.trained + target * run.target)


def hours(
    run: Run, engine: str, gpus: int, seconds_per_unit: float, bandwidth: float, overlap: float = 0.0
) -> tuple[float, float]:
    """(in all, of which waiting for the network): computing is shared out, and hides `overlap` of itself in traffic.

    Args:
        seconds_per_unit: of one GPU.
        bandwidth: bytes a second that a GPU sends.
        overlap: part of the computing during which traffic goes on unnoticed, 0 to 1.
    """
    computing = run.units * seconds_per_unit / gpus
    traffic = run.steps * payload(run, engine, gpus) / bandwidth
    waiting = max(0.0, traffic - overlap * computing)
    return (computing + waiting) / 3600, waiting / 3600


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("scaling", __doc__)
    parser.add_argument("recipe")
    option = partial(parser.add_argument, metavar="")
    parser.add_argument("--ms-per-unit", type=float, metavar="MS", required=True, help="measured on one GPU")
    option("--gpus", type=int, nargs="+", default=[1, 8, 32, 256], help="default 1 8 32 256")
    option("--gpus-per-node", type=int, default=8, help="default 8")
    option("--node-bandwidth", type=float, default=300.0, help="GB/s a GPU within a machine (default 300)")
    option("--network-bandwidth", type=float, default=40.0, help="GB/s a GPU between machines (default 40)")
    option("--overlap", type=float, default=0.5, help="part of the computing that hides traffic (default 0.5)")
    option("--output", type=Path, help="JSON to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    run = run_of(args.recipe)
    print(
        f"{args.recipe}: {run.units:,.0f} units, {run.steps:,} steps, {run.trained / 1e6:.1f} M parameters trained, "
        f"{run.target / 1e6:.1f} M of the target branch and frozen"
    )
    rows, lines = [], []
    for engine in ENGINES:
        cells = [engine]
        for gpus in args.gpus:
            bandwidth = 1e9 * (args.node_bandwidth if gpus <= args.gpus_per_node else args.network_bandwidth)
            total, waiting = hours(run, engine, gpus, args.ms_per_unit / 1000, bandwidth, args.overlap)
            rows.append({"engine": engine, "gpus": gpus, "hours": total, "waiting_hours": waiting})
            cells.append(f"{total:.2f}" + (f" ({waiting / total:.0%} network)" if waiting > 0 else ""))
        lines.append(cells)
    print(format_table(["engine", *(f"{gpus} GPUs, h" for gpus in args.gpus)], lines))
    if args.output:
        write_json(args.output, {"recipe": args.recipe, "rows": rows, "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
