"""The pretraining objectives, each one file."""

from .base import Draw, ObjectiveForPreTraining, ObjectiveOutput
from .dino import DINOForPreTraining
from .moco import MoCoForPreTraining
from .simclr import SimCLRForPreTraining

OBJECTIVES: dict[str, type[ObjectiveForPreTraining]] = {
    "moco": MoCoForPreTraining,
    "simclr": SimCLRForPreTraining,
    "dino": DINOForPreTraining,
}
