"""How a run normalises its images: as ImageNet's, as the encoder that it starts from asks for, or by their own mean."""

import logging
from typing import Literal

from ..data import ImageSource
from ..data.normalisation import is_like_imagenet, measure_normalisation
from ..data.sources import IMAGENET_MEAN, IMAGENET_STD
from ..distributed import broadcast_object, is_main
from ..models import AccelViTConfig
from ..utils.errors import fail

logger = logging.getLogger(__name__)


def normalise_source(
    source: ImageSource, config: AccelViTConfig, choice: Literal["imagenet", "data"] | None
) -> ImageSource:
    """Return the images with the normalisation of a run, which `config` keeps unless it is the usual one of RGB images.

    All processes must call it, and take what the main process has measured. Without a `choice`, the main process warns
    of RGB images that are not like ImageNet's.

    Raises:
        SettingError: images of other channels than the model's, or a choice that does not fit.
    """
    channels = config.num_channels
    if source.channels != channels:
        fail("num_channels", channels, f"the images of {source.title} have {source.channels} channels")
    if choice == "imagenet" and channels != 3:
        fail("normalisation", choice, f"ImageNet has 3 channels, and num_channels is {channels}; leave it out")
    brought: tuple = config.image_mean, config.image_std
    chosen = brought
    if choice is not None:
        chosen = measure_normalisation(source) if choice == "data" else ([*IMAGENET_MEAN], [*IMAGENET_STD])
    elif config.image_mean is None and channels != 3:
        chosen = [*source.mean], [*source.std]
    elif config.image_mean is None and source.mean == IMAGENET_MEAN and is_main():
        warn_of_other_images(source)
    chosen = broadcast_object(chosen)  # A process that cannot read one of the images has measured something else.
    if config.image_mean is not None and brought != chosen:
        fail("normalisation", choice, "the encoder brings its own mean and deviation; leave it out")
    config.image_mean, config.image_std = chosen
    return source.renormalised(*chosen)


def warn_of_other_images(source: ImageSource) -> None:
    """Warn of RGB images that are clearly brighter, darker, paler or richer in contrast than ImageNet's."""
    mean, std = measure_normalisation(source)
    if not is_like_imagenet(mean, std):
        logger.warning(
            "%s: the channels have the means %s and the deviations %s, and are normalised by those of ImageNet, %s and "
            "%s: for a new run, normalisation: data takes their own",
            source.title,
            *([round(value, 2) for value in values] for values in (mean, std, IMAGENET_MEAN, IMAGENET_STD)),
        )
