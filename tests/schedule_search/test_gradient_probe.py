"""The probe: gradients of the whole batch for any draw and strategy, which leave no trace."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hf_accel.compression import Compression, Strategy
from hf_accel.data import AUGMENTATIONS, ImageSource, TrainSampler, ViewConfig, make_views, train_loader
from hf_accel.objectives import OBJECTIVES, Draw
from hf_accel.recipe import Recipe, load_recipe
from hf_accel.schedule_search.gradient_error import estimate_errors
from hf_accel.schedule_search.gradient_probe import GradientProbe, estimate_gradient_errors
from hf_accel.tasks.setup import build_objective, images_of, pretrain_config
from hf_accel.utils.errors import SettingError

SMALL = [
    "model_config.hidden_size=16",
    "model_config.num_hidden_layers=2",
    "model_config.intermediate_size=32",
    "model_config.num_attention_heads=2",
    "batch_size=32",
    "budget=10000",
]


def small(objective: str = "moco", *overrides: str) -> Recipe:
    return load_recipe(f"recipes/{objective}.yaml", ["mixed_precision=no", *SMALL, *overrides])


def everything(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in objective.state_dict(keep_vars=False).items()}


def random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_probe_changes_neither_objective_nor_next_step(name, device):
    recipe = small(name, "model_config.drop_path_rate=0.2")
    source, _ = images_of(recipe)
    torch.manual_seed(0)
    objective: Any = build_objective(recipe).train()
    objective.to(device)
    sizes = [config.size or 28 for config in objective.view_configs(AUGMENTATIONS["digits"])]
    views = [torch.randn(32, 3, size, size, device=device) for size in sizes]
    states = random_states()

    def training_step() -> tuple[Any, dict[str, torch.Tensor]]:
        output = objective(views, Strategy(Compression(4, 0.5)), Draw(0, 3), 0.3)
        output.loss.backward()
        return output.loss.detach(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}

    before = everything(objective)
    alone = training_step()
    objective.load_state_dict(before)
    objective.zero_grad()
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])
    probe = GradientProbe(objective, pretrain_config(recipe), source, progress=0.3)
    gradients = [probe(strategy, draw) for strategy in (None, Strategy(Compression(7))) for draw in (0, 1)]
    assert all(gradient.shape == gradients[0].shape and gradient.norm() > 0 for gradient in gradients)
    assert all(torch.equal(a, b) for a, b in zip(random_states(), states, strict=True)) and objective.training
    after = everything(objective)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = training_step()
    assert alone[1].keys() == again[1].keys()
    for one, other in [(alone[0], again[0]), *((alone[1][key], again[1][key]) for key in alone[1])]:
        # some of a GPU's backward passes add in any order
        torch.testing.assert_close(one, other, rtol=0, atol=0 if device == "cpu" else 1e-5 * one.abs().max().item())


@pytest.mark.parametrize("progress", [-0.1, 1.5, float("nan")])
def test_progress_of_an_estimate_lies_between_0_and_1(progress):
    recipe = small()
    with pytest.raises(SettingError, match=r"^progress=.*: must lie in \[0, 1\]"):
        estimate_gradient_errors(build_objective(recipe), pretrain_config(recipe), None, progress=progress)


def test_an_estimate_takes_images_of_the_channels_of_the_model():
    recipe = small("moco", "num_channels=1", "schedule=null", "view_resolution=full", "data=x")
    pixels = [torch.randint(0, 255, (1, 28, 28), dtype=torch.uint8) for _ in range(40)]
    errors = estimate_gradient_errors(
        build_objective(recipe), pretrain_config(recipe), pixels, [Strategy(Compression(7))], draws=3
    )
    assert len(errors) == 1


def test_what_a_step_freezes_is_not_probed():
    recipe = small("dino", "objective_config.freeze_last_layer=0.1")
    source, _ = images_of(recipe)
    objective = build_objective(recipe)
    during, after = (GradientProbe(objective, pretrain_config(recipe), source, progress) for progress in (0.05, 0.1))
    frozen = objective.frozen_parameters(0.05)
    assert len(frozen) == 1
    assert len(during(None, 0)) == len(after(None, 0)) - frozen[0].numel()


def test_the_gradient_is_that_of_the_batch_loss():
    recipe = small("moco", "gradient_accumulation_steps=2")
    source, _ = images_of(recipe)
    objective = build_objective(recipe)
    strategy, draw = Strategy(Compression(4, 0.5)), 5
    probe = GradientProbe(objective, pretrain_config(recipe), source)
    found = probe(strategy, draw)
    objective.train()
    configs = objective.view_configs(AUGMENTATIONS[recipe.augmentation])
    first = draw * (len(source) // 32)  # a permutation of the images for each draw
    sampler = TrainSampler(len(source), 16, 1, 0, 2, probe.seed, first_step=first, last_step=first + 1)
    total: Any = 0.0
    for batch in train_loader(source, sampler, configs, lambda step: 28, 0, probe.seed):
        where = (batch["step"], batch["micro_step"], batch["rows"], batch["global_batch"])
        views = make_views(batch, configs, 28, probe.seed, *where, source.mean, source.std)
        total = total + objective(views, strategy, Draw(probe.seed, draw, batch["micro_step"])).loss / 2
    expected = torch.autograd.grad(total, probe.parameters)
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in expected]))
    assert len(probe.parameters) == len([p for p in objective.parameters() if p.requires_grad])


def test_draws_are_paired_and_repeat():
    recipe = small()
    source, _ = images_of(recipe)
    probe = GradientProbe(build_objective(recipe), pretrain_config(recipe), source)
    first, base = probe(None, 0), Strategy(Compression(4))
    assert torch.equal(probe(base, 0), first)  # the same images, views and tokens
    assert not torch.equal(probe(None, 1), first)
    assert torch.equal(probe(None, 0), first)
    assert not torch.equal(probe(Strategy(Compression(4, 0.5)), 0), first)


class MeanPixel(torch.nn.Module):
    """An objective whose gradient is the mean pixel of its batch, and zero under any compression."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(image_size=8, patch_size=4)

    def view_configs(self, augmentation):
        return [ViewConfig((1.0, 1.0), (1.0, 1.0), jitter=0, grayscale=0, blur=0, flip=0)]

    def frozen_parameters(self, progress):
        return []

    def forward(self, views, strategy, draw, progress):
        return SimpleNamespace(loss=self.weight * views[0].mean() * (strategy == Strategy(Compression(4))))


def test_draws_of_a_small_set_are_independent():
    """Of eight images, half black and half white: draws that shared an epoch would make up for each other."""
    recipe = small("moco", "image_size=8", "batch_size=4", "schedule=null", "view_resolution=full")
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(4)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    source = ImageSource("set", pixels=pixels, mean=(0.5,) * 3, std=(0.5,) * 3)
    probe = GradientProbe(cast(Any, MeanPixel()), pretrain_config(recipe), source)
    in_a_batch = (8 - 4) / (8 - 1) / 4  # variance of the mean of four of the eight, without replacement
    cheap = Strategy(Compression(4, 0.5))
    biases = [
        estimate_errors(probe, {cheap: 0.5}, range(4 * i, 4 * i + 4))[cheap].bias2 for i in range(40)
    ]  # its truth is 0: the mean pixel of the set
    assert abs(sum(biases) / len(biases)) < in_a_batch / 6  # three standard errors
