"""Training: the Trainer, its configuration and callbacks, and what happens around each step."""

from .config import PretrainConfig
from .memory import OutOfMemory
from .saving import TrainingDiverged
from .trainer import PretrainTrainer
