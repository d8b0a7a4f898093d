import numpy as np
import pytest
import torch

from hf_accel.compression import Compression, Strategy
from hf_accel.models import AccelViTConfig
from hf_accel.objectives import Draw, MoCoForPreTraining
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


def test_only_the_online_branch_has_gradient_and_the_target_follows_by_hand():
    moco = MoCoForPreTraining(CONFIG, projector_hidden_size=32, projection_size=16, momentum=0.9).train()
    views = [torch.randn(8, 3, 28, 28) for _ in range(2)]
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
