"""Test mixup and CutMix: targets are each class's share of the pixels, by the formulas of the papers."""

import math

import pytest
import torch

from hf_accel.evaluation.mixing import cutmix, cutmix_boxes, mix_batch, mixup

CLASSES, HEIGHT, WIDTH = 3, 6, 8


def coloured(labels: torch.Tensor) -> torch.Tensor:
    """Return an image for each label, with 1 in the channel of that number and 0 elsewhere."""
    return torch.eye(CLASSES)[labels][:, :, None, None].expand(-1, -1, HEIGHT, WIDTH).clone()


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)], ids=str)
def test_targets_are_the_share_of_each_class_in_the_pixels(alphas):
    labels = torch.arange(60) % CLASSES
    mixed, targets = mix_batch(coloured(labels), labels, CLASSES, *alphas, seed=0, step=3, rank=0)
    torch.testing.assert_close(mixed.mean((2, 3)), targets)
    pasted = ((mixed == 0) | (mixed == 1)).all((1, 2, 3))  # whole pixels of the one or the other
    changed = targets.amax(1) < 0.999
    assert changed.sum() > 20
    assert (changed & pasted).any() == (alphas[1] > 0) and (changed & ~pasted).any() == (alphas[0] > 0)


def test_mixup_is_the_weighted_mean():
    one, other = torch.rand(2, 4, 3, HEIGHT, WIDTH).unbind()
    ratio = torch.tensor([0.0, 0.3, 0.5, 1.0])
    expected = torch.stack([r * a + (1 - r) * b for r, a, b in zip(ratio, one, other, strict=True)])
    torch.testing.assert_close(mixup(one, other, ratio), expected)


def test_cutmix_boxes_follow_the_paper_and_pixels_are_counted():
    source = torch.Generator().manual_seed(0)
    ratio, centres = torch.rand(200, generator=source), torch.rand(200, 2, generator=source)
    boxes = cutmix_boxes(ratio, centres, HEIGHT, WIDTH)
    for box, r, centre in zip(boxes.tolist(), ratio.tolist(), centres.tolist(), strict=True):
        for axis, side in ((0, WIDTH), (1, HEIGHT)):  # r_x ~ U(0, W), r_w = W sqrt(1 - ratio), clipped
            middle, length = centre[axis] * side, side * math.sqrt(1 - r)
            assert box[axis] == pytest.approx(max(0, middle - length / 2), abs=0.5001)
            assert box[axis + 2] == pytest.approx(min(side, middle + length / 2), abs=0.5001)
    mixed, left = cutmix(torch.ones(200, 3, HEIGHT, WIDTH), torch.zeros(200, 3, HEIGHT, WIDTH), boxes)
    for image, share, (x1, y1, x2, y2) in zip(mixed, left.tolist(), boxes.tolist(), strict=True):
        count = 0
        for y in range(HEIGHT):
            for x in range(WIDTH):
                inside = x1 <= x < x2 and y1 <= y < y2
                assert image[:, y, x].tolist() == [0.0 if inside else 1.0] * 3
                count += not inside
        assert share == pytest.approx(count / (HEIGHT * WIDTH))
    assert 0.1 < left.mean() < 0.9


def test_ratios_follow_the_beta_distribution():
    labels = torch.arange(4000) % 2  # partners of the other class in half of the cases
    _, targets = mix_batch(coloured(labels), labels, CLASSES, 0.4, 0.0, seed=0, step=0, rank=0)
    own = targets.gather(1, labels[:, None])[:, 0]
    own = own[own < 1]
    assert own.mean() == pytest.approx(0.5, abs=0.03)
    assert own.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)  # of Beta(a, a)


def test_a_pure_function_of_seed_step_and_rank():
    labels = torch.arange(8) % CLASSES
    images = coloured(labels)

    def draw(*where: int) -> torch.Tensor:
        return mix_batch(images, labels, CLASSES, 0.8, 1.0, *where)[0]

    assert torch.equal(draw(1, 2, 0), draw(1, 2, 0))
    for where in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not torch.equal(draw(1, 2, 0), draw(*where))
    plain, targets = mix_batch(images, labels, CLASSES, 0.0, 0.0, 1, 2, 0)
    assert torch.equal(plain, images) and targets.argmax(1).tolist() == labels.tolist()
