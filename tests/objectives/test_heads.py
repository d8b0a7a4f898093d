"""Heads against moco-v3's and SLIP's `_build_mlp`, BatchNorm against torch's; over processes: test_two_processes.py."""

import pytest
import torch
from torch import nn

from hf_accel.models import AccelViTConfig
from hf_accel.objectives import MoCoForPreTraining, SimCLRForPreTraining
from hf_accel.objectives.heads import BatchNorm1d, mlp

CONFIG = AccelViTConfig(
    hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4
)


def kinds(head: nn.Sequential) -> list[tuple]:
    """(kind, input size, output size) of linear layers, (kind, size, affine) of norms, (kind,) of the rest."""
    found: list[tuple] = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            bias = () if layer.bias is None else ("bias",)
            found.append(("linear", layer.in_features, layer.out_features, *bias))
        elif isinstance(layer, BatchNorm1d):
            found.append(("norm", layer.num_features, layer.affine))
        else:
            found.append((type(layer).__name__,))
    return found


def test_projector_and_predictor_are_those_of_the_original():
    # moco/builder.py: MoCo_ViT._build_projector_and_predictor_mlps, mlp 3 and mlp 2
    projector = [
        ("linear", 24, 64), ("norm", 64, True), ("ReLU",),
        ("linear", 64, 64), ("norm", 64, True), ("ReLU",),
        ("linear", 64, 16), ("norm", 16, False),
    ]  # fmt: skip
    predictor = [("linear", 16, 64), ("norm", 64, True), ("ReLU",), ("linear", 64, 16), ("norm", 16, False)]
    moco = MoCoForPreTraining(CONFIG, projector_hidden_size=64, projection_size=16)
    assert kinds(moco.projector) == kinds(moco.momentum_projector) == projector
    assert kinds(moco.predictor) == predictor
    assert kinds(mlp(1, 24, 64, 16)) == [("linear", 24, 16), ("norm", 16, False)]


def test_simclrs_ends_in_a_plain_linear_layer():
    # SLIP's models.py: SIMCLR._build_mlp; the biases that it has before BatchNorms have no effect
    slip = [
        ("linear", 24, 64), ("norm", 64, True), ("ReLU",),
        ("linear", 64, 64), ("norm", 64, True), ("ReLU",),
        ("linear", 64, 16, "bias"),
    ]  # fmt: skip
    assert kinds(SimCLRForPreTraining(CONFIG, projector_hidden_size=64, projection_size=16).projector) == slip


@pytest.mark.parametrize("objective", [MoCoForPreTraining, SimCLRForPreTraining])
def test_sizes_and_temperatures_start_above_zero(objective):
    objective(CONFIG, projector_hidden_size=1, projection_size=1, temperature=1e-6)
    for name, value in {"projector_hidden_size": 0, "projection_size": 0, "temperature": 0.0}.items():
        with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
            objective(CONFIG, **{name: value})


@pytest.mark.parametrize("affine", [True, False])
def test_one_process_is_torch_bit_for_bit(affine):
    torch.manual_seed(0)
    ours, theirs = BatchNorm1d(7, affine=affine), nn.BatchNorm1d(7, affine=affine)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    slope = torch.randn(5, 7)
    for training in (True, True, False):
        rows, results = 3 * torch.randn(5, 7) + 2, []
        for norm in (ours, theirs):
            norm.train(training)
            norm.zero_grad()
            mine = rows.clone().requires_grad_()
            output = norm(mine)
            (output * slope).sum().backward()
            results.append([output, mine.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
        assert len(results[0]) == len(results[1]) == (7 if affine else 5)
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(ours.get_buffer("running_mean"), torch.zeros(7))
