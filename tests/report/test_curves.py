"""The curves figure: what is drawn is what was logged and planned, and panels without data are left out."""

import math
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_accel.compression import Compression, Plan, Schedule, Strategy
from hf_accel.compression.schedule import Stage
from hf_accel.report import plot_curves


def unit(strategy: Strategy) -> float:
    return 1.0


PLAN = Plan(100, Schedule.constant(Strategy(Compression(4))), 2, unit)


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """Draws and returns {label of a panel: its axes}."""

    def draw(history, plan=PLAN, **options):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        plot_curves(history, tmp_path / "curves.png", plan=plan, image_size=32, **options)
        return {axes.get_ylabel().replace("\n", " "): axes for axes in figures[0].axes}

    return draw


def lines(axes):
    """{label, or color: (x, y)}"""
    return {line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.lines}


def logs(n: int) -> list[dict]:
    rng = np.random.default_rng(0)
    units = np.cumsum(rng.uniform(1, 9, n))
    return [{"step": 10 * (i + 1), "units": units[i], "loss": rng.normal()} for i in range(n)]


def test_what_evaluations_measure_is_drawn(panels) -> None:
    history = [{"units": 4.0 * n, "eval_knn_top1": n / 4, "eval_ridge_top1": n / 3} for n in (1, 2)]
    history += [{"units": 4.0 * n, "eval_rank_me": 10.0 * n, "eval_alpha_req": 1 / n} for n in (1, 2)]
    history += [{"units": 4.0 * n, "eval_lidar": 9.0 + n} for n in (1, 2)]
    drawn = panels(history)
    assert list(drawn)[:4] == ["top-1 (%)", "RankMe", "alpha-ReQ", "LiDAR"]
    accuracy = lines(drawn["top-1 (%)"])
    np.testing.assert_allclose(accuracy["kNN"][1], [25, 50])
    np.testing.assert_allclose(accuracy["linear (ridge regression)"], [[4, 8], [100 / 3, 200 / 3]])
    for label, values in (("RankMe", [10, 20]), ("alpha-ReQ", [1, 0.5]), ("LiDAR", [10, 11])):
        ((x, y),) = lines(drawn[label]).values()
        assert (list(x), list(y)) == ([4, 8], values)
    compared = panels(history, rank_me_start=12.34)
    assert set(lines(compared["RankMe"])["start: 12.3"][1]) == {12.34} and len(compared["alpha-ReQ"].lines) == 1


def test_loss_and_accuracy_against_units(panels) -> None:
    history = logs(8)
    losses = list(history)
    history.insert(4, {"step": 45, "units": losses[3]["units"] + 0.5, "eval_knn_top1": 0.25})
    history.append({"step": 80, "units": losses[7]["units"], "eval_knn_top1": 0.75})
    drawn = panels(history, title="a run", baselines={"random initialisation": 0.2, "raw pixels": 0.5})
    x, y = next(iter(lines(drawn["training loss"]).values()))
    np.testing.assert_array_equal(x, [log["units"] for log in losses])
    np.testing.assert_array_equal(y, [log["loss"] for log in losses])
    (x, y), *baselines = lines(drawn["kNN top-1 (%)"]).values()
    np.testing.assert_allclose(x, [losses[3]["units"] + 0.5, losses[7]["units"]])
    np.testing.assert_allclose(y, [25, 75])
    assert [set(y) for _, y in baselines] == [{20.0}, {50.0}]
    texts = [text.get_text() for text in drawn["kNN top-1 (%)"].get_legend().get_texts()]
    assert texts == ["random initialisation: 20.0", "raw pixels: 50.0"]
    assert len({axes.get_xlim() for axes in drawn.values()}) == 1


def test_a_plan_is_drawn_as_it_was_followed(panels) -> None:
    """One log in ten steps, and a change of strategy after step 8 of 10: at 80% of the units."""
    target = Compression(4)
    strategies = Strategy(Compression(4, 0.5), target), Strategy(Compression(8), target), Strategy(Compression(4))
    plan = Plan(
        100, Schedule((Stage(0.2, strategies[0]), Stage(0.8, strategies[1]), Stage(1.0, strategies[2]))), 2, unit
    )
    history = [{"step": 10 * n, "units": plan.spent_after(10 * n), "loss": 1.0} for n in range(1, 6)]
    drawn = panels(history, plan)
    tokens = lines(drawn["patch tokens per image"])
    np.testing.assert_array_equal(tokens["online"], ([0, 20, 80, 100], [32, 32, 16, 64]))
    np.testing.assert_array_equal(tokens["target"], ([0, 20, 80, 100], [64, 64, 64, 64]))
    assert {line.get_drawstyle() for line in drawn["patch tokens per image"].lines} == {"steps-pre"}
    np.testing.assert_array_equal(lines(drawn["patch size (px)"])["online"][1], [4, 4, 8, 4])
    np.testing.assert_array_equal(lines(drawn["token dropout"])["online"][1], [0.5, 0.5, 0, 0])
    bottom, top = drawn["token dropout"].get_ylim()
    assert bottom < 0 and top > 0.5, "a line at 0 must be seen"


def test_without_a_target_branch_there_is_one_line(panels) -> None:
    drawn = panels([], Plan(100, Schedule.constant(Strategy(Compression(4, 0.5))), 2, unit), has_target_branch=False)
    assert len(drawn) == 3 and all(len(axes.lines) == 1 and not axes.get_legend() for axes in drawn.values())


@pytest.mark.parametrize(
    "count, measured", [(60, {"eval_knn_top1": 0.5, "eval_ridge_top1": 0.6}), (2, {"eval_rank_me": 9.0})]
)
def test_legends_cover_no_line_and_are_whole(panels, count, measured) -> None:
    history = [{"units": 2.0 * n, "loss": n % 7, **measured} for n in range(count)]
    baselines = {f"raw pixels {n}": 0.5 + 0.02 * n for n in range(3)}
    figure = next(iter(panels(history, baselines=baselines, rank_me_start=12.0, title="title").values())).figure
    figure.draw_without_rendering()
    boxes = [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
    assert len(boxes) == (2 if count == 60 else 1)
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_a_revised_plan_is_drawn_with_its_probes(panels) -> None:
    cheap, costly = Strategy(Compression(8)), Strategy(Compression(4))
    plan = Plan(100, Schedule.constant(cheap), 2, unit)
    plan.revise(0, Schedule.constant(cheap), 10)
    plan.revise(20, Schedule.constant(costly), 10)  # 50 units are spent before the probe
    x, y = next(iter(lines(panels([], plan)["patch tokens per image"]).values()))
    np.testing.assert_array_equal((x, y), ([0, 50, 100], [16, 16, 64]))
    assert len(lines(panels([], plan)["patch size (px)"])) == 1, "branches that agree are one line"


def test_panels_without_data_are_left_out(panels) -> None:
    compression = ["patch tokens per image", "patch size (px)", "token dropout"]
    assert list(panels([{"step": 3, "loss": 1.0}])) == compression  # Nothing says at which units that was.
    assert list(panels(logs(3))) == ["training loss", *compression]
    assert list(panels([{"units": 1.0, "eval_knn_top1": 0.5}])) == ["kNN top-1 (%)", *compression]


def test_nan_is_left_out(panels) -> None:
    history = logs(5)
    history[2]["loss"] = math.nan
    history[3]["loss"] = None
    ((x, y),) = lines(panels(history, baselines={"raw pixels": math.nan})["training loss"]).values()
    assert len(x) == len(y) == 3 and np.isfinite(y).all()


def test_many_losses_get_a_centred_mean(panels) -> None:
    history = logs(100)
    drawn = lines(panels(history)["training loss"])
    x, y = drawn["mean of 5 logs"]
    np.testing.assert_allclose(y[7], np.mean([log["loss"] for log in history[7:12]]))
    np.testing.assert_allclose(x[7], np.mean([log["units"] for log in history[7:12]]))


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_files_without_global_state(tmp_path, suffix, magic) -> None:
    before, backend = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    plot_curves(logs(4), tmp_path / f"curves.{suffix}", plan=PLAN, image_size=32)
    assert (tmp_path / f"curves.{suffix}").read_bytes().startswith(magic)
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == backend
