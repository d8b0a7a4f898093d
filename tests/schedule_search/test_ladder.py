"""The ladder and the controller of `schedule: auto`, against loops, and the evidence by which it climbs."""

import json
import math
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy import stats

from hf_accel.compression import Compression, Plan, Strategy, forward_cost
from hf_accel.models import AccelViTConfig
from hf_accel.schedule_search import gradient_error
from hf_accel.schedule_search.choose import build_grid
from hf_accel.schedule_search.gradient_error import GradientErrorAccumulator
from hf_accel.schedule_search.ladder import OnlineController, build_ladder

CONFIG = AccelViTConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=96, patch_size=8
)
SIZES = [(48, 8), (224, 16), (28, 4), (16, 4), (96, 8)]


def units(strategy: Strategy, config: AccelViTConfig = CONFIG) -> float:
    return 3 * forward_cost(config, strategy.online) + forward_cost(config, strategy.target_branch)


def ladder_at(image_size: int, patch_size: int) -> tuple[list[Strategy], partial]:
    config = AccelViTConfig(**{**CONFIG.to_dict(), "image_size": image_size, "patch_size": patch_size})
    cost = partial(units, config=config)
    return build_ladder(image_size, patch_size, cost), cost


LADDER, _ = ladder_at(96, 8)
BATCH = 16


def controller_with(budget: float, share: float = 0.03, draws: int = 8, ladder: list[Strategy] = LADDER):
    return OnlineController(ladder, lambda strategy: BATCH * units(strategy), budget, share, draws)


# The ladder


@pytest.mark.parametrize(("image_size", "patch_size"), SIZES)
def test_a_ladder_rises_in_clear_steps_and_misses_none(image_size, patch_size):
    ladder, cost = ladder_at(image_size, patch_size)
    costs = [cost(strategy) for strategy in ladder]
    assert ladder[-1] == Strategy(Compression(patch_size)) and len(ladder) > 1
    assert all(lower <= 0.5 * upper for lower, upper in pairwise(costs))
    assert all(strategy.online.kept_tokens(image_size) >= 4 for strategy in ladder)
    candidates = [
        cost(strategy)
        for strategy in build_grid(image_size, patch_size, [0.0, 0.5])
        if strategy.online.kept_tokens(image_size) >= 4
    ]
    for lower, upper in pairwise([0.0, *costs]):  # below the first rung, and between two
        assert not [c for c in candidates if lower < c <= 0.5 * upper and c not in costs]


def test_an_image_of_few_tokens_has_no_ladder():
    ladder, cost = ladder_at(8, 4)
    assert ladder == [Strategy(Compression(4))]
    with pytest.raises(ValueError, match="no strategy to choose from"):
        OnlineController(ladder, cost, 1e9)


# When it probes


def least_units(ladder: list[Strategy], cost, draws: int) -> tuple[float, float]:
    """Units of the first probe, and of the costliest later one: a batch under each, and an uncompressed one."""

    def probe(strategies: list[Strategy]) -> float:
        batches = strategies if ladder[-1] in strategies else [*strategies, ladder[-1]]
        return sum(BATCH * cost(strategy) for strategy in batches for _ in range(draws))

    return probe(ladder), max(probe(ladder[i : i + 2]) for i in range(len(ladder) - 1))


@pytest.mark.parametrize("seed", range(30))
def test_as_many_points_and_then_draws_as_the_share_pays_for(seed):
    rng = np.random.default_rng(seed)
    ladder, cost = ladder_at(*SIZES[seed % len(SIZES)])
    share, draws = float(rng.uniform(0.01, 0.5)), int(rng.integers(3, 12))
    start, costliest = least_units(ladder, cost, draws)
    budget = float(rng.choice([rng.uniform(1, 30), rng.uniform(30, 300)])) * (start + costliest) / share
    count = 0
    while count < 20 and start + (count + 1) * costliest <= share * budget:
        count += 1
    most = draws
    while count == 20 and most < 64 and (start + 20 * costliest) * (most + 1) / draws <= share * budget:
        most += 1
    controller = OnlineController(ladder, lambda strategy: BATCH * cost(strategy), budget, share, draws)
    assert controller.points == pytest.approx([0.8 * i / (count + 1) for i in range(count + 1)])
    assert controller.draws == most and controller.cost_of(ladder) == pytest.approx(start * most / draws)
    one_unit_less = (start + costliest) / share * (1 - 1e-6)
    named = (
        rf"{draws} draws take {start + costliest:,.0f} units, and a share of {share:g} of the budget is [\d,]+: raise"
    )
    with pytest.raises(ValueError, match=named + " auto_share or the budget, lower auto_draws"):
        OnlineController(ladder, lambda strategy: BATCH * cost(strategy), one_unit_less, share, draws)


class Verdict(GradientErrorAccumulator):
    """Stands for an accumulator: the errors of the strategies by name, and whether the next rung is clearly better."""

    def __init__(self, controller: OnlineController, first: int, climb: bool):
        self.ladder, self.first, self.climb, self.starts = controller.ladder, first, climb, controller.probed == 0

    def result(self):
        accumulator = GradientErrorAccumulator(dict.fromkeys(self.ladder, 1.0))
        for draw in range(4):
            scale = {s: 1.0 if i == self.first else 100.0 for i, s in enumerate(self.ladder)}
            gradients = {s: torch.tensor([0.0, (-1.0) ** draw]) * scale[s] for s in self.ladder}
            accumulator.add(torch.zeros(2), gradients)
        return accumulator.result()

    def evidence(self, criterion, one, other):
        return 10.0 * (self.climb or self.starts)


def follow(
    ladder: list[Strategy], budget: float, share: float, first: int, climb
) -> tuple[list[float], Plan, OnlineController]:
    """A whole run: charges of its probes, the plan in the end, the controller. `climb(n)` is the n-th verdict."""
    controller = controller_with(budget, share, 3, ladder)
    plan = Plan(budget, controller.schedule(), BATCH, units)
    charges, step, most = [], 0, len(plan)
    while step < len(plan):
        progress = plan[step].progress
        if due := controller.due(progress, budget - plan[step].spent):
            assert controller.rung < len(ladder) - 1
            controller.decide(Verdict(controller, first, climb(len(charges))), progress)
            charges.append(controller.cost_of(due))
            plan.revise(step, controller.schedule(), charges[-1])
            assert len(plan) <= most  # no more steps than the run began with
        step += 1
    return charges, plan, controller


@pytest.mark.parametrize("share", [pytest.param(0.03, marks=pytest.mark.slow), 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("ladder", [LADDER, LADDER[-2:]], ids=["whole ladder", "two rungs"])
@pytest.mark.parametrize("climbing", ["always", "never", "at random"])
def test_probes_stay_in_the_share_and_runs_in_the_budget(share, ladder, climbing):
    rng = np.random.default_rng(0)
    climb = {"always": lambda n: True, "never": lambda n: False, "at random": lambda n: rng.random() < 0.3}[climbing]
    enough = sum(least_units(ladder, units, 3)) / share
    for budget, first in product(enough * np.array([1.0001, 1.52, 2.03, 3.59, 9.0]), (0, len(ladder) - 2)):
        charges, plan, controller = follow(ladder, float(budget), share, first, climb)
        assert 1 <= len(charges) <= len(controller.points)
        assert sum(charges) <= share * budget * (1 + 1e-9)
        assert plan.total_cost <= budget * (1 + 1e-9)
        assert budget - plan.total_cost < plan[len(plan) - 1].cost
        assert plan.total_cost == pytest.approx(sum(charges) + sum(step.cost for step in plan))
        rungs = [ladder.index(step.strategy) for step in plan]
        assert rungs == sorted(rungs) and (rungs[0] == first or plan[0].progress >= controller.deadlines[first])
        for step, rung in zip(plan, rungs, strict=True):
            passed = sum(step.progress >= 0.8 * (k + 1) / (len(ladder) - 1) for k in range(len(ladder) - 1))
            left = budget - step.spent >= BATCH * units(ladder[-1])
            assert rung >= max(first, passed) or not left  # too little for a costlier step
            assert climbing != "never" or rung <= max(first, passed)


def test_probes_are_due_at_the_points_below_the_top_rung():
    controller = controller_with(1e7)
    points = controller.points
    assert len(points) == 21 and points[-1] < 0.8 and controller.due(0.0, 1e7) == LADDER
    controller.decide(Verdict(controller, 1, False), 0.0)
    assert controller.due(0.0, 1e7) == controller.due(points[1] - 1e-9, 1e7) == []
    assert controller.due(points[1], 1e7) == LADDER[1:3] == controller.due(points[4] + 1e-9, 1e7)
    controller.decide(Verdict(controller, 1, False), points[4] + 1e-9)  # three points were passed by at once
    assert controller.due(points[4] + 1e-9, 1e7) == [] and controller.due(points[5], 1e7) == LADDER[1:3]
    for _ in range(len(LADDER) - 2):
        controller.decide(Verdict(controller, 1, True), controller.points[controller.probed])
    assert controller.strategy == LADDER[-1] and controller.due(1.0, 1e7) == []


def test_without_clear_evidence_a_rung_is_left_at_its_deadline():
    controller, last = controller_with(1e7), len(LADDER) - 1
    deadlines = [0.8 * (rung + 1) / last for rung in range(last)]
    for point in controller.points:
        passed = sum(point >= deadline for deadline in deadlines)
        assert controller.due(point, 1e7) == (LADDER if point == 0 else LADDER[passed : passed + 2])
        controller.evidence = [-1.0]
        controller.decide(Verdict(controller, 0, False), point)
        assert controller.rung == passed
        ends = [stage.until for stage in controller.schedule().stages]
        assert ends == [*deadlines[passed:], 1.0]
        assert [stage.strategy for stage in controller.schedule().stages] == LADDER[passed:]
    assert len(LADDER) > 3 and len({sum(p >= d for d in deadlines) for p in controller.points}) == last
    controller.evidence = [1.0]
    assert controller.due(0.8, 1e7) == [] and controller.strategy == LADDER[-1] and controller.evidence == []


# What it decides


def gradients(rng, bias: list[float], draws: int, size: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(draws, size) uncompressed and (len(bias), draws, size) with planted biases of these norms."""
    truth = rng.normal(size=size)
    shifts = rng.normal(size=(len(bias), 1, size))
    shifts *= np.array(bias)[:, None, None] / np.linalg.norm(shifts, axis=-1, keepdims=True)
    noise = rng.normal(size=(1 + len(bias), draws, size)) * 0.3
    return truth + noise[0], truth + shifts + 0.7 * noise[0] + 0.7 * noise[1:]


def accumulated(names, costs, reference, compressed) -> GradientErrorAccumulator:
    accumulator = GradientErrorAccumulator(dict(zip(names, costs, strict=True)))
    for draw, one in enumerate(reference):
        named = {name: torch.from_numpy(rows[draw]) for name, rows in zip(names, compressed, strict=True)}
        accumulator.add(torch.from_numpy(one), named)
    return accumulator


def ca_mse(reference: np.ndarray, compressed: np.ndarray, cost: float) -> float:
    """By loops, of (draws, size) each."""
    n, d = len(reference), compressed - reference
    bias2 = sum(d[i] @ d[j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    mean = sum(compressed) / n
    return bias2 + cost * sum((g - mean) @ (g - mean) for g in compressed) / (n - 1)


def brute_interval(value: float, left: list[float]) -> tuple[float, float]:
    n = len(left)
    mean = sum(left) / n
    margin = float(stats.t.ppf(0.975, n - 1)) * math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in left))
    return value - margin, value + margin


def brute_score(value: float, left: list[float]) -> float:
    """By Student's t of the leave-one-out, as a normal one of the same probability."""
    n = len(left)
    t = value / math.sqrt((n - 1) / n * sum((x - sum(left) / n) ** 2 for x in left))
    return float(stats.norm.isf(stats.t.sf(t, n - 1)))


def brute_evidence(reference, one, other, costs) -> float:
    def difference(rows):
        errors = [ca_mse(reference[rows], g[rows], c) for g, c in zip((one, other), costs, strict=True)]
        return errors[0] - errors[1]

    rows = list(range(len(reference)))
    return brute_score(difference(rows), [difference([i for i in rows if i != out]) for out in rows])


@pytest.mark.parametrize("draws", [4, 9])
def test_evidence_against_leaving_out_each_draw(draws):
    rng = np.random.default_rng(draws)
    reference, (one, other) = gradients(rng, [1.0, 0.5], draws)
    accumulator = accumulated("ab", (0.3, 0.6), reference, (one, other))
    expected = brute_evidence(reference, one, other, (0.3, 0.6))
    assert accumulator.evidence("ca_mse", "a", "b") == pytest.approx(expected)
    assert accumulator.evidence("ca_mse", "b", "a") == pytest.approx(-expected)
    assert accumulator.evidence("ca_mse", "a", "a") == 0
    assert pytest.approx(stats.norm.isf(0.025)) == gradient_error.CLEAR


def test_common_noise_hides_no_difference():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(8, 30))
    accumulator = accumulated("ab", (0.5, 0.5), reference, (reference * 1.51, reference * 1.5))
    intervals = [error.ca_mse_interval for error in accumulator.result().values()]
    assert intervals[0][0] < intervals[1][1] and intervals[1][0] < intervals[0][1]
    assert abs(accumulator.evidence("ca_mse", "a", "b")) > 3
    same = np.ones((4, 30))
    accumulator = accumulated("ab", (0.5, 0.5), same, (2 * same, same))
    assert accumulator.evidence("ca_mse", "a", "b") == -accumulator.evidence("ca_mse", "b", "a") == 10
    short = accumulated("ab", (0.5, 0.5), reference[:2], (reference[:2], reference[:2]))
    with pytest.raises(ValueError, match="at least 3 draws"):
        short.evidence("ca_mse", "a", "b")


def test_the_last_four_probes_of_a_rung_are_judged_together(monkeypatch):
    rng, scores, asked = np.random.default_rng(3), [], []
    monkeypatch.setattr(GradientErrorAccumulator, "evidence", lambda *of: asked.append([*of[2:]]) or scores[-1])
    controller, since, climbs, alone = controller_with(1e7), [], 0, 0
    controller.probed = 1
    controller.deadlines = list(np.linspace(0.97, 0.99, len(LADDER) - 1))  # after the last probe
    for point in controller.points[1:]:
        assert controller.due(point, 1e7) == LADDER[controller.rung : controller.rung + 2]
        scores.append(float(rng.normal(0.7)))
        since, rung = [*since, scores[-1]][-4:], controller.rung
        controller.decide(GradientErrorAccumulator({}), point)
        assert asked[-1] == LADDER[rung : rung + 2]
        if sum(since) / math.sqrt(len(since)) > 1.959964:
            assert controller.rung == rung + 1 and controller.evidence == []
            since, climbs, alone = [], climbs + 1, alone + (scores[-1] > 1.959964)
        else:
            assert controller.rung == rung and controller.evidence == since
        if controller.rung == len(LADDER) - 1:
            break
    assert climbs > alone  # some climbed which by the last probe alone would not have


def test_a_restored_controller_decides_like_the_original(monkeypatch):
    one = controller_with(1e7)
    one.decide(Verdict(one, 1, False), 0.0)
    one.decide(Verdict(one, 1, True), one.points[1])
    monkeypatch.setattr(Verdict, "evidence", lambda *_: 1.5)  # clear only with the one before
    one.decide(Verdict(one, 1, False), one.points[2])
    other = controller_with(1e7)
    other.restore(json.loads(json.dumps(one.state())))
    counters = {"rung": 2, "probed": 3, "evidence": [1.5]}
    assert other.state() == one.state() == one.state() | counters
    assert (
        other.strategy == one.strategy and other.due(one.points[3], 1e7) == one.due(one.points[3], 1e7) == LADDER[2:4]
    )
    for controller in (one, other):
        controller.decide(Verdict(controller, 1, False), controller.points[3])
        assert controller.rung == 3


def test_a_state_that_counts_rungs_of_another_ladder_is_refused():
    state = controller_with(1e7).state()
    of_an_old_version = {key: value for key, value in state.items() if key != "ladder"}
    for other in (controller_with(1e7, ladder=LADDER[1:]).state(), of_an_old_version):
        controller = controller_with(1e7)
        with pytest.raises(ValueError, match=r"climbs another ladder, .*start again in another output_dir"):
            controller.restore(other | {"rung": 1})
        assert controller.state() == state


def gain(reference: np.ndarray, compressed: np.ndarray, cost: float) -> float:
    """By loops, of (draws, size) each: || G ||^2 and || E g_a - G ||^2 from different draws, || E g_a ||^2 likewise."""
    n, d = len(reference), compressed - reference

    def of_different(rows):
        return sum(rows[i] @ rows[j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    product = (of_different(compressed) + of_different(reference) - of_different(d)) / 2
    return product / (cost * math.sqrt(sum(g @ g for g in compressed) / n))


@pytest.mark.parametrize(("criterion", "quantity"), [("ca_mse", ca_mse), ("gain", lambda *of: -gain(*of))])
def test_the_first_rung_is_the_cheapest_not_clearly_worse(criterion, quantity):
    outcomes = {"the best": 0, "cheaper": 0}
    for seed, noise in product(range(8), (0.05, 3.0)):
        rng = np.random.default_rng(seed)
        controller = OnlineController(LADDER, lambda strategy: BATCH * units(strategy), 1e6, 0.5, 4, criterion)
        costs = list(controller.relative_cost.values())
        reference = rng.normal(size=20) + noise * rng.normal(size=(6, 20))
        compressed = [reference * slope for slope in rng.uniform(-1, 1, len(LADDER) - 1)]
        compressed = [*(rows + 0.3 * noise * rng.normal(size=rows.shape) for rows in compressed), reference]
        draws = np.arange(len(reference))

        def losses(of, reference=reference, compressed=compressed, costs=costs):
            return [quantity(reference[of], g[of], cost) for g, cost in zip(compressed, costs, strict=True)]

        estimates, left = losses(draws), [losses(np.delete(draws, out)) for out in draws]
        best = int(np.argmin(estimates))
        lows = [
            brute_interval(estimates[k] - estimates[best], [without[k] - without[best] for without in left])[0]
            for k in range(len(LADDER))
        ]
        expected = next(k for k in range(len(LADDER)) if k == best or lows[k] <= 0)
        chosen = controller.decide(accumulated(LADDER, costs, reference, compressed), 0.0)
        assert chosen == LADDER[expected] == controller.strategy and controller.probed == 1
        outcomes["the best" if expected == best else "cheaper"] += 1
    assert min(outcomes.values()) >= 3, outcomes


@pytest.mark.parametrize("criterion", ["ca_mse", "gain"])
@pytest.mark.parametrize("above_is_better", [True, False])
def test_it_climbs_to_the_lesser_error_or_to_the_greater_gain(criterion, above_is_better):
    controller = OnlineController(LADDER[-2:], lambda strategy: BATCH * units(strategy), 1e6, 0.5, 4, criterion)
    controller.probed = 1
    this, above = controller.ladder
    accumulator = GradientErrorAccumulator({this: controller.relative_cost[this], above: 1.0})
    for draw in range(4):
        reference = torch.tensor([1.0, 0.01 * draw])
        accumulator.add(reference, {this: -3 * reference if above_is_better else reference, above: reference})
    controller.decide(accumulator, controller.points[1])
    assert controller.strategy == (above if above_is_better else this)
