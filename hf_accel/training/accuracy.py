"""kNN accuracy of an encoder in training."""

from collections.abc import Callable
from typing import Any

import torch

from ..data import ImageSource, eval_loader
from ..evaluation import extract_features, knn_accuracy
from .config import PretrainConfig


def measure_knn(
    encoder: Any,
    source: ImageSource,
    validation: ImageSource,
    args: PretrainConfig,
    features: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> dict[str, float]:
    """Return the kNN accuracies {"top1", "top5"} of the labelled images of `validation` by those of `source`.

    Args:
        encoder: with a `config` that states the image size.
        args: neighbours, temperature, workers and device.
        features: what replaces the encoder, a function of a loader.
    """
    pairs = []
    for images in (source.labelled(), validation.labelled()):
        loader = eval_loader(images, encoder.config.image_size, 256, args.dataloader_num_workers)
        pairs.append(features(loader) if features else extract_features(encoder, loader, args.device))
    (bank, bank_labels), (queries, labels) = pairs
    return knn_accuracy(bank, bank_labels, queries, labels, args.knn_k, args.knn_temperature)
