"""`task=export`: every format from every kind of checkpoint, read by the class it is for."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import hf_accel.run as entry
from hf_accel import AccelViTConfig, AccelViTForImageClassification, AccelViTModel
from hf_accel.models.conversion_timm import to_timm
from hf_accel.objectives import OBJECTIVES
from hf_accel.tasks import export as export_task
from tests.real_timm import real_timm

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
MLP: dict[str, Any] = {"intermediate_size": 96}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def saved(model: Any, folder: Path, processor: bool = True) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    if processor:
        values = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.1] * 3}
        BitImageProcessorPil(**values).save_pretrained(folder)
    return folder


def export(checkpoint: Path | str, output: Path, export_format: str, *overrides: str) -> Path:
    recipe = output.with_name("recipe.yaml")
    recipe.write_text(yaml.safe_dump({"task": "export", "checkpoint": str(checkpoint), "output_dir": str(output)}))
    entry.main([str(recipe), f"export_format={export_format}", *overrides])
    return output / export_format


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@torch.no_grad()
def test_to_transformers(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(AccelViTModel(AccelViTConfig(**SIZES, **MLP, layerscale_value=0.5)), tmp_path / "encoder")
    folder = export(source, tmp_path / "out", kind, "eval_patch_sizes=[16]")
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is {"vit": ViTModel, "dinov2": Dinov2Model}[kind] and loaded.config.patch_size == 16
    ours, theirs = AutoModel.from_pretrained(source)(PIXELS, patch_size=16), loaded(PIXELS)
    assert_close(theirs.last_hidden_state, ours.last_hidden_state)
    assert_close(theirs.pooler_output, ours.pooler_output)
    assert list(AutoImageProcessor.from_pretrained(folder, backend="pil").image_mean) == [0.1] * 3
    said = capsys.readouterr().out
    assert "at patch 16, with image processor" in said and "Read back, its features " in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == [kind]  # nothing of the work remains


@pytest.mark.parametrize("default", [None, 16])
def test_the_patch_is_the_one_that_the_encoder_takes_by_itself(tmp_path: Path, default: int | None) -> None:
    config = AccelViTConfig(**SIZES, **MLP, default_patch_size=default)
    folder = export(saved(AccelViTModel(config), tmp_path / "encoder"), tmp_path / "out", "vit")
    assert ViTConfig.from_pretrained(folder).patch_size == (default or SIZES["patch_size"])


@torch.no_grad()
def test_to_timm(tmp_path: Path) -> None:
    timm = real_timm()
    fields: dict[str, Any] = {"num_register_tokens": 2, "num_labels": 3, "pooling": "mean"}
    config = AccelViTConfig(**SIZES, **MLP, **fields)
    source = saved(AccelViTForImageClassification(config), tmp_path / "classifier")
    folder = export(source, tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_close(model(PIXELS), AutoModelForImageClassification.from_pretrained(source)(PIXELS).logits)
    assert model.pretrained_cfg["mean"] == [0.1] * 3 and model.pretrained_cfg["crop_pct"] == 0.8


@torch.no_grad()
def test_a_classifier_and_a_training_checkpoint(tmp_path: Path) -> None:
    labels: dict[str, Any] = {"id2label": {0: "cat", 1: "dog"}}
    source = saved(AccelViTForImageClassification(AccelViTConfig(**SIZES, **MLP, **labels)), tmp_path / "classifier")
    vit: Any = AutoModelForImageClassification.from_pretrained(export(source, tmp_path / "out", "vit"))
    assert vit.config.id2label[1] == "dog" and type(vit) is ViTForImageClassification
    assert_close(vit(PIXELS).logits, AutoModelForImageClassification.from_pretrained(source)(PIXELS).logits)

    moco: Any = OBJECTIVES["moco"]
    config = AccelViTConfig(**SIZES, **MLP)
    training = saved(moco(config, projector_hidden_size=16, projection_size=8), tmp_path / "checkpoint-3", False)
    encoder = AutoModel.from_pretrained(export(training, tmp_path / "encoder", "accel_vit"))
    assert_close(encoder(PIXELS).last_hidden_state, AutoModel.from_pretrained(training)(PIXELS).last_hidden_state)


@pytest.mark.parametrize("pooler", [True, False])
@torch.no_grad()
def test_from_vit(tmp_path: Path, pooler: bool) -> None:
    source = saved(ViTModel(ViTConfig(**SIZES, **MLP), add_pooling_layer=pooler), tmp_path / "vit")
    encoder = AutoModel.from_pretrained(export(source, tmp_path / "out", "accel_vit"))
    assert type(encoder) is AccelViTModel
    assert_close(encoder(PIXELS).last_hidden_state, ViTModel.from_pretrained(source)(PIXELS).last_hidden_state)
    encoder(PIXELS, patch_size=16)
    assert (tmp_path / "out/accel_vit/preprocessor_config.json").exists()


@torch.no_grad()
def test_from_dinov2(tmp_path: Path) -> None:
    source = saved(Dinov2Model(Dinov2Config(**SIZES)), tmp_path / "dinov2", processor=False)
    encoder = AutoModel.from_pretrained(export(source, tmp_path / "out", "accel_vit"))
    assert_close(encoder(PIXELS).last_hidden_state, AutoModel.from_pretrained(source)(PIXELS).last_hidden_state)
    assert not (tmp_path / "out/accel_vit/preprocessor_config.json").exists()


@pytest.mark.parametrize("form", ["folder", "exported folder", "safetensors", "pth"])
@torch.no_grad()
def test_from_timm(tmp_path: Path, form: str) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3, "num_classes": 0}
    model = real_timm().models.VisionTransformer(**arguments).eval()
    overrides, source = ["model_config.num_attention_heads=3"], tmp_path / "timm"
    source.mkdir()
    pretrained = {"input_size": [3, 32, 32], "mean": [0.2] * 3, "std": [0.5] * 3, "crop_pct": 0.8}
    config: dict[str, Any] = {"architecture": "vit_tiny_patch8_32", "num_classes": 0, "pretrained_cfg": pretrained}
    if form == "pth":
        source = source / "model.pth"
        torch.save({"state_dict": model.state_dict()}, source)
    else:
        save_file(model.state_dict(), source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        source = source / "model.safetensors"
    elif form.endswith("folder"):
        overrides = []
    if form == "exported folder":
        first = export(source, tmp_path / "first", "accel_vit")
        source = export(first, tmp_path / "second", "timm")
    folder = export(source, tmp_path / "out", "accel_vit", *overrides)
    assert_close(AutoModel.from_pretrained(folder)(PIXELS).last_hidden_state, model.forward_features(PIXELS))
    assert (folder / "preprocessor_config.json").exists() == form.endswith("folder")
    if form.endswith("folder"):
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        assert (processor.size["shortest_edge"], list(processor.image_mean)) == (40, [0.2] * 3)


def test_exporter_says_nothing_of_torchvision_alone(caplog):
    logger = logging.getLogger(export_task.EXPORTER)
    with export_task.without_lines_on_torchvision():
        logger.warning("torchvision is not installed. Skipping %s", "torchvision::nms")
        logger.warning("another warning")
    logger.warning("torchvision is not installed. Skipping %s", "later")
    assert "nms" not in caplog.text and "another warning" in caplog.text and "later" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("classifies", [False, True])
@torch.no_grad()
def test_to_onnx(tmp_path: Path, classifies: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    kind: Any = AccelViTForImageClassification if classifies else AccelViTModel
    model = kind(AccelViTConfig(**SIZES, **MLP, num_register_tokens=1, default_patch_size=16))
    source = saved(model, tmp_path / "encoder")
    folder = export(source, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    assert names == (["logits"] if classifies else ["last_hidden_state", "pooler_output"])
    for batch_size in (1, 2, 5):
        pixels = torch.randn(batch_size, 3, 32, 32)
        expected = model.eval()(pixels, patch_size=16)
        for name, got in zip(names, session.run(None, {"pixel_values": pixels.numpy()}), strict=True):
            assert_close(torch.from_numpy(got), expected[name])
    assert (folder / "preprocessor_config.json").exists()


def test_a_wrong_export_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight is other than it should be, by a thousandth."""
    source = saved(AccelViTModel(AccelViTConfig(**SIZES, **MLP)), tmp_path / "encoder")

    def almost(*arguments: Any) -> Any:
        model_arguments, state = to_timm(*arguments)
        return model_arguments, {**state, "norm.weight": state["norm.weight"] * 1.001}

    monkeypatch.setattr(export_task, "to_timm", almost)
    with pytest.raises(SystemExit, match=r"features of what was written differ by \d\.\de-04.*nothing was kept"):
        export(source, tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(AccelViTModel(AccelViTConfig(**SIZES, **MLP, num_register_tokens=2)), tmp_path / "encoder", False)
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match="export_format='vit': ViT cannot express register tokens"):
        export(source, output, "vit")
    with pytest.raises(SystemExit, match=r"eval_patch_sizes=\[8, 16\]: timm has one patch size"):
        export(source, output, "timm", "eval_patch_sizes=[8,16]")
    with pytest.raises(SystemExit, match=r"eval_patch_sizes=\[16\]: accel_vit keeps every patch size"):
        export(source, output, "accel_vit", "eval_patch_sizes=[16]")
    with pytest.raises(SystemExit, match="export_format='timm': image_size 32 must be a multiple of patch_size 12"):
        export(source, output, "timm", "eval_patch_sizes=[12]")
    with pytest.raises(SystemExit, match=r"checkpoint='.*nowhere': there is no such file or folder"):
        export(tmp_path / "nowhere", output, "vit")
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"checkpoint='.*run': .*the encoder of this run is .*run.final"):
        export(tmp_path / "run", output, "vit")
    export(source, output, "timm")
    with pytest.raises(SystemExit, match="timm exists already; remove it"):
        export(source, output, "timm")
    monkeypatch.setattr(export_task, "ONNX_PACKAGES", ("onnx", "onnx_of_another_name"))
    with pytest.raises(SystemExit, match="not installed: onnx_of_another_name; pip install onnx_of_another_name"):
        export(source, output, "onnx")


def test_a_source_that_is_not_understood_is_named(tmp_path: Path) -> None:
    def config_of(text: dict[str, Any]) -> Path:
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source/config.json").write_text(json.dumps(text))
        return tmp_path / "source"

    with pytest.raises(SystemExit, match="its model_type is 'resnet'; there are accel_vit, vit, vit_mae, dinov2"):
        export(config_of({"model_type": "resnet"}), tmp_path / "out", "vit")
    save_file({"pos_embed": torch.zeros(1, 2, 3)}, tmp_path / "source/model.safetensors")
    with pytest.raises(SystemExit, match="architecture 'vit_base_patch16_clip_224' may have other activations"):
        export(config_of({"architecture": "vit_base_patch16_clip_224"}), tmp_path / "out", "vit")
    with pytest.raises(SystemExit, match=r"give model_config\.num_attention_heads="):
        export(tmp_path / "source/model.safetensors", tmp_path / "out", "accel_vit")


def test_a_partial_checkpoint_is_refused(tmp_path: Path) -> None:
    source = saved(ViTModel(ViTConfig(**SIZES, **MLP)), tmp_path / "vit")
    state = ViTModel.from_pretrained(source).state_dict()
    del state["layers.1.mlp.fc2.bias"]
    ViTModel.from_pretrained(source).save_pretrained(source, state_dict=state)
    with pytest.raises(
        SystemExit, match=r"tensors are missing, unknown or of another shape: layers\.1\.mlp\.fc2\.bias"
    ):
        export(source, tmp_path / "out", "accel_vit")
