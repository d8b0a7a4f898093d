"""Weighted k-nearest-neighbour classification of features, as in DINO (arXiv 2104.14294, appendix on kNN evaluation;
the weights are those of Wu et al., arXiv 1805.01978).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import all_reduce, rank, world_size
from ..distributed.stopping import until_stopped
from .metrics import topk_accuracy

QUERY_BLOCK = 1024
BANK_BLOCK = 16384
"""Rows that are compared at a time: 64 MiB of similarities, whatever the sizes of bank and queries."""

BLOCK_BYTES = 2**26
"""Limit of a block of features or votes. With wide features or many classes a block has few rows."""


@torch.no_grad()
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Return the votes (Q, num_classes) of the `k` nearest bank features for each query.

    A neighbour with the cosine similarity s adds `exp(s / temperature)` to its class. Features are L2-normalised here,
    and fp16 and bf16 features are compared in fp32. A bank smaller than `k` votes as a whole, so small datasets need no
    setting of their own. The order of equally near features is not defined.

    Args:
        bank: (N, D) on any device; it is moved to the queries' device a block at a time.
        bank_labels: (N,) integers in [0, num_classes).
        queries: (Q, D).
        temperature: above 0.012, because smaller ones make the weights overflow fp32.

    Raises:
        ValueError: empty bank, shapes that do not fit, labels out of range, k or temperature out of range, NaN or
            infinite features.
    """
    _check(bank, bank_labels, queries, k, temperature, num_classes)
    votes = queries.new_empty(len(queries), num_classes, dtype=_choose_dtype(bank, queries))
    for rows, block in _iterate_votes(bank, bank_labels, queries, k, temperature, num_classes):
        votes[rows] = block
    return votes


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> dict[str, float]:
    """Return the `{"top1", "top5"}` accuracy, in [0, 1], of `knn_predict` for queries (Q, D) with `labels` (Q,).

    All processes hold the same rows, and each predicts its share of the queries. Memory is bounded for any number of
    classes.

    Raises:
        Stopped: a stop was requested.
    """
    num_classes = 1 + int(max(bank_labels.max(), labels.max()))
    _check(bank, bank_labels, queries, k, temperature, num_classes)
    mine = slice(rank(), None, world_size())
    queries, own, hits = queries[mine], labels[mine].to(queries.device), {"top1": 0.0, "top5": 0.0}
    for rows, votes in until_stopped(_iterate_votes(bank, bank_labels, queries, k, temperature, num_classes)):
        for name, n in (("top1", 1), ("top5", 5)):
            hits[name] += topk_accuracy(votes, own[rows], n) * len(votes)
    total = all_reduce(torch.tensor([round(hit) for hit in hits.values()], dtype=torch.float, device=queries.device))
    return {name: hit / len(labels) for name, hit in zip(hits, total.tolist(), strict=True)}


@torch.no_grad()
def nearest_others(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return cosine similarities and rows, both (N, min(k, N - 1)), of the other features nearest to each of (N, D).

    A block of rows is compared at a time, so that memory grows with N and not with its square.
    """
    found = []
    for start in range(0, len(features), QUERY_BLOCK):
        block = F.normalize(features[start : start + QUERY_BLOCK], dim=1)
        similarity, index = _find_nearest(block, features, k + 1)
        itself = index == torch.arange(start, start + len(block), device=index.device)[:, None]
        itself[:, -1] |= ~itself.any(1)  # It is not among its own nearest where so many others are the same.
        others = itself.int().argsort(dim=1, stable=True)[:, :-1]
        found.append((similarity.gather(1, others), index.gather(1, others)))
    similarity, index = (torch.cat(part) for part in zip(*found, strict=True))
    return similarity, index


def _choose_dtype(bank: Tensor, queries: Tensor) -> torch.dtype:
    """Return the dtype in which features are compared."""
    return torch.promote_types(torch.promote_types(bank.dtype, queries.dtype), torch.float32)


def _iterate_votes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the queries and their votes (rows, num_classes), in order."""
    dtype = _choose_dtype(bank, queries)
    bank_labels = bank_labels.to(queries.device, torch.long)
    most = max(1, BLOCK_BYTES // (num_classes * dtype.itemsize))
    for start in range(0, len(queries), QUERY_BLOCK):
        block = F.normalize(queries[start : start + QUERY_BLOCK].to(dtype), dim=1)
        similarity, index = _find_nearest(block, bank, k)
        weights, classes = (similarity / temperature).exp(), bank_labels[index]
        for first in range(0, len(block), most):
            rows = slice(first, min(first + most, len(block)))
            votes = weights.new_zeros(rows.stop - first, num_classes).scatter_add_(1, classes[rows], weights[rows])
            if not votes.isfinite().all():
                raise ValueError("features hold NaN or infinite values; has training diverged?")
            yield slice(start + first, start + rows.stop), votes


def _find_nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return similarities and bank rows, both (Q, min(k, N)), of the features nearest to normalised queries (Q, D)."""
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    rows = max(1, min(BANK_BLOCK, BLOCK_BYTES // (bank.shape[1] * queries.element_size())))
    for start in range(0, len(bank), rows):
        block = F.normalize(bank[start : start + rows].to(queries.device, queries.dtype), dim=1)
        similarity, found = (queries @ block.T).topk(min(k, len(block)))
        best = torch.cat([best, similarity], 1)
        index = torch.cat([index, found + start], 1)
        best, kept = best.topk(min(k, best.shape[1]))
        index = index.gather(1, kept)
    return best, index


def _check(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int) -> None:
    if bank.ndim != 2 or len(bank) == 0:
        raise ValueError(f"bank must be (N, D) with N > 0, got {tuple(bank.shape)}")
    if queries.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries must be (Q, {bank.shape[1]}) to fit the bank, got {tuple(queries.shape)}")
    if bank_labels.shape != bank.shape[:1] or bank_labels.is_floating_point():
        raise ValueError(
            f"bank_labels must be ({len(bank)},) integers, got {tuple(bank_labels.shape)} of {bank_labels.dtype}"
        )
    low, high = int(bank_labels.min()), int(bank_labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"bank_labels must lie in [0, {num_classes}), got {low} to {high}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not temperature > 0.012:
        raise ValueError(f"temperature must be above 0.012, got {temperature}")
