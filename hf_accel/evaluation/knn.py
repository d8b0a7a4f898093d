"""Weighted k-nearest-neighbour classification of features, as in DINO (arXiv 2104.14294, appendix on kNN evaluation;
the weights are those of Wu et al., arXiv 1805.01978).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import all_reduce, rank, world_size
from .metrics import topk_accuracy

QUERY_BLOCK = 1024
BANK_BLOCK = 16384
"""Rows compared at a time: 64 MiB of similarities, whatever the sizes of bank and queries."""


@torch.no_grad()
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Votes (Q, num_classes) of the `k` nearest bank features for each query.

    A neighbour of cosine similarity s gives its class `exp(s / temperature)`. Features are L2-normalised here, and fp16
    and bf16 ones compared in fp32. A bank smaller than `k` votes as a whole, so that small data sets need no setting of
    their own. Which of several equally near features takes the k-th place is open.

    Args:
        bank: (N, D) on any device; it is moved to the queries' device a block at a time.
        bank_labels: (N,) integers in [0, num_classes).
        queries: (Q, D).
        temperature: above 0.012, below which the weights overflow fp32.

    Raises:
        ValueError: empty bank, shapes that do not fit, labels out of range, k or temperature out of range, NaN or
            infinite features.
    """
    _check(bank, bank_labels, queries, k, temperature, num_classes)
    dtype = torch.promote_types(torch.promote_types(bank.dtype, queries.dtype), torch.float32)
    bank_labels = bank_labels.to(queries.device, torch.long)
    votes = torch.zeros(len(queries), num_classes, dtype=dtype, device=queries.device)
    for rows, block in zip(votes.split(QUERY_BLOCK), queries.split(QUERY_BLOCK), strict=True):
        similarity, index = _nearest(F.normalize(block.to(dtype), dim=1), bank, k)
        rows.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
    if not votes.isfinite().all():
        raise ValueError("features hold NaN or infinite values; has training diverged?")
    return votes


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> dict[str, float]:
    """`{"top1", "top5"}` accuracy in [0, 1] of `knn_predict` for queries (Q, D) whose classes are `labels` (Q,).

    Each process, all holding the same rows, predicts its share of the queries.
    """
    num_classes = 1 + int(max(bank_labels.max(), labels.max()))
    mine = slice(rank(), None, world_size())
    votes = knn_predict(bank, bank_labels, queries[mine], k, temperature, num_classes)
    own = labels[mine].to(votes.device)
    hits = [round(topk_accuracy(votes, own, n) * len(own)) if len(own) else 0 for n in (1, 5)]
    total = all_reduce(torch.tensor(hits, dtype=torch.float, device=votes.device))
    return {name: hit / len(labels) for name, hit in zip(("top1", "top5"), total.tolist(), strict=True)}


def _nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and bank rows, both (Q, min(k, N)), of the nearest features of normalised queries (Q, D)."""
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), BANK_BLOCK):
        block = F.normalize(bank[start : start + BANK_BLOCK].to(queries.device, queries.dtype), dim=1)
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
