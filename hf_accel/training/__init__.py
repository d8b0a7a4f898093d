"""Training: the Trainer, its configuration and callbacks, and what happens around each step."""

from .config import PretrainConfig
from .trainer import PretrainTrainer, TrainingDiverged

__all__ = ["PretrainConfig", "PretrainTrainer", "TrainingDiverged"]
