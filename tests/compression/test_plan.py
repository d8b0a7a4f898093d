import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_accel.compression import Compression, Plan, Schedule, Stage, Strategy, forward_cost, forward_flops
from hf_accel.models import AccelViTConfig, AccelViTModel
from hf_accel.models.shortening_accel_vit import resize_patch_kernel

CONFIG = AccelViTConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=48, patch_size=8
)


def units(strategy: Strategy) -> float:
    return 3 * forward_cost(CONFIG, strategy.online) + forward_cost(CONFIG, strategy.target_branch)


@pytest.mark.parametrize("seed", range(20))
def test_plan_against_a_loop_that_spends_step_by_step(seed):
    rng = np.random.default_rng(seed)
    ends = [*np.sort(rng.uniform(0.05, 0.95, rng.integers(0, 4))).tolist(), 1.0]
    stages = [
        Stage(end, Strategy(Compression(int(rng.choice([8, 12, 16])), float(rng.uniform(0, 0.9))))) for end in ends
    ]
    schedule, budget, batch = Schedule(tuple(stages)), float(rng.uniform(500, 5000)), int(rng.integers(1, 40))
    plan = Plan(budget, schedule, batch, units)
    spent, count = 0.0, 0
    while True:
        strategy = schedule(spent / budget)
        cost = batch * units(strategy)
        if spent + cost > budget:
            break
        step = plan[count]
        assert step.strategy == strategy and step.progress == pytest.approx(spent / budget)
        spent, count = spent + cost, count + 1
    assert len(plan) == count
    begin = [0.0, *ends][-2]
    assert plan.pays_for_last_stage() == (plan[count - 1].progress >= begin)
    assert plan.total_cost == pytest.approx(spent) == pytest.approx(sum(step.cost for step in plan))
    assert plan.total_cost <= budget * (1 + 1e-9)


def test_a_budget_too_small_for_the_last_stage_is_known():
    cheap, costly = Strategy(Compression(16)), Strategy(Compression(8))
    schedule = Schedule((Stage(0.5, costly), Stage(0.9, cheap), Stage(1.0, costly)))
    step = 10 * units(costly)
    paid = {budget: Plan(budget * step, schedule, 10, units).pays_for_last_stage() for budget in (2, 5, 10, 20)}
    assert paid == {2: False, 5: False, 10: False, 20: True}
    assert Plan(step, Schedule.constant(costly), 10, units).pays_for_last_stage()


@pytest.mark.parametrize("cost", [0.1, 0.7, 128.0])
def test_a_budget_of_exactly_n_steps_buys_n(cost):
    """Whatever rounding makes of it: 0.3 / 0.1 is below 3, and 2.1 / 0.7 is above it."""
    first, second = Strategy(Compression(16)), Strategy(Compression(8))
    for count in range(2, 31):
        budget = float(f"{count * cost:.6g}")
        for steps in range(1, count):
            plan = Plan(budget, Schedule((Stage(steps / count, first), Stage(1.0, second))), 1, lambda _: cost)
            assert [step.strategy for step in plan] == [first] * steps + [second] * (count - steps)
            assert plan.pays_for_last_stage()
            plan.revise(steps, Schedule.constant(second))
            assert len(plan) == count
    with pytest.raises(ValueError, match="does not pay for one step"):
        Plan(cost * 0.99, Schedule.constant(first), 1, lambda _: cost)


@pytest.mark.parametrize("budget", [10, 200])
def test_the_rest_of_a_stage_buys_no_step_of_a_cheaper_one(budget):
    costly, cheap = Strategy(Compression(8)), Strategy(Compression(16, 0.75))
    schedule = Schedule((Stage(0.99, costly), Stage(1.0, cheap)))
    if budget < 4 * 16:  # not even one step at progress 0, and units enough for a cheap one
        assert 16 * units(cheap) < budget
        with pytest.raises(ValueError, match="does not pay for one step of 16 images, which costs 64 units"):
            Plan(budget, schedule, 16, units)
    else:
        plan = Plan(budget, schedule, 16, units)
        assert [step.strategy for step in plan] == [costly] * 3 and plan.total_cost == pytest.approx(192)


STRATEGIES = [Strategy(Compression(p, r)) for p, r in ((16, 0.5), (16, 0.0), (12, 0.0), (8, 0.5), (8, 0.0))]


def rising(rng) -> Schedule:
    """One to three stages, each costlier than the one before."""
    chosen = np.sort(rng.choice(5, rng.integers(1, 4), replace=False))
    ends = [*np.sort(rng.uniform(0.05, 0.95, len(chosen) - 1)), 1.0]
    return Schedule(tuple(Stage(float(end), STRATEGIES[index]) for end, index in zip(ends, chosen, strict=True)))


def revised(seed: int) -> tuple[Plan, list[tuple[int, Schedule, float]], float, int]:
    """A plan of one strategy, revised at up to four steps; its revisions, budget and batch size."""
    rng = np.random.default_rng(seed)
    budget, batch = float(rng.uniform(2000, 9000)), int(rng.integers(5, 20))
    plan = Plan(budget, Schedule.constant(STRATEGIES[rng.integers(5)]), batch, units)
    revisions, step = [], 0
    for _ in range(rng.integers(1, 5)):
        step += int(rng.integers(1 + len(plan) // 4)) if revisions or seed % 2 else 0
        change = (step, rising(rng), float(rng.uniform(0, 0.1) * budget))
        if step >= len(plan):
            break
        spent = plan[step].spent + change[2]
        progress = (spent - plan.start) / (budget - plan.start) if step else 0.0
        if spent > budget or spent + batch * units(change[1](min(1.0, progress))) > budget:
            break
        plan.revise(*change)
        if revisions and revisions[-1][0] == step:  # again before the same step: both charges are spent
            change = (step, change[1], change[2] + revisions.pop()[2])
        revisions.append(change)
    return plan, revisions, budget, batch


def charged_at_first(revisions) -> float:
    return sum(charge for step, _, charge in revisions if step == 0)


def walked(plan: Plan, revisions, budget: float, batch: int) -> list[tuple[Strategy, float, float]]:
    """(strategy, units before, units after) of every step, one by one; what the budget is too small for is left out."""
    spent, schedule, steps, changes = 0.0, plan.schedule, [], {step: change for step, *change in revisions}
    start = charged_at_first(revisions)
    while True:
        if len(steps) in changes:
            schedule, charge = changes[len(steps)]
            spent += charge
        strategy = schedule(min(1.0, (spent - start) / (budget - start)))
        if spent + batch * units(strategy) > budget * (1 + 1e-12) and steps and len(steps) not in changes:
            strategy = steps[-1][0]
        cost = batch * units(strategy)
        if spent + cost > budget * (1 + 1e-12):
            return steps
        steps.append((strategy, spent, spent + cost))
        spent += cost


@pytest.mark.parametrize("seed", range(20))
def test_a_revised_plan_against_a_loop_that_spends_step_by_step(seed):
    plan, revisions, budget, batch = revised(seed)
    steps = walked(plan, revisions, budget, batch)
    start = charged_at_first(revisions)
    assert len(plan) == len(steps) and len(plan) == len(list(plan)) and plan[0].progress == 0
    for index, (strategy, before, _) in enumerate(steps):
        assert plan[index].strategy == strategy and plan[index].cost == pytest.approx(batch * units(strategy))
        assert plan[index].spent == pytest.approx(before) == pytest.approx(plan.spent_after(index))
        assert plan[index].progress == pytest.approx((before - start) / (budget - start))
    assert plan.total_cost == plan.spent_after(len(plan)) == pytest.approx(steps[-1][2])
    charges = sum(charge for _, _, charge in revisions)
    assert plan.total_cost == pytest.approx(charges + sum(step.cost for step in plan))
    assert budget - plan.total_cost < batch * units(steps[-1][0])
    assert plan.total_cost <= budget * (1 + 1e-9)
    done = [(before - start) / (steps[-1][2] - start) for _, before, _ in steps]
    assert [plan.share_done(number) for number in range(len(plan) + 1)] == pytest.approx([*done, 1.0])
    assert plan.share_done(len(plan)) == 1 and plan.share_done(0) == 0


def test_the_revisions_of_the_loop_are_many_and_charged():
    counts = [len(revised(seed)[1]) for seed in range(20)]
    assert min(counts) >= 1 and max(counts) >= 3
    assert {revised(seed)[1][0][0] == 0 for seed in range(20)} == {True, False}
    stages = [len(revised(seed)[0].followed().stages) for seed in range(20)]
    assert max(stages) > max(counts) + 1  # revisions have stages of their own


@pytest.mark.parametrize("seed", range(20))
def test_the_schedule_that_a_revised_plan_amounts_to(seed):
    plan, revisions, budget, batch = revised(seed)
    steps = walked(plan, revisions, budget, batch)
    expected: list[tuple[float, Strategy]] = []
    start = charged_at_first(revisions)
    for (strategy, _, _), later in zip(steps, [*steps[1:], None], strict=True):
        if later is None or later[0] != strategy:
            expected.append(((later[1] - start) / (budget - start) if later else 1.0, strategy))
    followed = plan.followed()
    assert [stage.strategy for stage in followed.stages] == [strategy for _, strategy in expected]
    assert [stage.until for stage in followed.stages] == pytest.approx([until for until, _ in expected])
    assert Schedule.parse(json.loads(json.dumps(followed.to_list())), 8) == followed


def test_an_unrevised_plan_has_followed_its_schedule():
    stages = [Stage(0.3, STRATEGIES[0]), Stage(0.7, STRATEGIES[2]), Stage(1.0, STRATEGIES[4])]
    plan = Plan(6000, Schedule(tuple(stages)), 16, units)
    followed = plan.followed()
    assert [stage.strategy for stage in followed.stages] == [stage.strategy for stage in stages]
    for planned, taken in zip(stages, followed.stages, strict=True):  # a stage ends with the step that reaches its end
        assert 0 <= (taken.until - planned.until) * 6000 < 16 * units(planned.strategy) + 1e-6
    again = Plan(6000, followed, 16, units)
    assert [(s.strategy, s.spent) for s in again] == [(s.strategy, s.spent) for s in plan]
    same = [Stage(0.4, STRATEGIES[0]), Stage(0.8, STRATEGIES[0]), Stage(1.0, STRATEGIES[4])]
    merged = Plan(6000, Schedule(tuple(same)), 16, units).followed()
    assert [stage.strategy for stage in merged.stages] == [STRATEGIES[0], STRATEGIES[4]]
    plan = Plan(16 * units(STRATEGIES[0]), Schedule(tuple(stages)), 16, units)  # nothing is left for the later stages
    assert len(plan) == 1 and plan.followed() == Schedule.constant(STRATEGIES[0])


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_goes_on_from_its_state(seed):
    plan, _, budget, batch = revised(seed)
    other = Plan(budget, plan.schedule, batch, units)
    other.restore(json.loads(json.dumps(plan.state())), 8)
    assert list(other) == list(plan) and other.followed() == plan.followed()
    assert (other.num_steps, other.total_cost) == (plan.num_steps, plan.total_cost)
    step = len(plan) - 1
    for one in (plan, other):
        one.revise(step, Schedule.constant(STRATEGIES[0]), 0.0)
    assert list(other) == list(plan) and other.state() == plan.state()


def test_a_revision_without_a_step_is_refused_and_changes_nothing():
    plan = Plan(16 * 4 * 10, Schedule.constant(STRATEGIES[4]), 16, units)
    before = list(plan)
    with pytest.raises(ValueError, match=r"60 units are left at step 3, and one more costs 64"):
        plan.revise(3, Schedule.constant(STRATEGIES[4]), charge=16 * 4 * 7 - 60)
    assert list(plan) == before
    plan.revise(3, Schedule.constant(STRATEGIES[4]), charge=16 * 4 * 6)
    assert len(plan) == 4 and plan.total_cost == pytest.approx(plan.budget)


def test_a_stage_without_a_step_leaves_the_one_before_it():
    cheap, costly = STRATEGIES[0], STRATEGIES[4]
    plan = Plan(16 * units(costly) * 1.9, Schedule.constant(costly), 16, units)
    schedule = Schedule((Stage(0.6, cheap), Stage(1.0, costly)))
    plan.revise(0, schedule)
    assert {step.strategy for step in plan} == {cheap}
    assert 0 <= plan.budget - plan.total_cost < 16 * units(cheap)
    other = Plan(plan.budget, Schedule.constant(costly), 16, units)
    other.restore(json.loads(json.dumps(plan.state())), 8)
    assert list(other) == list(plan)


def test_local_crops_are_whole_unless_a_stage_says_otherwise():
    stages = [{"until": 0.5, "local_token_dropout": 0.5}, {"until": 0.7, "local_patch_size": 6}, {"until": 1.0}]
    schedule = Schedule.parse(stages, base_patch_size=4)
    assert [s.strategy.local for s in schedule.stages] == [Compression(4, 0.5), Compression(6), None]
    assert Schedule.parse(schedule.to_list(), 4) == schedule
    schedule.validate(24, 4, local_crop_size=12)
    with pytest.raises(ValueError, match=r"stage 2.*patch_size 6.*image_size 16"):
        schedule.validate(24, 4, local_crop_size=16)
    with pytest.raises(ValueError, match=r"stage 1.*local crops"):
        schedule.validate(24, 4)


def test_schedule_reads_back_what_it_writes_and_refuses_gaps():
    schedule = Schedule.parse([{"until": 0.5, "patch_size": 16, "token_dropout": 0.5}, {"until": 1.0}], 8)
    assert Schedule.parse(schedule.to_list(), 8) == schedule
    assert schedule(0.49).online == Compression(16, 0.5) and schedule(0.5).online == Compression(8)
    assert schedule(0.0).target == Compression(16)
    for ends in ([0.5], [0.5, 0.5, 1.0], [0.0, 1.0], [0.5, 1.1]):
        with pytest.raises(ValueError):
            Schedule.parse([{"until": end} for end in ends], 8)
    with pytest.raises(ValueError, match="one of \\[8, 12, 16, 24\\]"):
        Schedule.parse([{"until": 1.0, "patch_size": 9}], 8).validate(48, 8)
    with pytest.raises(ValueError, match="'auto' is searched while a run trains"):
        Schedule.parse("auto", 8)


@pytest.mark.parametrize(
    "image_size, patches, ends",
    [
        ((224, 16), [56, 32, 16], [0.4, 0.8, 1.0]),
        ((64, 8), [32, 16, 8], [0.4, 0.8, 1.0]),
        ((28, 4), [14, 7, 4], [0.4, 0.8, 1.0]),
        ((112, 8), [28, 16, 8], [0.4, 0.8, 1.0]),
        ((32, 16), [16], [1.0]),
        ((48, 16), [24, 16], [0.8, 1.0]),
        ((62, 31), [31], [1.0]),
    ],
)
def test_standard_schedule_takes_the_closest_patches(image_size, patches, ends):
    schedule = Schedule.parse("standard", image_size[1], image_size=image_size[0])
    schedule.validate(*image_size)
    assert [stage.strategy for stage in schedule.stages] == [Strategy(Compression(patch)) for patch in patches]
    assert [stage.until for stage in schedule.stages] == ends
    with pytest.raises(ValueError, match="give image_size"):
        Schedule.parse("standard", image_size[1])


@pytest.mark.parametrize("compression", [Compression(8), Compression(16), Compression(8, 0.5), Compression(12, 0.75)])
def test_analytic_flops_are_those_that_a_forward_performs(compression):
    model = AccelViTModel(CONFIG).eval()
    model.set_attn_implementation("eager")  # the counter does not see inside the fused attention of a CPU
    kernel = model.embeddings.patch_embeddings.projection.weight
    with FlopCounterMode(display=False) as derivation, torch.no_grad():
        resize_patch_kernel(kernel, compression.patch_size)  # once a forward, whatever the batch: no cost of an image
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 48, 48), compression.patch_size, compression.token_dropout)
    counted = counter.get_total_flops() - derivation.get_total_flops()
    assert counted == pytest.approx(forward_flops(CONFIG, compression), rel=0.001)
