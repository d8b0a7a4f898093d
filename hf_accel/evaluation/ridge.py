"""A linear classifier of frozen features in closed form, cheap enough to be measured while an encoder is trained."""

import torch
from torch import Tensor

from .metrics import topk_accuracy

PENALTY = 1e-3
"""The penalty of the squared weights, relative to the number of training features, which have unit variance."""

BLOCK = 16384
"""Rows that are summed at a time, in fp64."""


@torch.no_grad()
def ridge_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the `{"top1"}` accuracy, in [0, 1], of a linear classifier for queries (Q, D) with `labels` (Q,).

    It is the ridge regression of one-hot labels on the standardised features of the bank (N, D): the weights solve
    `(X^T X + PENALTY * N * I) W = X^T Y`. It takes one pass over the bank, and has no learning rate to choose.

    Raises:
        ValueError: an empty bank, or features that are not finite.
    """
    if not len(bank):
        raise ValueError("there are no training features to fit a classifier to")
    num_classes, width = 1 + int(max(bank_labels.max(), labels.max())), bank.shape[1]
    total = torch.zeros(width, dtype=torch.double)
    squares = torch.zeros(width, width, dtype=torch.double)
    sums = torch.zeros(num_classes, width, dtype=torch.double)
    for rows, classes in zip(bank.split(BLOCK), bank_labels.split(BLOCK), strict=True):
        rows = rows.double()
        total += rows.sum(0)
        squares += rows.T @ rows
        sums.index_add_(0, classes, rows)
    if not squares.isfinite().all():
        raise ValueError("features hold NaN or infinite values; has training diverged?")
    number, mean = len(bank), total / len(bank)
    covariance = squares / number - torch.outer(mean, mean)
    scale = covariance.diagonal().clamp(min=1e-12).rsqrt()
    shares = torch.bincount(bank_labels, minlength=num_classes) / number
    targets = (sums / number - torch.outer(shares, mean)) * scale
    system = covariance * torch.outer(scale, scale) + PENALTY * torch.eye(width, dtype=torch.double)
    weights = torch.linalg.solve(system, targets.T)
    scores = ((queries.double() - mean) * scale) @ weights + shares
    return {"top1": topk_accuracy(scores, labels, 1)}
