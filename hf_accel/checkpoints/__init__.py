"""Read the encoders that others have released: weights, image processor and licence."""

from .licence import CARD_NAME, LICENCE_KEYS, licence_of_trained, stated_licence
from .processor import ArrayProcessor, input_of, load_processor, normalisation_of
from .reading import Checkpoint, accel_model, read_checkpoint, refuse_run_folder
from .starting import Start, read_start

__all__ = [
    "CARD_NAME",
    "LICENCE_KEYS",
    "ArrayProcessor",
    "Checkpoint",
    "Start",
    "accel_model",
    "input_of",
    "licence_of_trained",
    "load_processor",
    "normalisation_of",
    "read_checkpoint",
    "read_start",
    "refuse_run_folder",
    "stated_licence",
]
