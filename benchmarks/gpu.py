"""Everything that waits for a GPU, in one command: the tests that need one, then each measurement.

A part that fails does not stop the rest, and is named at the end. Each has a time limit below ten minutes, all together
take less than 25, and each leaves `PART.log` and, if it measures, `PART.json` in the folder. Run it from the project's
root:

    python -m benchmarks.gpu runs/gpu
    python -m benchmarks.gpu runs/gpu search scaling
    python -m benchmarks.gpu /tmp/toy --toy
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import UNITS, parser_of

RECIPE = "recipes/imagenet1k/moco_vit_b16.yaml"
STEP = ("benchmarks.step", "--precision", "bf16", "--fill", "--model")
COST = ("benchmarks.cost", "--precision", "bf16", "--batch-size", "128", "--repeats", "10", "--model")
SEARCH = ("benchmarks.search", "--precision", "bf16", "--batch-size", "256", "--draws", "16", "--dropouts", "10")
TOY = ("--device", "cpu", "--precision", "fp32", "--model", "vit_tiny", "--image-size", "32", "--patch-size", "8")
TOY += ("--batch-size", "4", "--repeats", "1", "--projector-hidden-size", "16")
# From files a GPU waits for the loader, as `data` tells, so here the images are stored on it.
WHOLE = ("benchmarks.whole_steps", "recipes/imagenet100/moco_vit_s16.yaml", "--images", "4096", "image_size=224")
WHOLE += ("cache=device", "view_resolution=matched", "view_backend=fused", "budget=1e9")
WHOLE += ("schedule=[{until: 0.3, patch_size: 56}, {until: 0.6, patch_size: 32}, {until: 1.0, patch_size: 16}]",)
WHOLE += ("--beside", "view_resolution=full,view_backend=eager")
WHOLE_TOY = ("model=vit_tiny", "image_size=32", "patch_size=8", "batch_size=4", "num_workers=0", "view_backend=eager")
WHOLE_TOY += ("budget=1000", "mixed_precision=no", "objective_config={projector_hidden_size: 16}", "cache=ram")
WHOLE_TOY += ("schedule=[{until: 0.5, patch_size: 16}, {until: 1.0, patch_size: 8}]", "--images", "8", "--repeats", "1")
VIEWS_TOY = ("--device", "cpu", "--size", "32", "--batch-size", "4", "--repeats", "1")


@dataclass(frozen=True)
class Part:
    """A module and its arguments, how many seconds it may take, and what makes it small enough for a CPU."""

    command: tuple[str, ...]
    seconds: int
    toy: tuple[str, ...] = ()


PARTS = {
    "tests": Part(("pytest", "-m", "gpu", "--durations=0", "-p", "no:cacheprovider"), 400),
    "views": Part(("benchmarks.views", "--batch-size", "256"), 100, VIEWS_TOY),
    "data": Part(("benchmarks.data", "--batch-size", "256"), 60, VIEWS_TOY),
    "step_small": Part((*STEP, "vit_small"), 75, (*TOY, "--strategies", "16")),
    "step_base": Part((*STEP, "vit_base"), 75, (*TOY, "--strategies", "16")),
    "cost_small": Part((*COST, "vit_small"), 75, (*TOY, "--strategies", "16")),
    "cost_base": Part((*COST, "vit_base"), 75, (*TOY, "--strategies", "16")),
    "whole_256": Part((*WHOLE, "batch_size=256"), 120, WHOLE_TOY),
    "whole_1024": Part((*WHOLE, "batch_size=1024"), 120, WHOLE_TOY),
    "search": Part((*SEARCH, "--memory", "40", "--model", "vit_small"), 120, (*TOY, "--draws", "3", "--dropouts", "1")),
    "scaling": Part(("benchmarks.scaling", RECIPE), 40),
    "compiled_small": Part((*STEP, "vit_small", "--compile"), 120, (*TOY, "--strategies", "16")),
    "compiled_base": Part((*STEP, "vit_base", "--compile"), 120, (*TOY, "--strategies", "16")),
}


def command_of(name: str, folder: Path, toy: bool) -> list[str]:
    """Raises FileNotFoundError for `scaling` before `cost_base` has measured a unit."""
    part, more = PARTS[name], list[str]()
    if toy:
        more += part.toy
    if name != "tests":
        more += ["--output", str(folder / f"{name}.json")]
    if name == "scaling":
        measured = json.loads((folder / "cost_base.json").read_text())
        more += ["--ms-per-unit", str(measured["rows"][0]["ms_per_image"] / UNITS)]
    command = [word for word in part.command if not (toy and word == "--fill")]  # a CPU cannot be filled
    return [sys.executable, "-m", *command, *more]


def run(name: str, folder: Path, toy: bool) -> str | None:
    """What went wrong, None if nothing did."""
    with (folder / f"{name}.log").open("w") as log:
        try:
            command = command_of(name, folder, toy)
            code = subprocess.run(command, stdout=log, stderr=log, timeout=PARTS[name].seconds).returncode
        except subprocess.TimeoutExpired:
            return f"took longer than {PARTS[name].seconds} s"
        except FileNotFoundError as error:
            return str(error)
    return f"exit status {code}" if code else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("gpu", __doc__)
    parser.add_argument("folder", type=Path, help="of logs and JSON")
    # argparse itself takes no choices for a list that may be empty
    parser.add_argument("parts", nargs="*", help=f"of {' '.join(PARTS)} (default all, in this order)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a CPU, to try the commands themselves")
    args: argparse.Namespace = parser.parse_intermixed_args(arguments)
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for name in args.parts or PARTS:
        start = time.perf_counter()
        problem = run(name, args.folder, args.toy)
        print(f"{name}: {problem or 'done'} ({time.perf_counter() - start:.0f} s)", flush=True)
        if problem:
            failed[name] = problem
            print("".join((args.folder / f"{name}.log").read_text().splitlines(keepends=True)[-20:]), flush=True)
    if failed:
        print(f"failed: {', '.join(f'{name} ({problem})' for name, problem in failed.items())}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
