import colorsys
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageEnhance, ImageOps

from hf_accel.data import augment as views
from hf_accel.data import crops
from hf_accel.data.augment import AUGMENTATIONS, ViewConfig, make_views
from hf_accel.data.crops import crop_and_resize, crop_boxes
from hf_accel.utils.seeding import generator

PLAIN = ViewConfig(crop_scale=(1, 1), crop_ratio=(1, 1), jitter=0, grayscale=0, blur=0, flip=0)


def random_images(count, height, width, channels=3, seed=0):
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator(seed, "test"))


def random_unit(count, size, seed=0):
    return torch.rand(count, 3, size, size, generator=generator(seed, "test"))


def to_pil(image):
    """uint8 or float [0, 1] (3, H, W)."""
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    return PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def column(values):
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None]


@pytest.mark.parametrize("height, width, size", [(40, 57, 12), (40, 57, 24), (16, 12, 48), (28, 28, 28), (99, 150, 64)])
def test_crop_and_resize_is_pillows(height, width, size):
    images = random_images(6, height, width)
    corners = torch.rand(6, 4, generator=generator(1, "test"))
    left, right = (corners[:, :2] * (width - 2)).long().sort(1).values.unbind(1)
    top, bottom = (corners[:, 2:] * (height - 2)).long().sort(1).values.unbind(1)
    boxes = torch.stack([left, top, right + 2, bottom + 2], 1).float()
    boxes[0] = torch.tensor([0, 0, width, height])
    mine = crop_and_resize(images, boxes, size)
    for image, box, result in zip(images, boxes.int().tolist(), mine, strict=True):
        theirs = from_pil(to_pil(image).crop(tuple(box)).resize((size, size), PIL.Image.Resampling.BILINEAR))
        assert (result - theirs).abs().max() <= 1.01 / 255  # Pillow rounds after each of the two directions
        assert (result - theirs).abs().mean() < 0.4 / 255


@pytest.mark.parametrize("channels", [1, 3])
def test_both_ways_to_resize_agree(channels, monkeypatch):
    images, sides = random_images(20, 61, 90, channels), torch.full((20,), 61)
    boxes = views.view_boxes(ViewConfig(), sides, sides, 0, 0, 0, 0, slice(0, 20), 20)
    one_by_one = crop_and_resize(images, boxes, 50)
    monkeypatch.setattr(crops, "LARGEST_PRODUCT", 50)
    torch.testing.assert_close(crop_and_resize(images, boxes, 50), one_by_one, atol=1.01 / 255, rtol=0)


def reference_box(height, width, scale, ratio, draws):
    """RandomResizedCrop as torchvision writes it, with given uniform draws."""
    for area_draw, ratio_draw, top_draw, left_draw in draws.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
            return [left, top, left + w, top + h]
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return [left, top, left + w, top + h]


def test_crop_boxes():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 300, 400), rng.integers(1, 300, 400)
    heights[:40], widths[:40] = 7, 250  # nothing fits: the fallback
    widths[40:80], heights[40:80] = 7, 250
    draws = torch.from_numpy(rng.random((400, 10, 4)))
    boxes = crop_boxes(torch.tensor(heights), torch.tensor(widths), (0.08, 1.0), (3 / 4, 4 / 3), draws)
    for box, height, width, draw in zip(boxes.tolist(), heights.tolist(), widths.tolist(), draws, strict=True):
        assert box == reference_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), draw)
        assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height


@pytest.mark.parametrize(
    ("operation", "enhance"),
    [
        (views.brightness, ImageEnhance.Brightness),
        (views.contrast, ImageEnhance.Contrast),
        (views.saturation, ImageEnhance.Color),
    ],
)
def test_colour_operations_are_pillows(operation, enhance):
    images = (random_unit(5, 9) * 255).round() / 255
    factors = [0.6, 0.9, 1.0, 1.2, 1.4]
    mine = operation(images, column(factors))
    for image, factor, result in zip(images, factors, mine, strict=True):
        theirs = from_pil(enhance(to_pil(image)).enhance(factor))
        assert (result - theirs).abs().max() < 1.5 / 255
    assert not torch.allclose(mine[0], images[0], atol=0.05)


def test_hue_against_colorsys():
    images = random_unit(4, 6)
    images[0, :, 0, 0], images[0, :, 0, 1] = 0.5, 0.0  # no hue at all
    images[0, :, 0, 2] = torch.tensor([0.7, 0.7, 0.1])  # a tie of the largest
    images[0, :, 0, 3] = torch.tensor([0.7, 0.1, 0.7])
    shifts = [-0.1, 0.0, 0.03, 0.5]
    mine = views.hue(images, column(shifts))
    for image, shift, result in zip(images, shifts, mine, strict=True):
        for y in range(6):
            for x in range(6):
                h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
                expected = torch.tensor(colorsys.hsv_to_rgb((h + shift) % 1.0, s, v))
                torch.testing.assert_close(result[:, y, x], expected, atol=2e-6, rtol=0)


def test_grayscale_and_solarize_are_pillows():
    images = (random_unit(3, 11) * 255).round() / 255
    for image, gray, inverted in zip(images, views.grayscale(images), views.solarize(images), strict=True):
        assert (gray - from_pil(to_pil(image).convert("L").convert("RGB"))).abs().max() < 1.01 / 255
        torch.testing.assert_close(inverted, from_pil(ImageOps.solarize(to_pil(image))), atol=1e-6, rtol=0)


def test_blur_against_loops():
    images, sigmas, radius = random_unit(3, 7), torch.tensor([0.2, 0.9, 1.6]), 5
    mine = views.gaussian_blur(images, sigmas, radius)
    for image, sigma, result in zip(images.double().numpy(), sigmas.tolist(), mine, strict=True):
        kernel = np.array([math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)])
        kernel /= kernel.sum()
        expected = np.zeros_like(image)
        for y in range(7):
            for x in range(7):
                for i, down in enumerate(kernel):
                    for j, across in enumerate(kernel):
                        source = image[:, np.clip(y + i - radius, 0, 6), np.clip(x + j - radius, 0, 6)]
                        expected[:, y, x] += down * across * source
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


def test_rotation_and_shear_against_loops():
    size, images = 8, random_unit(3, 8)
    angles, shears = torch.tensor([0.3, -0.2, 0.0]), torch.tensor([0.0, 0.25, 0.0])
    mine = views.rotate_and_shear(images, angles, shears)
    torch.testing.assert_close(mine[2], images[2], atol=1e-5, rtol=0)
    for image, angle, shear, result in zip(images.numpy(), angles.tolist(), shears.tolist(), mine, strict=True):
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        matrix = turn @ np.array([[1, math.tan(shear)], [0, 1]])
        for y in range(size):
            for x in range(size):
                offset = np.array([x + 0.5 - size / 2, y + 0.5 - size / 2])
                sx, sy = np.clip(matrix @ offset + size / 2 - 0.5, 0, size - 1)
                x0, y0 = int(sx), int(sy)
                x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
                fx, fy = sx - x0, sy - y0
                upper = (1 - fx) * image[:, y0, x0] + fx * image[:, y0, x1]
                lower = (1 - fx) * image[:, y1, x0] + fx * image[:, y1, x1]
                np.testing.assert_allclose(result[:, y, x], (1 - fy) * upper + fy * lower, atol=1e-5)


def image_by_image(images, config, size, seed, step, view):
    """A view as a loop over images, operations and draws would make it."""
    count = len(images)

    def draw(name, width):
        return torch.rand(count, width, generator=generator(seed, name, step, 0, view))

    jitter, gray, blur, solarize = draw("jitter", 9), draw("grayscale", 1), draw("blur", 2), draw("solarize", 1)
    crop = torch.rand(count, 10, 4, generator=generator(seed, "crop", step, 0, view))
    flip = torch.rand(count, generator=generator(seed, "flip", step, 0, view))
    results = []
    for i in range(count):
        box = reference_box(images.shape[2], images.shape[3], config.crop_scale, config.crop_ratio, crop[i].double())
        x = crop_and_resize(images[i : i + 1], torch.tensor([box], dtype=torch.float32), size)
        if jitter[i, 0] < config.jitter:
            for number in jitter[i, 1:5].argsort().tolist():
                name = ("brightness", "contrast", "saturation", "hue")[number]
                amount = (2 * jitter[i, 5 + number] - 1) * getattr(config, name) + (name != "hue")
                x = getattr(views, name)(x, amount.view(1, 1, 1, 1))
        if gray[i, 0] < config.grayscale:
            x = views.grayscale(x)
        if blur[i, 0] < config.blur:
            low, high = (sigma * size / 224 for sigma in config.blur_sigma)
            x = views.gaussian_blur(x, low + (high - low) * blur[i, 1:], math.ceil(3 * high))
        if solarize[i, 0] < config.solarize:
            x = 1 - torch.max(x, 1 - x)
        if flip[i] < config.flip:
            x = x.flip(-1)
        results.append(x)
    return torch.cat(results)


def test_the_default_is_moco_v3s():
    # main_moco.py: augmentation1 and augmentation2, crop_min of vit_small and vit_base
    both = {"crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "jitter": 0.8, "grayscale": 0.2, "flip": 0.5}
    both |= {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "blur_sigma": (0.1, 2.0)}
    both |= {"rotation": 0, "shear": 0, "size": None}
    first, second = AUGMENTATIONS["moco"]
    assert asdict(first) == both | {"blur": 1.0, "solarize": 0.0}
    assert asdict(second) == both | {"blur": 0.1, "solarize": 0.2}


def test_digits_are_neither_mirrored_nor_coloured():
    for config in AUGMENTATIONS["digits"]:
        assert config.flip == config.hue == config.saturation == config.grayscale == 0


@pytest.mark.parametrize("size", [24, 96])  # the larger one has a blur to be seen
@pytest.mark.parametrize("view", [0, 1])
def test_views_image_by_image(view, size):
    images = random_images(24, 40, 31)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    made = make_views({"images": images}, AUGMENTATIONS["moco"], size, 3, 7, mean=mean, std=std)[view]
    expected = image_by_image(images, AUGMENTATIONS["moco"][view], size, 3, 7, view)
    expected = (expected - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_two_halves_are_the_whole(name):
    images, configs = random_images(20, 28, 28), AUGMENTATIONS[name]
    whole = make_views({"images": images}, configs, 28, 5, 11, 1)
    for rows in (slice(0, 6), slice(6, 20)):
        part = make_views({"images": images[rows]}, configs, 28, 5, 11, 1, rows=rows, global_batch=20)
        for mine, all_rows in zip(part, whole, strict=True):
            torch.testing.assert_close(mine, all_rows[rows], atol=1e-6, rtol=0)


def test_runs_for_the_cache_change_nothing(monkeypatch):
    images, configs = random_images(40, 20, 20), AUGMENTATIONS["moco"]
    whole = make_views({"images": images}, configs, 16, 5, 11)
    monkeypatch.setattr(views, "CACHE_BYTES", 1)
    for mine, before in zip(make_views({"images": images}, configs, 16, 5, 11), whole, strict=True):
        torch.testing.assert_close(mine, before, atol=1e-6, rtol=0)


def test_draws_change_with_the_micro_step_and_leave_their_input():
    images, state = random_images(8, 24, 24), torch.get_rng_state()
    before = images.clone()
    crops = {"crops": [images, images]}  # without draws of boxes
    first, second = (make_views(crops, AUGMENTATIONS["moco"], 24, 1, 2, micro) for micro in (0, 1))
    assert torch.equal(images, before) and torch.equal(state, torch.get_rng_state())
    assert all(not torch.allclose(one, other) for one, other in zip(first, second, strict=True))


def test_crops_are_taken_as_they_are():
    crops = [random_images(5, 12, 12, seed=seed) for seed in (0, 1)]
    made = make_views({"crops": crops}, [PLAIN, PLAIN], 12, 0, 0)
    for view, crop in zip(made, crops, strict=True):
        torch.testing.assert_close(view, crop / 255)


def test_larger_crops_are_resized():
    crops = [random_images(5, 24, 24)]
    (view,) = make_views({"crops": crops}, [PLAIN], 12, 0, 0)
    whole = torch.tensor([[0.0, 0.0, 24.0, 24.0]]).expand(5, 4)
    torch.testing.assert_close(view, crop_and_resize(crops[0], whole, 12))


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_one_gray_channel_equals_three(name):
    gray = random_images(16, 28, 28, channels=1)
    one = make_views({"images": gray}, AUGMENTATIONS[name], 28, 0, 0)
    three = make_views({"images": gray.repeat(1, 3, 1, 1)}, AUGMENTATIONS[name], 28, 0, 0)
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


def test_every_view_of_every_step_has_its_own_boxes():
    sides, rows = torch.full((4,), 100), slice(0, 4)
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    boxes = [views.view_boxes(ViewConfig(), sides, sides, *key, rows=rows, global_batch=4) for key in keys]
    assert len({tuple(box.flatten().tolist()) for box in boxes}) == len(keys)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["images", "crops", "gray"])
@pytest.mark.parametrize("augmentation", list(AUGMENTATIONS))
def test_the_device_changes_nothing(augmentation, kind):
    images = random_images(32, 64, 64)
    here: dict[str, Any] = {"images": images[:, :1] if kind == "gray" else images}
    if kind == "crops":
        here = {"crops": [images[..., :48, :48], images[..., 16:, 16:]]}
    there = {key: [part.cuda() for part in value] if key == "crops" else value.cuda() for key, value in here.items()}
    views = [make_views(batch, AUGMENTATIONS[augmentation], 48, 0, 0) for batch in (here, there)]
    for a, b in zip(*views, strict=True):
        assert b.is_cuda
        torch.testing.assert_close(a, b.cpu(), atol=1e-3, rtol=0)
