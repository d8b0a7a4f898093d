"""Images: where they come from, how they become batches, and how they are augmented."""

from .augment import AUGMENTATIONS, Renderer, ViewConfig, make_views
from .crops import crop_and_resize, crop_boxes
from .decoding import read_image
from .fused import FusedViews
from .items import image_source
from .labels import describe_labels
from .loader import TrainSampler, eval_loader, image_processor, resize_edge, train_loader
from .loading import load_sources
from .sources import CorruptDataError, CorruptImage, ImageSource
from .workers import WorkersFailed, count_workers, explained_failures
