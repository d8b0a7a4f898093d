"""Test that stored images give the crops of their files, and that their memory is known before it is taken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from hf_accel.data import FusedViews, augment, cache
from hf_accel.data.augment import AUGMENTATIONS, ViewConfig, make_views
from hf_accel.data.cache import StoredSizes, storage_bytes, storage_side, store_images, stored_sizes
from hf_accel.data.crops import crop_and_resize
from hf_accel.data.loader import TrainSampler, eval_loader, train_loader
from hf_accel.data.sources import CorruptDataError, ImageSource
from tests.data.test_loader import CROP_ONLY, MOCO, folder, noise

CPU = torch.device("cpu")
SIZES = ((80, 60), (50, 90), (200, 40), (64, 64))
"""Widths and heights."""


def smooth_jpegs(path: Path, count: int, sizes: Any) -> Any:
    """A source of pictures that change slowly, as photographs do."""
    source = folder(path, count, sizes, "jpg")
    for number, file in enumerate(sorted(path.iterdir())):
        noise(number, *sizes[number % len(sizes)], smooth=40).save(file, quality=95)
    return source


def load(source: ImageSource, configs: Any, size: int, count: int) -> dict[str, Any]:
    (batch,) = train_loader(source, TrainSampler(count, count), configs, lambda step: size, num_workers=0, seed=3)
    return batch


def views_of(source: ImageSource, configs: Any, size: int, count: int = 8, render: Any = None) -> list[torch.Tensor]:
    return make_views(load(source, configs, size, count), configs, size, 3, 0, render=render)


@pytest.mark.parametrize(
    ("configs", "size", "side"),
    [
        (MOCO, 224, 305),
        ((ViewConfig(crop_scale=(1.0, 1.0)),), 64, 64),
        ((CROP_ONLY, replace(CROP_ONLY, size=96)), 32, 131),
    ],
)
def test_the_median_crop_is_not_enlarged(configs, size, side):
    assert storage_side(configs, size) == side
    heights, widths = torch.full((2001,), side), torch.full((2001,), side * 2)
    for number, config in enumerate(configs):
        boxes = augment.view_boxes(config, heights, widths, 0, 0, 0, number, slice(0, 2001), 2001)
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).abs().median()
        assert area.sqrt() >= 0.99 * (config.size or size)


def test_sizes_keep_the_aspect_ratio_and_are_never_enlarged():
    own = torch.tensor([[300, 400], [80, 60], [1000, 10000], [100, 100]])
    assert stored_sizes(own, 100).tolist() == [[100, 133], [80, 60], [40, 400], [100, 100]]


@pytest.mark.parametrize("size", [24, 60])  # by products and one by one
@pytest.mark.parametrize("fused", [False, True])
def test_images_that_are_not_shrunk_give_the_crops_of_their_files(size, fused, tmp_path):
    files, stored = folder(tmp_path / "a", 8, SIZES), folder(tmp_path / "b", 8, SIZES)
    stored.stored = store_images(stored, 90, CPU)
    render = FusedViews(backend=None) if fused else None
    made = views_of(stored, MOCO, size, render=render), views_of(files, MOCO, size, render=render)
    for one, other in zip(*made, strict=True):
        # Solarization turns a value at one half in either direction.
        assert ((one - other).abs() > 6 / 255).float().mean() < 1e-3 and one.shape == (8, 3, size, size)
    crops = [views_of(source, (CROP_ONLY,), size, render=render)[0] for source in (stored, files)]
    assert (crops[0] - crops[1]).abs().max() < 1.6 / 255


def test_shrunk_images_give_nearly_the_crops_of_their_files(tmp_path):
    sizes = ((400, 300), (250, 450))
    files, stored = smooth_jpegs(tmp_path / "a", 8, sizes), smooth_jpegs(tmp_path / "b", 8, sizes)
    config = replace(CROP_ONLY, crop_scale=(0.5, 1.0))
    side = storage_side((config,), 64)
    stored.stored = store_images(stored, side, CPU)
    assert side == 74 and stored.stored.rows.shape[1] == 74
    one, other = (views_of(source, (config,), 64)[0] for source in (stored, files))
    assert (one - other).abs().mean() < 3 / 255 < 0.1 * other.std()


def test_stored_boxes_cover_the_part_that_was_drawn():
    own, stored = torch.tensor([[300, 400], [400, 300], [2, 900]]), torch.tensor([[75, 100], [100, 75], [1, 225]])
    place = StoredSizes(own, stored, torch.tensor([True, False, True])).place
    boxes = torch.tensor([[40.0, 20.0, 240.0, 220.0], [240.0, 20.0, 40.0, 220.0], [898.0, 0.0, 900.0, 1.0]])
    assert place(boxes).tolist() == [[5, 10, 55, 60], [60, 5, 10, 55], [0, 224, 1, 225]]


@pytest.mark.parametrize("size", [10, 50])
def test_crops_of_turned_images_are_upright(size):
    image = torch.randint(0, 256, (1, 3, 60, 90), dtype=torch.uint8)
    box = torch.tensor([[70.0, 5.0, 20.0, 45.0]])
    turned = crop_and_resize(image.transpose(2, 3), box[:, [1, 0, 3, 2]], size, torch.tensor([True]))
    assert (turned - crop_and_resize(image, box, size)).abs().max() <= 1.01 / 255


def test_memory_is_known_before_it_is_taken(tmp_path, monkeypatch):
    source = folder(tmp_path / "set", 8, SIZES)
    own = torch.tensor([(height, width) for width, height in SIZES] * 2)
    stored = store_images(source, 50, CPU)
    assert stored.rows.numel() == storage_bytes(own, 50) == cache.estimate_bytes(source, 50)
    monkeypatch.setattr(cache, "free_memory", lambda device: stored.rows.numel() - 1)
    monkeypatch.setattr(source, "decode_pixels", lambda *a, **k: 1 / 0)
    with pytest.raises(MemoryError, match=r"^the stored images take 0\.0 GB, and 0\.0 GB are free for this process$"):
        store_images(source, 50, CPU)


def test_the_memory_of_a_container_is_shared_by_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CGROUP", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = cache.free_memory(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    assert cache.free_memory(CPU) > 0.5 * whole > 1e6
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("200000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cache.free_memory(CPU) == 400_000


def test_files_are_read_once_and_their_order_stays(tmp_path, monkeypatch):
    source = folder(tmp_path / "set", 8, SIZES)
    expected = load(source, MOCO, 24, 8)["index"]
    source.stored = store_images(source, 50, CPU)
    monkeypatch.setattr(source, "open", lambda index: 1 / 0)
    batch = load(source, MOCO, 24, 8)
    assert torch.equal(batch["index"], expected) and batch["images"].dtype == torch.uint8
    assert batch["images"].shape == (8, 3, 200, 50)  # 200 x 40 pixels, turned


def test_the_next_image_replaces_one_that_cannot_be_read(tmp_path):
    source = folder(tmp_path / "set", 101, SIZES, broken=(4,))
    source.stored = store_images(source, 50, CPU)
    batch = load(source, MOCO, 24, 101)
    whole = train_loader(
        folder(tmp_path / "other", 101, SIZES, broken=(4,)), TrainSampler(101, 101), MOCO, lambda _: 24, seed=3
    )
    assert torch.equal(batch["index"], next(iter(whole))["index"])
    assert list(source.bad) == [4] and not batch["bad"] and 4 not in batch["index"]
    broken = folder(tmp_path / "broken", 8, SIZES, broken=(1, 2, 5))
    with pytest.raises(CorruptDataError, match="at least 3 of 8 images cannot be read"):
        store_images(broken, 50, CPU)


def test_evaluation_reads_the_files(tmp_path):
    source = folder(tmp_path / "set", 8, SIZES)
    (before,) = eval_loader(source, 32, 8)
    source.stored = store_images(source, 20, CPU)
    (after,) = eval_loader(source, 32, 8)
    assert torch.equal(before["pixel_values"], after["pixel_values"]) and torch.equal(before["labels"], after["labels"])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_are_stored_as_they_are(channels):
    pixels = torch.randint(0, 256, (8, channels, 20, 30), dtype=torch.uint8).expand(-1, 3, -1, -1)
    source, stored = (ImageSource("set", pixels=pixels) for _ in range(2))
    stored.stored = store_images(stored, 8, CPU)
    assert stored.stored.rows.numel() == cache.estimate_bytes(source, 8) == 8 * channels * 600
    for one, other in zip(views_of(source, MOCO, 16), views_of(stored, MOCO, 16), strict=True):
        assert torch.equal(one, other)


def test_jpegs_are_decoded_no_larger_than_needed(tmp_path, monkeypatch):
    source = smooth_jpegs(tmp_path / "set", 2, ((640, 480),))
    shapes, decode = [], source.decode_pixels
    monkeypatch.setattr(source, "decode_pixels", lambda *a, **k: shapes.append(decode(*a, **k)) or shapes[-1])
    stored = store_images(source, 100, CPU)
    assert {image.shape for image in shapes} == {(3, 120, 160)}
    whole = np.asarray(source.read(0).resize((133, 100), PIL.Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(stored.take(torch.tensor([0]))["images"][0].permute(2, 1, 0).numpy() - whole).mean() < 1


@pytest.mark.gpu
def test_views_of_images_on_the_device_are_those_on_the_cpu(tmp_path):
    source = folder(tmp_path / "set", 8, SIZES)
    made = []
    for device in (CPU, torch.device("cuda")):
        source.stored = store_images(source, 50, device)
        assert source.stored.rows.device.type == device.type
        made.append(views_of(source, AUGMENTATIONS["moco"], 40))
    for one, other in zip(*made, strict=True):
        assert other.device.type == "cuda" and ((one - other.cpu()).abs() > 6 / 255).float().mean() < 1e-3
