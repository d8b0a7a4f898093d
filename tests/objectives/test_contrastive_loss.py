import numpy as np
import pytest
import torch

from hf_accel.compression import Compression, Strategy
from hf_accel.models import AccelViTConfig
from hf_accel.objectives import Draw, MoCoForPreTraining
from hf_accel.objectives.base import embedding_std
from hf_accel.objectives.moco import contrastive_loss

CONFIG = AccelViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=4
)


def numpy_loss(query: np.ndarray, key: np.ndarray, temperature: float) -> float:
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    key = key / np.linalg.norm(key, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(query)):
        logits = [query[i] @ key[j] / temperature for j in range(len(key))]
        total += -logits[i] + np.log(np.sum(np.exp(logits)))
    return 2 * temperature * total / len(query)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_and_gradient_against_numpy(temperature):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    tensor = torch.tensor(query, requires_grad=True)
    loss = contrastive_loss(tensor, torch.tensor(key), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(numpy_loss(query, key, temperature), rel=1e-10)
    assert tensor.grad is not None
    for index in np.ndindex(query.shape):
        step = np.zeros_like(query)
        step[index] = 1e-6
        slope = (numpy_loss(query + step, key, temperature) - numpy_loss(query - step, key, temperature)) / 2e-6
        assert tensor.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


def model(symmetric: bool = False) -> MoCoForPreTraining:
    torch.manual_seed(0)
    return MoCoForPreTraining(
        CONFIG, projector_hidden_size=32, projection_size=16, symmetric=symmetric, momentum=0.9
    ).train()


def test_only_the_online_branch_has_gradient_and_the_target_follows_by_hand():
    moco, views = model(), [torch.randn(8, 3, 28, 28) for _ in range(2)]
    output = moco(views, Strategy(Compression(4, 0.5)), Draw(0, 0))
    output.loss.backward()
    target = {name for name, _ in moco.named_parameters() if name.startswith("momentum")}
    for name, parameter in moco.named_parameters():
        assert (parameter.grad is None) == (name in target), name
    with torch.no_grad():
        for parameter in moco.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = [p.clone() for p in moco.momentum_encoder.parameters()]
    moco.update_target(progress=0.0)
    pairs = zip(before, moco.encoder.parameters(), moco.momentum_encoder.parameters(), strict=True)
    for old, online, new in pairs:
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)


def test_draws_are_a_function_of_the_step_alone():
    moco, views, strategy = model().eval(), [torch.randn(8, 3, 28, 28) for _ in range(2)], Strategy(Compression(4, 0.5))
    losses = [moco(views, strategy, Draw(0, step)).loss.item() for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_units():
    def cost(compression: Compression, image_size: int | None = None) -> float:
        return {Compression(4): 1.0, Compression(4, 0.5): 0.4}[compression]

    assert model().units_per_image(Strategy(Compression(4)), cost) == 4
    assert model(symmetric=True).units_per_image(Strategy(Compression(4)), cost) == 8
    assert model().units_per_image(Strategy(Compression(4, 0.5)), cost) == pytest.approx(2.2)


def test_embedding_std_tells_collapse():
    assert embedding_std(torch.ones(64, 16)).item() < 1e-6
    assert embedding_std(torch.randn(4096, 16)).item() == pytest.approx(1, abs=0.05)
