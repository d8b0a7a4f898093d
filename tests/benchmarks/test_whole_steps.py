"""benchmarks/whole_steps.py at a toy size: rows of both settings, relative to their own uncompressed step."""

import json

import pytest

from benchmarks import whole_steps
from benchmarks.gpu import WHOLE_TOY

RECIPE = "recipes/imagenet100/moco_vit_s16.yaml"


def test_images_beyond_the_different_ones_are_links(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(whole_steps, "DIFFERENT", 2)
    whole_steps.write_images(tmp_path, 5)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5 and files[0].samefile(files[2]) and files[0].samefile(files[4])
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.slow
def test_rows_of_the_benchmark_of_whole_steps(tmp_path, capsys) -> None:
    output, asked = tmp_path / "whole.json", []
    load = whole_steps.load_recipe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_steps, "load_recipe", lambda *words: asked.append(words[1]) or load(*words))
        words = [RECIPE, *WHOLE_TOY, "--beside", "view_resolution=matched,cache=none", "--threads", "1"]
        assert whole_steps.main([*words, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["settings"], row["patch_size"], row["tokens"]) for row in rows] == [
        *(("recipe", patch, tokens) for patch, tokens in ((8, 17), (16, 5))),
        *(("view_resolution=matched,cache=none", patch, tokens) for patch, tokens in ((8, 17), (16, 5))),
    ]
    assert [row["time"] for row in rows[::2]] == [1, 1] and all(0.2 < row["units"] < 0.5 for row in rows[1::2])
    for base, row in (rows[:2], rows[2:]):
        assert row["time"] == pytest.approx(row["seconds"] / base["seconds"])
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
    assert "cache=none" in asked[1] and "cache=none" not in asked[0] and "time/units" in capsys.readouterr().out
