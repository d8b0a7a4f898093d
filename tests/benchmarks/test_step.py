"""benchmarks/step.py at a toy size: what it reports is what it timed."""

import json

import pytest

from benchmarks import step
from hf_accel.compression import Compression
from hf_accel.compression.cost import forward_flops
from hf_accel.models import PRESETS

ARGUMENTS = [
    *("--image-size", "32", "--patch-size", "8", "--batch-size", "4", "--repeats", "1", "--threads", "1"),
    *("--device", "cpu", "--projector-hidden-size", "64", "--strategies", "16", "8:0.5"),
]


def test_table_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "timed_step", lambda *_: 0.5)
    monkeypatch.setattr(step, "matmul_rate", lambda *_: 1e9)
    output = tmp_path / "step.json"
    assert step.main([*ARGUMENTS, "--output", str(output)]) == 0
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert [(row["who"], row["strategy"]) for row in written["rows"]] == [
        ("peer", "8"),
        ("ours", "8"),
        ("ours", "16"),
        ("ours", "8:0.5"),
    ]
    flops = forward_flops(PRESETS["vit_tiny"](image_size=32, patch_size=8), Compression(8))
    for row in written["rows"]:
        assert row["seconds"] == 0.5 and row["time"] == 1.0
        assert row["mfu"] == pytest.approx(4 * row["units"] * 4 * flops / 0.5 / 1e9)  # 4 units an image, 4 images
        assert f" {row['mfu']:.1%} |" in printed
    assert [row["units"] for row in written["rows"][:2]] == [1.0, 1.0]
    assert 0.2 < written["rows"][2]["units"] < 0.3 < written["rows"][3]["units"] < 0.8
    assert written["matmul_rate"] == 1e9 and written["batch_size"] == 4


@pytest.mark.slow
def test_a_real_step_of_each_side_is_timed(capsys):
    assert step.main([*ARGUMENTS, "--objective", "simclr"]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    assert len(lines) == 3 and all(float(line[3]) > 0 for line in lines)
    assert all(500 < int(line[9].replace(",", "")) < 5000 for line in lines)


def test_filling_a_cpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        step.parse_arguments([*ARGUMENTS, "--fill"])
    assert "--batch-size" in capsys.readouterr().err


@pytest.mark.gpu
def test_fill_finds_a_batch_that_fits(capsys):
    assert step.main(["--precision", "bf16", "--fill", "--repeats", "1", "--strategies", "32"]) == 0
    settings = dict(part.rsplit(" ", 1) for part in capsys.readouterr().out.splitlines()[0].split(", "))
    assert int(settings["batch_size"]) > 16
