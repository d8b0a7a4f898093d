"""The units that an objective charges for a training step, against a count of the FLOPs that the step performs."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_accel.compression import Compression, Strategy, forward_cost, forward_flops
from hf_accel.data import AUGMENTATIONS
from hf_accel.models import AccelViTConfig, AccelViTModel
from hf_accel.objectives import OBJECTIVES, Draw, ObjectiveForPreTraining

# Small, but as deep as a real ViT: the backward of the patch projection is one product, not two, for pixels want no
# gradient; with fewer layers that would count.
CONFIG = AccelViTConfig(
    hidden_size=48, num_hidden_layers=12, num_attention_heads=3, intermediate_size=192, image_size=48, patch_size=8
)
BATCH = 2
STRATEGIES = [
    Strategy(Compression(8)),
    pytest.param(Strategy(Compression(8, 0.5)), marks=pytest.mark.slow),
    pytest.param(Strategy(Compression(12, 0.25)), marks=pytest.mark.slow),
    Strategy(Compression(16), Compression(8)),
    Strategy(Compression(8, 0.7), Compression(12, 0.3), Compression(12, 0.25)),
]
HEADS = {"projector_hidden_size": 16, "projection_size": 8}
DINO_HEAD = {"num_prototypes": 16, "head_hidden_size": 16, "bottleneck_size": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "MoCo": ("moco", HEADS),
    "MoCo symmetric": ("moco", {**HEADS, "symmetric": True}),
    "SimCLR": ("simclr", HEADS),
    "DINO": ("dino", DINO_HEAD),
    "DINO multi-crop": ("dino", {**DINO_HEAD, "num_local_crops": 4, "local_crop_size": 24}),
}


def encoder_flops(model: ObjectiveForPreTraining, strategy: Strategy) -> int:
    """FLOPs of a step's forward and backward in every encoder, heads left out."""
    model.train().set_attn_implementation("eager")  # the counter does not see inside the fused attention of a CPU
    sizes = [config.size or CONFIG.image_size for config in model.view_configs(AUGMENTATIONS["moco"])]
    views = [torch.randn(BATCH, 3, size, size) for size in sizes]
    with FlopCounterMode(display=False) as counter:
        model(views, strategy, Draw(0, 0)).loss.backward()
    counts = counter.get_flop_counts()
    encoders = [name for name, module in model.named_modules() if isinstance(module, AccelViTModel)]
    return sum(sum(counts[f"{type(model).__name__}.{name}"].values()) for name in encoders)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES)
def test_units_are_the_flops_that_a_step_performs(name, settings, strategy):
    model = OBJECTIVES[name](CONFIG, **settings)
    units = model.units_per_image(strategy, partial(forward_cost, CONFIG))
    expected = BATCH * units * forward_flops(CONFIG, Compression(CONFIG.patch_size))
    assert encoder_flops(model, strategy) == pytest.approx(expected, rel=0.05)
