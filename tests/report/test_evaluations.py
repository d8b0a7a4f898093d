"""Evaluations in results.json: entries by question, runs by seed, statistics, table; what else is there stays."""

import json
import multiprocessing
import statistics
from typing import Any

import pytest

from hf_accel.report import add_run, find_run, format_evaluations
from hf_accel.report.evaluations import wilson_interval
from hf_accel.run_folder import RunFolder
from hf_accel.utils.writing import write_json

QUESTION: dict[str, Any] = {
    "evaluation": "linear",
    "checkpoint": "runs/moco/final",
    "train_images": 500,
    "validation_images": 100,
    "patch_size": 4,
    "settings": {"learning_rates": (0.1, 1.0)},
}


def run(seed: int | None, top1: float) -> dict:
    return {"seed": seed, "top1": top1, "top5": 1.0}


def test_runs_of_one_question_share_an_entry(tmp_path):
    values = [0.5, 0.6, 0.8]
    for seed, value in enumerate(values):
        assert find_run(tmp_path, QUESTION, seed) is None
        add_run(tmp_path, QUESTION, run(seed, value))
        assert find_run(tmp_path, QUESTION, seed) == run(seed, value)
    other = {**QUESTION, "settings": {"learning_rates": (0.1,)}}
    assert find_run(tmp_path, other, 0) is None
    add_run(tmp_path, other, run(0, 0.7))
    first, second = RunFolder(tmp_path).read_results()["evaluations"]
    assert first["seeds"] == [0, 1, 2] and [entry["top1"] for entry in first["runs"]] == values
    assert first["top1"] == pytest.approx(statistics.mean(values))
    assert first["top1_std"] == pytest.approx(statistics.stdev(values))
    assert first["top1_ci95"] == pytest.approx(wilson_interval(statistics.mean(values), 100))
    assert second["seeds"] == [0] and second["top1_std"] is None


def test_evaluations_do_not_make_a_run_complete(tmp_path):
    assert RunFolder(tmp_path).read_results() == {} and not RunFolder(tmp_path).is_complete()
    add_run(tmp_path, QUESTION, run(0, 0.5))
    assert not RunFolder(tmp_path).is_complete()
    write_json(tmp_path / "results.json", {"units": 7.0, **RunFolder(tmp_path).read_results()})
    add_run(tmp_path, QUESTION, run(1, 0.5))
    results = json.loads((tmp_path / "results.json").read_text())
    assert RunFolder(tmp_path).is_complete() and results["units"] == 7 and results["evaluations"][0]["seeds"] == [0, 1]


def add_many(folder, first: int) -> None:
    for seed in range(first, first + 20):
        add_run(folder, QUESTION, run(seed, 0.5))


def test_evaluations_of_two_processes_lose_no_result(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_many, args=(tmp_path, first)) for first in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (entry,) = RunFolder(tmp_path).read_results()["evaluations"]
    assert sorted(entry["seeds"]) == [*range(20), *range(100, 120)]


def test_table(tmp_path):
    for checkpoint, patch_size, values in (("ours", 4, [0.9, 0.92]), ("random", 4, [0.5]), ("ours", None, [0.3])):
        for seed, value in enumerate(values):
            add_run(tmp_path, {**QUESTION, "checkpoint": checkpoint, "patch_size": patch_size}, run(seed, value))
    lines = format_evaluations(RunFolder(tmp_path).read_results()["evaluations"]).splitlines()
    assert len(lines) == 5
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0] == ["ours", "linear", "", "500", "1", "30.0", "21.9 to 39.6"]
    assert rows[1] == ["ours", "linear", "4", "500", "2", "91.0 ± 1.4", "83.8 to 95.2"]
    assert rows[2][:6] == ["random", "linear", "4", "500", "1", "50.0"]


def test_settings_in_which_entries_differ_follow_the_evaluation(tmp_path):
    for k, name in ((20, "knn"), (5, "knn"), (20, "linear")):
        settings = {"k": k, "temperature": 0.07}
        add_run(tmp_path, {**QUESTION, "evaluation": name, "settings": settings}, run(None, 0.5))
    table = format_evaluations(RunFolder(tmp_path).read_results()["evaluations"])
    assert "knn (k=20) " in table and "knn (k=5) " in table and "linear  " in table and "temperature" not in table


@pytest.mark.parametrize(
    ("hits", "number", "low", "high"),
    # Newcombe, Statistics in Medicine 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(hits, number, low, high):
    assert wilson_interval(hits / number, number) == pytest.approx((low, high), abs=6e-5)
    mirrored = wilson_interval(1 - hits / number, number)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=6e-5)
