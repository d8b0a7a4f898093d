"""hf_accel: accelerated self-supervised pretraining of vision transformers on the Hugging Face stack."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import (
        PRESETS,
        AccelViTBackbone,
        AccelViTConfig,
        AccelViTForImageClassification,
        AccelViTModel,
        AccelViTPreTrainedModel,
    )

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AccelViTBackbone",
    "AccelViTConfig",
    "AccelViTForImageClassification",
    "AccelViTModel",
    "AccelViTPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import models

    return getattr(models, name)


# `import hf_accel` registers the classes, so that `AutoModel` opens checkpoints. For that it imports torch, which takes
# seconds. Only the script run.py goes without at first: it answers --help, or refuses a recipe, before it imports them.
_main = getattr(sys.modules["__main__"], "__file__", None)
if _main is None or Path(_main).resolve() != Path(__file__).resolve().with_name("run.py"):
    from . import models  # noqa: F401
