"""Recipes and configurations of accelerate that come with the package, found by name from any working directory."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped_folder(name: str) -> Path:
    """Return a folder that comes with the package: inside of it when installed, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def find_file(name: str | Path, folder: str) -> Path:
    """Return the file at this path or, if there is none, the one that a shipped folder has under this name.

    Args:
        name: a path, or a name in the folder: `moco`, `cifar10/moco_cpu`, `recipes/moco.yaml`.
    """
    path = Path(name)
    if path.is_file() or path.is_absolute():
        return path
    inside = path.relative_to(folder) if path.parts[:1] == (folder,) else path
    shipped = shipped_folder(folder) / inside
    found = shipped if shipped.suffix == ".yaml" else shipped.with_name(f"{shipped.name}.yaml")
    return found if found.is_file() else path


def list_recipes() -> dict[str, str]:
    """Return the names of the shipped recipes, each with the first sentence of the comment that opens its file."""
    folder = shipped_folder("recipes")
    paths = [path for path in folder.rglob("*.yaml") if path.parent.name != "schedules"]
    paths.sort(key=lambda path: (len(path.parts), path))
    lines = {path: path.read_text(encoding="utf-8").partition("\n")[0] for path in paths}
    return {
        path.relative_to(folder).with_suffix("").as_posix(): line.lstrip("# ").partition(". ")[0].rstrip(".")
        for path, line in lines.items()
    }
