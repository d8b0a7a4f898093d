"""timm, the real one, where torchvision cannot be installed: beside the CPU build of torch it does not import."""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

OWN_FOLDER = Path(sys.prefix) / "timm"
"""Where `make` installs it: in site-packages it breaks the accelerate command, which imports it at once."""

TORCHVISION = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms")
"""What timm imports of torchvision, all of it for images and detectors: nothing of it takes part in a ViT."""


class EmptyModule(types.ModuleType):
    """Has every name, as an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def empty_torchvision() -> Iterator[None]:
    modules = {}
    for suffix in (*TORCHVISION, ".transforms.functional"):
        name = f"torchvision{suffix}"
        module: Any = EmptyModule(name)
        module.__path__, module.__spec__ = [], ModuleSpec(name, None)
        modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    names = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
    modules["torchvision.transforms.functional"].InterpolationMode = Enum("InterpolationMode", names)
    sys.modules.update(modules)
    try:
        yield
    finally:  # before transformers can take them for the real ones
        for name in modules:
            del sys.modules[name]


def real_timm() -> Any:
    """The module; the test is skipped without the package, which `make` installs."""
    if "timm" not in sys.modules:
        if OWN_FOLDER.is_dir() and str(OWN_FOLDER) not in sys.path:
            sys.path.append(str(OWN_FOLDER))
        if importlib.util.find_spec("timm") is None:
            pytest.skip(f"timm is not installed: pip install --no-deps --target {OWN_FOLDER} timm")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if importlib.util.find_spec("torchvision"):
                return importlib.import_module("timm")
            with empty_torchvision():
                return importlib.import_module("timm")
    return sys.modules["timm"]
