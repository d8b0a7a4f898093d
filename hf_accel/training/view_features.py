"""Features of several views of each image, which LiDAR compares, apart from the views that training draws."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..data import ImageSource, ViewConfig, make_views, train_loader
from ..data.loader import Item
from ..evaluation import extract_features
from .config import PretrainConfig

VIEWS = 10
"""Views of each image. They are fixed, as LiDAR falls with their number: the mean of few views is still noisy."""

STEP = -1
"""The step that the views are draws of, which no step of training is."""

BATCH = 128


class RepeatedImages(Sampler[list[Item]]):
    """Batches of the images `rows`, which come `times` times, each time with other draws."""

    def __init__(self, rows: Sequence[int], times: int):
        self.rows, self.times, self.global_batch = rows, times, len(rows)

    def __len__(self) -> int:
        return self.times * -(-len(self.rows) // BATCH)

    def __iter__(self) -> Iterator[list[Item]]:
        for number in range(self.times):
            for start in range(0, len(self.rows), BATCH):
                part = self.rows[start : start + BATCH]
                yield [Item(index, STEP, number, row) for row, index in enumerate(part, start)]


def encode_views(
    encoder: Any,
    source: ImageSource,
    rows: Sequence[int],
    configs: Sequence[ViewConfig],
    args: PretrainConfig,
    to_device: Callable[[dict[str, Any]], dict[str, Any]],
) -> Tensor:
    """Return features (N, VIEWS, D) of the images `rows`. Their views are the same at each call.

    All processes must call it.

    Args:
        configs: the first two, which draw whole views and not local crops, take turns.
        to_device: what moves a batch of the training loader to the device of the encoder.
    """
    configs, size = configs[:2], encoder.config.image_size
    sampler = cast(Any, RepeatedImages(rows, VIEWS // len(configs)))
    loader = train_loader(source, sampler, configs, lambda step: size, args.dataloader_num_workers, args.seed)

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        where = (batch["step"], batch["micro_step"], batch["rows"], batch["global_batch"])
        views = make_views(to_device(batch), configs, size, args.seed, *where, source.mean, source.std)
        return {"pixel_values": torch.stack(views, 1).flatten(0, 1)}

    features = extract_features(encoder, loader, args.device, dtype=args.autocast_dtype, prepare=prepare)[0]
    return features.view(sampler.times, len(rows), len(configs), -1).transpose(0, 1).flatten(1, 2)
