"""benchmarks/search.py at a toy size: every gradient of the grid is timed and priced, and the parts make the whole."""

import json

import pytest

from benchmarks import search

ARGUMENTS = [
    *("--image-size", "32", "--patch-size", "8", "--batch-size", "2", "--repeats", "1", "--threads", "1"),
    *("--device", "cpu", "--projector-hidden-size", "16", "--draws", "3", "--dropouts", "2"),
]


@pytest.mark.slow
def test_a_stage_is_timed_part_by_part(tmp_path, capsys):
    output = tmp_path / "search.json"
    memory = 6 * 8 * 6e6 / 1e9  # GB for six strategies of a ViT-Ti's: all four of the grid at once
    assert search.main([*ARGUMENTS, "--memory", str(memory), "--output", str(output)]) == 0
    found, printed = json.loads(output.read_text()), capsys.readouterr().out
    # patch 8 and 16, dropout 0 and 0.5; of the first pass the size is asked of one more uncompressed gradient
    assert [(row["patch_size"], row["gradients"]) for row in found["rows"]] == [(None, 4), (8, 3), (16, 6)]
    assert found["passes"] == 1 and found["rows"][0]["units"] == 4 * 2 * 4
    assert 3 * 2 * 2 < found["rows"][1]["units"] < 3 * 2 * 4  # dropout halves the query's tokens, and no key's
    assert found["units"] == pytest.approx(sum(row["units"] for row in found["rows"]))
    assert found["seconds"] == pytest.approx(found["seconds_of_sums"] + sum(row["seconds"] for row in found["rows"]))
    assert found["seconds_of_sums"] > 0 and found["predicted_seconds"] == found["units"] * found["seconds_per_unit"]
    for row in found["rows"]:
        assert row["over_training"] == pytest.approx(row["seconds"] / row["units"] / found["seconds_per_unit"])
        assert f" {row['seconds']:.2f} |" in printed
    assert f"predicted {found['predicted_seconds']:.1f} s, measured {found['seconds']:.1f} s" in printed


def test_too_few_draws_are_refused(capsys):
    with pytest.raises(SystemExit):
        search.parse_arguments(["--draws", "2"])
    assert "--draws must be at least 3" in capsys.readouterr().err
