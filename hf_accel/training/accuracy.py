"""What the features of an encoder in training are worth: kNN and linear accuracy, and their spectrum."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..data import ImageSource, eval_loader
from ..data.shards import spread
from ..evaluation import extract_features, knn_accuracy, measure_spectrum, ridge_accuracy
from .config import PretrainConfig
from .view_features import VIEWS

RANK_SAMPLE, LIDAR_SAMPLE = 2048, 1000
"""Training images that RankMe takes where no accuracy needs features, and LiDAR (as in its paper), at most."""

RANK_SHARE, LIDAR_SHARE = 0.005, 0.01
"""What all evaluations read for them, relative to the images that the budget pays for without compression.

An image costs training several units, and each view of LiDAR one: so LiDAR takes at most half a percent of the units.
"""

SPECTRUM_ROWS = 10_000
"""Features of which the spectrum is taken at most."""

BATCH = 256

Features = Callable[..., tuple[Tensor, Tensor]]


class Samples(NamedTuple):
    """How many training images an evaluation encodes for RankMe, where no accuracy needs features, and for LiDAR."""

    rank_me: int = RANK_SAMPLE
    lidar: int = 0


def choose_samples(width: int, images: int, evaluations: int, affordable: float) -> Samples:
    """Return how many training images measures without labels take, so that they cost little.

    A rank needs more images than the features have numbers: RankMe takes at least twice as many, also where they cost
    more than their share, and LiDAR is left out where it would have to.

    Args:
        width: of the features.
        images: of the training set.
        evaluations: of the run.
        affordable: images that the budget of the run pays for without compression.
    """
    least, each = 2 * width, affordable / max(1, evaluations)
    rank = max(least, min(RANK_SAMPLE, int(RANK_SHARE * each)))
    lidar = min(images, max(least, LIDAR_SAMPLE), int(LIDAR_SHARE * each / (VIEWS / 2)))  # a reading gives two views
    return Samples(min(images, rank), lidar if lidar >= least else 0)


def measure_knn(
    encoder: Any,
    source: ImageSource,
    validation: ImageSource,
    args: PretrainConfig,
    features: Features | None = None,
) -> dict[str, float]:
    """Return the kNN accuracies {"top1", "top5"} of the labelled images of `validation` by those of `source`.

    Args:
        encoder: with a `config` that states the image size.
        args: neighbours, temperature, workers and device.
        features: what replaces the encoder, a function of a loader.
    """
    return knn_accuracy(*_labelled(encoder, source, validation, args, features), args.knn_k, args.knn_temperature)


def measure_encoder(
    encoder: Any, source: ImageSource, validation: ImageSource | None, args: PretrainConfig, sample: int = RANK_SAMPLE
) -> dict[str, float]:
    """Return what an evaluation logs of an encoder.

    With labels of training and validation images these are the accuracies "knn_top1" and "knn_top5" and that of a
    linear classifier, "ridge_top1", as well as "rank_me" and "alpha_req" of the training images. Without labels they
    are the last two, of `sample` training images. Measures that are not defined, as after a collapse, are missing.
    """
    if validation is None or source.labels is None or validation.labels is None:
        workers, rows = args.dataloader_num_workers, source.sample(sample)
        loader = eval_loader(source, encoder.config.image_size, BATCH, workers, rows)
        return measure_spectrum(extract_features(encoder, loader, args.device)[0])
    given = _labelled(encoder, source, validation, args)
    accuracy = knn_accuracy(*given, args.knn_k, args.knn_temperature)
    return {
        **{f"knn_{name}": value for name, value in accuracy.items()},
        **{f"ridge_{name}": value for name, value in ridge_accuracy(*given).items()},
        **measure_spectrum(given[0][spread(0, len(given[0]), SPECTRUM_ROWS)]),
    }


def _labelled(
    encoder: Any, source: ImageSource, validation: ImageSource, args: PretrainConfig, features: Features | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features and labels of the labelled training images, then those of the validation images."""
    pairs: list[Tensor] = []
    for images in (source.labelled(), validation.labelled()):
        loader = eval_loader(images, encoder.config.image_size, BATCH, args.dataloader_num_workers)
        pairs += features(loader) if features else extract_features(encoder, loader, args.device)
    bank, bank_labels, queries, labels = pairs
    return bank, bank_labels, queries, labels
