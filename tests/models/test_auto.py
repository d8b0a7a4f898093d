"""Saving, loading, the Auto classes, and the files as the Hub's remote code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    dynamic_module_utils,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import hf_accel
from hf_accel import AccelViTConfig, AccelViTForImageClassification, AccelViTModel


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def config(**overrides: Any) -> AccelViTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return AccelViTConfig(**{**sizes, "image_size": 32, "patch_size": 8, **overrides})


def features(model: AccelViTModel) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(9))
    return model.eval()(images, 16, 0.25, torch.Generator().manual_seed(9)).last_hidden_state


@pytest.mark.parametrize(
    "fields",
    [{}, {"position_embedding_type": "learned", "num_register_tokens": 2, "layerscale_value": 0.1, "pooling": "mean"}],
    ids=["default", "everything"],
)
def test_model_roundtrip(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = AccelViTModel(config(**fields))
    features(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["embeddings.patch_embeddings.projection.weight"].shape == (16, 3, 8, 8)
    assert set(stored) == {name for name, _ in model.named_parameters()}
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is AccelViTModel and type(AutoConfig.from_pretrained(tmp_path)) is AccelViTConfig
    paths = {"_name_or_path": None}
    assert loaded.config.to_dict() | paths == model.config.to_dict() | paths
    assert {name: getattr(loaded.config, name) for name in fields} == fields
    assert torch.equal(features(loaded), features(model))


def test_classifier_roundtrip(tmp_path: Path) -> None:
    model = AccelViTForImageClassification(config(num_labels=3)).eval()
    model.save_pretrained(tmp_path / "classifier")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    images = torch.randn(2, 3, 32, 32)
    assert type(loaded) is AccelViTForImageClassification
    assert torch.equal(loaded(images).logits, model(images).logits)
    # the encoder alone, and back under a new classifier
    load: Any = AccelViTModel.from_pretrained
    encoder, report = load(tmp_path / "classifier", output_loading_info=True)
    assert not report["missing_keys"] and torch.equal(features(encoder), features(model.encoder))
    encoder.save_pretrained(tmp_path / "encoder")
    again, report = AutoModelForImageClassification.from_pretrained(
        tmp_path / "encoder", num_labels=7, output_loading_info=True
    )
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert again.classifier.out_features == 7 and torch.equal(features(again.encoder), features(model.encoder))


def test_a_training_checkpoint_opens_as_its_encoder(tmp_path: Path) -> None:
    model = AccelViTModel(config())
    state = {f"encoder.{name}": value.clone() for name, value in model.state_dict().items()}
    state |= {f"momentum_encoder.{name}": torch.randn_like(value) for name, value in model.state_dict().items()}
    state["projector.0.weight"] = torch.randn(4, 16)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    loaders: list[Any] = [AccelViTModel.from_pretrained, AutoModel.from_pretrained]
    for load in loaders:
        loaded, report = load(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        assert torch.equal(features(loaded), features(model))


def test_a_frozen_projection_stays_frozen(tmp_path: Path) -> None:
    model = AccelViTForImageClassification(config(freeze_patch_projection=True))
    model.save_pretrained(tmp_path)
    for loaded in (
        model,
        AccelViTModel.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
        AutoModelForImageClassification.from_pretrained(tmp_path),
    ):
        frozen = {name.removeprefix("encoder.") for name, p in loaded.named_parameters() if not p.requires_grad}
        projection = "embeddings.patch_embeddings.projection"
        assert frozen == {f"{projection}.weight", f"{projection}.bias"}
    unfrozen = AccelViTModel.from_pretrained(tmp_path, freeze_patch_projection=False)
    assert all(parameter.requires_grad for parameter in unfrozen.parameters())


@pytest.mark.parametrize("save_processor", [True, False])
def test_image_processor(tmp_path: Path, save_processor: bool) -> None:
    """Shortest edge to 32, centre crop, by PIL; also from a file that does not say which processor it is of."""
    values = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    values |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    config().save_pretrained(tmp_path)
    if save_processor:
        BitImageProcessorPil(**values).save_pretrained(tmp_path)
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor) is BitImageProcessorPil
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    output = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    resized = np.asarray(Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC))[:, 8:40]
    assert output.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(output[0].permute(1, 2, 0), (resized / 255 - 0.5) / 0.25, atol=1e-5)


def test_the_files_stand_alone_as_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model files in a folder of their own, loaded as the Hub's copies are, agree with the package."""
    model = AccelViTModel(config())
    model.save_pretrained(tmp_path / "repo")
    source = Path(hf_accel.__file__).parent / "models"
    for path in source.glob("*_accel_vit.py"):
        shutil.copy(path, tmp_path / "repo")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    remote = dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_accel_vit.AccelViTModel", str(tmp_path / "repo"), local_files_only=True
    )
    assert remote is not AccelViTModel and "hf_accel" not in remote.__module__
    assert torch.equal(features(remote.from_pretrained(tmp_path / "repo")), features(model))


def test_import_is_silent_and_registers() -> None:
    code = (
        "import sys, hf_accel; from transformers import AutoConfig; "
        "assert AutoConfig.for_model('accel_vit').patch_size == 16; "
        "heavy = {'datasets', 'matplotlib', 'evaluate', 'tensorboard', 'mlxtend'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert hf_accel.__version__ == "0.1.0"
