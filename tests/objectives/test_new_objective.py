"""What an author of an objective can forget is said when the model is made, or at its first step."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_accel import PretrainTrainer
from hf_accel.models import AccelViTModel
from hf_accel.objectives import OBJECTIVES, MoCoForPreTraining, ObjectiveOutput
from hf_accel.objectives.heads import mlp
from hf_accel.training.monitoring import read_metrics
from tests.models.tiny import tiny_config
from tests.objectives.fourth_objective import SimSiamForPreTraining


class Backbone(SimSiamForPreTraining):
    def __init__(self, config):
        super(SimSiamForPreTraining, self).__init__(config)
        self.backbone = AccelViTModel(config)
        self.post_init()


class NoPostInit(SimSiamForPreTraining):
    def __init__(self, config):
        super(SimSiamForPreTraining, self).__init__(config)
        self.encoder = AccelViTModel(config)
        self.projector = mlp(1, 16, 16, 16)


class LaterModule(MoCoForPreTraining):
    def __init__(self, config):
        super().__init__(config, projector_hidden_size=8, projection_size=4)
        self.decoder = mlp(1, 16, 16, 16)


@pytest.mark.parametrize(
    "kind, problem",
    [
        (Backbone, r"Backbone\.__init__: set self\.encoder to the AccelViTModel"),
        (NoPostInit, r"NoPostInit\.__init__: call self\.post_init\(\) after the last module"),
        (LaterModule, r"LaterModule\.__init__: call self\.post_init\(\) after the last module"),
    ],
)
def test_a_model_without_encoder_or_post_init_is_refused(kind, problem):
    with pytest.raises(TypeError, match=problem):
        kind(tiny_config())


@pytest.mark.parametrize("kind", [*OBJECTIVES.values(), SimSiamForPreTraining])
def test_complete_objectives_are_made_and_copied(kind):
    widths = {"num_prototypes": 8} if "dino" in kind.__name__.lower() else {"projection_size": 4}
    model = kind(tiny_config(), **widths)
    assert type(deepcopy(model)) is kind


def test_metrics_may_be_missing_or_plain_numbers():
    assert read_metrics(None, "byol") == {} == read_metrics({}, "byol")
    weight = torch.ones(1, requires_grad=True)
    found = read_metrics({"a": 0.5, "b": 2 * weight}, "byol")
    assert found["a"] == 0.5 and found["b"].shape == () and not found["b"].requires_grad


def test_a_vector_as_a_metric_is_named():
    with pytest.raises(ValueError, match=r"metrics\['std'\] of byol has the shape \(3,\); return a scalar"):
        read_metrics({"std": torch.ones(3)}, "byol")


def test_a_step_takes_an_output_without_metrics():
    step: Any = SimpleNamespace(strategy=None, progress=0.0)
    trainer: Any = SimpleNamespace(plan=[step], draw_seed=0, objective=SimpleNamespace(name="byol"))
    trainer._metric_sums, trainer._metric_count, trainer._seconds_of_views = {}, 0, 0.0
    inputs = {"step": 0, "micro_step": 0, "views": [torch.zeros(1)]}
    model: Any = lambda *_: ObjectiveOutput(loss=torch.ones(()))  # noqa: E731
    loss = PretrainTrainer.compute_loss(trainer, model, inputs)
    assert loss == 1 and trainer._metric_sums == {} and trainer._metric_count == 1
