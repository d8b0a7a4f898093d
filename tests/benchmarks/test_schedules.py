"""benchmarks/schedules.py: every schedule gets its runs, the searched one comes from the pilot, the table is theirs."""

from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import yaml

import hf_accel.run as entry
from benchmarks import schedules
from tests.tiny_runs import RECIPE, image_folder, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

PLAN = {
    "seeds": [3, 4],
    "common": {"eval_points": [0.0, 0.5, 1.0]},
    "search": {"search_draws": 3, "search_token_dropout": [0.0, 0.5]},
    "schedules": {
        "uncompressed": {"schedule": None},
        "patch 8": {"schedule": [{"until": 1.0, "patch_size": 8}]},
        "searched": {"search": {"search_patch_size": [4, 8]}},
    },
}


@pytest.fixture
def plan(tmp_path):
    """A benchmark's file for images of noise."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(image_folder(tmp_path / "images"))}))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, "recipe": str(recipe)}))
    return path


@pytest.fixture
def launched(monkeypatch):
    """The commands of the runs, which take place in this process."""
    commands = []

    def run(command, **_):
        commands.append(command)
        entry.main(command[2:])

    monkeypatch.setattr(schedules, "subprocess", SimpleNamespace(run=run, CalledProcessError=CalledProcessError))
    return commands


def test_each_kind_of_schedule_has_one_colour_everywhere():
    for names in (
        ["uncompressed", "patch 8", "by hand", "auto"],
        ["auto", "patch 16", "patch 8", "by hand", "uncompressed"],
    ):
        looks = schedules.choose_looks(names)
        found = {name: looks[name][0] for name in ("uncompressed", "patch 8", "by hand", "auto")}
        kinds = ("uncompressed", "constant", "by hand", "auto")
        assert found == dict(zip(found, map(schedules.COLOR_OF_KIND.get, kinds), strict=True))
        assert len(set(looks.values())) == len(names)
    assert len(set(schedules.COLOR_OF_KIND.values())) == 5
    assert schedules.choose_looks(["searched CA-MSE", "searched gain"])["searched gain"][0] == schedules.ORANGE


def test_a_figures_axis_begins_where_its_curves_do(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(schedules.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        {"schedule": name, "mean": value, "curves": [[(30_000, value - 1), (60_000, value)]]}
        for name, value in (("by hand", 35.0), ("uncompressed", 31.0))
    ]
    schedules.plot_schedules(rows, tmp_path / "schedules.png", "title")
    axes = drawn[0].axes[0]
    assert 25_000 < axes.get_xlim()[0] < 30_000
    assert [line.get_color() for line in axes.lines] == [schedules.BLUE, schedules.GRAY]


@pytest.mark.slow
def test_runs_table_and_figure(plan, launched, tmp_path, capsys):
    output = tmp_path / "out"
    schedules.main([str(plan), "--output", str(output), "learning_rate=1.0e-3"])
    names = ["patch_8", "searched", "uncompressed"]
    folders = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert folders == sorted([f"{name}-{seed}" for name in names for seed in (3, 4)] + ["searched-search"])
    for name in folders:
        recipe = yaml.safe_load((output / name / "recipe.yaml").read_text())
        assert recipe["seed"] == (4 if name.endswith("4") else 3)
        assert recipe.get("learning_rate") == (None if name == "searched-search" else 1e-3)  # a search reads none
        assert bool(recipe.get("keep_points")) == (name == "uncompressed-3")
    found = yaml.safe_load((output / "searched-search/schedule.yaml").read_text())["stages"]
    rows = {row["schedule"]: row for row in read(output / "schedules.json")["rows"]}
    assert [stage["until"] for stage in rows["searched"]["stages"][0]] == [stage["until"] for stage in found]
    assert [stage["patch_size"] for stage in rows["patch 8"]["stages"][1]] == [8]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        results = [read(output / f"{name.replace(' ', '_')}-{seed}/results.json") for seed in (3, 4)]
        assert row["top1"] == pytest.approx([100 * result["knn_top1"] for result in results])
        assert row["mean"] == pytest.approx(sum(row["top1"]) / 2)
        assert [len(curve) for curve in row["curves"]] == [3, 3]
        assert f"{row['mean']:.1f}" in printed
    assert (output / "schedules.png").stat().st_size > 10_000 and (output / "schedules.svg").exists()

    count = len(launched)
    before = (output / "patch_8-3/results.json").stat().st_mtime_ns
    schedules.main([str(plan), "--output", str(output), "learning_rate=1.0e-3"])
    assert len(launched) == count + 6  # each looks at its folder; the search is not even launched
    assert (output / "patch_8-3/results.json").stat().st_mtime_ns == before


def test_a_plan_that_cannot_be_followed_is_refused(plan, tmp_path, capsys):
    values = yaml.safe_load(plan.read_text())
    for broken, named in (
        (yaml.safe_dump({**values, "seed": [1]}), "seeds"),
        (yaml.safe_dump({**values, "schedules": {"searched": {"search": {}}}}), "needs a schedule named uncompressed"),
        (yaml.safe_dump(values) + "seeds: [1]\n", "'seeds' is given twice"),
    ):
        plan.write_text(broken)
        with pytest.raises(SystemExit):
            schedules.main([str(plan), "--output", str(tmp_path / "out")])
        assert named in capsys.readouterr().err


def test_a_run_that_fails_ends_the_benchmark(plan, monkeypatch, tmp_path):
    def run(command, **_):
        raise CalledProcessError(3, command)

    monkeypatch.setattr(schedules, "subprocess", SimpleNamespace(run=run, CalledProcessError=CalledProcessError))
    with pytest.raises(SystemExit, match="exit code 3"):
        schedules.main([str(plan), "--output", str(tmp_path / "out")])
