"""Imports inside hf_accel go downward only, the model files stand alone, and no name hides an installed package."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_accel"

LEVELS = [
    {"utils"},
    {"distributed"},
    {"models"},
    {"checkpoints"},
    {"compression"},
    {"data"},
    {"objectives"},
    {"schedule_search"},
    {"evaluation"},
    {"run_folder"},
    {"report"},
    {"hub"},
    {"training"},
    {"recipe"},
    {"tasks"},
    {"run"},
    {"cli"},
    {"__main__"},
    {"__init__"},
]
"""Modules and folders of hf_accel, lowest first. Each may import itself and what stands on a lower level."""

MODELS_MAY_IMPORT = {"torch", "transformers", *sys.stdlib_module_names}
"""The Hub copies the files of models/, so they need nothing but these and each other."""


def imported_names(path: Path, package: Path) -> Iterator[tuple[int, str, int]]:
    """(line, absolute dotted name, number of leading dots) of every import in the file, lazy ones too."""
    parents = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name]), node.level


def layer_errors(package: Path) -> list[str]:
    """What breaks the order of LEVELS in the package at this path, one line each."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    errors = []
    for path in sorted(package.rglob("*.py")):
        importer = path.relative_to(package).parts[0].removesuffix(".py")
        if importer not in level:
            errors.append(f"{path.relative_to(package)}: {importer} has no place in LEVELS")
            continue
        for line, name, dots in imported_names(path, package):
            where = f"{path.relative_to(package)}:{line}"
            parts = name.split(".")
            if parts[0] != package.name:
                if importer == "models" and parts[0] not in MODELS_MAY_IMPORT:
                    errors.append(f"{where}: models/ imports {parts[0]}")
                continue
            # a name that is no module is one that the package itself defines
            imported = parts[1] if len(parts) > 1 and parts[1] in level else "__init__"
            if importer == "models" != imported:
                errors.append(f"{where}: models/ imports {imported}")
            elif imported != importer and level[imported] >= level[importer]:
                errors.append(f"{where}: {importer} imports {imported}, which is not below it")
            if importer == imported == "models" and (dots, len(parts)) != (1, 4):
                errors.append(f"{where}: models/ imports {name} otherwise than by `from .file import name`")
    return errors


def hidden_packages(package: Path) -> set[str]:
    """Installed packages that a module or folder of `package` would hide.

    `accelerate launch hf_accel/run.py` puts the folder first on sys.path.
    """
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    names = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.iterdir()))}
    return (names - {"__init__", "__pycache__"}) & installed


def test_imports_go_downward() -> None:
    assert list(PACKAGE.rglob("*.py"))
    assert layer_errors(PACKAGE) == []


def test_no_name_hides_an_installed_package() -> None:
    assert hidden_packages(PACKAGE) == set()


BAD_FILES = {
    "upward, relative": ("compression/cost.py", "from ..training import Plan", "compression imports training"),
    "upward, absolute": ("data/loader.py", "import hf_accel.run", "data imports run"),
    "upward, by name": ("data/loader.py", "from .. import objectives", "data imports objectives"),
    "upward, inside a function": ("utils/seeding.py", "def f():\n    from ..models import x", "utils imports models"),
    "upward, to a neighbour": ("report/curves.py", "from ..hub.card import card_text", "report imports hub"),
    "from the package itself": ("report/results.py", "from .. import __version__", "report imports __init__"),
    "no place": ("helpers.py", "", "helpers has no place"),
    "model, foreign": ("models/conversion.py", "import numpy as np", "models/ imports numpy"),
    "model, package": ("models/conversion.py", "from ..utils.seeding import generator", "models/ imports utils"),
    "model, absolute": ("models/a.py", "from hf_accel.models.b import B", "otherwise than by"),
    "model, folder": ("models/a.py", "from .b.c import C", "otherwise than by"),
    "model, module": ("models/a.py", "from . import b", "otherwise than by"),
}


@pytest.mark.parametrize("file, source, complaint", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_tree_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    path = tmp_path / "hf_accel" / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    errors = layer_errors(tmp_path / "hf_accel")
    assert len(errors) == 1 and complaint in errors[0], errors


def test_a_good_tree_passes(tmp_path: Path) -> None:
    sources = {
        "models/modeling.py": "import math\nimport torch\nfrom transformers import C\nfrom .configuration import D",
        "training/trainer.py": "import numpy\nfrom ..data.loader import Loader\nfrom hf_accel.compression import Plan",
        "data/loader.py": "from .augment import View\nfrom ..utils.seeding import generator",
    }
    for file, source in sources.items():
        path = tmp_path / "hf_accel" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    assert layer_errors(tmp_path / "hf_accel") == []


@pytest.mark.parametrize("name", ["accelerate", "datasets.py", "types.py"])
def test_a_hidden_package_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix:
        path.touch()
    else:
        path.mkdir()
        (path / "__init__.py").touch()
    assert hidden_packages(tmp_path) == {path.stem}
