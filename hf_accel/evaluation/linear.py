"""Classify frozen features linearly: a probe with heads of many learning rates at once, and logistic regression.

Features are those of images without augmentation, computed once and kept. Both classifiers get them standardised by the
mean and standard deviation of the training set, like MAE's probe with its BatchNorm without affine parameters (arXiv
2111.06377), so that one grid of settings serves every encoder.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..data.labels import hold_out
from ..distributed import is_main
from ..distributed.stopping import until_stopped
from ..utils.seeding import generator
from .metrics import topk_accuracy

HELD_OUT = 5
"""One in this many training images of each class helps to choose the setting. Validation images never do."""

HEADS_BYTES = 2**28
"""Limit of weights and logits of heads that are trained at once. With gradients they take a few times more."""

SCORES_BYTES = 2**26
"""Largest block of scores."""

LOGISTIC_C = tuple(10.0**exponent for exponent in range(-5, 4))
"""Inverse strengths of the L2 penalty that logistic regression chooses from."""


@dataclass(frozen=True)
class LinearConfig:
    """Settings of the linear probe, which uses SGD with momentum 0.9 and a cosine, as DINOv2 does (arXiv 2304.07193).

    Args:
        learning_rates: one head each, for 256 images per step; for other batch sizes they are scaled in proportion.
        epochs: passes over the training features.
        batch_size: images of a step.
        weight_decay: weight decay of weights and biases.
    """

    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
    epochs: int = 50
    batch_size: int = 256
    weight_decay: float = 0.0

    def __post_init__(self):
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates={list(self.learning_rates)} must be one or more numbers above 0")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")


def standardise(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Standardise features (N, D) by the mean and standard deviation of `train`; constant features become 0."""
    mean, std = train.mean(0), train.std(0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), 1 / std, 0.0)
    return tuple((features - mean) * scale for features in (train, *others))


def train_heads(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    learning_rates: Sequence[float],
    config: LinearConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Train one linear classifier for each of H learning rates, and return weights (H, K, D) and biases (H, K).

    All are trained at once, by SGD with momentum 0.9 along a cosine to 0, on the same batches of features (N, D) and
    from the same start: weights from a normal distribution of std 0.01, biases 0. This is a pure function.
    """
    heads, width = len(learning_rates), features.shape[1]
    start = torch.randn(num_classes, width, generator=generator(seed, "head")) * 0.01
    weight = start.to(device, features.dtype).expand(heads, -1, -1).clone()
    bias = torch.zeros(heads, num_classes, device=device, dtype=features.dtype)
    velocities = [torch.zeros_like(weight), torch.zeros_like(bias)]
    rates = torch.tensor(learning_rates, device=device, dtype=features.dtype) * config.batch_size / 256
    steps = config.epochs * math.ceil(len(features) / config.batch_size)
    for step, rows in enumerate(until_stopped(_draw_batches(len(features), config, seed))):
        batch, classes = features[rows].to(device), labels[rows].to(device)
        error = _compute_logits(batch, weight, bias).softmax(-1)
        error[:, torch.arange(len(rows), device=device), classes] -= 1  # gradient of each cross-entropy, times B
        error /= len(rows)
        gradients = [error.transpose(1, 2) @ batch, error.sum(1)]
        now = rates * (1 + math.cos(math.pi * step / steps)) / 2
        for parameter, velocity, gradient in zip((weight, bias), velocities, gradients, strict=True):
            velocity.mul_(0.9).add_(gradient.add_(parameter, alpha=config.weight_decay))
            parameter.sub_(now.view(-1, *[1] * (parameter.ndim - 1)) * velocity)
    return weight, bias


def _draw_batches(count: int, config: LinearConfig, seed: int) -> Iterator[Tensor]:
    """Yield the rows of each batch of the probe's training, epoch by epoch."""
    for epoch in tqdm(range(config.epochs), desc="linear probe", leave=False, disable=None if is_main() else True):
        yield from torch.randperm(count, generator=generator(seed, "head order", epoch)).split(config.batch_size)


def _compute_logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, D), (H, K, D), (H, K) -> (H, B, K), by one matrix product."""
    heads, num_classes = bias.shape
    logits = F.linear(features, weight.flatten(0, 1), bias.flatten())
    return logits.view(-1, heads, num_classes).transpose(0, 1)


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    num_classes: int,
    config: LinearConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, float]:
    """Return scores (M, num_classes) of `test` (M, D), on the CPU, and the learning rate that was chosen.

    As in DINOv2's sweep (arXiv 2304.07193), heads of all learning rates are trained together on the features. DINOv2
    chooses the head on the validation set. Here a fifth of the training images, drawn by `seed`, chooses it, and a head
    of that learning rate is then trained on all of them, so that test images do not affect it. Of heads with equally
    many correct images, the one with the smallest cross-entropy is chosen.

    Raises:
        ValueError: features that are not finite, or too few images to hold any out.
        Stopped: a stop was requested.
    """
    train, test = standardise(*_check_finite(train, test))
    kept, held = _split(train_labels, seed)
    rates, merits = config.learning_rates, []
    at_once = max(1, HEADS_BYTES // (num_classes * (train.shape[1] + config.batch_size) * train.element_size()))
    for first in range(0, len(rates), at_once):
        group = rates[first : first + at_once]
        heads = train_heads(train[kept], train_labels[kept], num_classes, group, config, seed, device)
        merits += _rate_settings(train_labels[held], _iterate_scores(train[held], *heads))
    chosen = rates[max(range(len(merits)), key=merits.__getitem__)]
    weight, bias = train_heads(train, train_labels, num_classes, [chosen], config, seed, device)
    return torch.cat([scores[0] for scores in _iterate_scores(test, weight, bias)]), chosen


def _rate_settings(labels: Tensor, blocks: Iterable[Tensor]) -> list[tuple[float, float]]:
    """Rate each of H settings for comparison: first by its hits, then by the smaller cross-entropy.

    Many settings classify all held-out images of an easy dataset correctly. The first of them may have hardly learnt
    anything, so the cross-entropy decides among them.

    Args:
        labels: (N,).
        blocks: scores (H, rows, K) of one block of rows after another.
    """
    parts, start = [], 0
    for scores in blocks:
        rows = labels[start : start + scores.shape[1]]
        start += len(rows)
        finite = torch.nan_to_num(scores, neginf=-math.inf).double()  # classes without training images stay at -inf
        losses = [F.cross_entropy(own, rows, reduction="sum") for own in finite]
        hits = [topk_accuracy(own, rows, 1) * len(rows) for own in finite]
        parts.append(torch.tensor([hits, losses], dtype=torch.float64))
    hits, losses = torch.stack(parts).sum(0).tolist()
    return [(hit, -loss) for hit, loss in zip(hits, losses, strict=True)]


def _iterate_scores(features: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """Yield scores (H, rows, K) on the CPU, a block of rows at a time."""
    rows = max(1, SCORES_BYTES // (bias.numel() * bias.element_size()))
    for block in features.split(rows):
        yield _compute_logits(block.to(weight.device), weight, bias).cpu()


def logistic_regression(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, seed: int
) -> tuple[Tensor, float]:
    """Return scores (M, num_classes) of `test` (M, D) and the chosen C, for datasets of thousands of images.

    This is scikit-learn's multinomial `LogisticRegression`. A fifth of the training images, drawn by `seed`, chooses
    the C with most hits out of `LOGISTIC_C`, and of equal ones that with the smallest cross-entropy. Then it is fitted
    to all images. Intercepts are penalised like weights, because under a strong penalty free intercepts alone would
    decide, for the largest class. Classes without training images score -inf.

    Raises:
        ValueError: features that are not finite, or too few images to hold any out.
        Stopped: a stop was requested; one fit is not interrupted.
    """
    train, test = (F.pad(part, (0, 1), value=1.0) for part in standardise(*_check_finite(train, test)))
    kept, held = _split(train_labels, seed)

    def fitted(rows: Tensor, queries: Tensor, strength: float) -> Tensor:
        from sklearn.exceptions import ConvergenceWarning  # this import takes a second
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(
            C=strength, max_iter=1000, fit_intercept=False
        )  # a constant feature gives the intercept
        with warnings.catch_warnings():  # the weakest penalties can be compared before they have converged
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(train[rows].numpy(), train_labels[rows].numpy())
        scores = torch.full((len(queries), num_classes), -math.inf)
        logits = torch.from_numpy(model.decision_function(queries.numpy())).float()
        if logits.ndim == 1:  # for two classes scikit-learn gives only the difference
            logits = torch.stack([-logits / 2, logits / 2], 1)
        scores[:, torch.from_numpy(model.classes_)] = logits
        return scores

    merits = [
        _rate_settings(train_labels[held], [fitted(kept, train[held], strength)[None]])[0]
        for strength in until_stopped(LOGISTIC_C)
    ]
    chosen = LOGISTIC_C[max(range(len(merits)), key=merits.__getitem__)]
    return fitted(torch.arange(len(train)), test, chosen), chosen


def _split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    kept, held = hold_out(labels, seed, one_in=HELD_OUT)
    if len(labels[kept].unique()) < 2 or len(held) == 0:
        raise ValueError(
            f"{len(labels)} training images are too few to choose a setting: one in {HELD_OUT} of each class is held "
            "out for it, and two classes have to be left: label more images"
        )
    return kept, held


def _check_finite(*features: Tensor) -> tuple[Tensor, ...]:
    if not all(part.isfinite().all() for part in features):
        raise ValueError("features hold NaN or infinite values; has training diverged?")
    return features
