"""Top-1 and top-5 accuracy, as a function and as an `evaluate.Metric` that needs no network and writes no files."""

import tempfile
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor


def topk_hits(scores: Tensor, labels: Tensor, n: int) -> Tensor:
    """Return, in [0, 1], whether the label (N,) of each row of `scores` (N, num_classes) is among the `n` highest.

    If equal scores compete for the last places, the label counts with the probability that a fair draw would pick it.
    So neither constant logits nor classes without votes win by their order. A label without a column in `scores`, of a
    class that training never saw, counts as missed.

    Raises:
        ValueError: no rows, shapes that do not fit, NaN scores, negative labels.
    """
    if scores.ndim != 2 or len(scores) == 0 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"scores must be (N, num_classes) and labels (N,), N > 0; got {tuple(scores.shape)}, {tuple(labels.shape)}"
        )
    if scores.isnan().any():
        raise ValueError("scores hold NaN")
    if (labels < 0).any():
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    known = labels < scores.shape[1]
    own = scores.gather(1, labels.long().clamp(max=scores.shape[1] - 1)[:, None])
    greater = (scores > own).sum(1)
    equal = (scores == own).sum(1)
    return ((n - greater) / equal).clamp(0, 1) * known


def topk_accuracy(scores: Tensor, labels: Tensor, n: int) -> float:
    """Return the mean of `topk_hits`, in [0, 1]."""
    return float(topk_hits(scores, labels, n).double().mean())


class TopKAccuracy(evaluate.Metric):
    """`{"top1", "top5"}` of votes or logits: `TopKAccuracy().compute(predictions=scores, references=labels)`.

    `predictions` is (N, num_classes), `references` (N,). They stay in memory, so distributed runs must gather first.
    """

    def __init__(self, **kwargs: Any) -> None:
        # evaluate makes a folder even for data in memory, so this one is removed at once
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of samples whose class is among the 1 and the 5 with the highest scores.",
            citation="",
            inputs_description="predictions: scores (N, num_classes); references: classes (N,)",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        scores, labels = torch.tensor(predictions), torch.tensor(references)
        return {f"top{n}": topk_accuracy(scores, labels, n) for n in (1, 5)}
