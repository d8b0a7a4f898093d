"""How good features are, told without labels by the spectrum of a matrix of them: RankMe, alpha-ReQ and LiDAR."""

from contextlib import suppress

import torch
from torch import Tensor

EPSILON = 1e-7
"""Of RankMe and LiDAR: it keeps the logarithm of a share of zero finite."""

WITHIN = 1e-4
"""What LiDAR adds to the scatter within images, which need not have full rank. The paper's delta."""


@torch.no_grad()
def rank_me(features: Tensor) -> float:
    """Return RankMe (Garrido et al., arXiv 2210.02885): the effective rank of features (N, D), from 1 to min(N, D).

    It is the exponential of the entropy of the singular values s, as shares of their sum: with
    `p_k = s_k / sum(s) + EPSILON` (equations 1 and 2), `exp(-sum(p_k * log(p_k)))`. The features are not centred.

    Raises:
        ValueError: no two rows, features that are not finite, or all zero.

    Example:
        >>> import torch
        >>> round(rank_me(torch.eye(4)), 3)
        4.0
    """
    return _effective_rank(_singular_values(_checked(features)))


@torch.no_grad()
def alpha_req(features: Tensor) -> float:
    """Return alpha-ReQ (Agrawal et al., NeurIPS 2022): how fast the eigenvalues of the features' covariance decay.

    It is the alpha of the power law `lambda_i ~ i^-alpha`, fitted to the logarithms of the eigenvalues by least
    squares. Near 1 is good: well above it, a few directions hold everything, and well below it, much is noise.
    Eigenvalues below the precision of the features are left out.

    Args:
        features: (N, D).

    Raises:
        ValueError: no two rows, features that are not finite, or less than two directions that vary.
    """
    features = _checked(features)
    values = _singular_values(features - features.mean(0)).square() / (len(features) - 1)
    values = values[values > values[0] * torch.finfo(torch.float32).eps]
    if len(values) < 2:
        raise ValueError("the features vary in less than two directions, so their spectrum has no slope")
    ranks = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device).log()
    ranks, heights = ranks - ranks.mean(), values.log() - values.log().mean()
    return -float((ranks * heights).sum() / ranks.square().sum())


@torch.no_grad()
def lidar(features: Tensor) -> float:
    """Return LiDAR (Thilak et al., arXiv 2312.04000): the effective rank of what tells images apart across views.

    With the scatter B of the images' means around the mean of all, and the scatter W of views around the mean of
    their image plus WITHIN, it is the effective rank of `W^(-1/2) B W^(-1/2)`, as in `rank_me`.

    Args:
        features: (N, V, D), of V views of each of N images.

    Raises:
        ValueError: no two images or no two views, or features that are not finite or all zero.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"features must be (images, views, D) with two views or more, not {tuple(features.shape)}")
    images, views, width = features.shape
    flat = _checked(features.flatten(0, 1))
    means = flat.view(images, views, width).mean(1)
    if images < 2:
        raise ValueError("LiDAR compares images, so it needs at least two")
    apart = means - means.mean(0)
    around = (flat.view(images, views, width) - means[:, None]).flatten(0, 1)
    between = apart.T @ apart / (images - 1)
    within = around.T @ around / (images * (views - 1))
    within += WITHIN * torch.eye(width, dtype=within.dtype, device=within.device)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors * values.rsqrt() @ vectors.T
    return _effective_rank(torch.linalg.eigvalsh(whiten @ between @ whiten).clamp(min=0))


def measure_spectrum(features: Tensor) -> dict[str, float]:
    """Return "rank_me" and "alpha_req" of features (N, D), each where it is defined.

    A collapsed encoder, whose features do not vary, has no alpha-ReQ, and one that has diverged has neither.
    """
    found = {}
    for name, measure in (("rank_me", rank_me), ("alpha_req", alpha_req)):
        with suppress(ValueError):
            found[name] = measure(features)
    return found


def _singular_values(features: Tensor) -> Tensor:
    """Return the singular values of features (N, D) in fp64, the largest first.

    They come from the smaller one of both Gram matrices. This takes a small part of the time of a decomposition, and
    fp64 leaves values above 1e-8 of the largest exact enough.
    """
    gram = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def _effective_rank(values: Tensor) -> float:
    """The exponential of the entropy of values, as shares of their sum."""
    if not values.sum() > 0:
        raise ValueError("all features are alike or zero, so they have no rank")
    shares = values / values.sum() + EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def _checked(features: Tensor) -> Tensor:
    """The features (N, D) in fp64. Raises ValueError."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, D) with two rows or more, not {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("the features hold NaN or infinity")
    return features.double()
