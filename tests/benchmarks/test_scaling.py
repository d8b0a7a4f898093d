"""benchmarks/scaling.py against the formula of docs/scaling.md, by hand."""

import json

import pytest

from benchmarks import scaling


def test_hours_by_hand():
    run = scaling.Run(units=3.6e6, steps=1000, trained=10**8, target=5 * 10**7)
    assert scaling.hours(run, "zero3", 1, 0.001, 1e9) == (1.0, 0.0)  # alone, nobody is to be told anything
    # 4 GPUs: 900 s of computing; 3/4 of 2 x 0.4 GB a step at 1 GB/s: 600 s, of which half of the computing hides 450
    assert scaling.payload(run, "ddp", 4) == pytest.approx(0.6e9)
    assert scaling.hours(run, "ddp", 4, 0.001, 1e9, 0.5) == pytest.approx((1050 / 3600, 150 / 3600))
    # ZeRO-3: 3/4 of (3 x 0.4 + 0.2) GB
    assert scaling.payload(run, "zero3", 4) == pytest.approx(1.05e9)
    assert scaling.hours(run, "fsdp2", 4, 0.001, 1e12, 0.5) == pytest.approx((0.25, 0.0))


def test_a_recipe_is_counted_without_its_weights(tmp_path, capsys):
    output = tmp_path / "scaling.json"
    assert scaling.main(["recipes/moco.yaml", "--ms-per-unit", "2.0", "--gpus", "1", "2", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert "688 steps" in capsys.readouterr().out
    alone, two = (next(r for r in rows if r["engine"] == "ddp" and r["gpus"] == gpus) for gpus in (1, 2))
    assert alone["hours"] == pytest.approx(240_000 * 0.002 / 3600, rel=0.01)
    assert two["hours"] == pytest.approx(alone["hours"] / 2 + two["waiting_hours"])
