"""Training: the Trainer, its configuration and callbacks, and what happens around each step."""

from .config import PretrainConfig
from .memory import OutOfMemory
from .trainer import PretrainTrainer, TrainingDiverged

__all__ = ["OutOfMemory", "PretrainConfig", "PretrainTrainer", "TrainingDiverged"]
