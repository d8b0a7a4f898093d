"""benchmarks/cost.py at a toy size: its table, its JSON, its arithmetic, and that what it times is training."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import cost
from hf_accel.compression import Compression, Strategy

ARGUMENTS = [
    *("--model", "vit_tiny", "--image-size", "32", "--patch-size", "4", "--batch-size", "4", "--repeats", "2"),
    *("--threads", "1", "--projector-hidden-size", "64", "--strategies", "4:0.5", "8", "16:0.25"),
]
# patch size, token dropout, pixels of the views, tokens with CLS of the query and of the key
ROWS = [(4, 0, 32, 65, 65), (4, 0.5, 32, 33, 65), (8, 0, 32, 17, 17), (16, 0.25, 32, 4, 5), (8, 0, 16, 17, 17)]
ROWS += [(16, 0.25, 8, 4, 5)]


def flops(patch_size: int, tokens: int) -> int:
    """Multiply-adds of a ViT-Ti forward: 12 layers of width 192, counted weight by weight."""
    embedding = (tokens - 1) * 3 * patch_size * patch_size * 192
    layer = tokens * (4 * 192 * 192 + 2 * 192 * 768) + 2 * tokens * tokens * 192
    return embedding + 12 * layer


def check_run(output: Path, printed: str) -> None:
    written = json.loads(output.read_text())
    rows = written["rows"]
    keys = ("patch_size", "token_dropout", "view_size", "tokens", "target_tokens")
    assert [tuple(row[key] for key in keys) for row in rows] == ROWS
    table = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0]] == list(cost.COLUMNS)
    assert len(table) == 2 + len(ROWS)
    for row, (patch_size, _, _, tokens, target_tokens), cells in zip(rows, ROWS, table[2:], strict=True):
        sample = 3 * flops(patch_size, tokens) + flops(patch_size, target_tokens)
        assert row["analytic"] == pytest.approx(sample / (4 * flops(4, 65)))
        assert row["measured_over_analytic"] == pytest.approx(row["measured"] / row["analytic"])
        assert row["measured_range"][0] <= row["measured"] <= row["measured_range"][1]
        assert all(row[f"{part}_ms_per_image"] > 0 for part in cost.PARTS)
        assert [cell.strip() for cell in cells] == [show(row) for show in cost.COLUMNS.values()]
    assert rows[0]["measured"] == rows[0]["measured_over_analytic"] == rows[0]["encoder_over_analytic"] == 1
    assert written["batch_size"] == 4 and written["model"] == "vit_tiny" and written["threads"] == 1
    assert written["environment"]["versions"]["torch"] == torch.__version__
    assert "whole step: " in printed and "encoder alone: no row has 49 tokens" in printed


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(["--device", "cpu"], marks=pytest.mark.slow),
        pytest.param(["--device", "cuda", "--precision", "bf16"], marks=pytest.mark.gpu),
    ],
    ids=["cpu", "cuda"],
)
def test_toy_run(device: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "cost.json"
    assert cost.main([*ARGUMENTS, *device, "--output", str(output)]) == 0
    check_run(output, capsys.readouterr().out)


def test_ten_strategies_by_default() -> None:
    args = cost.parse_arguments([])
    cases = cost.cases_of(args)
    full = [case.strategy.online for case in cases if case.view_size == 240]
    assert full[0] == Compression(16) and len(set(full)) == 11
    kinds = {(online.token_dropout > 0, online.patch_size > 16) for online in full[1:]}
    assert kinds == {(True, False), (False, True), (True, True)}
    matched = {case.strategy.online.patch_size: case.view_size for case in cases if case.view_size < 240}
    assert matched == {20: 192, 24: 160, 30: 128, 48: 80}


def test_a_step_trains_both_branches() -> None:
    args = cost.parse_arguments([*ARGUMENTS, "--device", "cpu"])
    step = cost.Step(args)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    seconds = step(cost.cases_of(args)[1])
    assert set(seconds) == set(cost.PARTS)
    after = step.model.state_dict()
    for module in ("encoder.layers.0", "encoder.layers.11", "projector", "predictor", "momentum_encoder.layers.0"):
        names = [name for name in before if name.startswith(module) and name.endswith("weight")]
        assert names and all(not torch.equal(before[name], after[name]) for name in names), module


def test_parts_are_summed_over_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 11.0, 111.0, 1111.0, 11111.0, 111111.0, 1111111.0])
    monkeypatch.setattr(cost.time, "process_time", lambda: next(ticks))
    args = cost.parse_arguments([*ARGUMENTS, "--device", "cpu", "--clock", "process"])
    # data 1, query encoder 10 and heads 100, key encoder 1000, key heads, loss and backward of the heads 10000,
    # backward of the encoder 100000, optimizer 1000000
    expected = {"data": 1.0, "encoder": 101010.0, "heads": 10100.0, "optimizer": 1000000.0}
    assert cost.Step(args)(cost.cases_of(args)[0]) == expected


def test_ratios_are_taken_within_a_round() -> None:
    """The machine is three times slower in the second round, which a ratio of separate medians would not cancel."""
    args = cost.parse_arguments([*ARGUMENTS, "--device", "cpu", "--repeats", "3"])
    base, half = cost.cases_of(args)[:2]
    shares = {base: (2.0, 8.0, 4.0, 2.0), half: (2.0, 4.0, 2.0, 4.0)}  # 16 and 12 seconds
    order, round_speed = [], [100.0, 1.0, 3.0, 1.0]

    def step(case: cost.Case) -> dict[str, float]:
        speed = round_speed[len(order) // 2]
        order.append(case)
        return {part: share * speed for part, share in zip(cost.PARTS, shares[case], strict=True)}

    seconds = cost.measure(step, [base, half], 3)
    assert order == [half, base, base, half, half, base, base, half]
    rows = cost.table_rows(args, cost.Step(args).model, seconds)
    assert rows[1]["measured"] == 12 / 16 and rows[1]["measured_range"] == [12 / 16, 12 / 16]
    assert rows[1]["encoder_over_analytic"] == pytest.approx(0.5 / rows[1]["analytic"])
    assert rows[1]["ms_per_image"] == 12 * 1000 / 4 and rows[1]["optimizer_ms_per_image"] == 4 * 1000 / 4


def test_aim_counts_long_rows_only() -> None:
    ratios = [(65, 1.0), (57, 1.14), (49, 0.8), (48, 9.0)]
    rows = [{"tokens": tokens, "ratio": ratio} for tokens, ratio in ratios]
    assert cost.aim_line(rows, "ratio", "x").startswith("x: 1 of 2 rows within 15%")
    assert cost.aim_line(rows, "ratio", "x").endswith("worst 0.80")


def test_strategies_are_the_papers_default() -> None:
    assert cost.parse_strategy("24:0.5") == Strategy(Compression(24, 0.5), Compression(24))


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--strategies", "17"], "must be one of [16, 20,"),
        (["--strategies", "16:half"], "no strategy PATCH[:DROPOUT]"),
        (["--strategies", "16:1.5"], "must lie in [0, 1)"),
        (["--batch-size", "1"], "--batch-size"),
        (["--device", "cuda", "--clock", "process"], "use --clock wall"),
    ],
)
def test_impossible_options(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cost.main(arguments)
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


FILES = sorted(Path(cost.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", [path.stem for path in FILES if "def main(" in path.read_text()])
def test_help(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert stopped.value.code == 0 and f"python -m benchmarks.{name}" in capsys.readouterr().out
