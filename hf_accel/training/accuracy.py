"""What the features of an encoder in training are worth: kNN and linear accuracy, and their spectrum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data import ImageSource, eval_loader
from ..evaluation import extract_features, knn_accuracy, measure_spectrum, ridge_accuracy
from .config import PretrainConfig

SAMPLE = 2048
"""Training images that are encoded for the spectrum where no accuracy needs features."""

SPECTRUM_ROWS = 10_000
"""Features of which the spectrum is taken at most."""

BATCH = 256

Features = Callable[..., tuple[Tensor, Tensor]]


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
    encoder: Any, source: ImageSource, validation: ImageSource | None, args: PretrainConfig
) -> dict[str, float]:
    """Return what an evaluation logs of an encoder.

    With labels of training and validation images these are the accuracies "knn_top1" and "knn_top5" and that of a
    linear classifier, "ridge_top1", as well as "rank_me" and "alpha_req" of the training images. Without labels they
    are the last two, of SAMPLE training images. Measures that are not defined, as after a collapse, are missing.
    """
    if validation is None or source.labels is None or validation.labels is None:
        rows = torch.linspace(0, len(source) - 1, min(len(source), SAMPLE)).long().tolist()
        loader = eval_loader(source, encoder.config.image_size, BATCH, args.dataloader_num_workers, rows)
        return measure_spectrum(extract_features(encoder, loader, args.device)[0])
    given = _labelled(encoder, source, validation, args)
    accuracy = knn_accuracy(*given, args.knn_k, args.knn_temperature)
    return {
        **{f"knn_{name}": value for name, value in accuracy.items()},
        **{f"ridge_{name}": value for name, value in ridge_accuracy(*given).items()},
        **measure_spectrum(_spread(given[0])),
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


def _spread(features: Tensor) -> Tensor:
    """Return SPECTRUM_ROWS of the features, spread over all of them, or all if they are fewer."""
    return features[torch.linspace(0, len(features) - 1, min(len(features), SPECTRUM_ROWS)).long()]
