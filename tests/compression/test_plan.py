import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_accel.compression import Compression, Plan, Schedule, Stage, Strategy, forward_cost, forward_flops
from hf_accel.models import AccelViTConfig, AccelViTModel
from hf_accel.models.modeling_accel_vit import resize_patch_kernel

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
    assert plan.total_cost == pytest.approx(spent) == pytest.approx(sum(step.cost for step in plan))
    assert plan.total_cost <= budget * (1 + 1e-9)


def test_a_budget_of_exactly_n_steps_buys_n():
    schedule = Schedule.constant(Strategy(Compression(8)))
    assert len(Plan(4 * 32 * 7, schedule, 32, units)) == 7
    with pytest.raises(ValueError, match="does not pay for one step"):
        Plan(4 * 32 - 1, schedule, 32, units)


def test_first_step_at_is_the_first_to_reach_the_progress():
    plan = Plan(3000, Schedule.parse([{"until": 0.5, "patch_size": 16}, {"until": 1.0}], 8), 16, units)
    for progress in (0.1, 0.5, 0.9, 1.0):
        first = plan.first_step_at(progress)
        assert plan.spent_after(first) >= progress * plan.total_cost * (1 - 1e-9)
        assert plan.spent_after(first - 1) < progress * plan.total_cost


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
