"""Test fine-tuning: learning rates by depth, weights of the classifier, learning, saving, and refusals."""

from copy import copy
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    LevitConfig,
    LevitModel,
    PreTrainedModel,
    ViTConfig,
    ViTMAEConfig,
    pipeline,
)

import hf_accel
from hf_accel.data import ImageSource, image_processor, load_sources
from hf_accel.data.shards import Shards
from hf_accel.distributed.stopping import Stopped, request_stop
from hf_accel.evaluation import FineTuneConfig, NotFineTunable, finetune
from hf_accel.evaluation.finetune import FineTuneTrainer, build_classifier, compute_layer_scales, parameter_groups
from tests.tiny_runs import image_folder

pytestmark = pytest.mark.usefixtures("own_cache_and_threads")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CONFIGS = {
    "ours": hf_accel.AccelViTConfig(
        **SIZES,
        intermediate_size=64,
        layerscale_value=0.1,
        num_register_tokens=1,
        position_embedding_type="learned",
        freeze_patch_projection=True,
    ),
    "vit": ViTConfig(**SIZES, intermediate_size=64),
    "dinov2": Dinov2Config(**SIZES, mlp_ratio=2),
}
QUICK: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
CONFIG = FineTuneConfig(epochs=6, batch_size=30, learning_rate=3e-3, layer_decay=0.8, mixup=0.2, drop_path_rate=0.1)


def encoder(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(CONFIGS[name]).eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[ImageSource, ImageSource]:
    source, validation = load_sources(str(image_folder(tmp_path_factory.mktemp("images"))))
    assert validation is not None
    return source, validation


# With a decay of 0.5 and two layers; layer 0 is what comes before them, the classifier and the last norm are the top.
RATES = {
    "ours": {
        "encoder.embeddings.cls_token": 0.125,
        "encoder.embeddings.register_tokens": 0.125,
        "encoder.embeddings.position_embeddings": 0.125,
        "encoder.embeddings.patch_embeddings.projection.weight": 0.125,
        "encoder.layers.0.attention.q_proj.weight": 0.25,
        "encoder.layers.0.layer_scale1.lambda1": 0.25,
        "encoder.layers.1.layernorm_after.bias": 0.5,
        "encoder.layers.1.mlp.fc2.weight": 0.5,
        "encoder.layernorm.weight": 1.0,
        "classifier.weight": 1.0,
        "classifier.bias": 1.0,
    },
    "dinov2": {
        "dinov2.embeddings.mask_token": 0.125,
        "dinov2.embeddings.patch_embeddings.projection.bias": 0.125,
        "dinov2.encoder.layer.0.norm1.weight": 0.25,
        "dinov2.encoder.layer.1.layer_scale2.lambda1": 0.5,
        "dinov2.layernorm.bias": 1.0,
        "classifier.weight": 1.0,
    },
}


@pytest.mark.parametrize("name", RATES)
def test_learning_rates_fall_with_depth(name):
    model = build_classifier(encoder(name), ["a", "b", "c"], 0.0, seed=0)
    scales = compute_layer_scales(model, 0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert {parameter: scales[parameter] for parameter in RATES[name]} == RATES[name]
    assert set(scales.values()) == {0.125, 0.25, 0.5, 1.0}
    config = FineTuneConfig(learning_rate=2.0, weight_decay=0.3, layer_decay=0.5)
    groups = parameter_groups(model, config)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(settings) == sum(len(group["params"]) for group in groups) == len(scales)
    for parameter, value in model.named_parameters():
        rate, decay = settings[id(value)]
        matrix = value.ndim > 1 and not parameter.endswith(("_token", "_tokens", "position_embeddings"))
        assert (rate, decay) == (2 * scales[parameter], 0.3 if matrix else 0.0), parameter


def test_no_decay_needs_no_layers_and_another_does():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert set(compute_layer_scales(model, 1.0).values()) == {1.0}
    with pytest.raises(NotFineTunable, match=r"Sequential has no numbered layers; set finetune_config.layer_decay=1.0"):
        compute_layer_scales(model, 0.5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_classifier_has_the_encoders_weights(name):
    source = encoder(name)
    model = build_classifier(source, ["ant", "bee"], 0.3, seed=0)
    inner = getattr(model, model.base_model_prefix).state_dict()
    expected = {key: value for key, value in source.state_dict().items() if not key.startswith("pooler.")}
    assert inner.keys() == expected.keys()
    assert all(torch.equal(inner[key], value) for key, value in expected.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.id2label == {0: "ant", 1: "bee"} and model.config.label2id == {"ant": 0, "bee": 1}
    assert getattr(model.config, "drop_path_rate", None) == (None if name == "vit" else 0.3)
    assert "bee" not in source.config.to_dict().get("label2id", {})  # a copy was changed
    head = [build_classifier(source, ["ant", "bee"], 0.3, seed).state_dict()["classifier.weight"] for seed in (0, 0, 1)]
    assert torch.equal(head[0], head[1]) and not torch.equal(head[0], head[2])


def test_a_type_without_a_classifier_is_refused():
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    mae = AutoModel.from_config(ViTMAEConfig(**sizes, image_size=16, patch_size=4))
    with pytest.raises(NotFineTunable, match=r"no image classification model of type 'vit_mae'"):
        build_classifier(mae, ["a", "b"], 0.0, seed=0)
    heads: dict[str, Any] = {"hidden_sizes": [16] * 3, "num_attention_heads": [1] * 3, "key_dim": [8] * 3}
    levit = LevitModel(LevitConfig(image_size=16, depths=[1] * 3, patch_size=4, **heads))
    with pytest.raises(NotFineTunable, match=r"LevitModel cannot be made a classifier: .*'drop_path_rate'"):
        build_classifier(levit, ["a", "b"], 0.1, seed=0)


def test_a_type_of_several_classifiers_is_fine_tuned():
    deit = DeiTModel(DeiTConfig(**SIZES, intermediate_size=32))  # its config names no architecture
    assert type(build_classifier(deit, ["a", "b"], 0.0, seed=0)) is DeiTForImageClassification


@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns_and_saves_a_classifier(name, sources, tmp_path):
    source, validation = sources
    processor = image_processor(source, 16)
    accuracy = finetune(encoder(name), processor, source, validation, CONFIG, 0, tmp_path / "tuned", **QUICK)
    assert accuracy["top1"] > 0.9 and accuracy["top5"] == 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    classify = pipeline("image-classification", model=model, image_processor=processor)
    picture = validation.read(0)
    assert isinstance(picture, PIL.Image.Image) and classify(picture)[0]["label"] == "a"
    assert (tmp_path / "tuned" / "preprocessor_config.json").exists()


@pytest.mark.slow
def test_a_run_is_a_function_of_its_seed(sources, tmp_path):
    source, validation = sources
    config = FineTuneConfig(epochs=1, batch_size=30, drop_path_rate=0.5)

    def weights(seed: int, folder: Path) -> torch.Tensor:
        finetune(encoder("ours"), image_processor(source, 16), source, validation, config, seed, folder, **QUICK)
        return AutoModelForImageClassification.from_pretrained(folder).classifier.weight

    first = weights(0, tmp_path / "0")
    torch.rand(7)  # whatever the state of the global generator
    assert torch.equal(weights(0, tmp_path / "1"), first) and not torch.equal(weights(1, tmp_path / "2"), first)


def test_a_step_gets_augmented_images_and_its_learning_rate(sources, tmp_path, monkeypatch):
    """It gets augmented, normalised images with labels, smoothed targets, and a rate with warm-up and cosine."""
    source, validation = sources
    seen, rates, trainers = [], [], []
    step = FineTuneTrainer.training_step

    def recording(self, model, inputs, num_items_in_batch=None):
        trainers.append(self)
        images, targets = self._augmented(inputs)
        seen.append((images, targets, source.labels[inputs["index"]]))
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(FineTuneTrainer, "training_step", recording)
    config = FineTuneConfig(epochs=10, batch_size=30, learning_rate=1.0e-3, warmup=0.1, mixup=0.0, cutmix=0.0)
    finetune(encoder("vit"), image_processor(source, 16), source, validation, config, 0, tmp_path, **QUICK)
    assert trainers[0].state.log_history[-1]["epoch"] == 10
    assert len(seen) == 40 and all(images.shape == (30, 3, 16, 16) for images, _, _ in seen)
    for images, targets, labels in seen:
        assert targets.argmax(1).tolist() == labels.tolist() and targets.sum() == 30
        mean, std = torch.tensor(source.mean), torch.tensor(source.std)
        colours = images.mean((2, 3)) * std + mean  # 60 / 255 brighter in the channel of the class
        assert (colours.argmax(1) == labels).float().mean() > 0.9 and colours.min() > 0
    head = [max(rate) for rate in rates]
    assert head[0] < 1e-9 and head[4] == pytest.approx(1e-3) and head[-1] < 1e-5
    assert max(rates[4]) / min(rates[4]) == pytest.approx(0.65**-3)


def test_images_of_row_groups_come_in_an_order_by_groups(sources, tmp_path, monkeypatch):
    source, validation = copy(sources[0]), sources[1]
    source.shards = Shards(torch.arange(len(source)) // 10, are_row_groups=True)
    source.shards.pieces = 2
    seen, step = [], FineTuneTrainer.training_step

    def recording(self, model, inputs, num_items_in_batch=None):
        seen.extend(inputs["index"].tolist())
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(FineTuneTrainer, "training_step", recording)
    config = FineTuneConfig(epochs=1, batch_size=30)
    finetune(encoder("ours"), image_processor(source, 16), source, validation, config, 0, tmp_path, **QUICK)
    assert [len({index // 10 for index in seen[start : start + 20]}) for start in range(0, 120, 20)] == [2] * 6


def test_targets_are_smoothed_and_mixed(sources, tmp_path, monkeypatch):
    """The loss of a step against a hand calculation from the model's logits."""
    source, validation = sources
    losses = []
    compute = FineTuneTrainer.compute_loss

    def recording(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        if "step" in inputs:
            images, targets = self._augmented(inputs)
            smooth = 0.8 * targets + 0.2 / 3
            logits = model(pixel_values=images).logits
            assert isinstance(loss, torch.Tensor)
            losses.append((loss.item(), -(smooth * logits.log_softmax(1)).sum(1).mean().item(), targets))
        return loss

    monkeypatch.setattr(FineTuneTrainer, "compute_loss", recording)
    config = FineTuneConfig(epochs=1, batch_size=30, label_smoothing=0.2, drop_path_rate=0.0)
    finetune(encoder("ours"), image_processor(source, 16), source, validation, config, 0, tmp_path, **QUICK)
    assert len(losses) == 4
    for loss, expected, targets in losses:
        assert loss == pytest.approx(expected, rel=1e-5) and (targets.amax(1) < 0.99).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("layer_decay", 1.1),
        ("mixup", -0.1),
        ("label_smoothing", 1.0),
        ("flip", 2.0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
        FineTuneConfig(**{name: value})


@pytest.mark.parametrize("batch", ["train", "validation"])
def test_a_stop_is_answered_between_batches(tmp_path, monkeypatch, sources, batch):
    """After a request in the first training step, or the first evaluated batch, no second one begins."""
    method = "training_step" if batch == "train" else "prediction_step"
    step, done = getattr(FineTuneTrainer, method), []

    def stopping(self, *arguments, **keywords):
        done.append(self.state.global_step)
        request_stop()
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(FineTuneTrainer, method, stopping)
    (source, validation), output = sources, tmp_path / "run"
    config = FineTuneConfig(epochs=1, batch_size=30)
    with pytest.raises(Stopped):
        finetune(encoder("vit"), image_processor(source, 16), source, validation, config, 0, output, **QUICK)
    assert len(done) == 1 and not (output / "model.safetensors").exists()
