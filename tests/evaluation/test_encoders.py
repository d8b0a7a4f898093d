"""Test which encoders are loaded from a folder and which are refused, and the images of their processors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, PreTrainedModel, ViTConfig, ViTModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import hf_accel
from hf_accel.data import load_sources
from hf_accel.evaluation import (
    extract_features,
    input_of,
    load_encoder,
    load_processor,
    processed_loader,
    takes_patch_size,
    weights_digest,
)
from tests.tiny_runs import image_folder

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]

pytestmark = pytest.mark.usefixtures("own_cache_and_threads")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), count=30, side=lambda index: 20 + index % 3)


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_a_pooling_layer_without_weights_is_taken_off(tmp_path):
    vit = ViTModel(ViTConfig(**SIZES, intermediate_size=16), add_pooling_layer=False).eval()
    model = load_encoder(saved(vit, tmp_path))
    pixels = torch.randn(2, 3, 16, 16)
    loader = [{"pixel_values": pixels, "labels": torch.zeros(2)}]
    with torch.no_grad():
        expected = vit(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(extract_features(model, loader, "cpu")[0], expected)
    with_weights = ViTModel(ViTConfig(**SIZES, intermediate_size=16))
    assert load_encoder(saved(with_weights, tmp_path / "pooled")).pooler is not None


def test_half_precision_is_loaded_in_full(tmp_path):
    half = Dinov2Model(Dinov2Config(**SIZES)).bfloat16()
    assert {value.dtype for value in load_encoder(saved(half, tmp_path)).state_dict().values()} == {torch.float32}


def test_models_that_encode_no_images_are_refused(tmp_path):
    for path in (str(tmp_path / "nowhere"), "runs/mine/final", "./final", "~/final", "my model"):
        with pytest.raises(ValueError, match=r"^there is no such file or folder$"):
            load_encoder(path)
    with pytest.raises(ValueError, match="no such folder, and as a Hub id it cannot be opened"):
        load_encoder("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be opened"):
        load_encoder(str(tmp_path / "empty"))
    (tmp_path / "empty" / "final").mkdir()
    with pytest.raises(ValueError, match=r"no config.json in it; the encoder of this run is .*empty.final"):
        load_encoder(str(tmp_path / "empty"))
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    text = saved(BertModel(BertConfig(**sizes, vocab_size=20)), tmp_path / "text")
    with pytest.raises(ValueError, match="BertModel takes input_ids, not images"):
        load_encoder(text)


@pytest.mark.parametrize("damage", ["missing", "reshaped"])
def test_weights_of_another_model_are_refused(tmp_path, damage):
    folder = saved(Dinov2Model(Dinov2Config(**SIZES)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.0.mlp.fc1.weight"
    value = weights.pop(name)
    if damage == "reshaped":
        weights[name] = value[:3].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.mlp\.fc1\.weight|cannot be opened: .*size"):
        load_encoder(folder)


def test_models_with_a_patch_size_per_call_are_recognised():
    ours = hf_accel.AccelViTModel(hf_accel.AccelViTConfig(**SIZES, intermediate_size=16))
    assert takes_patch_size(ours) and not takes_patch_size(Dinov2Model(Dinov2Config(**SIZES)))


def test_digest_differs_between_weights():
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SIZES))
    first = weights_digest(model)
    assert weights_digest(model) == first and len(first) == 12
    with torch.no_grad():
        model.layernorm.bias[3] += 1e-3
    assert weights_digest(model) != first


PROCESSORS = {
    "crop": BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD
    ),
    "square": ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD),
    "not normalised": ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_input_of_a_processor(kind):
    size, mean, std = input_of(PROCESSORS[kind])
    expected = ([0, 0, 0], [1, 1, 1]) if kind == "not normalised" else (MEAN, STD)
    assert size == 16
    np.testing.assert_allclose((mean, std), expected, atol=1e-6)


def test_images_of_differing_shapes_are_refused():
    processor = BitImageProcessorPil(size={"shortest_edge": 20}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"wide image .* tall one; a batch needs one square size: .*do_center_crop"):
        input_of(processor)


def test_processors_are_loaded_where_there_are_any(tmp_path):
    folder = saved(Dinov2Model(Dinov2Config(**SIZES)), tmp_path)
    assert load_processor(folder) is None
    PROCESSORS["crop"].save_pretrained(folder)
    processor = load_processor(folder)
    assert processor is not None and list(processor.image_mean) == MEAN
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="its image processor cannot be opened"):
        load_processor(folder)


def test_images_are_those_of_the_processor_in_order(images):
    source, _ = load_sources(str(images))
    batches = list(processed_loader(source, PROCESSORS["crop"], 16))
    assert [len(batch["pixel_values"]) for batch in batches] == [16, 14]
    for index in (0, 17, 29):
        expected = PROCESSORS["crop"](images=source.read(index), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(batches[index // 16]["pixel_values"][index % 16], expected)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [index // 10 for index in range(30)]


def test_an_unreadable_image_is_replaced_with_its_label(images, tmp_path):
    source, _ = load_sources(str(image_folder(tmp_path, count=120, side=lambda index: 20 + index % 3)))
    paths = sorted((tmp_path / "train").rglob("*.png"))
    paths[39].write_bytes(b"broken")  # the last of the first class
    (batch,) = processed_loader(source, PROCESSORS["crop"], 120)
    assert batch["labels"][39] == 1 and torch.equal(batch["pixel_values"][39], batch["pixel_values"][40])
    assert list(source.bad) == [39]
