"""What `PretrainTrainer` and `estimate_gradient_errors` refuse, in one line that says what to pass instead."""

from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainingArguments, ViTConfig

from hf_accel import (
    AccelViTModel,
    Compression,
    MoCoForPreTraining,
    PretrainConfig,
    PretrainTrainer,
    Strategy,
    estimate_gradient_errors,
    vit_small,
)
from tests.models.tiny import tiny_config


def model() -> MoCoForPreTraining:
    return MoCoForPreTraining(tiny_config(), projector_hidden_size=16, projection_size=8)


def trainer(**arguments: Any) -> PretrainTrainer:
    args = PretrainConfig("runs/arguments", budget=600, batch_size=4, report_to="none", bf16=False)
    given: dict[str, Any] = {"model": model(), "args": args, "train_dataset": None, **arguments}
    return PretrainTrainer(**given)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "model",
            "moco",
            r"of type str cannot be pretrained; pass an objective, e\.g\. MoCoForPreTraining\(vit_small\(\)\)",
        ),
        ("model", None, "of type NoneType cannot be pretrained"),
        ("model", tiny_config(), r"made from it, e\.g\. MoCoForPreTraining\(config\)"),
        ("model", AccelViTModel(tiny_config()), r"MoCoForPreTraining\.from_pretrained\(folder\)"),
        ("args", TrainingArguments("runs/arguments", use_cpu=True), "of type TrainingArguments has no budget; pass a"),
        ("eval_dataset", {"a": [], "b": []}, r"it holds several datasets \(a, b\); pass one"),
    ],
    ids=str,
)
def test_an_object_of_another_kind_is_refused(name, value, words):
    with pytest.raises(TypeError, match=rf"^{name}: .*{words}"):
        trainer(**{name: value})


@pytest.mark.parametrize(
    "name",
    [
        *("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "data_collator"),
        *("processing_class", "model_init", "label_column", "image_column"),
    ],
)
def test_an_argument_that_is_not_taken_names_another_way(name):
    with pytest.raises(ValueError, match=rf"^{name}: PretrainTrainer does not take it; "):
        trainer(**{name: print})


def test_none_is_as_good_as_no_argument(tmp_path):
    args = PretrainConfig(str(tmp_path), budget=600, batch_size=4, report_to="none", bf16=False)
    nothing = dict.fromkeys(("processing_class", "compute_metrics", "data_collator", "label_column"))
    assert trainer(args=args, train_dataset=Images(), **nothing).plan.num_steps > 0


@pytest.mark.parametrize("callback", [EarlyStoppingCallback, EarlyStoppingCallback()], ids=["class", "object"])
def test_early_stopping_is_refused(callback):
    with pytest.raises(ValueError, match="EarlyStoppingCallback has no effect: training ends when the budget"):
        trainer(callbacks=[callback])


@pytest.mark.parametrize("config", [ViTConfig(), "vit_small", {}], ids=["ViTConfig", "name", "dict"])
def test_an_objective_takes_only_its_configuration(config):
    with pytest.raises(TypeError, match=r"takes an AccelViTConfig, e\.g\. vit_small\(\), and not a "):
        MoCoForPreTraining(config)


def test_a_preset_refuses_a_field_that_does_not_exist():
    with pytest.raises(TypeError, match="hiden_size=3: AccelViTConfig has no such field; did you mean 'hidden_size'"):
        vit_small(hiden_size=3)
    made = vit_small(num_labels=3, out_features=["stage2"], attn_implementation="eager", image_size=32)
    assert (made.num_labels, made.out_features, made.image_size) == (3, ["stage2"], 32)


def test_an_estimate_refuses_impossible_strategies():
    args, images = PretrainConfig("runs/arguments", budget=600, batch_size=4, bf16=False), Images()
    with pytest.raises(ValueError, match="patch_size 9 is not possible at image_size 32 and base patch 8"):
        estimate_gradient_errors(model(), args, images, [Strategy(Compression(9))], draws=3)
    bare: Any = Compression(16)
    with pytest.raises(TypeError, match=r"expected a Strategy, .*; write Strategy\(Compression\(patch_size\)\)"):
        estimate_gradient_errors(model(), args, images, [bare], draws=3)


class Images:
    """Eight uint8 tensors."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        return torch.full((3, 32, 32), index, dtype=torch.uint8)
