import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_accel.compression import Compression, CostTable, build_cost_grid, build_cost_rows, forward_cost, measure_costs
from hf_accel.compression import cost as cost_module
from hf_accel.models import AccelViTConfig, AccelViTModel

CONFIG = AccelViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=4
)
BASE = Compression(4)


def test_a_compression_without_a_measured_cost_is_named():
    table = CostTable({BASE: 1.0, Compression(8): 0.3}, "cpu")
    assert table(Compression(8)) == 0.3
    with pytest.raises(KeyError, match=r"patch 8, dropout 0\.5.*patch 4, dropout 0.*cost_table\.json.*cost=analytic"):
        table(Compression(8, 0.5))


def test_measured_costs_are_relative_to_the_base_patch(monkeypatch):
    now: list[float] = [0.0]
    true_forward: Any = AccelViTModel.forward

    def forward(self, *args, **options):
        output = true_forward(self, *args, **options)
        now[0] += output.last_hidden_state.shape[1]  # a second a token
        return output

    monkeypatch.setattr(AccelViTModel, "forward", forward)
    monkeypatch.setattr(cost_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    table = measure_costs(CONFIG, [Compression(16), Compression(4, 0.9), Compression(16)], batch_size=2, repeats=2)
    assert list(table.costs) == [BASE, Compression(16), Compression(4, 0.9)] and table.device == "cpu"
    assert table(BASE) == 1
    assert table(Compression(16)) == pytest.approx(5 / 65) and table(Compression(4, 0.9)) == pytest.approx(7 / 65)


def test_the_median_of_the_rounds_after_the_warm_up_is_taken(monkeypatch):
    rounds = [(1000, 1), (10, 4), (10, 4), (70, 5), (10, 60), (10, 5)]  # seconds at the base patch and at patch 8
    durations, now = itertools.chain(*rounds), [0.0]

    def forward(self, *_, **__):
        now[0] += next(durations)

    monkeypatch.setattr(AccelViTModel, "forward", forward)
    monkeypatch.setattr(cost_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    table = measure_costs(CONFIG, [Compression(8)], batch_size=1, repeats=5)
    assert table.costs == {BASE: 1.0, Compression(8): 0.5}
    assert next(durations, None) is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_measuring_leaves_the_random_state_and_the_gradient_mode(dtype):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    measure_costs(CONFIG, [Compression(8, 0.5)], batch_size=2, repeats=1, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_report_rows_hold_every_possible_compression():
    grid = build_cost_grid(CONFIG)
    assert [c.patch_size for c in grid[::10]] == [4, 8, 16]
    assert [c.token_dropout for c in grid[:10]] == pytest.approx([0.1 * tenth for tenth in range(10)])
    table = CostTable({compression: 2.0 * number for number, compression in enumerate(grid)}, "cpu")
    rows = json.loads(json.dumps(build_cost_rows(CONFIG, table)))
    assert [row["measured"] for row in rows] == [2.0 * number for number in range(30)]
    for row, compression in zip(rows, grid, strict=True):
        side = 32 // compression.patch_size
        assert row["tokens"] == 1 + max(1, int(side**2 * (1 - compression.token_dropout)))
        assert row["analytic"] == pytest.approx(forward_cost(CONFIG, compression))
