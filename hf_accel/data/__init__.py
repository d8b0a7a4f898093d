"""Images: sources, batches, augmentation."""

from .loader import TrainSampler, eval_loader, image_processor, resize_edge, train_loader
from .sources import CorruptDataError, CorruptImage, ImageSource, load_sources
from .views import AUGMENTATIONS, ViewConfig, crop_and_resize, crop_boxes, make_views

__all__ = [
    "AUGMENTATIONS",
    "CorruptDataError",
    "CorruptImage",
    "ImageSource",
    "TrainSampler",
    "ViewConfig",
    "crop_and_resize",
    "crop_boxes",
    "eval_loader",
    "image_processor",
    "load_sources",
    "make_views",
    "resize_edge",
    "train_loader",
]
