"""NT-Xent against a transcription of the paper's equation; the model's branches and draws. Over processes: see
test_two_processes.py."""

import numpy as np
import pytest
import torch

from hf_accel.compression import Compression, Strategy
from hf_accel.models import AccelViTConfig
from hf_accel.objectives import Draw, SimCLRForPreTraining
from hf_accel.objectives.simclr import nt_xent_loss

CONFIG = AccelViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=4
)


def numpy_loss(a: np.ndarray, b: np.ndarray, temperature: float) -> float:
    """Equation 1 and algorithm 1 of arXiv 2002.05709, with the views of image k at 2 k and 2 k + 1."""
    views = [view for pair in zip(a, b, strict=True) for view in pair]

    def similarity(i: int, j: int) -> float:
        return views[i] @ views[j] / (np.linalg.norm(views[i]) * np.linalg.norm(views[j]))

    def one(i: int, j: int) -> float:
        others = [np.exp(similarity(i, k) / temperature) for k in range(len(views)) if k != i]
        return -np.log(np.exp(similarity(i, j) / temperature) / np.sum(others))

    return sum(one(2 * k, 2 * k + 1) + one(2 * k + 1, 2 * k) for k in range(len(a))) / (2 * len(a))


def pair(rows: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, rows, size])
    return rng.normal(size=(rows, size)), rng.normal(size=(rows, size))


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_loss_and_gradient_against_numpy(rows, size, temperature):
    a, b = pair(rows, size)
    tensors = [torch.tensor(view, requires_grad=True) for view in (a, b)]
    loss = nt_xent_loss(tensors[0], tensors[1], temperature)
    loss.backward()
    assert loss.item() == pytest.approx(numpy_loss(a, b, temperature), rel=1e-10, abs=1e-12)
    for tensor, view in zip(tensors, (a, b), strict=True):
        assert tensor.grad is not None
        for index in np.ndindex(view.shape):
            value, ends = view[index], []
            for step in (1e-6, -1e-6):
                view[index] = value + step
                ends.append(numpy_loss(a, b, temperature))
            view[index] = value
            slope = (ends[0] - ends[1]) / 2e-6
            assert tensor.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float_and_stays_finite(dtype):
    a, b = (torch.tensor(view).to(dtype) for view in pair(32, 64))
    for first, second in ((a, b), (a, a), (a, -a), (300 * a, 300 * b)):
        halves = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        with torch.autocast("cpu", dtype):
            loss = nt_xent_loss(halves[0], halves[1], 0.05)
        loss.backward()
        expected = numpy_loss(first.double().numpy(), second.double().numpy(), 0.05)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert all(half.grad is not None and half.grad.isfinite().all() for half in halves)


def model() -> SimCLRForPreTraining:
    torch.manual_seed(0)
    return SimCLRForPreTraining(CONFIG, projector_hidden_size=32, projection_size=16).train()


def views() -> list[torch.Tensor]:
    return [torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


@pytest.mark.parametrize("compression", [Compression(4), Compression(7, 0.5)], ids=str)
def test_the_loss_is_that_of_each_view_encoded_and_projected_on_its_own(compression, monkeypatch):
    simclr, pixels = model(), views()
    # every image keeps the same tokens, so that two forwards draw what one does
    monkeypatch.setattr(
        "hf_accel.models.modeling_accel_vit.sample_kept_tokens", lambda batch, *_: torch.arange(8).expand(batch, 8)
    )
    patch_size, token_dropout = compression.patch_size, compression.token_dropout
    with torch.no_grad():
        apart = [
            simclr.projector(simclr.encoder(view, patch_size, token_dropout).pooler_output).double().numpy()
            for view in pixels
        ]
        output = simclr(pixels, Strategy(compression), Draw(0, 0))
    assert output.loss.item() == pytest.approx(numpy_loss(apart[0], apart[1], 0.1), rel=1e-5)
    normalised = apart[0] / np.linalg.norm(apart[0], axis=1, keepdims=True)
    assert output.metrics["embedding_std"].item() == pytest.approx(normalised.std(axis=0).mean() * 4, rel=1e-4)


def test_the_gradient_reaches_every_parameter_through_both_views():
    simclr, pixels = model(), [view.requires_grad_() for view in views()]
    simclr(pixels, Strategy(Compression(4)), Draw(0, 0)).loss.backward()
    for name, parameter in simclr.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for view in pixels:
        assert view.grad is not None and (view.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_each_view_of_each_step_keeps_its_own_tokens(monkeypatch):
    simclr, kept = model(), []
    encode = simclr.encoder.encode
    monkeypatch.setattr(
        simclr.encoder, "encode", lambda pixels, size, tokens: kept.append(tokens) or encode(pixels, size, tokens)
    )
    pixels = torch.randn(8, 3, 28, 28)
    losses = [simclr([pixels, pixels], Strategy(Compression(4, 0.5)), Draw(0, step)).loss.item() for step in (0, 1, 0)]
    assert [tuple(tokens.shape) for tokens in kept] == [(16, 24)] * 3, "one forward for both views"
    sets = {tuple(sorted(row.tolist())) for tokens in kept[:2] for row in tokens}
    assert len(sets) == 32
    assert torch.equal(kept[0], kept[2]) and losses[0] == losses[2] != losses[1]


def test_there_is_no_target_branch():
    simclr, pixels = model(), views()
    losses = [
        simclr(pixels, Strategy(Compression(7), target), Draw(0, 0)).loss.item()
        for target in (None, Compression(4), Compression(14, 0.5))
    ]
    assert losses[0] == losses[1] == losses[2]
    before = {name: value.clone() for name, value in simclr.state_dict().items()}
    simclr.update_target(0.5)
    assert all(torch.equal(value, before[name]) for name, value in simclr.state_dict().items())


def test_the_heads_keep_the_initialisation_of_torch():
    bounds = [layer.in_features**-0.5 for layer in model().projector if isinstance(layer, torch.nn.Linear)]
    weights = [layer.weight for layer in model().projector if isinstance(layer, torch.nn.Linear)]
    for bound, weight in zip(bounds, weights, strict=True):
        assert 0.95 * bound < weight.abs().max().item() <= bound
