"""`hf-accel compare RUN RUN ...`: one table and one figure of finished runs."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compression import Schedule, Strategy
from ..report import format_table, plot_accuracies
from ..run_folder import RunFolder
from ..utils.errors import SettingError
from ..utils.writing import write_text

NOTE = (
    "kNN top-1 is in %, of the exported encoder at the end, of the encoder before training (random init), and of the "
    "images themselves (raw pixels). Seconds are those of training, without evaluations."
)
NOTE_ON_RANK = (
    "RankMe is the effective rank of the exported encoder's features at the end, and needs no labels. Higher is better "
    "among runs on the same images with encoders of the same hidden size."
)


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run left in its folder."""

    name: str
    results: Mapping[str, Any]
    log_history: Sequence[Mapping[str, Any]]

    @classmethod
    def load(cls, path: str) -> "FinishedRun":
        """Read the run in the folder `path`.

        Raises:
            SettingError: there is no such folder, or no finished run in it.
        """
        folder = RunFolder(path)
        if not folder.path.is_dir():
            raise SettingError(f"{path}: there is no such folder. Give the output_dir of each run")
        if not folder.is_complete() or not folder.log_history.exists():
            raise SettingError(f"{path} holds no finished run. Launch its command again to finish it, or leave it out")
        logs = json.loads(folder.log_history.read_text())["log_history"]
        return cls(folder.path.resolve().name, folder.read_results(), logs)

    @property
    def seconds(self) -> float:
        return self.results["seconds"]["total"] - self.results["seconds"]["evaluation"]

    @property
    def origin(self) -> dict[str, str]:
        """What should be the same for a fair comparison."""
        environment = self.results["environment"]
        hardware = environment["hardware"]
        device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, torch_threads={hardware['torch_threads']}"
        commit = str(environment["commit"])[:7] + (" with changes" if environment["dirty"] else "")
        processes = f", {self.results['processes']} processes" if self.results["processes"] > 1 else ""
        return {"data": self.results["data"]["name"], "commit": commit, "hardware": device + processes}


def compare_runs(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Answer the command `hf-accel compare`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a finished run")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of compare.md and compare.png; default: .")
    compare(**vars(parser.parse_args(argv)))


def compare(runs: Sequence[str], output: Path = Path()) -> None:
    """Print a table of finished runs, and write it as compare.md into the folder `output`, with compare.png.

    Raises:
        SettingError: a run is missing or not finished.
    """
    finished = [FinishedRun.load(run) for run in runs]
    names = [run.name for run in finished]
    names = names if len(set(names)) == len(names) else runs
    text = build_comparison(dict(zip(names, finished, strict=True)))
    output.mkdir(parents=True, exist_ok=True)
    batches = [run.results["images_seen"] // run.results["steps"] for run in finished]
    logs = [run.log_history for run in finished]
    page, figure = output / "compare.md", output / "compare.png"
    replaced = [path.name for path in (page, figure) if path.exists()]
    plot_accuracies(names, logs, batches, figure)
    write_text(page, f"{text}\n\n![measures of the runs](compare.png)\n")
    print(text)
    print(f"\nsaved to {page} and {figure}")
    if replaced:
        print(f"replaced earlier files of these names: {' and '.join(replaced)} (--output names another folder)")


def build_comparison(runs: Mapping[str, FinishedRun]) -> str:
    """Build the table, and below it what its columns mean and what the runs have in common."""
    origins = [run.origin for run in runs.values()]
    differing = [key for key in origins[0] if len({origin[key] for origin in origins}) > 1]
    header = ["run", "objective", "schedule", "budget", "units", "seconds", "images/s"]
    header += ["kNN top-1", "random init", "raw pixels"]
    accuracies, ranks = ([run.results.get(key) for run in runs.values()] for key in ("knn_top1", "rank_me"))
    with_rank = None in accuracies and any(rank is not None for rank in ranks)
    header += ["RankMe"] * with_rank + differing
    rows = []
    for name, run in runs.items():
        results = run.results
        numbers = [results["budget"], results["units"], run.seconds, results["images_seen"] / run.seconds]
        accuracies = [results.get(key) for key in ("knn_top1", "knn_top1_random_init", "knn_top1_raw_pixels")]
        cells = [name, results["objective"], summarize_schedule(Schedule.parse(results["schedule"], 1))]
        cells += [f"{number:,.0f}" for number in numbers]
        cells += ["-" if accuracy is None else f"{100 * accuracy:.1f}" for accuracy in accuracies]
        rank = results.get("rank_me")
        cells += ["-" if rank is None else f"{rank:.1f}"] * with_rank
        rows.append([*cells, *(run.origin[key] for key in differing)])
    common = "; ".join(f"{key}: {value}" for key, value in origins[0].items() if key not in differing)
    notes = [NOTE, NOTE_ON_RANK] if with_rank else [NOTE]
    notes.append("In a schedule, p is the patch size in pixels, d the token dropout, and % the progress at its end.")
    notes += [
        f"{name} continues {run.results['continued_from']['name']}, whose units are not counted here."
        for name, run in runs.items()
        if run.results.get("continued_from")
    ]
    if len({run.results["budget"] for run in runs.values()}) > 1:
        notes.append("The budgets differ.")
    notes += [f"All runs: {common}."] if common and len(runs) > 1 else [f"The run: {common}."] if common else []
    return "\n\n".join([format_table(header, rows), " ".join(notes)])


def summarize_schedule(schedule: Schedule) -> str:
    """Name each stage's online compression, the target's where it is not the paper's, and the progress at its end."""
    stages = []
    for stage in schedule.stages:
        strategy = stage.strategy
        name = strategy.online.abbreviate()
        if strategy.target != Strategy(strategy.online).target:
            name += f" / {strategy.target_branch.abbreviate()}"
        stages.append(f"{name} to {100 * stage.until:.3g}%")
    return ", ".join(stages) if len(stages) > 1 else stages[0].removesuffix(" to 100%")
