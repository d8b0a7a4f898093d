"""Find the folder of an image that names its class, at the same level and in the same spelling in every split."""

import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

logger = logging.getLogger(__name__)

Folders = tuple[str, ...]
"""The folders that an image is in, topmost first, without the folder of its split."""

NAMED = 5
"""How many names a warning lists."""


def shorten(names: Sequence[str]) -> str:
    """List the first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]).encode(errors="backslashreplace").decode() + more


def name_classes(name: str, folders: Mapping[str, Sequence[Folders]]) -> dict[str, list[str | None]]:
    """Return the class of each image of each split, by its folders; None for an image in no folder.

    Args:
        name: the name of the dataset, for warnings.
        folders: the folders of each image, split by split, with the training split first.
    """
    distinct = {split: sorted(set(filter(None, images))) for split, images in folders.items()}  # few
    level = _choose_level([some for some in distinct.values() if some])
    if len({len(parts) for some in distinct.values() for parts in some}) > 1:
        which = {0: "the topmost folder", -1: "the innermost folder"}.get(level)
        which = which or (f"folder {level + 1} from the top" if level > 0 else f"folder {-level} from the bottom")
        logger.warning("%s: images are in folders of different depth; %s is taken as the class of each", name, which)
    _warn_of_merged(name, level, distinct.values())
    spelling = _match_case(name, [{_at(parts, level) for parts in some} for some in distinct.values()])
    classes: dict[Folders, str | None] = {(): None}
    for some in distinct.values():
        for parts in some:
            classes[parts] = spelling.get(_at(parts, level), _at(parts, level))
    return {split: [classes[parts] for parts in images] for split, images in folders.items()}


def _position(parts: Folders, level: int) -> int:
    """Return the index of this level, or the nearest that exists. A negative level counts from the end."""
    return min(level, len(parts) - 1) if level >= 0 else max(level + len(parts), 0)


def _at(parts: Folders, level: int) -> str:
    return unicodedata.normalize("NFC", parts[_position(parts, level)])  # macOS and Linux store "é" differently


def _choose_level(splits: list[list[Folders]]) -> int:
    """Choose the level whose names recur across splits, else the innermost, or the topmost of an uneven first split."""
    depths = {len(parts) for parts in splits[0]} if splits else set()
    usual = -1 if len(depths) <= 1 else 0
    if len(splits) < 2:
        return usual
    deepest = max(len(parts) for some in splits for parts in some)

    def recurring(level: int) -> float:
        first, *others = ({_at(parts, level).casefold() for parts in some} for some in splits)
        found = [name in first for those in others for name in those]
        return sum(found) / len(found) if len(first) > 1 else 0

    return max((usual, -1, 0, *range(1, deepest - 1), *range(-2, -deepest, -1)), key=recurring)


def _warn_of_merged(name: str, level: int, splits: Iterable[list[Folders]]) -> None:
    """Warn of folders with the same name in different places, which become one class."""
    merged: set[str] = set()
    for some in splits:
        inside: dict[str, set[str]] = {}
        for parts in some:
            path = "/".join(parts[: _position(parts, level) + 1])
            inside.setdefault(_at(parts, level), set()).add(unicodedata.normalize("NFC", path))
        merged.update(path for paths in inside.values() if len(paths) > 1 for path in paths)
    if merged:
        logger.warning(
            "%s: folders of the same name are one class: %s; rename them if they are not",
            name,
            shorten(sorted(merged, key=lambda path: (path.rpartition("/")[2], path))),
        )


def _match_case(name: str, splits: Sequence[set[str]]) -> dict[str, str]:
    """Map each class that another split writes in another case to its spelling in the first split."""
    variants: dict[str, list[str]] = {}
    for some in splits:
        for spelling in sorted(some):
            known = variants.setdefault(spelling.casefold(), [])
            if spelling not in known:
                known.append(spelling)
    matched: dict[str, str] = {}
    for first, *others in variants.values():
        if all(
            len(some.intersection((first, *others))) <= 1 for some in splits
        ):  # otherwise two classes differ in case only
            matched |= dict.fromkeys(others, first)
    if matched:
        listed = [f"{other} as {first}" for other, first in sorted(matched.items())]
        logger.warning("%s: folders that differ in case are one class: %s", name, shorten(listed))
    return matched
