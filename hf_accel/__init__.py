"""hf_accel: accelerated self-supervised pretraining of vision transformers on the Hugging Face stack."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compression import Compression, Schedule, Strategy
    from .data import read_image
    from .models import (
        PRESETS,
        AccelViTBackbone,
        AccelViTConfig,
        AccelViTForImageClassification,
        AccelViTModel,
        AccelViTPreTrainedModel,
        vit_base,
        vit_large,
        vit_small,
        vit_tiny,
    )
    from .objectives import DINOForPreTraining, MoCoForPreTraining, SimCLRForPreTraining
    from .schedule_search import estimate_gradient_errors
    from .training import PretrainConfig, PretrainTrainer

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AccelViTBackbone",
    "AccelViTConfig",
    "AccelViTForImageClassification",
    "AccelViTModel",
    "AccelViTPreTrainedModel",
    "Compression",
    "DINOForPreTraining",
    "MoCoForPreTraining",
    "PretrainConfig",
    "PretrainTrainer",
    "Schedule",
    "SimCLRForPreTraining",
    "Strategy",
    "estimate_gradient_errors",
    "read_image",
    "vit_base",
    "vit_large",
    "vit_small",
    "vit_tiny",
]

HOMES = ("compression", "models", "data", "objectives", "schedule_search", "training")
"""The packages that define public names."""


def __getattr__(name: str) -> Any:
    """Import a public name from the package that defines it when it is first used."""
    for home in HOMES if name in __all__ else ():
        package = import_module(f".{home}", __name__)
        if hasattr(package, name):
            return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether this process is run.py or the `hf-accel` command."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    if main is None:
        return sys.argv[:1] == ["-m"] and "hf_accel" in sys.orig_argv  # python -m hf_accel
    path = Path(main)
    return "hf-accel" in (path.stem, path.parent.stem) or path.resolve() == Path(__file__).resolve().with_name("run.py")


# `import hf_accel` registers the classes, so that `AutoModel` opens checkpoints. For that it imports torch, which takes
# seconds. Only the commands go without it at first: they answer --help, or refuse a recipe, before they import it.
if not _is_command():
    from . import models  # noqa: F401
