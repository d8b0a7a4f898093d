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
