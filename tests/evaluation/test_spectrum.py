"""Measures of features without labels, against transcriptions of their papers in NumPy and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from hf_accel.evaluation.spectrum import alpha_req, lidar, rank_me


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rank_by_the_paper(values: np.ndarray) -> float:
    shares = values / np.abs(values).sum() + 1e-7
    return float(np.exp(-np.sum(shares * np.log(shares))))


@pytest.mark.parametrize("shape", [(50, 8), (6, 20)])
def test_rank_me_is_the_papers(shape) -> None:
    features = draw(*shape) * torch.logspace(0, -2, shape[1]) + 0.3
    expected = rank_by_the_paper(np.linalg.svd(features.double().numpy(), compute_uv=False))
    assert rank_me(features) == pytest.approx(expected, rel=1e-9)


def test_rank_me_counts_equal_directions() -> None:
    assert rank_me(torch.eye(5).repeat(3, 1)[:, :4]) == pytest.approx(4, rel=1e-5)
    assert rank_me(torch.ones(9, 4)) == pytest.approx(1, rel=1e-4)
    features = draw(40, 6)
    assert rank_me(7 * features) == pytest.approx(rank_me(features))
    assert rank_me(features.half()) == pytest.approx(rank_me(features), rel=1e-3)


def test_alpha_req_finds_the_exponent() -> None:
    count, width, alpha = 4000, 20, 1.5
    noise = draw(count, width, seed=1).double().numpy()
    basis = np.asarray(scipy.linalg.orth(noise - noise.mean(0)))
    scales = np.sqrt(np.arange(1, basis.shape[1] + 1) ** -alpha)
    features = torch.from_numpy(basis * scales + 3)
    assert alpha_req(features) == pytest.approx(alpha, rel=1e-6)
    assert alpha_req(5 * features) == pytest.approx(alpha, rel=1e-6)


def test_alpha_req_is_the_slope_of_the_covariance() -> None:
    features = draw(300, 12) * torch.logspace(0, -1, 12)
    values = np.sort(np.linalg.eigvalsh(np.cov(features.double().numpy().T)))[::-1]
    slope, _ = np.polyfit(np.log(np.arange(1, 13)), np.log(values), 1)
    assert alpha_req(features) == pytest.approx(-slope, rel=1e-8)
    turned = torch.linalg.qr(draw(17, 12, seed=2))[0].T  # into 17 columns, of which 5 directions do not vary
    assert alpha_req(features @ turned) == pytest.approx(-slope, rel=1e-4)


def test_lidar_is_the_papers() -> None:
    images, views, width = 30, 4, 6
    features = 2 * draw(images, 1, width) + draw(images, views, width, seed=1) * torch.logspace(0, -1, width)
    each = features.double().numpy()
    means = each.mean(1)
    between = np.cov(means.T)
    around = (each - means[:, None]).reshape(-1, width)
    within = around.T @ around / (images * (views - 1)) + 1e-4 * np.eye(width)
    values = np.asarray(scipy.linalg.eigh(between, within, eigvals_only=True))  # those of W^(-1/2) B W^(-1/2)
    assert lidar(features) == pytest.approx(rank_by_the_paper(values), rel=1e-6)


def test_lidar_leaves_out_what_views_change() -> None:
    own = torch.zeros(40, 1, 6)
    own[:, :, :2] = draw(40, 1, 2)
    noise = torch.zeros(40, 8, 6)
    noise[:, :, 2:] = draw(40, 8, 4, seed=1)
    features = own + noise + 1e-3 * draw(40, 8, 6, seed=2)
    assert lidar(features) < 2.1 < rank_me(features.flatten(0, 1))


@pytest.mark.parametrize(
    ("measure", "features", "problem"),
    [
        (rank_me, torch.ones(1, 4), "two rows or more"),
        (rank_me, torch.ones(2, 3, 4), "two rows or more"),
        (rank_me, torch.zeros(5, 4), "no rank"),
        (rank_me, torch.full((5, 4), float("nan")), "NaN"),
        (alpha_req, torch.ones(5, 4), "less than two directions"),
        (alpha_req, torch.full((5, 4), float("inf")), "infinity"),
        (lidar, torch.ones(5, 4), "two views or more"),
        (lidar, torch.ones(5, 1, 4), "two views or more"),
        (lidar, torch.ones(1, 5, 4), "at least two"),
        (lidar, torch.ones(5, 5, 4), "no rank"),
    ],
)
def test_impossible_features_are_refused(measure, features, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        measure(features)
