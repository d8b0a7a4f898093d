"""How much cheaper is a compressed run of equal accuracy? A plan's baselines and accelerated runs, to their end.

    python -m benchmarks.speedup imagenette_cpu [--minutes M] [--jobs N] [--only WORD] [key=value ...]

A plan is a YAML file in `benchmarks/plans/`. Each of its runs is one of the entry point's, with its own full decay, in
RUNS/OBJECTIVE-NAME-BUDGET-SEED. A finished run is recorded at once in `docs/results/PLAN/`, in a JSON file of its own,
and is not trained again while the plan's settings of it stay the same. A benchmark that is stopped, by `--minutes` or
by a signal, saves the runs that are under way, and the same command goes on with them. The tables, the figure,
`docs/results/PLAN.json` (`benchmarks.speedup_report`) and the numbers in README and docs (`benchmarks.generated`) are
made from the finished runs.

`--results FOLDER` puts records, tables and figures into that folder. If it is empty, every run is trained again. At the
end the command says where the new records differ from those in `docs/results/`.

`key=value` overrides keys of the recipe in every run, such as `data=FOLDER` for images that are on this machine.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from benchmarks.generated import pages, write_pages
from benchmarks.options import parser_of
from benchmarks.speedup_figure import plot
from benchmarks.speedup_report import write_report
from hf_accel.recipe import overrides_for
from hf_accel.run_folder import RunFolder
from hf_accel.utils.strict_yaml import load_yaml
from hf_accel.utils.writing import write_json

ROOT = Path(__file__).parents[1]
PLANS, RESULTS = ROOT / "benchmarks" / "plans", ROOT / "docs" / "results"
BASELINE, ACCELERATED, CHOICE, ABLATION, PEER = "baseline", "accelerated", "choice", "ablation", "peer"
PLAN_KEYS = {"title", "clock", "common", "choice_split", "objectives"}
OBJECTIVE_KEYS = {"recipe", "budget", "seeds", "common", "baseline", "accelerated", "choices", "ablations", "peers"}
NEEDED = {"recipe", "budget", "seeds", "baseline", "accelerated"}
DIVISORS = (1, 4, 2, 8)
"""The budgets of a plan are X over these; baselines leave out the last."""
CURVE_POINTS = [point / 8 for point in range(9)]
"""Progress at which the runs of the whole budget X take their accuracy; the others do so half-way and at the end."""

DATA_KEYS = ("name", "images", "train_split", "validation_images", "validation_split")

COMPARED = ("knn", "linear", "units", "steps")
"""What a rerun repeats to the last digit, on the same processor and at the same commit."""

TOY = ("train_split=train[:512]", "validation_split=train[512:640]", "batch_size=16")
"""What `--toy` overrides in every run: few images to evaluate on, and steps that a thousandth of a budget pays for."""


@dataclass(frozen=True)
class Run:
    """One training run of a plan. `keys` are those of the recipe that the plan sets, but for seed and budget."""

    objective: str
    kind: str
    name: str
    recipe: str
    budget: float
    divisor: float
    seed: int
    keys: Mapping[str, Any] = field(hash=False)

    @property
    def folder(self) -> str:
        words = [self.objective, self.kind if self.kind == self.name else f"{self.kind}-{self.name}"]
        return "-".join([*(re.sub(r"[^\w.-]+", "_", word) for word in words), f"{self.budget:.0f}", str(self.seed)])

    @property
    def is_reference(self) -> bool:
        """Whether speedups refer to this run, so that what its encoder had before training is measured, too."""
        return self.kind == BASELINE and self.divisor == 1

    def settings(self) -> dict[str, Any]:
        return {**self.keys, "seed": self.seed, "budget": self.budget}


def load_plan(path: Path) -> dict[str, Any]:
    """Read a plan.

    Its keys are `title`; `clock`, "cpu" (seconds that the run's process computed) or "wall"; `common` overrides;
    `choice_split`, the overrides that keep the test images out of sight; `objectives`, each with `recipe`, `budget`
    (X, in units), `seeds`, overrides of the `baseline` and the `accelerated` runs, and, by name, `choices` (with their
    `divisors` of X), `ablations` (at X/4, unless they have `divisors`) and `peers` (at X/4, by
    `benchmarks.peer_training`).

    Raises:
        ValueError: a key is missing or unknown.
    """
    plan = load_yaml(path.read_text())
    if not isinstance(plan, dict) or set(plan) != PLAN_KEYS or plan["clock"] not in ("cpu", "wall"):
        raise ValueError(f"{path}: a plan has the keys {', '.join(sorted(PLAN_KEYS))}; clock is cpu or wall")
    for name, objective in plan["objectives"].items():
        unknown, missing = set(objective) - OBJECTIVE_KEYS, NEEDED - set(objective)
        if unknown or missing:
            raise ValueError(f"{path}: objective {name}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    return plan


def runs_of(plan: Mapping[str, Any], scale: float = 1.0) -> list[Run]:
    """Every run, with its budget times `scale`, the most informative first.

    First what settings are chosen by; then baseline and accelerated runs at X and X/4, all seeds of the plan's first
    objective before one seed of the others and then the rest; then the other budgets; then ablations and peers.
    """
    runs = [run for name in plan["objectives"] for run in _runs_of_objective(plan, name, scale)]
    first = next(iter(plan["objectives"]))

    def rank(run: Run) -> tuple[float, ...]:
        first_seed = plan["objectives"][run.objective]["seeds"][0]
        if run.kind == CHOICE:
            return 0, run.objective != first, -run.divisor
        if run.kind in (ABLATION, PEER):
            return 4, run.seed != first_seed
        if run.divisor in (1, 4):
            group = 1 if run.objective == first else 2
            return group, run.seed != first_seed, run.seed, -run.divisor
        return 3, run.objective != first, run.seed != first_seed, run.divisor

    return sorted(runs, key=rank)


def _runs_of_objective(plan: Mapping[str, Any], name: str, scale: float) -> Iterator[Run]:
    objective = plan["objectives"][name]
    recipe, whole = objective["recipe"], scale * objective["budget"]
    common = {**plan["common"], **objective.get("common", {})}

    def run(kind: str, label: str, divisor: float, seed: int, keys: Mapping[str, Any]) -> Run:
        points = CURVE_POINTS if divisor == 1 and kind in (BASELINE, ACCELERATED) else [0.0, 0.5, 1.0]
        keys = {"eval_points": points, **common, **keys}
        return Run(name, kind, label, recipe, whole / divisor, divisor, seed, keys)

    for label, keys in objective.get("choices", {}).items():
        keys = dict(keys)
        for divisor in keys.pop("divisors"):
            yield run(CHOICE, label, divisor, objective["seeds"][0], {**plan["choice_split"], **keys})
    for seed in objective["seeds"]:
        for divisor in DIVISORS:
            if divisor != DIVISORS[-1]:
                yield run(BASELINE, BASELINE, divisor, seed, objective["baseline"])
            yield run(ACCELERATED, ACCELERATED, divisor, seed, objective["accelerated"])
        for kind in (ABLATION, PEER):
            for label, keys in objective.get(f"{kind}s", {}).items():
                keys = dict(keys)
                for divisor in keys.pop("divisors", [4]):
                    yield run(kind, label, divisor, seed, keys)


class Bench:
    """Trains what is not yet known, several runs at once, until the time is over."""

    def __init__(self, records: Path, runs_folder: Path, overrides: Sequence[str], clock: str, seconds: float):
        self.records, self.runs_folder, self.overrides = records, runs_folder, list(overrides)
        self.clock, self.seconds = clock, seconds
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def record_path(self, run: Run) -> Path:
        return self.records / f"{run.folder}.json"

    def is_known(self, run: Run) -> bool:
        """Whether this run is recorded, with the settings that the plan now has."""
        path = self.record_path(run)
        if not path.exists():
            return False
        record = json.loads(path.read_text())
        return record["settings"] == json.loads(json.dumps(run.settings())) and record["recipe"] == run.recipe

    def stop(self) -> None:
        """Have every run save itself and end."""
        self.stopping.set()
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)

    def take(self, run: Run) -> str | None:
        """Train and evaluate one run and write its record. Returns what went wrong, None if nothing did."""
        folder = self.runs_folder / run.folder
        if self.stopping.is_set() or self.is_known(run):
            return None
        settings = {**run.settings(), "report_to": []}
        print(f"{time.strftime('%H:%M:%S')} {run.folder}", flush=True)
        command, code = self._launch(run, folder, settings)
        results = RunFolder(folder).read_results()
        if "units" not in results:
            return None if self.stopping.is_set() else f"{run.folder}: exit code {code}, see {folder}.log"
        if run.kind != CHOICE and results["knn_top1"] is not None:
            for checkpoint in (str(folder / "final"), *["random"] * run.is_reference):
                keys = {"task": "evaluate", "checkpoint": checkpoint, "evaluations": ["linear"], "seed": run.seed}
                code = 0 if self.stopping.is_set() else self._launch(run, folder, keys)[1]
                if code and not self.stopping.is_set():
                    return f"{run.folder}: linear probe of {checkpoint}: exit code {code}"
        if not self.stopping.is_set():
            self.records.mkdir(parents=True, exist_ok=True)
            write_json(self.record_path(run), self.record_of(run, folder, command))
        return None

    def _launch(self, run: Run, folder: Path, settings: Mapping[str, Any]) -> tuple[list[str], int]:
        keys = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        task = settings.get("task", "pretrain")
        program = ["-m", "benchmarks.peer_training"] if (run.kind, task) == (PEER, "pretrain") else ["hf_accel/run.py"]
        command = [*program, run.recipe, *keys, *overrides_for(task, self.overrides)]
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        if self.clock == "cpu":
            environment["OMP_NUM_THREADS"] = "1"  # seconds of a processor are comparable between runs of one thread
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{folder}.log").open("ab") as log:
            whole = [sys.executable, *command, f"output_dir={folder.resolve()}"]
            process = subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=log, stderr=log)
            self.processes.add(process)
            if self.stopping.is_set():  # it was asked for while this one started
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self.processes.discard(process)
        return command, code

    def record_of(self, run: Run, folder: Path, command: list[str]) -> dict[str, Any]:
        """What the report needs of a finished run. Accuracies are in percent, and null for images without labels."""
        results = RunFolder(folder).read_results()
        history = json.loads((folder / "log_history.json").read_text())["log_history"]
        seconds = results["seconds"]
        evaluations = results.get("evaluations", [])
        probed = {entry["checkpoint"]: 100 * entry["top1"] for entry in evaluations if entry["evaluation"] == "linear"}
        curve = [(log["units"], 100 * log["eval_knn_top1"]) for log in history if "eval_knn_top1" in log]
        top1 = {name: results[name] for name in ("knn_top1", "knn_top1_raw_pixels", "knn_top1_random_init")}
        percent = {name: None if value is None else 100 * value for name, value in top1.items()}
        names = ("objective", "kind", "name", "recipe", "budget", "divisor", "seed")
        where = results["environment"]
        return {
            **{name: asdict(run)[name] for name in names},
            "settings": run.settings(),
            "knn": percent["knn_top1"],
            "linear": probed.get(str(folder / "final")),
            "seconds": results["cpu_seconds"] if self.clock == "cpu" else seconds["total"] - seconds["evaluation"],
            "clock": self.clock,
            "units": results["units"],
            "steps": results["steps"],
            "schedule": results["schedule"],
            "raw_pixels_knn": percent["knn_top1_raw_pixels"],
            "random_knn": percent["knn_top1_random_init"],
            **({"random_linear": probed.get("random")} if run.is_reference else {}),
            "curve": {"units": [u for u, _ in curve], "knn": [k for _, k in curve]},
            "data": {key: results["data"][key] for key in DATA_KEYS},
            **{key: results[key] for key in ("view_backend", "cache")},
            "command": " ".join(["python", *command[: len(command) - len(self.overrides)]]),
            "finished": datetime.now(timezone.utc).isoformat(timespec="minutes"),
            "commit": where["commit"],
            "dirty": where["dirty"],
            "hardware": {**where["hardware"], "torch": where["versions"]["torch"]},
            **({"peer": results["peer"]} if run.kind == PEER else {}),
        }


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("speedup", __doc__)
    parser.add_argument("plan", help=f"a name of benchmarks/plans/ ({', '.join(sorted(plan_names()))}), or a file")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="save and stop before so many are over")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one a core; one with the clock wall)")
    words = "take only runs whose folder's name holds this word; may be given several times"
    parser.add_argument("--only", action="append", metavar="WORD", help=words)
    parser.add_argument("--runs", type=Path, help="folder of the runs (default runs/speedup/PLAN, or in --results)")
    parser.add_argument("--results", type=Path, help="folder of records and tables (default docs/results)")
    parser.add_argument("--list", action="store_true", help="only print the runs, in order, and which are known")
    toy = "a thousandth of each budget, on 640 images; records stay in RUNS"
    parser.add_argument("--toy", action="store_true", help=toy)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the recipe in every run")
    args: argparse.Namespace = parser.parse_intermixed_args(arguments)
    path = PLANS / f"{args.plan}.yaml" if args.plan in plan_names() else Path(args.plan)
    try:
        plan = load_plan(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    default = args.results / "runs" if args.results else ROOT / "runs" / "speedup"
    folder = args.runs or default / (f"{path.stem}_toy" if args.toy else path.stem)
    results = args.results.resolve() if args.results else folder if args.toy else RESULTS
    overrides = [*(TOY if args.toy else ()), *args.overrides]
    bench = Bench(results / path.stem, folder, overrides, plan["clock"], 60 * args.minutes)
    every = runs_of(plan, 1e-3 if args.toy else 1.0)
    wanted = [run for run in every if any(word in run.folder for word in args.only or [""])]
    if args.list:
        print("\n".join(f"{'known' if bench.is_known(run) else '     '} {run.folder}" for run in wanted))
        return 0
    # Runs that share a device would slow each other, and the wall clock would count that.
    jobs = args.jobs or (1 if plan["clock"] == "wall" else os.cpu_count() or 1)
    failures = train_all(bench, wanted, jobs)
    for failure in failures:
        print(failure, file=sys.stderr)
    known = [run for run in every if bench.is_known(run)]
    print(write_report(path.stem, plan, [json.loads(bench.record_path(run).read_text()) for run in known], results))
    report = json.loads((results / f"{path.stem}.json").read_text())
    plot(report, results / path.stem)
    print(f"{len(known)} of {len(every)} runs are known")
    if results != RESULTS and not args.toy:
        print("\n".join(compare_with_committed(results / path.stem, RESULTS / path.stem)))
    if results == RESULTS:
        write_pages(path.stem, report, pages())
    return 1 if failures else 0


def compare_with_committed(records: Path, committed: Path) -> list[str]:
    """Say of each record of `records` what differs from the one of the same run in `committed`, if there is one."""
    lines = []
    for path in sorted(records.glob("*.json")):
        if not (committed / path.name).exists():
            continue
        here, there = (json.loads((folder / path.name).read_text()) for folder in (records, committed))
        differ = [f"{key} {here[key]} ({there[key]} recorded)" for key in COMPARED if here[key] != there[key]]
        lines.append(f"{path.stem}: {'; '.join(differ) or 'as recorded'}")
    return lines


def plan_names() -> set[str]:
    return {path.stem for path in PLANS.glob("*.yaml")}


def train_all(bench: Bench, runs: Sequence[Run], jobs: int) -> list[str]:
    """Train the runs in order, `jobs` at once, until all are known or the time is over. Returns what went wrong."""
    signal.signal(signal.SIGTERM, lambda *_: bench.stop())
    timer = threading.Timer(bench.seconds, bench.stop)
    if bench.seconds < float("inf"):
        timer.start()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            return [failure for failure in pool.map(bench.take, runs) if failure]
    except KeyboardInterrupt:
        bench.stop()
        raise
    finally:
        timer.cancel()


if __name__ == "__main__":
    sys.exit(main())
