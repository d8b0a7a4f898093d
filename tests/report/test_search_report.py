"""The report of a search: figures that show the rows, and a page that holds all of them and needs nothing else."""

import html
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_accel.compression import Compression, Schedule, Stage, Strategy
from hf_accel.report import write_search_report
from hf_accel.report.search_figures import (
    compact,
    plot_gradient_error,
    plot_heatmap,
    plot_schedule,
)
from hf_accel.report.search_report import build_report
from hf_accel.schedule_search.choose import build_grid, build_schedule
from hf_accel.schedule_search.error_table import ErrorTable
from hf_accel.schedule_search.gradient_error import GradientError

TENTHS = [tenth / 10 for tenth in range(10)]
GRIDS = {
    "two stages": ((0.0, 1.0), 28, 4, [0, 0.5, 0.75], None, ["paper"]),
    "one stage": ((0.5,), 28, 4, [0, 0.5, 0.75], None, ["paper"]),
    "one patch size": ((0.0, 0.5, 1.0), 28, 4, TENTHS, [4], ["paper"]),
    "one strategy": ((0.0,), 28, 4, [0.0], [4], ["paper"]),
    "sixty strategies": ((0.0, 0.25, 0.5, 0.75, 1.0), 240, 16, TENTHS, [16, 20, 24, 30, 40, 48], ["paper"]),
    "three symmetries": ((0.0, 0.5, 1.0), 28, 4, [0, 0.5], None, ["paper", "symmetric", "asymmetric"]),
    "eleven stages": (tuple(np.linspace(0, 1, 11).round(6)), 28, 4, [0.0, 0.3], None, ["paper"]),
}


def search_of(name: str = "two stages") -> tuple[list[dict], Schedule]:
    """Random rows of a grid, and a schedule of the strategies marked as chosen; biases of both signs."""
    points, image_size, base, *of_grid = GRIDS[name]
    rng = np.random.default_rng(0)
    grid = build_grid(image_size, base, *of_grid)
    cost = {
        strategy: (3 * strategy.online.kept_tokens(image_size) + strategy.target_branch.kept_tokens(image_size))
        / (4 * (image_size // base) ** 2)
        for strategy in grid
    }
    rows, chosen = [], []
    for progress in points:
        chosen.append(grid[rng.integers(len(grid))])
        norm2 = rng.uniform(1e-3, 1e3)
        for number, strategy in enumerate(grid):
            bias2 = norm2 * (rng.uniform(-0.2, 2) if number else 0.0)
            variance = norm2 * rng.uniform(3, 9)
            margin = norm2 * rng.uniform(0, 0.1)
            ca_mse = bias2 + cost[strategy] * variance
            gain = norm2 / (cost[strategy] * (norm2 + variance) ** 0.5)
            error = GradientError(
                bias2=bias2,
                variance=variance,
                ca_variance=cost[strategy] * variance,
                ca_mse=ca_mse,
                reference_norm2=norm2,
                bias2_interval=(bias2 - margin, bias2 + margin),
                ca_mse_interval=(ca_mse - 2 * margin, ca_mse + 2 * margin),
                gain=gain,
                gain_interval=(0.8 * gain, 1.3 * gain),
            )
            row = ErrorTable.build_row(progress, strategy, error, cost[strategy], image_size, draws=16)
            rows.append({**row, "chosen": strategy == chosen[-1]})
    return rows, build_schedule(points, chosen)


TITLE = """<script src="http://x/y.js">MoCo</script> & $5 "two" $6 | *a_b_c* [d](e) `f`"""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, list[dict], Schedule]:
    rows, schedule = search_of("three symmetries")
    output = tmp_path_factory.mktemp("reports") / "new"
    write_search_report(ErrorTable(rows), schedule, output, TITLE)
    return output, rows, schedule


def test_page_needs_nothing_else_and_escapes(written) -> None:
    text = (written[0] / "report.html").read_text()
    assert [html.unescape(found) for found in re.findall(r"<(?:title|h1)>([^<]*)</", text)] == [TITLE, TITLE]
    assert not set(re.findall(r"<(\w+)", text)) & {"script", "link", "iframe", "object", "a"}
    assert text.count("<img ") == text.count('src="data:image/png;base64,') == 3
    assert "url(" not in text and "@import" not in text and "href" not in text


def test_tables_hold_the_rows(written) -> None:
    output, rows, schedule = written
    tables = re.findall(r"(?:^\|.*\n)+", (output / "report.md").read_text(), re.MULTILINE)
    stages, best = ([[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in t.splitlines()] for t in tables)
    page = (output / "report.html").read_text()
    assert (page.count("<table>"), page.count("<tr>")) == (2, len(stages) + len(best) - 2)  # without the two rules
    assert len(stages) == 2 + len(schedule.stages)

    for progress in {row["progress"] for row in rows}:
        stage = sorted((row for row in rows if row["progress"] == progress), key=lambda row: row["ca_mse"])
        listed = [line for line in best if line[0] == f"{100 * progress:g}%"]
        chosen = next(row for row in stage if row["chosen"])
        expected = [chosen, *(row for row in stage if not row["chosen"])][: len(listed)]
        assert [line[1] for line in listed] == ["chosen"] + [""] * (len(listed) - 1) and len(listed) == 5
        for line, row in zip(listed, expected, strict=True):
            strategy = Strategy.from_dict(row)
            assert line[2:4] == [strategy.online.abbreviate(), strategy.target_branch.abbreviate()]
            assert (int(line[4]), line[5]) == (row["tokens"], f"{row['relative_cost']:.3f}")
            shown = [float(line[6]), *map(float, line[7].split(" to ")), float(line[8]), float(line[9])]
            shown += [*map(float, line[10].split(" to ")), float(line[11]), *map(float, line[12].split(" to "))]
            columns = ("bias2", "bias2_low", "bias2_high", "ca_variance", "ca_mse", "ca_mse_low", "ca_mse_high")
            wanted = [row[name] / row["reference_norm2"] for name in columns]
            (plain,) = (other["gain"] for other in stage if other["relative_cost"] == 1)
            wanted += [row[name] / plain for name in ("gain", "gain_low", "gain_high")]
            np.testing.assert_allclose(shown, wanted, rtol=6e-3)


def test_images_for_the_same_budget(written) -> None:
    output, rows, schedule = written
    cost = {Strategy.from_dict(row): row["relative_cost"] for row in rows}
    progress = np.linspace(0, 1, 10_001)[:-1] + 5e-5
    images = np.mean([1 / cost[schedule(at)] for at in progress])
    assert len(schedule.stages) > 1
    assert f"on {images:.2f} times as many images" in (output / "report.html").read_text()


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws with a function of search_figures and returns the figure, laid out."""

    def draw(plot, *arguments) -> Figure:
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        plot(*arguments, tmp_path / "figure", "a title " * 20)
        figures[0].draw_without_rendering()
        return figures[0]

    return draw


def overlapping(labels) -> list[tuple[str, str]]:
    boxes = [(label.get_text(), label.get_window_extent()) for label in labels if label.get_text()]
    return [
        (a, b)
        for i, (a, box) in enumerate(boxes)
        for b, other in boxes[i + 1 :]
        if box.shrunk(0.9, 0.9).overlaps(other.shrunk(0.9, 0.9))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_no_text_is_cut_or_overlaps(drawn, name: str) -> None:
    rows, schedule = search_of(name)
    table = ErrorTable(rows)
    for figure in (
        drawn(plot_gradient_error, table),
        drawn(plot_heatmap, table),
        drawn(plot_schedule, schedule, table.cost, table.image_size),
    ):
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0, box
        assert box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight(), box
        for axes in figure.axes:
            if axes.axison:
                assert overlapping([*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts]) == []
                assert overlapping([axes.title for axes in figure.axes]) == []


def test_gradient_errors_are_drawn_as_they_are(drawn) -> None:
    rows, _ = search_of("sixty strategies")
    table = ErrorTable(rows)
    figure = drawn(plot_gradient_error, table)
    costs = [table.cost[strategy] for strategy in table.strategies]
    assert len(costs) == 60 and costs == sorted(costs)
    for axes, name in zip(figure.axes, ("bias2", "ca_variance", "ca_mse", "gain"), strict=True):
        lines = [line for line in axes.lines if line.get_linestyle() == "-"]
        rings = [line for line in axes.lines if line.get_markersize() == 10]
        assert any(label.get_text() for label in axes.get_xticklabels())
        assert len(lines) == len(rings) == len(table.points)
        marked = [line for line in axes.lines if line.get_marker() == "<"]
        clipped = 0
        for line, progress in zip(lines, table.points, strict=True):
            stage = {Strategy.from_dict(row): row for row in rows if row["progress"] == progress}
            unit = stage[table.strategies[-1]]["gain" if name == "gain" else "reference_norm2"]
            values = np.array([stage[s][name] / unit for s in table.strategies])
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            np.testing.assert_array_equal(np.round(y), np.arange(60))
            above = x > x.min()
            np.testing.assert_allclose(x[above], values[above])
            assert (values[~above] <= x.min()).all() and axes.get_xlim()[0] < x.min()
            clipped += (values <= 0).sum()
        assert sum(len(np.asarray(line.get_xdata())) for line in marked) >= clipped
        assert (clipped > 0) == (name == "bias2") == bool(marked)
        shown = [table.strategies[round(float(np.asarray(ring.get_ydata())[0]))] for ring in rings]
        assert shown == [Strategy.from_dict(row) for row in rows if row["chosen"]]


@pytest.mark.parametrize("criterion", ["ca_mse", "gain"])
def test_heatmaps_hold_each_symmetry(drawn, criterion) -> None:
    rows, _ = search_of("three symmetries")
    table = ErrorTable(rows)
    figure = drawn(partial(plot_heatmap, criterion=criterion), table)
    assert figure._supxlabel.get_text().startswith(
        {"ca_mse": "CA-MSE / ‖G‖²;", "gain": "gain / uncompressed;"}[criterion]
    )
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert len(panels) == 9
    for row in rows:
        strategy = Strategy.from_dict(row)
        online, target = strategy.online, strategy.target_branch
        fits = {
            "paper": target == Strategy(online).target,
            "symmetric": target == online,
            "asymmetric": (target.patch_size, target.token_dropout) == (4, 0),
        }
        assert any(fits.values())
        place = [0, 0.5].index(online.token_dropout), [4, 7, 14].index(online.patch_size)
        for symmetry, fit in fits.items():
            axes = panels[f"{symmetry}, progress {100 * row['progress']:g}%"]
            frames = {(round(patch.get_x() + 0.5), round(patch.get_y() + 0.5)) for patch in axes.patches}
            if fit:
                texts = {text.get_position(): text.get_text() for text in axes.texts}
                assert texts[place] == compact(row[criterion] / table.unit(row, criterion))
                assert (place in frames) == row["chosen"]
    for progress in table.points:  # a stage is one choice: its panels have the same colours for the same values
        values = table.values(criterion, progress)
        for symmetry in ("paper", "symmetric", "asymmetric"):
            norm = panels[f"{symmetry}, progress {100 * progress:g}%"].images[0].norm
            assert (norm.vmin, norm.vmax) == pytest.approx((values[values > 0].min(), values.max()))


def test_schedule_steps(drawn) -> None:
    rows, _ = search_of()
    table = ErrorTable(rows)
    strategies = build_grid(28, 4, [0.5, 0.75], [14, 4])
    schedule = Schedule((Stage(0.05, strategies[2]), Stage(0.4, strategies[1]), Stage(1.0, strategies[0])))
    tokens, names, cost = drawn(plot_schedule, schedule, table.cost, table.image_size).axes
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in tokens.lines}
    np.testing.assert_array_equal(lines["online"], [1, 2, 49, 49])
    np.testing.assert_array_equal(lines["target"], [4, 4, 49, 49])
    np.testing.assert_array_equal(np.asarray(tokens.lines[0].get_xdata()), [0, 0.05, 0.4, 1])
    np.testing.assert_allclose(np.asarray(cost.lines[0].get_ydata())[[2, 3]], [1, 1])
    shown = [(text.get_text(), text.get_rotation()) for text in names.texts]
    assert shown == [("p14 d0.75", 90), ("p14 d0", 90), ("p14 d0.5", 0), ("p14 d0", 0), ("p4 d0", 0), ("p4 d0", 0)]


def test_schedule_without_a_target_branch_draws_online_alone(drawn) -> None:
    schedule = Schedule((Stage(1.0, Strategy(Compression(4))),))
    cost = {schedule.stages[0].strategy: 1.0}
    plot = partial(plot_schedule, has_target_branch=False)
    tokens, names, _ = drawn(plot, schedule, cost, 28).axes
    assert [line.get_label() for line in tokens.lines] == ["online"]
    assert [label.get_text() for label in names.get_yticklabels()] == ["online"] and len(names.texts) == 1


def test_a_report_without_a_target_branch_shows_none() -> None:
    rows, schedule = search_of()
    table = ErrorTable(rows)
    pages = [build_report(table, schedule, "", "ca_mse", has_target_branch=has) for has in (True, False)]
    with_target, without = (page.partition("## Schedule")[2].splitlines() for page in pages)
    assert any("target" in line for line in with_target) and not any("target" in line for line in without)
    tables = [[line.split("|")[1:-1] for line in page if line.startswith("|")] for page in (with_target, without)]
    stages = 2 + len(schedule.stages)
    for number, (wide, narrow) in enumerate(zip(*tables, strict=True)):
        cells, left = [cell.strip(" *") for cell in wide], [cell.strip(" *") for cell in narrow]
        if number not in (1, stages + 1):  # the rules below the headers
            del cells[2 if number < stages else 3]
            if number < stages:
                cells[2] = cells[2].partition(", online")[0].partition(" / ")[0]
            assert left == cells


def test_the_report_draws_the_criterion_that_chose(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.touch())
    rows, schedule = search_of("one strategy")
    for criterion, other in (("ca_mse", "gain"), ("gain", "ca_mse")):
        write_search_report(ErrorTable(rows), schedule, tmp_path, "", criterion)
        assert {path.name for path in tmp_path.glob("*_heatmap.*")} == {
            f"{criterion}_heatmap{s}" for s in (".png", ".svg")
        }
        text = (tmp_path / "report.md").read_text()
        assert f"({criterion}_heatmap.png)" in text and f"{other}_heatmap" not in text


def test_values_stay_as_they_are_where_the_norm_is_lost_in_noise(drawn) -> None:
    rows, schedule = search_of()
    text = build_report(ErrorTable(rows), schedule, "", "ca_mse")
    assert "relative to the squared norm" in text and "gains in its units" not in text
    for row, value in zip(rows, np.geomspace(3e3, 1.2e5, len(rows)), strict=True):
        row |= {name: value for name in row if name.startswith(("bias2", "ca_variance", "ca_mse", "gain"))}
        row["reference_norm2"] = -1e-9
    table = ErrorTable(rows)
    figure = drawn(plot_gradient_error, table)
    for axes in figure.axes:
        texts = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
        assert {"5000", "1e4", "2e4", "5e4", "1e5"} <= set(texts) and overlapping(axes.get_xticklabels()) == []
    assert figure.axes[2].get_xlabel() == "CA-MSE"
    x = np.asarray(figure.axes[1].lines[0].get_xdata())
    values = {Strategy.from_dict(row): row["ca_variance"] for row in rows if row["progress"] == 0}
    np.testing.assert_allclose(x, [values[strategy] for strategy in table.strategies])
    text = build_report(table, schedule, "", "ca_mse")
    assert "gains in its units" in text and "relative to the squared norm" not in text


def test_gains_are_relative_to_the_uncompressed_strategy() -> None:
    rows, _ = search_of()
    costly = next(row for row in rows if row["token_dropout"] and row["patch_size"] == 4)
    for row in rows:
        if Strategy.from_dict(row) == Strategy.from_dict(costly):
            row["relative_cost"] = 1.1
    table = ErrorTable(rows)
    assert table.strategies[-1] == Strategy.from_dict(costly) and table.uncompressed == Strategy.from_dict(rows[0])
    for progress in table.points:
        gains = dict(zip(table.strategies, table.values("gain", progress), strict=True))
        assert gains[table.uncompressed] == 1 and gains[Strategy.from_dict(costly)] != 1


@pytest.mark.parametrize(
    "value, text",
    [
        *[(3, "3.0"), (0.994, "0.99"), (0.0123, "0.012"), (9.96, "10"), (20.4, "20"), (99.7, "100"), (123, "120")],
        *[(996, "1e3"), (0.0031, "3e-3"), (2.6e-7, "3e-7"), (0, "≤0"), (-4, "≤0")],
    ],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text
