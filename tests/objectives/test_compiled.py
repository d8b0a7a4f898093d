"""Compiled encoders along a schedule: one whole graph for each shape, and the results of eager ones."""

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from hf_accel import DINOForPreTraining, MoCoForPreTraining, PretrainConfig
from hf_accel.compression import Compression, Strategy
from hf_accel.models import AccelViTConfig
from hf_accel.objectives import Draw, ObjectiveForPreTraining
from hf_accel.utils.errors import SettingError

SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS: dict[str, Any] = {"projector_hidden_size": 24, "projection_size": 8}
PROTOTYPES: dict[str, Any] = {"num_prototypes": 12, "head_hidden_size": 24, "bottleneck_size": 8}
STAGES = [Strategy(Compression(8, 0.5), Compression(8)), Strategy(Compression(4, 0.5), Compression(4))]
STAGES.append(Strategy(Compression(4)))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=4):  # restored afterwards
        yield
    torch.compiler.reset()


def make(objective: str, **settings: Any) -> ObjectiveForPreTraining:
    torch.manual_seed(0)
    config = AccelViTConfig(**{**SIZES, "image_size": 16, "patch_size": 4, **settings})
    if objective == "moco":
        return MoCoForPreTraining(config, **HEADS).train()
    return DINOForPreTraining(config, **PROTOTYPES, num_local_crops=2, local_crop_size=8).train()


def step(model: ObjectiveForPreTraining, strategy: Strategy, number: int, device: str = "cpu", **autocast: Any) -> Any:
    """The loss of a step of SGD."""
    size, source = model.config.image_size, torch.Generator().manual_seed(number)
    sizes = [size, size, *[8] * getattr(model, "num_local_crops", 0)]
    views = [torch.randn(8, 3, side, side, generator=source).to(device) for side in sizes]
    with torch.autocast(device, torch.bfloat16, **{"enabled": False, **autocast}):
        loss = model(views, strategy, Draw(0, number), 0.5).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    model.zero_grad()
    model.update_target(0.5)
    return loss.detach().float().cpu()


@pytest.mark.slow
# The online branch has three shapes, the target branch two, and local crops one more.
@pytest.mark.parametrize(("objective", "graphs"), [("moco", 5), ("dino", 6)])
def test_a_schedule_has_one_whole_graph_for_each_shape(objective, graphs):
    counter, model = CompileCounter(), make(objective)
    eager = copy.deepcopy(model)
    model.compile_encoders(backend=counter)
    for number in range(2 * len(STAGES)):
        stage = STAGES[number // 2]
        assert step(model, stage, number) == pytest.approx(float(step(eager, stage, number)), rel=1e-4)
    assert counter.frame_count == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_long_schedule_has_graphs_beyond_the_limit_of_torch():
    counter, model = CompileCounter(), make("moco")
    model.compile_encoders(backend=counter)
    shapes = [Strategy(Compression(4, dropout), Compression(4)) for dropout in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)]
    for _ in range(2):
        for number, strategy in enumerate(shapes):
            step(model, strategy, number)
    assert counter.frame_count == len(shapes) + 1


@pytest.mark.slow
def test_a_resized_view_breaks_no_graph():
    """A local crop of 8 pixels has no grid of 3 x 3 whole patches."""
    counter, model = CompileCounter(), make("dino", image_size=24)
    model.compile_encoders(backend=counter)
    strategy = Strategy(Compression(4), local=Compression(2, 0.5))
    model.config.patch_size = 2
    step(model, strategy, 0)
    assert not counters["graph_break"]


def test_a_copy_is_not_compiled():
    model: Any = make("moco")
    model.compile_encoders(backend="eager")
    assert model.encoder._compiled_call_impl is not None
    assert copy.deepcopy(model).encoder._compiled_call_impl is None


def test_backend_and_mode_are_those_of_the_arguments(tmp_path):
    def config(**settings: Any) -> PretrainConfig:
        return PretrainConfig(str(tmp_path), budget=1, report_to="none", bf16=False, **settings)

    assert not config().torch_compile
    assert config(torch_compile=True).compile_options == {"backend": "inductor", "mode": None}
    given = config(torch_compile_backend="aot_eager", torch_compile_mode="default")
    assert given.torch_compile and given.compile_options == {"backend": "aot_eager", "mode": "default"}
    with pytest.raises(SettingError, match="overwrite the gradients"):
        config(torch_compile_mode="reduce-overhead", gradient_accumulation_steps=2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_as_eager_code():
    model = make("moco")
    eager = copy.deepcopy(model)
    model.compile_encoders()
    for number in (0, 1, 1, 2):
        assert step(model, STAGES[number], number) == pytest.approx(
            float(step(eager, STAGES[number], number)), rel=1e-3
        )
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("objective", ["moco", "dino"])
def test_replayed_graphs_train_as_eager_code(objective, precise):
    """Each stage is long enough to warm up, to record and to replay, and the first one comes again."""
    model: Any = make(objective)
    model.to("cuda")
    eager = copy.deepcopy(model)
    model.compile_encoders(mode="reduce-overhead")
    for number in range(5 * len(STAGES) + 5):
        stage, settings = STAGES[number // 5 % len(STAGES)], {"device": "cuda", "enabled": not precise}
        expected = float(step(eager, stage, number, **settings))
        assert step(model, stage, number, **settings) == pytest.approx(expected, rel=1e-3 if precise else 0.05)
    skipped = {name: count for name, count in counters["inductor"].items() if "cudagraph_skips" in name}
    assert not skipped
