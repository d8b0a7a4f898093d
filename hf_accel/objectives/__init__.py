"""The pretraining objectives, each one file."""

from .base import Draw, ObjectiveForPreTraining, ObjectiveOutput
from .moco import MoCoForPreTraining

OBJECTIVES: dict[str, type[ObjectiveForPreTraining]] = {"moco": MoCoForPreTraining}

__all__ = ["OBJECTIVES", "Draw", "MoCoForPreTraining", "ObjectiveForPreTraining", "ObjectiveOutput"]
