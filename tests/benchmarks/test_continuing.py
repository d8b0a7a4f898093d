"""The benchmark of starting from another encoder: its table, and what each run starts from."""

import json

from benchmarks import continuing
from benchmarks.generated import fill, pages, plans_of


def record(name, seed, start, end, linear):
    return {"name": name, "seed": seed, "curve": {"knn": [start, 50.0, end]}, "knn": end, "linear": linear}


def test_the_table_has_means_and_ranges_over_seeds():
    records = {
        "continued": [record("continued", 0, 44.0, 52.0, 60.0), record("continued", 1, 44.0, 54.0, 61.0)],
        "high_rate": [record("high_rate", 0, 44.0, 30.0, 40.0)],
    }
    assert continuing.format_table(records).splitlines()[2:] == [
        "| the encoder from CIFAR-10 | 44.0 (44.0 to 44.0) | 53.0 (52.0 to 54.0) | 60.5 (60.0 to 61.0) | 0, 1 |",
        "| the same, ten times the learning rate | 44.0 | 30.0 | 40.0 | 0 |",
    ]


def test_the_docs_have_the_table_of_the_records():
    table = continuing.format_table(continuing.read_records(continuing.RESULTS))
    texts = [page.read_text() for page in pages()]
    assert [text for text in texts if continuing.NAME in plans_of(text)]
    assert all(fill(text, continuing.NAME, table) == text for text in texts), "python -m benchmarks.continuing"


def test_only_continued_runs_start_from_the_encoder(tmp_path, monkeypatch):
    launched = []

    def train_all(bench, runs, jobs):
        launched.extend((run.name, run.seed, bench.overrides) for run in runs)
        return []

    monkeypatch.setattr(continuing, "train_all", train_all)
    words = ["--toy", "--runs", str(tmp_path), "--cifar10", "small", "--imagenette", "large"]
    assert continuing.main(words) == 0
    start = f"init_from={tmp_path / 'moco-continuing-cifar10-300-0' / 'final'}"
    assert launched[0] == ("cifar10", 0, ["data=small"])
    assert launched[1:] == [
        *(("continued", seed, ["data=large", start]) for seed in (0, 1, 2)),
        ("high_rate", 0, ["data=large", start]),
        ("higher_rate", 0, ["data=large", start]),
    ]


def test_records_are_read_by_name_in_order_of_seeds(tmp_path):
    for folder, file, name in (
        ("continuing", "a-1", "continued"),
        ("continuing", "a-0", "continued"),
        ("imagenette_cpu", "moco-accelerated-150000-0", "accelerated"),
        ("imagenette_cpu", "moco-accelerated-300000-0", "accelerated"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = json.dumps(record(name, int(file[-1]), 1, 2, 3))
        (tmp_path / folder / f"{file}.json").write_text(text)
    found = continuing.read_records(tmp_path)
    assert [entry["seed"] for entry in found["continued"]] == [0, 1] and len(found["accelerated"]) == 1
