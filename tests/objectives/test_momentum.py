import numpy as np
import pytest
import torch
from torch import nn

from hf_accel.objectives.heads import mlp
from hf_accel.objectives.momentum import update_momentum


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return mlp(2, 6, 8, 4), mlp(2, 6, 8, 4)


def values(module: nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in module.parameters()]


def test_several_steps_by_hand():
    target, online = pair()
    by_hand = values(target)
    for momentum in (0.9, 0.99, 0.0, 0.996, 0.5):
        with torch.no_grad():
            for parameter in online.parameters():
                parameter.add_(torch.randn_like(parameter))
        update_momentum(target, online, momentum)
        by_hand = [momentum * old + (1 - momentum) * new for old, new in zip(by_hand, values(online), strict=True)]
        for got, expected in zip(values(target), by_hand, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_buffers_are_left_alone():
    target, online = pair()
    online.train()(torch.randn(16, 6))
    target.train()(torch.randn(16, 6) + 5)
    before = {name: buffer.clone() for name, buffer in target.named_buffers()}
    update_momentum(target, online, 0.5)
    assert len(before) == 6
    for name, buffer in target.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert name.endswith("num_batches_tracked") or not torch.equal(buffer, online.get_buffer(name)), name


def test_modules_that_do_not_match_are_refused():
    target, online = mlp(2, 6, 8, 4), mlp(3, 6, 8, 4)
    before = values(target)
    with pytest.raises(ValueError, match="target has 4 parameters, online 7"):
        update_momentum(target, online, 0.9)
    assert all(np.array_equal(new, old) for new, old in zip(values(target), before, strict=True))
