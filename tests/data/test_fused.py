"""Fused views are those that are made operation by operation."""

import shutil
from typing import Any

import pytest
import torch

from hf_accel.data import AUGMENTATIONS, FusedViews, fused, make_views
from tests.data.test_augment import image_by_image, random_images

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def both(batch: dict[str, Any], name: str, size: int, render: FusedViews, step: int = 7) -> None:
    """Views that are rendered both ways from the same draws agree."""
    arguments = (batch, AUGMENTATIONS[name], size, 3, step)
    expected = make_views(*arguments, mean=MEAN, std=STD)
    made = make_views(*arguments, mean=MEAN, std=STD, render=render)
    for mine, theirs in zip(made, expected, strict=True):
        assert mine.dtype == render.dtype
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [24, 96])  # the larger one has a blur to be seen
@pytest.mark.parametrize("view", [0, 1])
def test_fused_views_image_by_image(view: int, size: int) -> None:
    images = random_images(48, 60, 70)
    render = FusedViews(backend=None)
    made = make_views({"images": images}, AUGMENTATIONS["moco"], size, 3, 7, mean=MEAN, std=STD, render=render)[view]
    expected = image_by_image(images, AUGMENTATIONS["moco"][view], size, 3, 7, view)
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_fused_views_of_crops_and_of_gray_images(name: str, channels: int) -> None:
    crops = [random_images(40, 32, 32, channels, seed) for seed in range(2)]
    both({"crops": crops}, name, 32, FusedViews(backend=None))


def test_every_order_of_colour_jitter_has_its_place() -> None:
    """All 24 orders come, each with an image that shows it."""
    draws = torch.rand(3000, 9, generator=torch.Generator().manual_seed(0))
    orders = draws[:, 1:5].argsort(1)
    assert len(orders.unique(dim=0)) == 24
    crops = [random_images(300, 8, 8, seed=seed) for seed in range(2)]
    for step in range(3):
        both({"crops": crops}, "moco", 8, FusedViews(backend=None), step)


@pytest.mark.parametrize("count", [16, 12, 11])  # runs of eight, of six, and one of all
def test_runs_of_fused_views_change_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST_RUN", 8)
    monkeypatch.setattr(fused, "CACHE_BYTES", 1)
    seen = []
    render = FusedViews(backend=None)
    mix = render.mix_colours
    render.mix_colours = lambda images, *rest: seen.append(len(images)) or mix(images, *rest)
    both({"images": random_images(count, 20, 20)}, "moco", 16, render)
    assert set(seen) == {{16: 8, 12: 6, 11: 11}[count]}


def test_large_views_keep_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FRESH_BYTES", 1)
    render, made = FusedViews(backend=None), []
    for step in range(2):
        batch = {"images": random_images(16, 20, 20, seed=step)}
        both(batch, "moco", 16, render)
        made.append(make_views(batch, AUGMENTATIONS["moco"], 16, 3, 7, render=render))
    assert not any(torch.equal(first, second) for first, second in zip(*made, strict=True))
    for step, views in enumerate(made):  # the second views were not written over the first
        batch = {"images": random_images(16, 20, 20, seed=step)}
        again = make_views(batch, AUGMENTATIONS["moco"], 16, 3, 7, render=render)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(views, again, strict=True))


def test_views_whole_and_in_runs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU makes them as a GPU does if it is not to make runs, with a blur of several pixels."""
    monkeypatch.setattr(fused, "LEAST_RUN", 8)
    monkeypatch.setattr(fused, "CACHE_BYTES", 1)
    images = random_images(16, 110, 120)
    for name in AUGMENTATIONS:
        made = []
        for in_runs in (True, False):
            monkeypatch.setattr(fused, "IN_RUNS", in_runs)
            made.append(make_views({"images": images}, AUGMENTATIONS[name], 100, 3, 7, render=FusedViews(backend=None)))
        for mine, theirs in zip(*made, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


def test_fused_views_in_the_precision_of_the_model() -> None:
    batch = {"images": random_images(4, 20, 20)}
    made = make_views(batch, AUGMENTATIONS["moco"], 16, 3, 7, render=FusedViews(torch.bfloat16, backend=None))
    expected = make_views(batch, AUGMENTATIONS["moco"], 16, 3, 7)
    for mine, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(mine, theirs.bfloat16(), atol=0.005, rtol=0)


def test_torch_compile_can_trace_the_chain() -> None:
    """Older versions of torch trace less of Python. Without inductor this takes no compiler."""
    crops = [random_images(4, 16, 16, seed=seed) for seed in range(2)]
    both({"crops": crops}, "moco", 16, FusedViews(backend="eager"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++ on a CPU")
@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_compiled_views_agree(name: str) -> None:
    torch.compiler.reset()
    render = FusedViews()
    for size in (24, 64):
        both({"images": random_images(16, 70, 80)}, name, size, render)
    crops = [random_images(16, 64, 64, seed=seed) for seed in range(2)]
    both({"crops": crops}, name, 64, render)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["images", "crops"])
@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_compiled_views_on_a_gpu(name: str, kind: str) -> None:
    images = random_images(32, 64, 64).cuda()
    crops = {"crops": [images[..., :48, :48], images[..., 16:, 16:]]}
    both({"images": images} if kind == "images" else crops, name, 48, FusedViews())
