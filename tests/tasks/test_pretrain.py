"""What a run says before it trains."""

import pytest

from hf_accel.compression import Strategy
from hf_accel.recipe import describe_keys, load_recipe
from hf_accel.tasks.pretrain import notes_on
from hf_accel.tasks.setup import build_objective, plan_of

TINY = ["model_config.hidden_size=32", "model_config.num_hidden_layers=1", "model_config.intermediate_size=32"]
TINY += ["batch_size=100", "schedule=[{until: 0.9, patch_size: 7}, {until: 1.0}]"]


def notes(objective: str, *overrides: str) -> list[str]:
    recipe = load_recipe(f"recipes/{objective}.yaml", [*TINY, *overrides])
    return notes_on(recipe, build_objective(recipe), plan_of(recipe, price))


def price(strategy: Strategy) -> float:
    return 4.0 if strategy.online.patch_size == 4 else 1.0


@pytest.mark.parametrize("objective", ["moco", "simclr", "dino"])
def test_contrast_within_a_micro_batch_is_said_at_start(objective):
    assert notes(objective) == [] == notes(objective, "gradient_accumulation_steps=1")
    said = notes(objective, "gradient_accumulation_steps=4")
    if objective == "dino":
        assert said == []
    else:
        assert len(said) == 1 and f"{objective} contrasts the 25 images of each micro-batch" in said[0]


def test_contrast_within_a_micro_batch_is_in_the_help():
    text = describe_keys().split("  gradient_accumulation_steps (")[1].split("  learning_rate (")[0]
    assert "moco and simclr contrast the images of a micro-batch only" in text


def test_a_budget_that_does_not_pay_for_the_last_stage_is_said():
    assert notes("moco", "budget=40e2") == []
    (said,) = notes("moco", "budget=39e2")
    assert "budget=3900 pays for no step of the schedule's last stage (patch 4, dropout 0" in said
    assert notes("moco", "budget=39e2", "schedule=auto") == []
