"""Names as they are in figures: in any script, with fonts of the machine, and with dollar signs that are no formula."""

import logging
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from ..distributed import say

REMEDY = "Install fonts that have them, such as the Noto fonts."

EMPTY = ("lastresort", "adobeblank")
"""Families that claim to have every character, and draw boxes or nothing."""

_families: dict[str, str | None] = {}
"""What `find_families` has found. It opens every font of the machine, which can take a second."""


def save_figure(figure: Figure, path: str | Path, **options: Any) -> None:
    """Save a figure that shows names of users. A character that no font of this machine has is written as its code."""
    with _silent_search():
        missing = "".join(map(_make_legible, cast(list[Text], figure.findobj(Text))))
        figure.savefig(path, **options)
    if missing:
        _say_code(_to_codes(min(missing)))


def find_missing(text: str) -> set[str]:
    """Find the characters of a text that no font of this machine has."""
    families = find_families(_find_lacking(compose(text), findfont(FontProperties())))
    return {character for character, family in families.items() if family is None}


def find_families(characters: Iterable[str]) -> dict[str, str | None]:
    """Find a font family for each character, None where no font has it. All characters share as few as possible."""
    characters = sorted(characters)
    unknown = set(characters) - _families.keys()
    found = {family: _select(unknown, path) for family, path in list_fonts().items()} if unknown else {}
    while unknown:
        best = max(found, key=lambda family: (len(found[family] & unknown), "sans" in family.lower()), default=None)
        taken = found[best] & unknown if best else set()
        _families.update(dict.fromkeys(taken or unknown, best if taken else None))
        unknown -= taken or unknown
    return {character: _families[character] for character in characters}


def list_fonts() -> dict[str, str]:
    """List the fonts of this machine as {family: file}, an upright file of normal weight where the family has one."""
    known = {font.fname for font in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:  # It was installed after matplotlib had written its list.
            with suppress(Exception):  # Bitmap fonts and damaged files raise errors of many kinds.
                fontManager.addfont(path)
    fonts = sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", abs(int(font.weight) - 400)))
    families: dict[str, str] = {}
    for font in fonts:
        if font.name.lower().replace(" ", "").lstrip(".").startswith(EMPTY) or not Path(font.fname).is_file():
            continue
        families.setdefault(font.name, font.fname)
    return families


def compose(text: str) -> str:
    """Compose accents with their letters. Names of folders that come from a Mac have them apart."""
    return unicodedata.normalize("NFC", text)


def _make_legible(text: Text) -> str:
    """Give a text the fonts that it needs, and return the characters that no font has, which become codes."""
    text.set_parse_math(False)
    content = compose(text.get_text())
    families = find_families(_find_lacking(content, findfont(text.get_fontproperties())))
    if families:
        text.set_fontfamily([*dict.fromkeys([*text.get_fontfamily(), *filter(None, families.values())])])
    missing = [character for character, family in families.items() if family is None]
    text.set_text("".join(_to_codes(character) if character in missing else character for character in content))
    return "".join(missing)


def _find_lacking(text: str, path: str) -> set[str]:
    """Find the characters of a text that the font in a file lacks."""
    others = {character for character in text if not character.isascii()}
    return others - _read_characters(path) if others else others


@cache
def _read_characters(path: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(path).get_charmap()))


def _select(characters: set[str], path: str) -> set[str]:
    """Select the characters that the font in a file has. It is fast also where the font has 60,000."""
    font = FT2Font(path)
    return {character for character in characters if font.get_char_index(ord(character))}


def _to_codes(characters: str) -> str:
    return characters.encode("ascii", "backslashreplace").decode("ascii")


@cache
def _say_code(code: str) -> None:
    """Say it once where several figures show the same name."""
    say(f"No font on this machine has some characters of a name, and figures show codes such as {code}. {REMEDY}")


@contextmanager
def _silent_search() -> Iterator[None]:
    """Within it, matplotlib does not note that it takes another weight of a font than a text asks for."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
