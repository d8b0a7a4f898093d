"""Weights that are cast together: the bits of plain autocast, in fewer operations, and no trace left in the model."""

import copy
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_accel import DINOForPreTraining, MoCoForPreTraining, SimCLRForPreTraining
from hf_accel.compression import Compression, Strategy
from hf_accel.models import AccelViTConfig
from hf_accel.objectives import Draw, ObjectiveForPreTraining

aten = torch.ops.aten
LAYERS = 3
SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16}
HEADS: dict[str, Any] = {"projector_hidden_size": 24, "projection_size": 8}
DINO_HEADS: dict[str, Any] = {"num_prototypes": 12, "head_hidden_size": 24, "bottleneck_size": 8}
MODELS: dict[str, tuple[type[ObjectiveForPreTraining], dict[str, Any]]] = {
    "moco": (MoCoForPreTraining, HEADS),
    "moco, symmetric": (MoCoForPreTraining, {**HEADS, "symmetric": True}),
    "simclr": (SimCLRForPreTraining, HEADS),
    "dino": (DINOForPreTraining, {**DINO_HEADS, "num_local_crops": 2, "local_crop_size": 8}),
}
SHORT = Strategy(Compression(8, 0.5), Compression(8))


def make(name: str, **settings: Any) -> ObjectiveForPreTraining:
    torch.manual_seed(0)
    config = AccelViTConfig(**SIZES, patch_size=4, num_hidden_layers=LAYERS, **settings)
    kind, heads = MODELS[name]
    return kind(config, **heads).train()


class Casts(TorchDispatchMode):
    """Counts copies to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, kind = func(*args, **(kwargs or {})), func.overloadpacket
        if kind is aten._to_copy and result.dtype != args[0].dtype:
            self.count["one"] += 1
        elif kind is aten._foreach_copy_ and args[0][0].dtype != args[1][0].dtype:
            self.count["many"] += 1
        return result


def gradients(
    model: ObjectiveForPreTraining, dtype: torch.dtype | None = torch.bfloat16, micro_batches: int = 2
) -> tuple[list[Any], Counter[str]]:
    """The losses, then the gradients of all parameters, and the casts that were counted."""
    losses = []
    with Casts() as casts:
        for micro_step in range(micro_batches):
            torch.manual_seed(micro_step)
            sizes = [16, 16, *[8] * getattr(model, "num_local_crops", 0)]
            views = [torch.randn(6, 3, size, size) for size in sizes]
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = model(views, SHORT, Draw(0, 0, micro_step), 0.5).loss
            loss.backward()
            losses.append(loss.detach())
    return [*losses, *(parameter.grad for parameter in model.parameters())], casts.count


def plainly(monkeypatch: pytest.MonkeyPatch, model: ObjectiveForPreTraining) -> tuple[list[Any], Counter[str]]:
    with monkeypatch.context() as patch:
        patch.setattr("hf_accel.objectives.base.weights_cast_together", lambda encoders: nullcontext())
        return gradients(model)


def assert_equal(got: list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected) and sum(value is not None for value in got) > 20
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_casts_together_have_the_bits_of_autocast(name, checkpointing, monkeypatch):
    model = make(name, drop_path_rate=0.2)
    if checkpointing:
        model.activation_checkpointing_enable()
    other = copy.deepcopy(model)
    got, casts = gradients(model)
    expected, before = plainly(monkeypatch, other)
    assert_equal(got, expected)
    assert casts["many"] > 0 == before["many"]


def test_casts_together_are_few(monkeypatch):
    model = make("moco")
    (_, after), (_, before) = gradients(model, micro_batches=1), plainly(monkeypatch, copy.deepcopy(model))
    weights = 12 * LAYERS  # six linear layers with weight and bias
    assert after["many"] == LAYERS + 1 + LAYERS  # of each layer, of the target branch, and of each layer's gradients
    # The other one had two micro-batches: per micro-batch, both branches' weights, and the gradients of one.
    assert before["one"] / 2 - after["one"] == 3 * weights


def test_fp32_casts_nothing():
    model = make("moco")
    _, casts = gradients(model, dtype=None)
    assert casts["many"] == 0


def test_casting_leaves_the_model_as_it_was():
    model = make("moco")
    before = dict(model.named_parameters())
    gradients(model)
    with pytest.raises(ValueError, match="unpack"), torch.autocast("cpu", torch.bfloat16):
        model([torch.randn(6, 3, 16, 16)] * 3, SHORT, Draw(0, 0), 0.5)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values() if tensor.is_floating_point())


def test_casts_follow_the_weights(monkeypatch):
    """No copy of the weights is kept: the optimizer, the target's average and a loaded checkpoint all count."""
    model, results = make("moco"), []
    for change in ("optimizer", "average", "load"):
        with torch.no_grad():
            if change == "optimizer":
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            elif change == "average":
                model.update_target(0.0)
            else:
                model.load_state_dict(make("moco").state_dict())
        model.zero_grad()
        other = copy.deepcopy(model)
        got, _ = gradients(model)
        assert_equal(got, plainly(monkeypatch, other)[0])
        results.append(got[0])
    assert len({float(loss) for loss in results}) == 3


def test_gradients_without_backward_are_the_same(monkeypatch):
    model = make("simclr")
    parameters, views = list(model.parameters()), [torch.randn(6, 3, 16, 16) for _ in range(2)]

    def grad() -> list[Any]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(views, SHORT, Draw(0, 0), 0.5).loss
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    got = grad()
    monkeypatch.setattr("hf_accel.objectives.base.weights_cast_together", lambda encoders: nullcontext())
    assert_equal(got, grad())
