"""What a budget buys: costs, plans, and what a run says of them."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from hf_accel import PretrainConfig
from hf_accel.compression import Compression, CostTable, Plan, Schedule, Strategy
from hf_accel.recipe import describe_keys, load_recipe
from hf_accel.tasks.setup import build_objective, pretrain_config
from hf_accel.training.planning import describe_plan, make_forward_cost, make_plan, read_schedule

TINY = ["model_config.hidden_size=32", "model_config.num_hidden_layers=1", "model_config.intermediate_size=32"]
TINY += ["batch_size=100", "schedule=[{until: 0.9, patch_size: 7}, {until: 1.0}]", "mixed_precision=no"]


@pytest.mark.parametrize(
    ("device", "precision", "expected"), [("cpu", "bf16", (64, torch.bfloat16)), ("cuda", "no", (128, None))]
)
def test_costs_are_measured_as_the_run_will_compute(device, precision, expected, tmp_path, monkeypatch):
    asked = []

    def measured(config, compressions, device, batch_size, dtype):
        asked.append((batch_size, dtype))
        return CostTable({compression: 1.0 for compression in compressions}, "test")

    monkeypatch.setattr("hf_accel.training.planning.measure_costs", measured)
    settings = ["cost=measured", f"output_dir={tmp_path}", f"mixed_precision={precision}"]
    settings += ["batch_size=256", "gradient_accumulation_steps=2"]
    recipe = load_recipe("recipes/moco.yaml", settings)
    wanted = [Strategy(Compression(7))]
    costs = make_forward_cost(pretrain_config(recipe), recipe.encoder_config(), torch.device(device), wanted)
    assert asked == [expected] and costs(Compression(7)) == 1.0


def test_the_standard_schedule_is_the_default():
    recipe: Any = load_recipe(None, ["budget=64", "data=bundled", "image_size=28", "patch_size=4"])
    expected, args, config = Schedule.standard(28, 4), pretrain_config(recipe), recipe.encoder_config()
    assert recipe.compression_schedule() == expected and len(expected.stages) == 3
    assert read_schedule(args, config, None) == expected
    assert PretrainConfig("runs/default", budget=64).schedule == args.schedule == recipe.schedule == "standard"
    uncompressed = Schedule.constant(Strategy(Compression(4)))
    assert read_schedule(replace(args, schedule=None), config, None) == uncompressed
    config.init_from = {"name": "released"}
    (first, last) = read_schedule(args, config, None).stages
    assert (first.until, first.strategy.online, last.strategy.online) == (0.8, Compression(4, 0.5), Compression(4))
    assert replace(recipe, init_from="released").compression_schedule().stages == (first, last)


def lines(objective: str, *overrides: str) -> list[str]:
    recipe = load_recipe(f"recipes/{objective}.yaml", [*TINY, *overrides])
    args, model = pretrain_config(recipe), build_objective(recipe)
    schedule = read_schedule(args, model.config, None)
    plan = Plan(float(recipe.budget or 0), schedule, recipe.batch_size, price)
    return describe_plan(args, model, plan)[1:]


def price(strategy: Strategy) -> float:
    return 4.0 if strategy.online.patch_size == 4 else 1.0


@pytest.mark.parametrize("objective", ["moco", "simclr", "dino"])
def test_a_loss_within_a_micro_batch_is_said_at_start(objective):
    assert lines(objective) == [] == lines(objective, "gradient_accumulation_steps=1")
    said = lines(objective, "gradient_accumulation_steps=4")
    if objective == "dino":
        assert said == []
    else:
        assert len(said) == 1 and f"in {objective} the loss of an image depends on the 25 images of its" in said[0]
        assert "contrast" not in said[0]  # BatchNorm does the same to objectives that contrast nothing


def test_a_loss_within_a_micro_batch_is_in_the_help():
    text = describe_keys("pretrain").split("  gradient_accumulation_steps (")[1].split("  learning_rate (")[0]
    assert "in moco and simclr the loss of an image depends on the other images of its micro-batch only" in text


def test_a_budget_that_does_not_pay_for_the_last_stage_is_said():
    assert lines("moco", "budget=40e2") == []
    (said,) = lines("moco", "budget=39e2")
    assert "pays for no step of the schedule's last stage (patch 4, dropout 0" in said
    assert lines("moco", "budget=39e2", "schedule=auto") == []


def test_a_budget_in_epochs_costs_what_they_cost_uncompressed():
    recipe = load_recipe("recipes/moco.yaml", [*TINY, "budget=3 epochs"])
    args, model = pretrain_config(recipe), build_objective(recipe)
    schedule = read_schedule(args, model.config, None)
    units = partial(model.units_per_image, forward_cost=make_forward_cost(args, model.config, args.device, []))
    plan, controller = make_plan(args, model.config, schedule, units, 1000)
    assert plan.budget == pytest.approx(3 * 1000 * 4) and controller is None
    assert plan.num_steps > 30  # compressed steps are cheaper than those that the budget was counted in
