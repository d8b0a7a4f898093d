"""What spans processes, run in two of them over gloo: each result equals one process's with the whole batch."""

from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_accel.compression import Compression, Strategy
from hf_accel.data import AUGMENTATIONS, ImageSource
from hf_accel.data.normalisation import measure_normalisation
from hf_accel.distributed import all_reduce, rank, world_size
from hf_accel.evaluation import knn_accuracy
from hf_accel.models import AccelViTConfig
from hf_accel.objectives import OBJECTIVES, Draw
from hf_accel.objectives.dino import DINOForPreTraining
from hf_accel.objectives.heads import BatchNorm1d, mlp
from hf_accel.objectives.moco import contrastive_loss
from hf_accel.objectives.simclr import nt_xent_loss
from hf_accel.recipe import PretrainRecipe
from hf_accel.schedule_search.gradient_probe import GradientProbe
from hf_accel.tasks.setup import build_objective, pretrain_config
from hf_accel.training.normalising import normalise_source
from tests.tiny_runs import RECIPE
from tests.two_processes import run_two

ROWS, SIZE, STEPS = 12, 6, 2
CONFIG = AccelViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
)
Results = dict[str, torch.Tensor]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def mine(whole: torch.Tensor) -> torch.Tensor:
    """This process's rows of a global batch."""
    share = len(whole) // world_size()
    return whole[rank() * share : (rank() + 1) * share].clone()


def through(module: nn.Module) -> Results:
    """Training steps of a sum of the outputs, weighed at random; then the module as it is evaluated."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=number))
    results: Results = {}
    for step in range(STEPS):
        rows = mine(3 * random(ROWS, SIZE, seed=100 + step) + 2).requires_grad_()
        output = module.train()(rows)
        (output * mine(random(*(ROWS, output.shape[1]), seed=200))).sum().backward()
        assert rows.grad is not None
        results |= {f"rows {step} output": output.detach(), f"rows {step} gradient": rows.grad}
    results |= {f"sum {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    results |= {f"same {name}": buffer for name, buffer in module.named_buffers()}
    with torch.no_grad():
        return results | {"rows evaluated": module.eval()(mine(random(ROWS, SIZE, seed=300)))}


def loss() -> Results:
    query = mine(random(ROWS, SIZE, seed=1)).requires_grad_()
    key = mine(random(ROWS, SIZE, seed=2)).requires_grad_()
    value = contrastive_loss(query, key, 0.2)
    (value / world_size()).backward()  # data parallel training averages over processes
    assert query.grad is not None and key.grad is None
    return {"rows gradient": query.grad, "mean value": value.detach()}


def nt_xent() -> Results:
    views = [mine(random(ROWS, SIZE, seed=seed)).requires_grad_() for seed in (1, 2)]
    value = nt_xent_loss(views[0], views[1], 0.1)
    (value / world_size()).backward()
    gradients = {f"rows gradient {number}": view.grad for number, view in enumerate(views) if view.grad is not None}
    assert len(gradients) == 2
    return {**gradients, "mean value": value.detach()}


def objective(name: str, **settings: Any) -> Results:
    """A training step as it is run: the gradients that data parallel training gives to every process."""
    torch.manual_seed(0)
    model = OBJECTIVES[name](CONFIG, **settings).train()
    parallel: nn.Module = model
    if world_size() > 1:
        parallel = DistributedDataParallel(cast(nn.Module, model), broadcast_buffers=False)
    sizes = [view.size or 16 for view in model.view_configs(AUGMENTATIONS["moco"])]
    views = [mine(random(ROWS, 3, size, size, seed=seed)) for seed, size in enumerate(sizes, 1)]
    output = parallel(views, Strategy(Compression(4, 0.5)), Draw(0, 0))
    output.loss.backward()
    gradients = {f"same gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert max(gradient.abs().max().item() for gradient in gradients.values()) > 0.05  # of the tolerance's 2e-5
    model.update_target(0.5)
    buffers = {f"same {n}": buffer for n, buffer in model.named_buffers()}
    return {**gradients, **buffers, "mean loss": output.loss.detach()}


def dino_steps() -> Results:
    """DINO's centre over steps of two micro-batches, with plain gradient descent in between."""
    torch.manual_seed(0)
    model = DINOForPreTraining(CONFIG, **DINO_HEAD).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results: Results = {}
    for step in range(STEPS):
        for micro_step in range(2):
            views = [mine(random(ROWS, 3, 16, 16, seed=10 * step + 2 * micro_step + view)) for view in range(2)]
            output = model(views, Strategy(Compression(4)), Draw(0, step, micro_step), step / STEPS)
            output.loss.backward()
            results[f"mean loss {step} {micro_step}"] = output.loss.detach()
        for parameter in trained:
            assert parameter.grad is not None
            parameter.data.sub_(all_reduce(parameter.grad) / world_size())
            parameter.grad = None
        model.update_target(step / STEPS)
        results[f"same centre {step}"] = model.get_buffer("center").clone()
        assert results[f"same centre {step}"].abs().max() > 0.005  # of the tolerance's 2e-5
    return results


def probe(name: str, **settings: Any) -> Results:
    """A probe's gradient, of two micro-batches: images, views, kept tokens and negatives are those of one process."""
    own = {"objective": name, "objective_config": settings, "gradient_accumulation_steps": 2, "mixed_precision": "no"}
    recipe = PretrainRecipe(**{**RECIPE, **own})
    pixels = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    torch.manual_seed(0)
    gradient_of = GradientProbe(build_objective(recipe), pretrain_config(recipe), ImageSource("set", pixels=pixels))
    results: Results = {}
    for draw, strategy in enumerate((None, Strategy(Compression(4, 0.5), Compression(4, 0.25)))):
        gradient = gradient_of(strategy, draw)
        results[f"same direction {draw}"] = gradient / gradient.norm()
        results[f"same norm {draw}"] = gradient.norm().log()
    return results


def nearest() -> Results:
    """kNN accuracy of seven queries, and of a single one, which leaves the second process without."""
    bank, queries = random(30, SIZE, seed=1), random(7, SIZE, seed=2)
    classes, truth = torch.arange(30) % 6, torch.arange(7) % 6
    results: Results = {}
    for count in (7, 1):
        accuracy = knn_accuracy(bank, classes, queries[:count], truth[:count], k=9)
        results[f"same accuracy of {count}"] = torch.tensor([accuracy["top1"], accuracy["top5"]])
    assert 0 < results["same accuracy of 7"][1] < 1
    return results


def normalisation() -> Results:
    """The mean and deviation of a run, though the second process cannot read some of the images."""
    results: Results = {}
    cases: tuple[tuple[int, Literal["data"] | None], ...] = ((3, "data"), (2, None))
    for channels, choice in cases:
        pixels = torch.randint(0, 256, (8, channels, 9, 9), generator=torch.Generator().manual_seed(0))
        readable = pixels.to(torch.uint8)[3 * rank() :]
        source = ImageSource("set", pixels=readable, channels=channels)
        source = source.renormalised(*measure_normalisation(source))
        config = AccelViTConfig(hidden_size=32, num_attention_heads=2, num_channels=channels)
        made = normalise_source(source, config, choice)
        assert (list(made.mean), list(made.std)) == (config.image_mean, config.image_std)
        results |= {f"same mean {channels}": torch.tensor(made.mean), f"same std {channels}": torch.tensor(made.std)}
    return results


HEADS = {"projector_hidden_size": 32, "projection_size": 8}
DINO_HEAD: dict[str, Any] = {"num_prototypes": 24, "head_hidden_size": 32, "bottleneck_size": 8}
CASES: dict[str, Callable[[], Results]] = {
    "BatchNorm1d": lambda: through(BatchNorm1d(SIZE)),
    "BatchNorm1d without affine": lambda: through(BatchNorm1d(SIZE, affine=False)),
    "mlp": lambda: through(mlp(3, SIZE, 8, 4)),
    "contrastive_loss": loss,
    "nt_xent_loss": nt_xent,
    "MoCo": lambda: objective("moco", **HEADS),
    "SimCLR": lambda: objective("simclr", **HEADS),
    "DINO": lambda: objective("dino", **DINO_HEAD, num_local_crops=3, local_crop_size=8),
    "DINO's steps": dino_steps,
    "kNN": nearest,
    "normalisation": normalisation,
    "probe of MoCo": lambda: probe("moco", **HEADS),
    "probe of SimCLR": lambda: probe("simclr", **HEADS),
    "probe of DINO": lambda: probe("dino", **DINO_HEAD, num_local_crops=3, local_crop_size=8),
}


SCRIPT = (
    "from tests.objectives.test_two_processes import CASES; results = {name: case() for name, case in CASES.items()}"
)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return run_two(SCRIPT, tmp_path_factory.mktemp("gloo"))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_are_one_with_the_whole_batch(case: str, of_two: list[dict[str, Results]]) -> None:
    assert world_size() == 1
    expected, (first, second) = CASES[case](), (one[case] for one in of_two)
    assert expected.keys() == first.keys() == second.keys()
    for name, value in expected.items():
        kind = name.split()[0]
        if kind == "same":
            assert torch.equal(first[name], second[name]), name
        joined = {
            "rows": lambda a, b: torch.cat([a, b]),
            "sum": torch.add,
            "mean": lambda a, b: (a + b) / 2,
            "same": lambda a, b: a,
        }[kind](first[name], second[name])
        torch.testing.assert_close(joined, value, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
