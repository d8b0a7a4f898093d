from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import yaml

from hf_accel.compression import Compression, Schedule, Strategy
from hf_accel.schedule_search.choose import build_grid, build_schedule, build_schedule_file, choose_strategies
from hf_accel.schedule_search.gradient_error import GradientError


def error(ca_mse: float, width: float = 0.0) -> GradientError:
    interval = (ca_mse - width, ca_mse + width)
    return GradientError(0.0, ca_mse, ca_mse, ca_mse, 1.0, (0.0, 0.0), interval, 1 / ca_mse, (1 / ca_mse, 1 / ca_mse))


def test_the_grid_holds_every_strategy_once():
    grid = build_grid(28, 4, [0.0, 0.5], symmetries=["paper", "symmetric", "asymmetric"])
    expected = {
        Strategy(Compression(p, r), Compression(*target))
        for p, r in product([4, 7, 14], [0.0, 0.5])
        for target in [(p, 0.0), (p, r), (4, 0.0)]
    }
    assert grid[0] == Strategy(Compression(4)) and set(grid) == expected and len(grid) == len(expected)
    with pytest.raises(ValueError, match=r"patch_size 5.*\[4, 7, 14\]"):
        build_grid(28, 4, [0.0], [5])
    with pytest.raises(ValueError, match=r"papper.*paper"):
        build_grid(28, 4, [0.0], symmetries=["papper"])


def rule_of_one_stage(stage, cost, criterion: str) -> list[float]:
    """What each strategy adds to the sum of logarithms, transcribed from the words of `choose_strategies`."""
    if criterion == "gain":
        sure = [error.gain_interval[0] for error in stage.values()]
        if max(sure) <= 0:
            costliest = max(stage, key=cost.__getitem__)
            sure = [float(strategy == costliest) for strategy in stage]
        return [-np.log(max(gain, max(sure) / 1000)) for gain in sure]
    (_, best) = min((error.ca_mse, i) for i, error in enumerate(stage.values()))
    best = list(stage.values())[best]
    tied = [best.ca_mse if error.ca_mse <= best.ca_mse_interval[1] else error.ca_mse for error in stage.values()]
    positive = [error.ca_mse for error in stage.values() if error.ca_mse > 0]
    return [np.log(max(value, min(positive))) if positive else 0.0 for value in tied]


@pytest.mark.parametrize("criterion", ["ca_mse", "gain"])
@pytest.mark.parametrize("seed", range(30))
def test_the_choice_of_noisy_estimates_against_every_sequence(seed, criterion):
    """Intervals, ties, estimates below zero, and strategies in any order."""
    rng = np.random.default_rng(seed)
    strategies = [Strategy(Compression(4, r)) for r in rng.permutation([0.75, 0.6, 0.5, 0.25, 0.0])]
    cost = dict(zip(strategies, rng.permutation([0.1, 0.2, 0.35, 0.7, 1.0]), strict=True))
    shift = rng.choice([0.0, 1.0, 9.0])

    def estimate() -> GradientError:
        value, width, gain, unsure = *rng.lognormal(size=3), rng.lognormal() * rng.choice([0.1, 1.0])
        noisy = replace(error(1.0), ca_mse=value - shift, gain=gain, gain_interval=(gain - unsure - shift, gain))
        return replace(noisy, ca_mse_interval=(value - shift - width, value - shift + width))

    stages = [{strategy: estimate() for strategy in strategies} for _ in range(4)]
    losses = [rule_of_one_stage(stage, cost, criterion) for stage in stages]

    def value(way: tuple[int, ...]) -> tuple[float, float]:
        units = [cost[strategies[k]] for k in way]
        total = sum(stage[k] for stage, k in zip(losses, way, strict=True))
        return (round(total, 9), sum(units)) if units == sorted(units) else (np.inf, 0.0)

    ways = list(product(range(5), repeat=4))
    chosen = tuple(strategies.index(s) for s in choose_strategies(stages, cost, criterion))
    assert value(chosen) == pytest.approx(min(map(value, ways)))


def test_of_tied_strategies_the_cheaper_wins():
    cheap, middle, full = (Strategy(Compression(4, r)) for r in (0.75, 0.5, 0.0))
    cost = {cheap: 0.4, middle: 0.6, full: 1.0}
    stage = {cheap: error(1.5), middle: error(1.2), full: error(1.0, width=0.3)}
    assert choose_strategies([stage], cost) == [middle]
    stage[full] = error(1.0, width=0.1)
    assert choose_strategies([stage], cost) == [full]
    stage[full] = error(1.0, width=0.6)
    assert choose_strategies([stage], cost) == [cheap]


def gaining(gain: float, width: float = 0.0) -> GradientError:
    return replace(error(1.0, width=9.0), gain=gain, gain_interval=(gain - width, gain + width))


def test_the_surest_gain_wins_or_the_uncompressed_strategy():
    cheap, middle, full = (Strategy(Compression(4, r)) for r in (0.75, 0.5, 0.0))
    cost = {cheap: 0.4, middle: 0.6, full: 1.0}
    clear = {cheap: gaining(1.9), middle: gaining(2.0), full: gaining(1.0)}
    assert choose_strategies([clear], cost) == [cheap] and choose_strategies([clear], cost, "gain") == [middle]
    noisy = {cheap: gaining(3.0, 2.5), middle: gaining(2.0, 1.1), full: gaining(1.0, 0.05)}
    assert choose_strategies([noisy], cost, "gain") == [full]
    lost = {cheap: gaining(9.0, 20.0), middle: gaining(2.0, 9.0), full: gaining(1.0, 2.0)}
    assert choose_strategies([lost], cost, "gain") == [full]
    assert choose_strategies([clear, noisy, lost], cost, "gain") == [middle, full, full]


def test_stages_reach_halfway_to_their_neighbours_or_merge():
    a, b, c = (Strategy(Compression(p)) for p in (14, 7, 4))
    schedule = build_schedule([0.0, 0.25, 0.5, 0.75, 1.0], [a, a, b, c, c])
    assert [(stage.until, stage.strategy) for stage in schedule.stages] == [(0.375, a), (0.625, b), (1.0, c)]
    assert build_schedule([0.4], [b]) == Schedule.constant(b)
    assert Schedule(list(schedule.stages)) == schedule  # pyright: ignore[reportArgumentType]


def test_a_schedule_file_is_read_at_another_base_patch(tmp_path):
    found = build_schedule([0.0, 0.5, 1.0], [Strategy(Compression(p, r)) for p, r in ((32, 0.5), (24, 0.0), (16, 0.0))])
    path = tmp_path / "schedule.yaml"
    path.write_text(yaml.safe_dump(build_schedule_file(found, 16, data="x", command="y")))
    assert Schedule.parse(str(path), 16) == found
    moved = Schedule.parse(str(path), 4)
    assert [stage.strategy.online for stage in moved.stages] == [Compression(8, 0.5), Compression(6), Compression(4)]
    assert [stage.until for stage in moved.stages] == [stage.until for stage in found.stages]
    for old, new in zip(found.stages, moved.stages, strict=True):  # the same share of the uncompressed tokens
        tokens = [
            s.strategy.online.kept_tokens(size) / (size // base) ** 2 for s, size, base in ((old, 96, 16), (new, 24, 4))
        ]
        assert tokens[0] == tokens[1]
    with pytest.raises(ValueError, match=r"patches of 24 pixels at base patch 16 would be 10.5 pixels"):
        Schedule.parse(str(path), 7)


@pytest.mark.parametrize(
    "text", ["patch_size: 4", "{patch_size: 4, stages: 3}", "{patch_size: '4', stages: [{until: 1.0}]}", "{}"]
)
def test_a_schedule_file_without_stages_is_refused(text, tmp_path):
    (tmp_path / "schedule.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a file holds a list of stages, or `stages`.*got stages="):
        Schedule.parse(str(tmp_path / "schedule.yaml"), 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule: [{until: 1.0}]", "'schedule' is no key .* patch_size and stages; give the list alone"),
        ("patch_sise: 4\nstages: [{until: 1.0}]", "'patch_sise' is no key .* patch_size and stages; leave it out"),
    ],
)
def test_an_unknown_key_of_a_schedule_file_is_refused(text, message, tmp_path):
    (tmp_path / "schedule.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Schedule.parse(str(tmp_path / "schedule.yaml"), 4)


@pytest.mark.parametrize("text", ["{}", "patch_sise: 4", "[]", "words", "- {until: 0.5}", "- {until: 1.0, patch: 4}"])
def test_errors_in_a_schedule_file_name_the_file(text, tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        Schedule.parse(str(path), 4)
    assert str(raised.value).startswith(f"schedule: {path}: ")
