"""Test feature extraction: pooling, order, unchanged modes and random state, raw pixels, and two processes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_accel.data import eval_loader, load_sources
from hf_accel.distributed.stopping import Stopped, request_stop
from hf_accel.evaluation import extract_features, features, raw_pixel_features
from tests.tiny_runs import image_folder
from tests.two_processes import run_two

SIZE = 8


def samples(n: int = 21, size: int = SIZE) -> Any:
    source = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, size, size, generator=source), "labels": i % 5} for i in range(n)]


def small_vit(pooling: bool = False) -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=SIZE, patch_size=4
    )
    return ViTModel(config, add_pooling_layer=pooling)


class Encoder(nn.Module):
    """Records its arguments and returns the mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(3)
        self.config, self.asked = ViTConfig(), []

    def forward(self, pixel_values, patch_size=16):
        self.asked.append((self.training, torch.is_grad_enabled(), patch_size))
        pooled = self.drop(self.norm(pixel_values)).mean((2, 3))
        return type("Output", (), {"pooler_output": pooled.to(torch.get_autocast_dtype("cpu"))})


def test_order_labels_and_values() -> None:
    data, model = samples(), small_vit()
    features, labels = extract_features(model, DataLoader(data, batch_size=4), "cpu")
    model.eval()
    with torch.no_grad():
        expected = [model(item["pixel_values"][None]).last_hidden_state[0, 0] for item in data]
    torch.testing.assert_close(features, torch.stack(expected))
    assert labels.tolist() == [item["labels"] for item in data] and labels.dtype == torch.int64


def test_pooling_of_each_kind_of_encoder() -> None:
    loader, pixels = DataLoader(samples(6), batch_size=6), torch.stack([s["pixel_values"] for s in samples(6)])
    with torch.no_grad():
        vit = small_vit(pooling=True).eval()
        torch.testing.assert_close(extract_features(vit, loader, "cpu")[0], vit(pixels).pooler_output)
        no_cls = small_vit().eval()
        no_cls.config.use_cls_token = False
        torch.testing.assert_close(extract_features(no_cls, loader, "cpu")[0], no_cls(pixels).last_hidden_state.mean(1))
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
        resnet = ResNetModel(ResNetConfig(**sizes)).eval()
        expected = resnet(pixels).last_hidden_state.mean((2, 3))
        torch.testing.assert_close(extract_features(resnet, loader, "cpu")[0], expected)


def test_modes_gradients_and_random_state_are_as_before() -> None:
    model = Encoder().train()
    model.norm.eval()
    state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    features, _ = extract_features(model, DataLoader(samples(), batch_size=4), "cpu", patch_size=8)
    assert set(model.asked) == {(False, False, 8)} and not features.requires_grad
    assert (model.training, model.drop.training, model.norm.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_mode_is_restored_after_an_error() -> None:
    model = Encoder().train()
    with pytest.raises(KeyError, match="pixel_values"):
        extract_features(model, [{"labels": torch.zeros(1)}], "cpu")
    assert model.training and model.drop.training


def test_images_without_labels_have_features() -> None:
    bare: Any = [{"pixel_values": item["pixel_values"]} for item in samples()]
    found, labels = extract_features(small_vit(), DataLoader(bare, batch_size=4), "cpu")
    expected, _ = extract_features(small_vit(), DataLoader(samples(), batch_size=4), "cpu")
    assert torch.equal(found, expected) and set(labels.tolist()) == {-1}


def test_patch_size_is_left_to_the_model_unless_given() -> None:
    model = Encoder()
    extract_features(model, DataLoader(samples(2), batch_size=2), "cpu")
    assert model.asked[0][2] == 16


def test_autocast_computes_low_and_returns_fp32() -> None:
    loader, model = DataLoader(samples(), batch_size=7), small_vit()
    exact, low = (extract_features(model, loader, "cpu", dtype=dtype)[0] for dtype in (None, torch.bfloat16))
    assert low.dtype == torch.float32 and not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0.1)


def test_a_cached_kernel_serves_a_later_backward() -> None:
    class Caching(Encoder):
        cache = None

        def forward(self, pixel_values):
            if self.cache is None:
                self.cache = torch.ones(3) * 2
            return type("Output", (), {"pooler_output": pixel_values.mean((2, 3)) * self.cache})

    model = Caching()
    extract_features(model, DataLoader(samples(2), batch_size=2), "cpu")
    pixels = torch.ones(1, 3, 2, 2, requires_grad=True)
    model(pixels).pooler_output.sum().backward()
    assert pixels.grad is not None and torch.equal(pixels.grad, torch.full_like(pixels, 0.5))


def test_a_stop_is_answered_between_batches() -> None:
    seen = []

    def loader():
        for batch in DataLoader(samples(), batch_size=4):
            seen.append(len(batch["labels"]))
            if len(seen) == 2:
                request_stop()
            yield batch

    model = Encoder().train()
    with pytest.raises(Stopped):
        extract_features(model, loader(), "cpu")
    assert len(seen) <= 3 and model.training


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_of_a_batch_change_nothing(monkeypatch, rows) -> None:
    loader, model = list(DataLoader(samples(), batch_size=8)), small_vit()
    expected, expected_labels = extract_features(model, loader, "cpu")
    monkeypatch.setattr(features, "CPU_ROWS", rows)
    found, labels = extract_features(model, loader, "cpu")
    torch.testing.assert_close(found, expected)
    assert torch.equal(labels, expected_labels)


def test_a_large_batch_is_answered_within_it_on_a_cpu() -> None:
    class Stopping(Encoder):
        def forward(self, pixel_values, patch_size=16):
            if len(pixel_values) > 1:  # not the check before
                request_stop()
            return super().forward(pixel_values, patch_size)

    model = Stopping()
    with pytest.raises(Stopped):
        extract_features(model, DataLoader(samples(100), batch_size=100), "cpu")
    assert len(model.asked) <= 3  # two of the check, and the first part


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        extract_features(Encoder(), [], "cpu")


def test_raw_pixels() -> None:
    data = samples(5)
    features, labels = raw_pixel_features(DataLoader(data, batch_size=2))
    assert torch.equal(features, torch.stack([item["pixel_values"].flatten() for item in data]))
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_large_raw_pixels_are_averaged() -> None:
    data = samples(2, size=64)
    features, _ = raw_pixel_features(DataLoader(data, batch_size=2))
    block_means = data[1]["pixel_values"].unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))
    torch.testing.assert_close(features[1], block_means.flatten())


SCRIPT = """
from torch.utils.data import DataLoader
from hf_accel.evaluation import features as module
from tests.evaluation.test_features import Encoder, samples
module.GATHER_ROWS = 3
loaded = []
def collate(items):
    loaded.append(len(items))
    return torch.utils.data.default_collate(items)
found = {}
for n in (21, 8, 4):  # in batches of four: six of them, the last short; one each; one process without any
    loader = DataLoader(samples(n), batch_size=4, collate_fn=collate)
    found[n] = module.extract_features(Encoder(), loader, "cpu")
found["list"] = module.extract_features(Encoder(), list(DataLoader(samples(21), batch_size=4)), "cpu")
try:
    from accelerate.data_loader import DataLoaderShard
    module.extract_features(Encoder(), DataLoaderShard(samples(4)), "cpu")
except TypeError as error:
    found["sharded"] = str(error)
results = (found, loaded)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path) -> None:
    results = run_two(SCRIPT, tmp_path)
    for (found, loaded), own in zip(results, ([4, 4, 4, 4, 4], [4, 4, 1, 4]), strict=True):
        assert loaded == own, "each process loads its own batches only"
        assert "sharded already" in found["sharded"]
        for n in (21, 8, 4, "list"):
            count = 21 if n == "list" else n
            features, labels = extract_features(Encoder(), DataLoader(samples(count), batch_size=4), "cpu")
            assert torch.equal(found[n][0], features) and torch.equal(found[n][1], labels)


def test_a_process_tells_what_it_cannot_read_of_its_share(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "images", side=lambda index: 16 + index % 3)  # images of one size would be in memory
    sorted(root.glob("train/*/*.png"))[70].write_bytes(b"no image")
    source, _ = load_sources(str(root))
    monkeypatch.setattr(features, "world_size", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(features, "rank", lambda rank=rank: rank)
        source.bad.clear()
        numbers = [number for number, _ in features._take_own_batches(eval_loader(source, 16, 20))]
        assert numbers == [rank, rank + 2, rank + 4]
        found.append(sorted(source.bad))
    assert sorted(map(len, found)) == [0, 1]
