"""benchmarks/speedup.py and its report: the definition of a speedup, the order of runs, records, resumption."""

import math
import os
import signal
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
import yaml
from matplotlib.figure import Figure

import hf_accel.run as entry
from benchmarks import peer_training, peers, speedup, speedup_figure, speedup_report
from hf_accel.utils.writing import write_json
from tests.tiny_runs import RECIPE, image_folder, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


def record(kind, budget, seed, knn, seconds, divisor=1, name=None, curve=((0, 10.0), (1, 20.0))):
    units, accuracies = zip(*curve, strict=True)
    same = {"objective": "moco", "recipe": "r.yaml", "settings": {}, "clock": "cpu", "steps": 10, "schedule": []}
    same |= {
        "raw_pixels_knn": 12.0,
        "random_knn": 11.0,
        "random_linear": 15.0,
        "commit": "c",
        "dirty": False,
        "data": {},
        "hardware": {},
    }
    run = {"kind": kind, "name": name or kind, "budget": budget, "units": budget, "divisor": divisor, "seed": seed}
    measured = {"knn": knn, "linear": knn + 5, "seconds": seconds}
    return {**same, **run, **measured, "curve": {"units": list(units), "knn": list(accuracies)}, "command": "python"}


BASELINES = [record("baseline", 800, seed, knn, 80) for seed, knn in ((0, 50.0), (1, 52.0))]
ACCELERATED = [
    record("accelerated", budget, seed, knn, seconds, 800 // budget)
    for budget, seconds, accuracies in ((100, 12, (40.0, 44.0)), (200, 24, (52.0, 54.0)), (800, 90, (60.0, 62.0)))
    for seed, knn in enumerate(accuracies)
]


def test_crossing_interpolates_in_the_logarithm_of_amounts():
    points = [(400.0, 60.0), (100.0, 40.0)]
    assert speedup_report.crossing(points, 50) == pytest.approx(200)
    assert speedup_report.crossing(points, 45) == pytest.approx(100 * 4**0.25)
    assert speedup_report.crossing(points, 60) == pytest.approx(400)
    assert speedup_report.crossing(points, 61) is None
    assert speedup_report.crossing(points, 30) == 100  # below all runs it is not extrapolated
    assert speedup_report.crossing([(0.0, 10.0), (5.0, 20.0)], 15) == 5  # units 0 have no logarithm


def test_speedup_is_that_of_means_with_extremes_over_seeds():
    found = speedup_report.speedup(BASELINES, ACCELERATED, "budget")
    share = (51 - 42) / (53 - 42)  # of the way from 100 to 200 units, by the means of both seeds
    assert found["value"] == pytest.approx(800 / (100 * 2**share))
    single = [800 / (100 * 2 ** ((50 - 40) / 12)), 800 / (100 * 2 ** ((52 - 44) / 10))]
    assert [found["low"], found["high"]] == pytest.approx([min(single), max(single)])
    more = [*ACCELERATED, record("accelerated", 200, 2, 90.0, 24, 4)]  # no baseline has this seed
    assert speedup_report.speedup(BASELINES, more, "budget") == found
    assert speedup_report.speedup(BASELINES[:1], more[-1:], "budget")["value"] is None
    seconds = speedup_report.speedup(BASELINES, ACCELERATED, "seconds")
    assert seconds["value"] == pytest.approx(80 / (12 * 2**share))


def test_no_speedup_where_no_accelerated_run_is_as_good():
    best = [record("baseline", 800, seed, 70.0, 80) for seed in (0, 1)]
    assert set(speedup_report.speedup(best, ACCELERATED, "budget").values()) == {None}
    one = [best[0], BASELINES[1]]  # the mean is 61 again, which the runs of 800 units reach
    found = speedup_report.speedup(one, ACCELERATED, "budget")
    assert found["value"] == pytest.approx(1.0) and found["low"] is None
    assert found["high"] == pytest.approx(800 / (100 * 2 ** ((52 - 44) / 10)))


def test_a_report_holds_what_it_prints(tmp_path):
    curve = ((0, 11.0), (400, 49.0), (800, 61.0))
    curve = {"units": [u for u, _ in curve], "knn": [k for _, k in curve]}
    long = [{**run, "curve": curve, "linear": 2 * run["knn"] - 40} for run in ACCELERATED]
    tried = [record("choice", 200, 0, 47.0, 24, 4, "patch 16"), record("ablation", 200, 0, 43.0, 24, 4, "batch 64")]
    parts = ("lightly 1.6.0", "plain transcription, for lightly cannot be imported: No module")
    theirs = [{**record("peer", 200, seed, 41.0, 25, 4, "uncompressed"), "peer": parts[seed]} for seed in (0, 1)]
    plan = {"title": "A title", "clock": "cpu", "objectives": {"moco": {}}}
    text = speedup_report.write_report("toy", plan, [*BASELINES, *long, *tried, *theirs], tmp_path)
    report = read(tmp_path / "toy.json")
    (found,) = report["objectives"]
    measured = {"knn": [50.0, 52.0], "linear": [55.0, 57.0], "seconds": [80, 80], "steps": [10, 10], "seed": [0, 1]}
    assert found["baseline"] == {"budget": 800, **measured}
    assert [row["budget"] for row in found["accelerated"]] == [800, 200, 100] and found["seeds"] == [0, 1]
    assert found["crossing_units"] == pytest.approx(math.exp(math.log(400) + (51 - 49) / 12 * math.log(2)))
    assert (found["raw_pixels_knn"], found["random_knn"], found["random_linear"]) == (12.0, [11.0, 11.0], [15.0, 15.0])
    assert "| the encoder before training | | | | 11.0 11.0 | 11.0 | 15.0 15.0 |" in text
    assert found["choices"][0]["name"] == "patch 16" and found["ablations"][0]["name"] == "batch 64"
    assert [(row["name"], row["peer"], row["knn"], row["seed"]) for row in found["peers"]] == [
        ("uncompressed", parts[seed], [41.0], [seed]) for seed in (0, 1)
    ]
    for peer in ("lightly 1.6.0", "plain transcription"):
        assert f"| uncompressed, another implementation ({peer}) | 200 | 10 | 25 | 41.0 | 41.0 | 46.0 |" in text
    assert len(report["curves"]) == 8 and report["curves"][0]["seconds"][-1] > 0
    assert f"Speedup at equal kNN accuracy: {found['speedup_units']['value']:.1f}x" in text
    linear = speedup_report.speedup(BASELINES, long, "budget", "linear")
    assert found["speedup_units_linear"] == linear != speedup_report.speedup(BASELINES, long, "budget", "knn")
    assert f" At equal accuracy of the linear probe: {linear['value']:.1f}x" in text
    assert "| short sequences first | 200 | 10 | 24 | 52.0 54.0 | 53.0 | 64.0 68.0 |" in text
    speedup_figure.plot(report, tmp_path / "toy")
    axes = Figure().subplots()
    speedup_figure.draw_panel(axes, found, "budget")
    (hollow,) = (line for line in axes.get_lines() if line.get_label() == "batch 64")
    assert hollow.get_xydata().tolist() == [[200, 43.0]] and hollow.get_markerfacecolor() == "white"  # pyright: ignore
    assert (tmp_path / "toy.png").stat().st_size > 10_000 and (tmp_path / "toy.md").read_text() == text + "\n"


def test_no_speedup_over_a_baseline_that_learnt_nothing(tmp_path):
    plan = {"title": "A title", "clock": "cpu", "objectives": {"moco": {}}}
    before = [{**run, "random_knn": run["knn"]} for run in BASELINES]
    text = speedup_report.write_report("toy", plan, [*before, *ACCELERATED], tmp_path)
    (found,) = read(tmp_path / "toy.json")["objectives"]
    assert {*found["speedup_units"].values(), *found["speedup_seconds"].values(), found["crossing_units"]} == {None}
    assert "ends at 51.0%, no higher than the encoder before training (51.0%)." in text and "reached" not in text
    whole = [run["knn"] for run in ACCELERATED if run["budget"] == 800]
    assert f"Short sequences first end at {sum(whole) / len(whole):.1f}% with as many units." in text
    quarter = [run for run in ACCELERATED if run["budget"] < 800]
    assert "as many units" not in speedup_report.write_report("toy", plan, [*before, *quarter], tmp_path)
    speedup_figure.plot(read(tmp_path / "toy.json"), tmp_path / "toy")
    assert (tmp_path / "toy.png").exists()
    axes = Figure().subplots()
    for drawn, texts in (({**found, "speedup_units": {"value": 3.0}}, ["", "3.0x"]), (found, [])):
        axes.clear()
        speedup_figure.draw_panel(axes, drawn, "budget")
        said = [text.get_text() for text in axes.texts]
        assert said == ["raw pixels", "encoder before training", *texts]


def test_without_a_baseline_a_report_names_no_speedup(tmp_path):
    plan = {"title": "A title", "clock": "cpu", "objectives": {"moco": {}}}
    tried = [record("choice", 200, 0, 47.0, 24, 4, "patch 16")]
    text = speedup_report.write_report("toy", plan, tried, tmp_path)
    assert "No speedup yet" in text and "not reached" not in text and "| patch 16 | 200 | 10 | 24 | 47.0 |" in text
    speedup_figure.plot(read(tmp_path / "toy.json"), tmp_path / "toy")
    assert read(tmp_path / "toy.json")["objectives"][0]["baseline"] is None and not (tmp_path / "toy.png").exists()


PLAN = {
    "title": "Noise",
    "clock": "cpu",
    "common": {"logging_steps": 4},
    "choice_split": {"train_split": "train[:80%]", "validation_split": "train[80%:]"},
    "objectives": {
        "moco": {
            "recipe": "r.yaml",
            "budget": 16 * 4 * 16,
            "seeds": [0, 1],
            "baseline": {"schedule": None},
            "accelerated": {"schedule": [{"until": 1.0, "patch_size": 8}]},
            "choices": {"patch 8": {"divisors": [4], "schedule": [{"until": 1.0, "patch_size": 8}]}},
            "ablations": {"batch 8": {"schedule": None, "batch_size": 8}},
            "peers": {"uncompressed": {"schedule": None, "mixed_precision": "no"}},
        }
    },
}


def test_runs_come_in_the_order_of_what_they_tell():
    other = {**PLAN["objectives"]["moco"], "choices": {}, "ablations": {}, "peers": {}}
    names = [run.folder for run in speedup.runs_of({**PLAN, "objectives": {**PLAN["objectives"], "dino": other}})]
    assert names[:5] == [
        "moco-choice-patch_8-256-0",
        *("moco-baseline-256-0", "moco-accelerated-256-0", "moco-baseline-1024-0", "moco-accelerated-1024-0"),
    ]
    assert [name.split("-")[0] for name in names[5:9]] == ["moco"] * 4  # the second seed of the first objective
    assert names[9:13] == [name.replace("moco", "dino") for name in names[1:5]]
    last = [f"moco-{kind}-256-{seed}" for seed in (0, 1) for kind in ("ablation-batch_8", "peer-uncompressed")]
    assert names[-4:] == last
    assert len(names) == len(set(names)) == 1 + 2 * 2 * 7 + 4


def test_ablations_have_a_quarter_of_the_budget_or_their_own_divisors():
    moco = {**PLAN["objectives"]["moco"], "ablations": {"a": {"batch_size": 8}, "b": {"divisors": [1, 8]}}}
    runs = [run for run in speedup.runs_of({**PLAN, "objectives": {"moco": moco}}) if run.kind == "ablation"]
    assert {(run.name, run.divisor, run.seed) for run in runs} == {
        *((name, divisor, seed) for name, divisor in (("a", 4), ("b", 1), ("b", 8)) for seed in (0, 1))
    }
    assert all("divisors" not in run.settings() for run in runs)


def test_a_plan_with_a_misspelt_key_is_refused(tmp_path):
    path = tmp_path / "plan.yaml"
    broken = [{**PLAN, "clocks": 1}, {**PLAN, "objectives": {"moco": {**PLAN["objectives"]["moco"], "sed": 1}}}]
    for plan, named in zip(broken, ("clock", "sed"), strict=True):
        path.write_text(yaml.safe_dump(plan))
        with pytest.raises(ValueError, match=named):
            speedup.load_plan(path)


def test_the_plans_of_this_repository_can_be_read():
    assert speedup.plan_names()
    for name in speedup.plan_names():
        runs = speedup.runs_of(speedup.load_plan(speedup.PLANS / f"{name}.yaml"))
        assert all((speedup.ROOT / run.recipe).exists() for run in runs)
        choices = [run for run in runs if run.kind == speedup.CHOICE]
        assert all("[" in run.keys["validation_split"] for run in choices)  # never the test images


@pytest.mark.parametrize(("clock", "jobs"), [("wall", 1), ("cpu", 3)])
def test_by_the_wall_clock_one_run_trains_at_a_time(clock, jobs, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(speedup, "train_all", lambda bench, runs, jobs: asked.append((jobs, runs, bench)) or [])
    monkeypatch.setattr(speedup.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(speedup, "RESULTS", tmp_path / "results")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, "clock": clock}))
    command = [str(tmp_path / "plan.yaml"), "--runs", str(tmp_path), "--toy"]
    speedup.main([*command, "--only", "baseline-0-0", "--only", "choice"])
    speedup.main([*command, "--jobs", "2", "batch_size=8"])
    speedup.main([*command[:-1], "batch_size=8"])
    (tmp_path / "results" / "plan.md").unlink()
    monkeypatch.chdir(tmp_path)  # the committed folder by a relative path is no other folder
    written: list = []
    monkeypatch.setattr(speedup, "write_pages", lambda *arguments: written.append(arguments))
    speedup.main([*command[:-1], "--results", "results"])
    assert written and (tmp_path / "results" / "plan.md").exists()
    assert [jobs for jobs, _, _ in asked] == [jobs, 2, jobs, jobs] and len(asked[1][1]) == 19
    few = ["train_split=train[:512]", "validation_split=train[512:640]", "batch_size=16"]
    assert [bench.overrides for *_, bench in asked[:3]] == [few, [*few, "batch_size=8"], ["batch_size=8"]]
    assert [run.folder for run in asked[0][1]] == ["moco-choice-patch_8-0-0", "moco-baseline-0-0"]


def test_a_list_holds_the_runs_that_are_asked_for(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    command = [str(tmp_path / "plan.yaml"), "--runs", str(tmp_path), "--results", str(tmp_path), "--list"]
    speedup.main([*command, "--only", "baseline-256", "--only", "choice"])
    assert capsys.readouterr().out.split() == [
        "moco-choice-patch_8-256-0",
        "moco-baseline-256-0",
        "moco-baseline-256-1",
    ]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The command for a plan of tiny runs, which take place in this process. `plan` can be changed between commands."""
    recipe, path = tmp_path / "recipe.yaml", tmp_path / "toy.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(image_folder(tmp_path / "images"))}))
    plan = {**PLAN, "objectives": {"moco": {**PLAN["objectives"]["moco"], "recipe": str(recipe), "seeds": [0]}}}
    launched = []

    class Process:
        def __init__(self, command, env, **_):
            assert env.get("HF_HUB_OFFLINE") == os.environ.get("HF_HUB_OFFLINE")  # a recipe's data may be on the Hub
            self.command, self.code = command[1:], 0
            launched.append(self)

        def send_signal(self, number):
            self.code = -number

        def wait(self):
            if self.code == 0:
                if self.command[0] == "-m":
                    assert self.command[1] == "benchmarks.peer_training"
                    return peer_training.main(self.command[2:])
                entry.main(self.command[1:])
            return self.code

    def command(*words):
        path.write_text(yaml.safe_dump(plan))
        launched.clear()
        code = speedup.main([str(path), "--runs", str(tmp_path / "runs"), "--jobs", "1", *words])
        return code, {file.stem: read(file) for file in (tmp_path / "results").glob("toy/*.json")}

    monkeypatch.setattr(speedup, "subprocess", SimpleNamespace(Popen=Process))
    monkeypatch.setattr(speedup, "RESULTS", tmp_path / "results")
    return SimpleNamespace(command=command, plan=plan["objectives"]["moco"], launched=launched, folder=tmp_path)


@pytest.mark.slow
def test_runs_are_recorded_and_not_trained_again(bench, capsys):
    code, records = bench.command("--only", "256")
    names = [
        "moco-choice-patch_8-256-0",
        "moco-baseline-256-0",
        "moco-accelerated-256-0",
        "moco-ablation-batch_8-256-0",
        "moco-peer-uncompressed-256-0",
    ]
    assert code == 0 and set(records) == set(names)
    chosen, baseline = records["moco-choice-patch_8-256-0"], records["moco-baseline-256-0"]
    assert chosen["data"]["images"] == 96 and chosen["data"]["validation_images"] == 24
    assert chosen["view_backend"] == "eager" and chosen["linear"] is None  # four fifths of the training images
    assert baseline["data"]["images"] == 120 and 0 <= baseline["linear"] <= 100 and baseline["seconds"] > 0
    assert baseline["curve"]["units"][-1] == baseline["units"] == 256
    assert records["moco-ablation-batch_8-256-0"]["steps"] == 2 * baseline["steps"]
    peer = records["moco-peer-uncompressed-256-0"]
    assert peer["peer"] == peers.peer_components()[0] and "peer" not in baseline
    assert peer["command"].startswith("python -m benchmarks.peer_training ") and 0 <= peer["linear"] <= 100
    same = ("units", "steps", "schedule", "raw_pixels_knn", "random_knn", "data", "commit", "hardware")
    assert {key: peer[key] for key in same} == {key: baseline[key] for key in same}
    assert [*peer["curve"]["units"]] == baseline["curve"]["units"] and peer["seconds"] > 0

    assert datetime.now(timezone.utc) - datetime.fromisoformat(baseline["finished"]) < timedelta(minutes=10)
    assert "random_linear" not in baseline  # it is measured beside the whole budget
    code, again = bench.command("--only", "256")
    assert again == records and not bench.launched and "5 of 10 runs are known" in capsys.readouterr().out
    bench.plan["accelerated"] = {"schedule": [{"until": 1.0, "patch_size": 4, "token_dropout": 0.5}]}
    with pytest.raises(SystemExit, match="holds a run with schedule"):  # it is trained again, not in the same folder
        bench.command("--only", "accelerated-256")


@pytest.mark.slow
def test_an_empty_folder_of_results_has_a_run_trained_again_and_compared(bench, capsys):
    _, records = bench.command("--only", "baseline-1024")
    capsys.readouterr()
    again = bench.folder / "again"
    bench.command("--only", "baseline-1024", "--results", str(again), "--runs", str(again / "runs"))
    # the run, and the linear probe of its encoder at the end and before training
    assert len(bench.launched) == 3 and "moco-baseline-1024-0: as recorded" in capsys.readouterr().out
    first, second = records["moco-baseline-1024-0"], read(again / "toy" / "moco-baseline-1024-0.json")
    assert first["curve"] == second["curve"] and 0 <= first["random_linear"] == second["random_linear"]
    run = again / "runs" / "moco-baseline-1024-0"
    probed = {entry["checkpoint"]: 100 * entry["top1"] for entry in read(run / "results.json")["evaluations"]}
    assert probed == {str(run / "final"): second["linear"], "random": second["random_linear"]}


def test_records_are_compared_with_the_committed_ones(tmp_path):
    for folder, knn in (("here", 50.0), ("committed", 50.5)):
        (tmp_path / folder).mkdir()
        for name in ("same", "other", folder):
            changes = {"knn": knn} if name == "other" else {}
            write_json(tmp_path / folder / f"{name}.json", {**ACCELERATED[0], "seconds": knn, **changes})
    lines = speedup.compare_with_committed(tmp_path / "here", tmp_path / "committed")
    assert lines == ["other: knn 50.0 (50.5 recorded)", "same: as recorded"]


def test_out_of_time_runs_are_stopped_and_not_recorded(bench):
    code, records = bench.command("--only", "baseline", "--minutes", "0")
    assert code == 0 and not records
    assert all(process.code == -signal.SIGTERM for process in bench.launched)
