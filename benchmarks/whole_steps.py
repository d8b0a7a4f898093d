"""Do seconds follow units? Whole optimizer steps of a recipe, from files on: loading, views, model, optimizer, target.

The steps are those of a run: `PretrainTrainer` loads, makes views and trains as the recipe says. Timed are the
recipe's stages and an uncompressed step, in turn. `units` is what the budget charges and `time` what the step takes,
both relative to the uncompressed step, and `time/units` would be 1 everywhere if seconds followed units. Run it from
the project's root:

    python -m benchmarks.whole_steps recipes/imagenette/moco_64px_cpu.yaml data=FOLDER
    python -m benchmarks.whole_steps --beside view_resolution=full,view_backend=eager,cache=none RECIPE key=value ...

`--beside` gives the keys of a second column, which is measured in the same run. `--images N` writes N synthetic JPEG
files of 500 x 375 pixels and trains on them.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import synthetic_files
from benchmarks.options import parser_of
from hf_accel.compression import Compression, Strategy
from hf_accel.recipe import load_recipe
from hf_accel.report import environment, format_table
from hf_accel.tasks.setup import build_objective, load_images, pretrain_config
from hf_accel.training.caching import start_cache
from hf_accel.training.planning import analytic_units
from hf_accel.training.timing import time_steps
from hf_accel.training.trainer import PretrainTrainer
from hf_accel.training.views import start_views
from hf_accel.utils.writing import write_json

DIFFERENT = 256
"""Synthetic files that differ from each other. The others are links to them."""


def write_images(folder: Path, count: int) -> None:
    """Write JPEG files, as a folder without labels."""
    for number, file in enumerate(synthetic_files(min(count, DIFFERENT))):
        (folder / f"{number:06}.jpg").write_bytes(file)
    for number in range(DIFFERENT, count):
        (folder / f"{number:06}.jpg").hardlink_to(folder / f"{number % DIFFERENT:06}.jpg")


def measure(recipe: str, settings: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Return a row for the uncompressed step and for each stage of a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"output_dir={folder}", "report_to=none", "push_to_hub=false", "eval_points=[]"]
        read = load_recipe(recipe, [*settings, *own])
        trainer = PretrainTrainer(build_objective(read), pretrain_config(read), *load_images(read))
        try:
            start_cache(trainer)
            start = time.perf_counter()
            start_views(trainer)
            compiling = time.perf_counter() - start
            config, plan = trainer.objective.config, trainer.plan
            base = Strategy(Compression(config.patch_size))
            strategies = list(dict.fromkeys([base, *(strategy for strategy, _ in plan.stage_steps())]))
            taken = time_steps(trainer, strategies, repeats)
        finally:
            trainer.end()
    rows, units = [], analytic_units(trainer.objective)
    for strategy in strategies:
        online = strategy.online
        row: dict[str, Any] = {"patch_size": online.patch_size, "token_dropout": online.token_dropout}
        row["tokens"] = online.kept_tokens(config.image_size) + config.num_prefix_tokens
        row |= {"seconds": taken[strategy].seconds, "images_per_second": plan.batch_size / taken[strategy].seconds}
        row["units"] = units(strategy) / units(base)
        row["time"] = taken[strategy].seconds / taken[base].seconds
        rows.append({**row, "view_backend": trainer.view_backend, "preparation_seconds": compiling})
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    header = ["settings", "patch", "dropout", "tokens", "s/step", "images/s", "units", "time", "time/units"]
    lines = []
    for row in rows:
        shape = [row["settings"], str(row["patch_size"]), f"{row['token_dropout']:g}", str(row["tokens"])]
        speed = [f"{row['seconds']:.3f}", f"{row['images_per_second']:,.1f}"]
        lines.append([*shape, *speed, *(f"{x:.3f}" for x in (row["units"], row["time"], row["time"] / row["units"]))])
    return format_table(header, lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("whole_steps", __doc__)
    parser.add_argument("recipe", help="YAML file of a pretraining run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings in place of the recipe's")
    parser.add_argument("--beside", metavar="", help="keys of a second measurement, key=value,key=value")
    parser.add_argument("--images", type=int, metavar="", help="train on so many synthetic JPEG files")
    parser.add_argument("--repeats", type=int, default=3, metavar="", help="timed steps of each stage (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="", help="of torch on the CPU")
    parser.add_argument("--output", type=Path, metavar="", help="JSON to write")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    columns = {"recipe": []} | ({args.beside: args.beside.split(",")} if args.beside else {})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() if args.images else nullcontext() as folder:
        settings = list(args.settings)
        if folder:
            write_images(Path(folder), args.images)
            settings.append(f"data={folder}")
        for name, more in columns.items():
            rows += [{"settings": name, **row} for row in measure(args.recipe, [*settings, *more], args.repeats)]
    print(format_rows(rows))
    if args.output:
        found = {"recipe": args.recipe, "settings": args.settings, "images": args.images, "rows": rows}
        write_json(args.output, {**found, "threads": args.threads, "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
