"""Is it worth starting from another data set's encoder? CIFAR-10 to Imagenette, beside training from random weights.

    python -m benchmarks.continuing [--cifar10 FOLDER] [--imagenette FOLDER] [--runs RUNS]

All runs take `recipes/imagenette/moco_64px_cpu.yaml` and one core:

- `cifar10` trains on CIFAR-10 at 64 px, without its labels;
- `continued` trains on Imagenette from the encoder of `cifar10`;
- `high_rate` and `higher_rate` are `continued` with ten and a hundred times the learning rate, to see when training
  makes the encoder worse, a warning says so, and `best/` keeps the start.

Runs from random weights with the same budget are those of the plan `imagenette_cpu` (`benchmarks.speedup`).
A finished run is recorded at once in `docs/results/continuing/`. A benchmark that is stopped saves the run that is
under way, and the same command goes on with it. The table in `docs/own_images.md` is made from the records.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.generated import fill, pages
from benchmarks.options import parser_of
from benchmarks.speedup import ACCELERATED, RESULTS, ROOT, Bench, Run, train_all
from hf_accel.utils.writing import write_text

RECIPE = "recipes/imagenette/moco_64px_cpu.yaml"
RATE = 1.0e-3
"""The learning rate of the recipe."""

PRETRAINING_BUDGET, BUDGET, SEEDS = 300_000, 150_000, (0, 1, 2)
SCRATCH = ACCELERATED
"""What the plan calls its runs with that recipe's own schedule."""

NAME = "continuing"
"""Of the folder of records and of the marks in the docs."""


def runs_of(scale: float = 1.0) -> dict[str, list[Run]]:
    """The runs by name, with their budgets times `scale`. `cifar10` is needed by those that start from it."""

    def run(name: str, budget: float, seed: int, **keys: Any) -> Run:
        keys = {"eval_points": [0.0, 0.5, 1.0], **keys}
        return Run("moco", NAME, name, RECIPE, scale * budget, 1, seed, keys)

    return {
        "cifar10": [run("cifar10", PRETRAINING_BUDGET, 0, label_column="none")],
        "continued": [run("continued", BUDGET, seed, model=None) for seed in SEEDS],
        "high_rate": [run("high_rate", BUDGET, 0, model=None, learning_rate=10 * RATE)],
        "higher_rate": [run("higher_rate", BUDGET, 0, model=None, learning_rate=100 * RATE)],
    }


def format_table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format the accuracy on Imagenette before the first step and at the end, mean and range over seeds."""
    rows = {
        SCRATCH: "random weights",
        "continued": "the encoder from CIFAR-10",
        "high_rate": "the same, ten times the learning rate",
        "higher_rate": "the same, a hundred times the learning rate",
    }
    lines = ["| training starts from | kNN before the first step | kNN at the end | linear probe | seeds |"]
    lines.append("|---|---:|---:|---:|---|")
    for name, label in rows.items():
        if found := records.get(name):
            columns = (
                [record["curve"]["knn"][0] for record in found],
                [record["knn"] for record in found],
                [record["linear"] for record in found],
            )
            seeds = ", ".join(str(record["seed"]) for record in found)
            lines.append(f"| {label} | {' | '.join(map(_spread, columns))} | {seeds} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def read_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of the finished runs, by name and in the order of their seeds."""
    scratch = f"moco-{SCRATCH}-{BUDGET}-*.json"
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted([*(folder / NAME).glob("*.json"), *(folder / "imagenette_cpu").glob(scratch)]):
        record = json.loads(path.read_text())
        found.setdefault(record["name"], []).append(record)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(NAME, __doc__)
    parser.add_argument("--cifar10", default="uoft-cs/cifar10", help="folder or Hub id of CIFAR-10")
    parser.add_argument("--imagenette", default="Sijuade/ImageNette", help="folder or Hub id of Imagenette")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / NAME, help="folder of the runs")
    parser.add_argument("--only", default="", help="take only runs whose folder's name holds this word")
    parser.add_argument("--toy", action="store_true", help="a thousandth of each budget; records stay in RUNS")
    args: argparse.Namespace = parser.parse_args(arguments)
    records = args.runs if args.toy else RESULTS
    runs = runs_of(1e-3 if args.toy else 1.0)
    start = (args.runs / runs["cifar10"][0].folder / "final").resolve()
    overrides = {
        "cifar10": [f"data={args.cifar10}"],
        **{name: [f"data={args.imagenette}", f"init_from={start}"] for name in runs if name != "cifar10"},
    }
    failures: list[str] = []
    for name, wanted in runs.items():
        bench = Bench(records / NAME, args.runs, overrides[name], "cpu", float("inf"))
        failures += train_all(bench, [run for run in wanted if args.only in run.folder], jobs=1)
        if bench.stopping.is_set() or failures:
            break
    for failure in failures:
        print(failure, file=sys.stderr)
    table = format_table(read_records(records))
    print(table)
    for page in () if args.toy else pages():
        if (filled := fill(text := page.read_text(), NAME, table)) != text:
            write_text(page, filled)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
