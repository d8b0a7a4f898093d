"""Test saving, loading, the Auto classes, and the model files as remote code of the Hub."""

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
from safetensors.torch import load_file
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
from hf_accel.models import configuration_accel_vit
from hf_accel.objectives import OBJECTIVES
from tests.models.tiny import tiny_config


def features(model: AccelViTModel) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(9))
    return model.eval()(images, 16, 0.25, torch.Generator().manual_seed(9)).last_hidden_state


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return an empty cache of remote code that Python has not imported from yet."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if "transformers_modules" not in k})


def remote_class(reference: str, folder: Path) -> Any:
    return dynamic_module_utils.get_class_from_dynamic_module(reference, str(folder), local_files_only=True)


@pytest.mark.parametrize(
    "fields",
    [{}, {"position_embedding_type": "learned", "num_register_tokens": 2, "layerscale_value": 0.1, "pooling": "mean"}],
    ids=["default", "everything"],
)
def test_model_roundtrip(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = AccelViTModel(tiny_config(**fields))
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
    model = AccelViTForImageClassification(tiny_config(num_labels=3)).eval()
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_checkpoint_of_every_objective_opens_silently(tmp_path: Path, name: str) -> None:
    objective: Any = OBJECTIVES[name]
    small = {"dino": {"num_prototypes": 8, "head_hidden_size": 8, "bottleneck_size": 8}}
    model = objective(tiny_config(), **small.get(name, {"projector_hidden_size": 8, "projection_size": 8}))
    model.save_pretrained(tmp_path)
    load: Any = AccelViTModel.from_pretrained
    loaded, report = load(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(features(loaded), features(model.encoder))
    # other missing weights are reported
    state = {**model.state_dict(), "embeddings.stray_tokens": torch.zeros(3)}
    model.save_pretrained(tmp_path, state_dict=state)
    assert load(tmp_path, output_loading_info=True)[1]["unexpected_keys"] == {"embeddings.stray_tokens"}


def test_a_frozen_projection_stays_frozen(tmp_path: Path) -> None:
    model = AccelViTForImageClassification(tiny_config(freeze_patch_projection=True))
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
def test_image_processor_is_saved_and_loaded(tmp_path: Path, save_processor: bool) -> None:
    """It resizes the shortest edge to 32 and crops the centre with PIL, even if the file does not name its class."""
    values = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    values |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    tiny_config().save_pretrained(tmp_path)
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


@pytest.mark.parametrize("kind", [AccelViTModel, AccelViTForImageClassification])
def test_patch_size_at_load_time(tmp_path: Path, kind: Any) -> None:
    """It applies to calls that name none. The kernel, and the base that is saved again, do not change."""
    model = kind(tiny_config(num_labels=3)).eval()
    model.save_pretrained(tmp_path / "base")
    images = torch.randn(2, 3, 32, 32)
    auto: Any = AutoModel if kind is AccelViTModel else AutoModelForImageClassification
    loaded = auto.from_pretrained(tmp_path / "base", patch_size=16)
    assert (loaded.config.patch_size, loaded.config.default_patch_size) == (8, 16)
    assert torch.equal(loaded(images)[0], model(images, patch_size=16)[0])
    assert torch.equal(loaded(images, patch_size=8)[0], model(images)[0])
    loaded.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again")
    assert torch.equal(again(images)[0], loaded(images)[0])
    base = auto.from_pretrained(tmp_path / "again", patch_size=None)
    assert base.config.default_patch_size is None and torch.equal(base(images)[0], model(images)[0])
    assert AutoConfig.from_pretrained(tmp_path / "base", patch_size=16).default_patch_size == 16
    with pytest.raises(ValueError, match="patch_size must be a positive whole number of pixels, got 0"):
        auto.from_pretrained(tmp_path / "base", patch_size=0)


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_image_size_at_load_time_keeps_the_features(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The positions span an image of any size, so they must not be laid out again."""
    monkeypatch.setattr(configuration_accel_vit.logger, "propagate", True, raising=False)
    model = AccelViTModel(tiny_config(position_embedding_type=kind)).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    for image_size, said in ((64, True), (100, True), (32, False), (None, False)):
        caplog.clear()
        for load in (AutoModel.from_pretrained, AccelViTModel.from_pretrained):
            loaded: Any = load(tmp_path, image_size=image_size)
            assert torch.equal(loaded(images).last_hidden_state, model(images).last_hidden_state)
            assert loaded.config.image_size == 32
        assert caplog.text.count(f"image_size={image_size} has no effect") == (2 if said else 0)


def test_every_checkpoint_carries_its_code(tmp_path: Path) -> None:
    """It carries exactly what the modeling file imports, also as a training checkpoint, and loading asks nothing."""
    source = Path(hf_accel.__file__).parent / "models"
    needed = dynamic_module_utils.get_relative_import_files(source / "modeling_accel_vit.py")
    names = {Path(path).name for path in needed} | {"modeling_accel_vit.py"}
    moco: Any = OBJECTIVES["moco"]
    sizes = {"projector_hidden_size": 16, "projection_size": 8}
    for number, model in enumerate((AccelViTModel(tiny_config()), moco(tiny_config(), **sizes))):
        folder = tmp_path / str(number)
        model.save_pretrained(folder, state_dict=model.state_dict())  # as the Trainer does
        assert {path.name for path in folder.glob("*.py")} == names
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"}
        for auto, reference in auto_map.items():
            module, _, name = reference.partition(".")
            assert getattr(hf_accel, name).__module__ == f"hf_accel.models.{module}", auto
        assert type(AutoModel.from_pretrained(folder)) is AccelViTModel
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is AccelViTModel


@pytest.mark.usefixtures("modules_cache")
def test_remote_code_beside_the_package(tmp_path: Path) -> None:
    """A checkpoint's own files work in a process that has the package, and what they save is complete."""
    model = AccelViTModel(tiny_config())
    model.save_pretrained(tmp_path / "repo")

    def remote(name: str, folder: Path) -> Any:
        found = remote_class(f"modeling_accel_vit.{name}", folder)
        assert found is not getattr(hf_accel, name) and "hf_accel" not in found.__module__
        return found.from_pretrained(folder)

    loaded = remote("AccelViTModel", tmp_path / "repo")
    assert torch.equal(features(loaded), features(model))
    loaded.save_pretrained(tmp_path / "saved again, ä")
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("repo", "saved again, ä")]
    assert files[0] == files[1]
    assert torch.equal(features(remote("AccelViTModel", tmp_path / "saved again, ä")), features(model))
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path / "saved again, ä")), features(model))


@pytest.mark.usefixtures("modules_cache")
def test_what_a_remote_configuration_saves_opens_as_a_model(tmp_path: Path) -> None:
    """The folder of its module in transformers' cache holds the model files, too."""
    AccelViTModel(tiny_config()).save_pretrained(tmp_path / "repo")
    remote = remote_class("configuration_accel_vit.AccelViTConfig", tmp_path / "repo")
    remote.from_pretrained(tmp_path / "repo").save_pretrained(tmp_path / "again")
    names = [{path.name for path in (tmp_path / name).glob("*.py")} for name in ("repo", "again")]
    assert names[0] == names[1]
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"}
    model = remote_class(auto_map["AutoModel"], tmp_path / "again")(tiny_config())
    assert model(torch.randn(1, 3, 32, 32)).pooler_output.shape == (1, 16)


@pytest.mark.usefixtures("modules_cache")
def test_every_model_file_decides_the_configuration_class(tmp_path: Path) -> None:
    """`AutoModel` finds the model class by the configuration class, so other code must have another one."""
    reference = "configuration_accel_vit.AccelViTConfig"
    tiny_config().save_pretrained(tmp_path / "original" / "final")
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    original = remote_class(reference, tmp_path / "original" / "final")
    assert remote_class(reference, tmp_path / "copy" / "final") is original
    files = sorted(path.name for path in (tmp_path / "original" / "final").glob("*.py"))
    assert len(files) > 3
    for name in files:
        other = tmp_path / name / "final"
        shutil.copytree(tmp_path / "original" / "final", other)
        (other / name).write_text((other / name).read_text() + "\nANOTHER_VERSION = True\n")
        assert remote_class(reference, other) is not original, name


@pytest.mark.slow
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
