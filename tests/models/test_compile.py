"""Test torch.compile: equal results, whole graphs without a generator, and few graph breaks with one."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.models.tiny import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_whole_graphs_at_any_patch_and_image_size(kind: str) -> None:
    model = tiny(position_embedding_type=kind, num_hidden_layers=1).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size, patch_size in [((32, 32), 8), ((32, 32), 16), ((32, 32), 4), ((48, 64), 16)]:
        images = torch.randn(2, 3, *size)
        expected = model(images, patch_size).last_hidden_state
        assert torch.equal(compiled(images, patch_size).last_hidden_state, expected), (size, patch_size)


def test_gradients_through_a_resized_kernel() -> None:
    model = tiny(position_embedding_type="learned")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images, slope = torch.randn(2, 3, 32, 32), torch.randn(2, 16)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            (run(images, 16).pooler_output * slope).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, of_compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, of_compiled, rtol=0, atol=0.02 * plain.abs().max().item() + 1e-6)


def test_a_generator_breaks_the_graph_outside_of_the_layers() -> None:
    model = tiny(num_hidden_layers=6).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    images = torch.randn(2, 3, 32, 32)
    for seed in range(4):
        expected = model(images, 8, 0.5, torch.Generator().manual_seed(seed)).pooler_output
        assert torch.equal(compiled(images, 8, 0.5, torch.Generator().manual_seed(seed)).pooler_output, expected)
    # one graph sorts the draw and one is the whole encoder, for all generators
    assert counter.frame_count <= 3


def test_whole_graph_without_a_generator() -> None:
    model = tiny().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    expected = model(images, token_dropout=0.5).pooler_output
    torch.manual_seed(3)
    assert torch.equal(compiled(images, token_dropout=0.5).pooler_output, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_inductor_agrees_through_a_schedule(kind: str) -> None:
    """Output and gradients agree at changing compressions and image sizes with the default backend."""
    model = tiny(position_embedding_type=kind)
    compiled = torch.compile(model)
    for size, patch_size, token_dropout in [(32, 16, 0.5), (32, 8, 0.5), (48, 8, 0.0)]:
        images, slope = torch.randn(4, 3, size, size), torch.randn(4, 16)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(images, patch_size, token_dropout, torch.Generator().manual_seed(1)).pooler_output
            (output * slope).sum().backward()
            results.append([output, *(parameter.grad for parameter in model.parameters())])
        for plain, of_compiled in zip(*results, strict=True):
            torch.testing.assert_close(plain, of_compiled, rtol=0, atol=1e-4 * plain.abs().max().item() + 1e-5)
