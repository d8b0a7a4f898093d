"""Numbers in README and docs are those of docs/results/PLAN.json."""

import json

import pytest

from benchmarks import continuing, generated, speedup_report

RESULTS = generated.ROOT / "docs" / "results"
PLANS = sorted(path.stem for path in RESULTS.glob("*.json") if (RESULTS / f"{path.stem}.md").exists())


def entry(**changes):
    row = {
        "budget": 800.0,
        "knn": [50.0, 52.0],
        "linear": [None, 60.0],
        "seconds": [80, 80],
        "steps": [1, 1],
        "seed": [0, 1],
    }
    speed = {"value": 3.64, "low": 3.5, "high": 4.0}
    whole = {"objective": "moco", "baseline": row, "smaller_baselines": [{**row, "budget": 200.0, "knn": [40.0, 41.0]}]}
    whole |= {"accelerated": [{**row, "budget": 200.0, "knn": [51.0, 52.0]}], "seeds": [0, 1], "raw_pixels_knn": 36.1}
    whole |= {"random_knn": [35.0, 36.0], "random_linear": [44.0, 45.0]}
    linear = {"value": 2.2, "low": 2.2, "high": 2.2}
    speeds = {"speedup_units": speed, "speedup_seconds": {**speed, "value": 3.0}, "speedup_units_linear": linear}
    return {**whole, **speeds, **changes}


@pytest.mark.parametrize("plan", PLANS)
def test_pages_have_the_numbers_of_the_json(plan):
    report = json.loads((RESULTS / f"{plan}.json").read_text())
    assert (RESULTS / f"{plan}.md").read_text() == speedup_report.format_report(report) + "\n"
    for path in generated.pages():
        text = path.read_text()
        if plan in generated.plans_of(text):
            assert generated.fill(text, plan, generated.summarize(report)) == text, (
                f"python -m benchmarks.speedup {plan}"
            )


def test_marks_name_plans_that_exist():
    marked = {plan for path in generated.pages() for plan in generated.plans_of(path.read_text())}
    assert marked <= {*PLANS, continuing.NAME}


def test_a_summary_has_a_row_for_each_kind_of_run():
    assert generated.summarize({"objectives": [entry()]}).splitlines() == [
        "| kNN top-1 (linear probe), % | 200 units | 800 units |",
        "|---|---:|---:|",
        "| MoCo-v3, short sequences first | 51.5 (60.0) |  |",
        "| MoCo-v3, uncompressed | 40.5 (60.0) | 51.0 (60.0) |",
        "",
        "- MoCo-v3: means over seeds 0 and 1. Speedup at equal kNN accuracy: 3.6x (3.5 to at least 4.0 over seeds) in "
        "units, 3.0x (3.5 to 4.0 over seeds) in seconds. At equal accuracy of the linear probe: 2.2x in units.",
        "- For comparison, raw pixels reach 36.1% and encoders before training 35.5% (44.5% by the linear probe).",
    ]
    alone = {"value": 4.0, "low": 4.0, "high": 4.0}
    single = generated.summarize({"objectives": [entry(seeds=[0], speedup_units=alone, speedup_seconds=alone)]})
    assert "- MoCo-v3: seed 0. Speedup at equal kNN accuracy: at least 4.0x in units, 4.0x in seconds." in single
    unfinished = generated.summarize({"objectives": [entry(baseline=None)]})
    assert "| MoCo-v3, uncompressed | 40.5 (60.0) |" in unfinished and "No speedup yet: it takes" in unfinished
    assert "- MoCo" not in generated.summarize({"objectives": [entry(seeds=[], baseline=None, accelerated=[])]})


def test_a_cell_says_its_runs_where_some_are_missing():
    one = {**entry()["baseline"], "knn": [50.0], "linear": [None]}
    text = generated.summarize({"objectives": [entry(baseline=one)]})
    assert "| MoCo-v3, uncompressed | 40.5 (60.0) | 50.0, one run |" in text
    assert "MoCo-v3: means over seeds 0 and 1, where no other number of runs is given. Speedup" in text
    three = generated.summarize({"objectives": [entry(seeds=[0, 1, 2])]})
    assert "Speedup at equal kNN accuracy (by seeds 0 and 1, which both have): 3.6x" in three
    assert "| MoCo-v3, uncompressed | 40.5 (60.0), 2 runs | 51.0 (60.0), 2 runs |" in three


def test_an_encoder_before_training_counts_once_a_seed():
    one = {**entry()["baseline"], "knn": [50.0], "seed": [1]}
    other = entry(objective="dino", baseline=one, seeds=[1], random_knn=[36.4], random_linear=[None])
    text = generated.summarize({"objectives": [entry(), other]})
    assert text.endswith("encoders before training 35.6% (44.5% by the linear probe).")  # (35.0 + 36.2) / 2


def test_a_summary_names_ablations():
    rows = [
        {**entry()["smaller_baselines"][0], "name": "constant patch 16", "budget": budget} for budget in (200.0, 800.0)
    ]
    lines = generated.summarize({"objectives": [entry(ablations=rows[1:])]}).splitlines()
    assert lines[4] == "| MoCo-v3, constant patch 16 |  | 40.5 (60.0) |"
    lines = generated.summarize({"objectives": [entry(ablations=rows)]}).splitlines()
    assert lines[4] == "| MoCo-v3, constant patch 16 | 40.5 (60.0) | 40.5 (60.0) |"


def test_a_summary_names_the_peer_and_its_parts():
    peers = [{**entry()["smaller_baselines"][0], "name": "uncompressed", "peer": "lightly 1.6.0"}]
    lines = generated.summarize({"objectives": [entry(peers=peers)]}).splitlines()
    assert lines[4] == "| MoCo-v3, uncompressed, another implementation (lightly 1.6.0) | 40.5 (60.0) |  |"


def test_only_what_stands_between_marks_is_written(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text("before\n\n<!-- toy -->\nold\n<!-- end toy -->\n\nafter\n")
    other.write_text("no marks\n")
    report = {"objectives": [entry()]}
    generated.write_pages("toy", report, [page, other])
    text = page.read_text()
    assert text == f"before\n\n<!-- toy -->\n{generated.summarize(report)}\n<!-- end toy -->\n\nafter\n"
    assert other.read_text() == "no marks\n" and generated.plans_of(text) == ["toy"]
