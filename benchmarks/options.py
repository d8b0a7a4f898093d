"""The options that benchmarks share, and how they are checked."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_accel.models import PRESETS

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
UNITS = 4
"""Of an uncompressed MoCo-v3 step, an image."""

SHARED = ("model", "image_size", "patch_size", "batch_size", "repeats", "precision", "threads", "clock")


def parser_of(prog: str, description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{prog}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_shared_options(parser: argparse.ArgumentParser, image_size: int, batch_size: int, repeats: int) -> None:
    """`image_size` pixels, `batch_size` images and `repeats` rounds are defaults."""
    option = partial(parser.add_argument, metavar="")
    option("--model", choices=PRESETS, default="vit_tiny", help=f"{', '.join(PRESETS)} (default vit_tiny)")
    option("--image-size", type=int, default=image_size, help=f"pixels of the model's side (default {image_size})")
    option("--patch-size", type=int, default=16, help="base patch (default 16)")
    option("--batch-size", type=int, default=batch_size, help=f"images a step (default {batch_size})")
    rounds = f"timed rounds, after one that is not (default {repeats})"
    option("--repeats", type=int, default=repeats, help=rounds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    option("--device", type=torch.device, default=torch.device(device), help="cpu or cuda (default: cuda if any)")
    option("--precision", choices=DTYPES, default="fp32", help="fp32, or bf16 by autocast (default fp32)")
    option("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU (default: torch's)")
    clock = "wall, or process: CPU seconds of this process, on a machine that others use too (default wall)"
    option("--clock", choices=("wall", "process"), default="wall", help=clock)
    option("--projector-hidden-size", type=int, default=4096, help="width of the heads (default 4096, the recipes')")
    option("--output", type=Path, help="JSON to write")


def parse(parser: argparse.ArgumentParser, arguments: Any) -> argparse.Namespace:
    """Parse, refuse what cannot be timed, and set torch's threads."""
    args = parser.parse_args(arguments)
    if args.repeats < 1 or args.batch_size < 2:
        parser.error("--repeats must be at least 1 and --batch-size, as there are BatchNorms, at least 2")
    if args.clock == "process" and args.device.type == "cuda":
        parser.error("--clock process does not see a GPU's time; use --clock wall")
    torch.set_num_threads(args.threads)
    return args


def settings_of(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """For the report: the shared options and those named."""
    return {name: getattr(args, name) for name in (*SHARED, "projector_hidden_size", *more)}
