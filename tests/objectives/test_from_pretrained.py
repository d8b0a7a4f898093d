"""Objectives opened from their own checkpoints, from encoders, and from checkpoints without their settings."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_accel import AccelViTModel, DINOForPreTraining, MoCoForPreTraining, SimCLRForPreTraining
from hf_accel.objectives import ObjectiveForPreTraining
from tests.models.tiny import tiny_config

CONTRASTIVE: dict[str, Any] = {"projector_hidden_size": 16, "projection_size": 8}
CASES: list[tuple[type[ObjectiveForPreTraining], dict[str, Any]]] = [
    (MoCoForPreTraining, {**CONTRASTIVE, "temperature": 0.7, "momentum": 0.5, "symmetric": True}),
    (SimCLRForPreTraining, {**CONTRASTIVE, "temperature": 0.7}),
    (
        DINOForPreTraining,
        {
            **{"num_prototypes": 12, "head_hidden_size": 16, "bottleneck_size": 8, "center_momentum": 0.3},
            **{"local_crop_scale": (0.1, 0.2), "norm_last_layer": False},
        },
    ),
]
every_objective = pytest.mark.parametrize(("kind", "settings"), CASES, ids=[kind.name for kind, _ in CASES])


def saved(folder: Path, model: Any) -> str:
    with torch.no_grad():  # no tensor is at its initial value
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(torch.ones_like(tensor) if not tensor.is_floating_point() else torch.rand_like(tensor))
    model.save_pretrained(folder)
    return str(folder)


def encoders(model: Any) -> list[AccelViTModel]:
    return [child for child in model.children() if isinstance(child, AccelViTModel)]


@every_objective
def test_a_checkpoint_opens_with_its_settings_and_weights(tmp_path, kind, settings):
    model = kind(tiny_config(freeze_patch_projection=True), **settings)
    opened: Any = kind.from_pretrained(saved(tmp_path, model))
    lists = {k: [*v] if isinstance(v, tuple) else v for k, v in model.settings.items()}
    assert {k: [*v] if isinstance(v, tuple) else v for k, v in opened.settings.items()} == lists
    assert not opened.training and opened.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    learn = [{name for name, one in m.named_parameters() if one.requires_grad} for m in (opened, model)]
    assert learn[0] == learn[1] != {name for name, _ in model.named_parameters()}
    for name in ("center_sum", "center_rows"):  # of the step that is under way, in no checkpoint
        assert not hasattr(opened, name) or not getattr(opened, name).any()


@every_objective
def test_an_encoder_gets_new_heads_and_equal_branches(tmp_path, kind, settings, caplog):
    encoder = AccelViTModel(tiny_config())
    path = saved(tmp_path, encoder)
    torch.manual_seed(3)
    new = kind(tiny_config(), **settings).state_dict()
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING, "hf_accel"):
        model = kind.from_pretrained(path, **settings)
    assert "the heads are new" in caplog.text and path in caplog.text
    assert model.settings == kind(tiny_config(), **settings).settings
    for branch in encoders(model):
        for name, value in encoder.state_dict().items():
            assert torch.equal(branch.state_dict()[name], value), name
    heads = {name: value for name, value in model.state_dict().items() if "encoder." not in name}
    for name, value in heads.items():
        assert torch.equal(value, new[name]), name
    assert len(encoders(model)) == 1 + kind.has_target_branch and heads


def test_the_encoder_of_another_objective_is_taken(tmp_path, caplog):
    moco = MoCoForPreTraining(tiny_config(), **CONTRASTIVE)
    with caplog.at_level(logging.WARNING, "hf_accel"):
        model: Any = SimCLRForPreTraining.from_pretrained(saved(tmp_path, moco), **CONTRASTIVE)
    assert "holds MoCoForPreTraining" in caplog.text and model.settings["temperature"] == 0.1
    for name, value in moco.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name


def test_settings_in_the_call_replace_those_of_the_checkpoint(tmp_path):
    path = saved(tmp_path, MoCoForPreTraining(tiny_config(), **CONTRASTIVE, temperature=0.7))
    model: Any = MoCoForPreTraining.from_pretrained(path, temperature=0.3, drop_path_rate=0.1)
    assert (model.temperature, model.config.drop_path_rate) == (0.3, 0.1)
    shapes = re.escape("momentum_projector.0.weight is (16, 16) there and (32, 16) here")
    with pytest.raises(ValueError, match=rf"{path}: {shapes}"):
        MoCoForPreTraining.from_pretrained(path, projector_hidden_size=32)


def test_a_checkpoint_without_settings_asks_for_them(tmp_path, caplog):
    """Earlier versions wrote no settings."""
    moco: Any = MoCoForPreTraining(tiny_config(), **CONTRASTIVE, temperature=0.7)
    path = saved(tmp_path, moco)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("objective_config")["temperature"] == 0.7
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="give the settings that it was trained with"):
        MoCoForPreTraining.from_pretrained(path)
    with caplog.at_level(logging.WARNING, "hf_accel"):
        model: Any = MoCoForPreTraining.from_pretrained(path, **CONTRASTIVE)
    assert "without its settings" in caplog.text and "temperature=0.2" in caplog.text
    assert torch.equal(model.projector[0].weight, moco.projector[0].weight)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    moco: Any = MoCoForPreTraining(tiny_config(), **CONTRASTIVE)
    weights = {name: value for name, value in moco.state_dict().items() if not name.startswith("predictor.")}
    moco.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"it lacks predictor\.0\.weight"):
        MoCoForPreTraining.from_pretrained(tmp_path)


def test_an_encoder_of_a_checkpoint_carries_no_objective(tmp_path):
    moco: Any = MoCoForPreTraining(tiny_config(), **CONTRASTIVE)
    saved(tmp_path / "checkpoint", moco)
    AccelViTModel.from_pretrained(tmp_path / "checkpoint").save_pretrained(tmp_path / "a")
    moco.encoder.save_pretrained(tmp_path / "b")
    for name in "ab":
        assert "objective_config" not in (tmp_path / name / "config.json").read_text()
    assert not hasattr(moco.config, "objective_config")
