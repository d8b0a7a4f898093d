"""The cost figure and table: every cell where it belongs."""

import numpy as np
from matplotlib.figure import Figure

from hf_accel.report import format_cost_table, plot_cost


def rows(measured: bool = True) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "patch_size": patch_size,
            "token_dropout": dropout,
            "tokens": 7,
            "analytic": rng.uniform(0.1, 1),
            "measured": rng.uniform(0.1, 1) if measured else None,
        }
        for dropout in (0.5, 0.0, 0.9)
        for patch_size in (8, 4)
    ]


def drawn(monkeypatch, tmp_path, table) -> Figure:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot_cost(table, tmp_path / "cost.png", "a title")
    return figures[0]


def cells(axes) -> dict[tuple[str, str], str]:
    """{(patch size, token dropout): text}, by the tick labels."""
    columns = [label.get_text() for label in axes.get_xticklabels()]
    lines = [label.get_text() for label in axes.get_yticklabels()]
    return {
        (lines[int(text.get_position()[1])], columns[int(text.get_position()[0])]): text.get_text()
        for text in axes.texts
    }


def test_every_cell(monkeypatch, tmp_path) -> None:
    table = rows()
    analytic, measured, ratio = drawn(monkeypatch, tmp_path, table).axes
    for axes, value in (
        (analytic, lambda row: row["analytic"]),
        (measured, lambda row: row["measured"]),
        (ratio, lambda row: row["measured"] / row["analytic"]),
    ):
        expected = {(f"{row['patch_size']}", f"{row['token_dropout']:g}"): f"{value(row):.2f}" for row in table}
        assert cells(axes) == expected
    assert analytic.images[0].get_clim() == measured.images[0].get_clim()


def test_without_measurements_there_is_one_panel(monkeypatch, tmp_path) -> None:
    (axes,) = drawn(monkeypatch, tmp_path, rows(measured=False)).axes
    assert len(axes.texts) == 6


def test_missing_combinations_stay_blank(monkeypatch, tmp_path) -> None:
    analytic, measured, ratio = drawn(monkeypatch, tmp_path, [*rows()[1:], {**rows()[0], "measured": None}]).axes
    assert [len(axes.texts) for axes in (analytic, measured, ratio)] == [6, 5, 5]


def test_one_row_is_written(tmp_path) -> None:
    plot_cost(
        [{"patch_size": 4, "token_dropout": 0.0, "tokens": 5, "analytic": 1.0, "measured": 1.0}], tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_text_table() -> None:
    table = [
        {"patch_size": 4, "token_dropout": 0.0, "tokens": 50, "analytic": 1.0, "measured": 1.1},
        {"patch_size": 14, "token_dropout": 0.9, "tokens": 2, "analytic": 0.0123},
    ]
    assert format_cost_table(table).splitlines() == [
        "| patch size | token dropout | tokens | analytic | measured | ratio |",
        "|-----------:|--------------:|-------:|---------:|---------:|------:|",
        "|          4 |          0.00 |     50 |   1.0000 |   1.1000 |  1.10 |",
        "|         14 |          0.90 |      2 |   0.0123 |        - |     - |",
    ]
