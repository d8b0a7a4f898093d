"""Records of strategies: no field is lost between writing and reading."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import yaml

from hf_accel.compression import Compression, CostTable, Plan, Schedule, Stage, Strategy
from hf_accel.schedule_search.choose import build_schedule_file
from hf_accel.schedule_search.error_table import ErrorTable
from hf_accel.schedule_search.gradient_error import GradientError

ERROR = GradientError(1.0, 2.0, 0.5, 1.5, 4.0, (0.9, 1.1), (1.4, 1.6), 3.0, (2.5, 3.5))


@dataclass(frozen=True, order=True)
class Masked(Compression):
    """A compression with a field more."""

    mask: str = "none"


@pytest.fixture
def masked(monkeypatch) -> partial:
    """The class of compressions with a field more, in every module that makes compressions."""
    for module in ("strategy", "schedule", "cost"):
        monkeypatch.setattr(f"hf_accel.compression.{module}.Compression", Masked)
    return partial(Masked, mask="block")


def build_strategies(make: Any) -> list[Strategy]:
    plain = Strategy(make(4), make(4, 0.25))
    return [Strategy(make(8, 0.5), make(8), make(8, 0.75)), plain]


@pytest.fixture(params=["compressions of today", "compressions with a field more"])
def strategies(request) -> list[Strategy]:
    return build_strategies(Compression if "today" in request.param else request.getfixturevalue("masked"))


def build_schedule(strategies: list[Strategy]) -> Schedule:
    return Schedule((Stage(0.5, strategies[0]), Stage(1.0, strategies[1])))


def test_a_record_of_a_strategy_keeps_every_field(strategies):
    for strategy in strategies:
        record = json.loads(json.dumps(strategy.to_dict()))
        assert Strategy.from_dict(record) == strategy and set(record) <= set(Strategy.keys())


def test_a_schedule_file_keeps_every_field(strategies, tmp_path):
    schedule = build_schedule(strategies)
    path = tmp_path / "schedule.yaml"
    path.write_text(yaml.safe_dump(build_schedule_file(schedule, 4)))
    assert Schedule.parse(str(path), 4) == schedule


def test_a_transferred_schedule_keeps_every_field(strategies):
    schedule = build_schedule(strategies)
    moved = schedule.transferred(4, 16)
    sizes = [stage.strategy.local.patch_size for stage in moved.stages if stage.strategy.local]
    assert sizes == [32] and moved != schedule and moved.transferred(16, 4) == schedule


def test_the_state_of_a_plan_keeps_every_field(strategies):
    schedule = build_schedule(strategies)
    plan, other = (Plan(100, of, 2, lambda _: 1.0) for of in (schedule, Schedule.constant(strategies[0])))
    other.restore(json.loads(json.dumps(plan.state())), 4)
    assert [step.strategy for step in other] == [step.strategy for step in plan] and len(set(plan)) == 50


def test_a_cost_table_keeps_every_field(strategies, tmp_path):
    branches = [branch for s in strategies for branch in (s.online, s.target_branch, s.local) if branch]
    table = CostTable({branch: 0.1 * number for number, branch in enumerate(branches)}, "cpu")
    table.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == table and len(table.costs) == 5


@pytest.mark.parametrize("first", [0, 1])
def test_an_error_table_keeps_every_field(strategies, first, tmp_path):
    """Whichever row comes first: only one has local crops."""
    order = [strategies[first], strategies[1 - first]]
    table = ErrorTable([ErrorTable.build_row(0.5, s, ERROR, 0.1, 32, 3, "abc") for s in order])
    table.save(tmp_path / "errors.parquet")
    again = ErrorTable.load(tmp_path / "errors.parquet")
    assert again.errors(0.5) == dict.fromkeys(order, ERROR) and again.rows == table.rows
    chosen = again.choose([strategies[0]])
    assert chosen.chosen(0.5) == [strategies[0]] and chosen.rows.keys() == table.rows.keys()
