"""Names in figures: characters come from any font that has them, else they become codes, and nothing is a formula."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_accel.report import fonts
from hf_accel.report.curves import plot_accuracies
from hf_accel.report.feature_map import plot_feature_map
from hf_accel.report.fonts import find_missing, list_fonts, save_figure

SHIPPED = matplotlib.get_data_path()
CIRCLED = "Ⓐ"
"""A character that STIXGeneral has and DejaVu Sans lacks; both come with matplotlib, and no font there has Chinese."""


@pytest.fixture(autouse=True)
def shipped_fonts(monkeypatch):
    """The machine has the fonts that come with matplotlib, and nothing has been found or said before."""
    found = {family: path for family, path in list_fonts().items() if path.startswith(SHIPPED)}
    monkeypatch.setattr(fonts, "list_fonts", lambda: found)
    monkeypatch.setattr(fonts, "_families", {})
    fonts._say_code.cache_clear()


def test_a_character_comes_from_another_font(tmp_path, monkeypatch, capsys, caplog) -> None:
    is_bold = [font.name == "STIXGeneral" and int(font.weight) > 400 for font in fonts.fontManager.ttflist]
    upright = [font for font, left_out in zip(fonts.fontManager.ttflist, is_bold, strict=True) if not left_out]
    monkeypatch.setattr(fonts.fontManager, "ttflist", upright)
    figure = Figure()
    plain, circled, bold = (figure.text(0, 0, name) for name in ("кошка", CIRCLED, f"{CIRCLED} {CIRCLED.lower()}"))
    bold.set_fontweight("bold")
    families = plain.get_fontfamily()
    save_figure(figure, tmp_path / "a.png")  # a warning would be an error
    save_figure(figure, tmp_path / "a.svg")
    assert plain.get_fontfamily() == families
    assert circled.get_fontfamily() == bold.get_fontfamily() == [*families, "STIXGeneral"]
    assert (plain.get_text(), circled.get_text()) == ("кошка", CIRCLED)
    assert capsys.readouterr().out == "" and not caplog.records


def test_what_no_font_has_is_a_code_and_is_said_once(tmp_path, capsys) -> None:
    for _ in range(2):
        figure = Figure()
        title = figure.suptitle(f"MoCo on 猫\u3000{CIRCLED}")
        save_figure(figure, tmp_path / "a.png")
        assert title.get_text() == f"MoCo on \\u732b\\u3000{CIRCLED}"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "No font on this machine" in said and r"such as \u3000." in said
    assert find_missing("a猫é") == {"猫"} and find_missing("plain") == set()


def test_a_file_name_that_is_no_text_is_drawn(tmp_path) -> None:
    figure = Figure()
    text = figure.text(0, 0, "caf\udce9")
    save_figure(figure, tmp_path / "a.png")
    assert text.get_text() == "caf\\udce9"


def test_dollars_are_no_formula_and_accents_are_composed(tmp_path) -> None:
    figure = Figure()
    text = figure.text(0, 0, "A\u0308 $5 to $\\wrong$")
    save_figure(figure, tmp_path / "a.png")
    assert text.get_text() == r"Ä $5 to $\wrong$" and not text.get_parse_math()


def test_one_font_serves_as_many_characters_as_it_can(monkeypatch) -> None:
    has = {"Few": "猫", "Many": "猫犬", "More Sans": "猫犬", "Other": "鳥"}
    monkeypatch.setattr(fonts, "list_fonts", lambda: {family: family for family in has})
    monkeypatch.setattr(fonts, "_select", lambda characters, path: characters & set(has[path]))
    expected = {"猫": "More Sans", "犬": "More Sans", "鳥": "Other", "魚": None}
    assert fonts.find_families("鳥犬魚猫") == expected


def test_fonts_installed_later_are_found_and_empty_ones_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.undo()
    listed = [font for font in fonts.fontManager.ttflist if font.name != "STIXGeneral"]
    monkeypatch.setattr(fonts.fontManager, "ttflist", listed)
    assert "STIXGeneral" not in list_fonts()
    (tmp_path / "damaged.ttf").write_text("no font")
    new = f"{SHIPPED}/fonts/ttf/STIXGeneral.ttf"
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(tmp_path / "damaged.ttf"), new])
    found = list_fonts()
    assert found["STIXGeneral"] == new and Path(found["DejaVu Sans"]).name == "DejaVuSans.ttf"
    assert not [family for family in found if "resort" in family.lower()]


def test_names_with_an_underscore_in_front_are_in_the_legend(tmp_path, monkeypatch) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    names, logs = ["_first", "second"], [{"step": 0, "units": 0.0, "eval_knn_top1": 0.5}]
    plot_accuracies(names, [logs, logs], [1, 1], tmp_path / "compare.png")
    points, image = np.random.default_rng(0).random((6, 2)), np.zeros((2, 2, 3))
    plot_feature_map(points, np.arange(6) % 2, names, lambda row: image, tmp_path / "map.png")
    assert [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures] == [names, names]
