"""The comparison of finished runs, from handmade run folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_accel.tasks import compare as comparing
from hf_accel.tasks.compare import compare
from hf_accel.utils.errors import SettingError

STAGES = [
    {"until": 0.8, "patch_size": 16, "token_dropout": 0.5, "target_patch_size": 8, "target_token_dropout": 0.0},
    {"until": 1.0, "patch_size": 8, "token_dropout": 0.0, "target_patch_size": 8, "target_token_dropout": 0.0},
]
HARDWARE = {"cpu": "Abacus", "torch_threads": 2, "gpus": []}


def write_run(folder: Path, rate: float = 100.0, accuracy: float = 0.8, **changed: Any) -> str:
    """A finished run of 40 steps of 10 images, at `rate` images per second."""
    folder.mkdir(parents=True)
    results = {
        **{"knn_top1": accuracy, "knn_top1_random_init": 0.25, "knn_top1_raw_pixels": 0.3},
        **{"units": 1600.0, "budget": 1650.0, "steps": 40, "images_seen": 400, "objective": "moco", "processes": 1},
        "seconds": {"total": 400 / rate + 7, "evaluation": 7.0},
        "schedule": STAGES[1:],
        "data": {"name": "photos"},
        "environment": {"commit": "0123456789", "dirty": False, "hardware": HARDWARE},
    }
    logs = [{"eval_knn_top1": 0.25, "step": 0, "units": 0.0}]
    for step in (10, 20, 40):
        logs.append({"loss": 1.0, "step": step, "units": 40.0 * step, "images_per_second": rate})
        logs.append({"eval_knn_top1": accuracy * step / 40, "step": step, "units": 40.0 * step})
    (folder / "results.json").write_text(json.dumps({**results, **changed}))
    (folder / "log_history.json").write_text(json.dumps({"log_history": logs}))
    return str(folder)


def read_table(path: Path) -> list[dict[str, str]]:
    header, _, *rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
    names, *cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
    return [dict(zip(names, line, strict=True)) for line in cells]


def test_the_table_holds_what_each_run_measured(tmp_path, capsys):
    one = write_run(tmp_path / "plain")
    other = write_run(tmp_path / "fast", rate=400.0, accuracy=0.9, schedule=STAGES, budget=3000.0, knn_top1=None)
    compare([one, other], tmp_path / "out")
    first, second = read_table(tmp_path / "out" / "compare.md")
    assert first == {
        **{"run": "plain", "objective": "moco", "schedule": "p8 d0", "budget": "1,650", "units": "1,600"},
        **{"seconds": "4", "images/s": "100", "kNN top-1": "80.0", "random init": "25.0", "raw pixels": "30.0"},
    }
    assert second["schedule"] == "p16 d0.5 / p8 d0 to 80%, p8 d0 to 100%" and second["kNN top-1"] == "-"
    assert second["images/s"] == "400" and second["seconds"] == "1" and second["budget"] == "3,000"
    said, written = capsys.readouterr().out, (tmp_path / "out" / "compare.md").read_text()
    assert "The budgets differ." in written and written.split("\n\n![")[0] in said
    assert "All runs: data: photos; commit: 0123456; hardware: Abacus, torch_threads=2." in written
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_what_differs_between_runs_has_a_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {"commit": "89abcdef01", "dirty": True, "hardware": {**HARDWARE, "gpus": ["H200", "H200"]}}
    other = write_run(tmp_path / "b" / "moco", environment=environment, processes=2, data={"name": "paintings"})
    compare([write_run(tmp_path / "a" / "moco"), other])
    first, second = read_table(tmp_path / "compare.md")
    assert (first["run"], second["run"]) == (str(tmp_path / "a" / "moco"), other)  # the folders have one name
    assert (first["commit"], second["commit"]) == ("0123456", "89abcde with changes")
    assert (first["data"], second["data"]) == ("photos", "paintings")
    assert second["hardware"] == "H200, H200, 2 processes" and "budgets differ" not in Path("compare.md").read_text()


def test_the_figure_draws_accuracy_over_units_and_over_seconds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    compare([write_run(tmp_path / "plain"), write_run(tmp_path / "fast", rate=400.0, accuracy=0.9)], tmp_path)
    by_units, by_seconds = figures[0].axes
    for axes, expected in (by_units, [[0, 400, 800, 1600]] * 2), (by_seconds, [[0, 1, 2, 4], [0, 0.25, 0.5, 1]]):
        assert [line.get_label() for line in axes.lines] == ["plain", "fast"]
        for line, x, accuracy in zip(axes.lines, expected, (80, 90), strict=True):
            np.testing.assert_allclose(np.asarray(line.get_xdata()), x)
            np.testing.assert_allclose(np.asarray(line.get_ydata()), [25, accuracy / 4, accuracy / 2, accuracy])


def test_runs_without_labels_are_compared_by_rank_me(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    logs = [{"eval_rank_me": 5.0 * step, "step": step, "units": 40.0 * step} for step in (1, 2)]
    without: dict[str, Any] = dict.fromkeys(("knn_top1", "knn_top1_random_init", "knn_top1_raw_pixels"))
    runs = []
    for name, rank in (("plain", 10.04), ("fast", None)):
        runs.append(write_run(tmp_path / name, rank_me=rank, **without))
        (tmp_path / name / "log_history.json").write_text(json.dumps({"log_history": logs}))
    compare(runs, tmp_path)
    assert [(row["kNN top-1"], row["RankMe"]) for row in read_table(tmp_path / "compare.md")] == [
        *(("-", "10.0"), ("-", "-"))
    ]
    assert "RankMe is the effective rank" in (tmp_path / "compare.md").read_text()
    by_units = figures[0].axes[0]
    assert by_units.get_ylabel() == "RankMe"
    np.testing.assert_allclose(np.asarray(by_units.lines[0].get_ydata()), [5, 10])


def test_rank_me_has_no_column_beside_accuracy_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    compare([write_run(tmp_path / name, rank_me=9.0) for name in "ab"], tmp_path / "out")
    assert "RankMe" not in (tmp_path / "out" / "compare.md").read_text()
    compare([str(tmp_path / "a"), write_run(tmp_path / "c", rank_me=8.0, knn_top1=None)], tmp_path / "out")
    assert [row["RankMe"] for row in read_table(tmp_path / "out" / "compare.md")] == ["9.0", "8.0"]


def test_files_that_a_comparison_replaces_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparing, "plot_accuracies", lambda *arguments: arguments[-1].touch())
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    compare([run], out)
    assert "replaced" not in capsys.readouterr().out
    (out / "compare.png").unlink()
    compare([run], out)
    assert capsys.readouterr().out.endswith(
        "replaced earlier files of these names: compare.md (--output names another folder)\n"
    )


def test_a_run_that_is_missing_or_unfinished_is_named(tmp_path):
    done = write_run(tmp_path / "done")
    (tmp_path / "begun").mkdir()
    for runs, message in (
        ([done, str(tmp_path / "none")], "none: there is no such folder. Give the output_dir of each run"),
        ([done, str(tmp_path / "begun")], "begun holds no finished run. Launch its command again"),
    ):
        with pytest.raises(SettingError, match=message):
            compare(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
