"""The licence that the origin of some weights states, and that of what is trained from them."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from transformers.utils.hub import cached_file

from ..utils.weight_files import opening

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")


def licence_of_trained(stated: str | list[str] | None) -> str:
    """Return the licence of a model that was trained from weights under the `stated` one, in one word of the Hub."""
    return stated if isinstance(stated, str) else "other" if stated else "unknown"


def stated_licence(checkpoint: str, config: Mapping[str, Any]) -> dict[str, str | list[str]] | None:
    """Return the licence that the card of a folder or Hub id states, or else the configuration of a timm model.

    A link to a file of a Hub repository becomes a URL. The result is empty if no licence is stated, and None if the
    card of a Hub id is not in the cache and the Hub cannot be reached.

    Raises:
        CannotBeOpened: the card of a Hub id cannot be stored in the cache.
    """
    card = Path(checkpoint) / CARD_NAME
    is_on_hub = not Path(checkpoint).exists()
    if is_on_hub:
        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        with opening(checkpoint):
            card = Path(cached_file(checkpoint, CARD_NAME, **options) or card)
    metadata = _read_metadata(card) if card.is_file() else {}
    for source in (metadata, config.get("pretrained_cfg"), config):
        stated = {key: source[key] for key in LICENCE_KEYS if source.get(key)} if isinstance(source, Mapping) else {}
        if not stated:
            continue
        link = str(stated.get("license_link", ""))
        if link and is_on_hub and "://" not in link:
            stated["license_link"] = f"https://huggingface.co/{checkpoint}/blob/main/{link}"
        return {key: [*map(str, value)] if isinstance(value, list) else str(value) for key, value in stated.items()}
    is_known = not is_on_hub or card.is_file() or try_to_load_from_cache(checkpoint, CARD_NAME) is _CACHED_NO_EXIST
    return {} if is_known else None


def _read_metadata(card: Path) -> dict[str, Any]:
    """Return the metadata of a card. If they are not valid YAML, return their lines on the licence."""
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    if "\N{REPLACEMENT CHARACTER}" in text:
        logger.warning("%s is not in UTF-8: check the licence that is stated", card)
    header = re.match(r"\s*---[ \t]*\n(.*?)\n---", text, re.DOTALL)
    if header is None:
        return {}
    try:
        metadata = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        logger.warning("The metadata of %s are not valid YAML: check the licence that is stated (%s)", card, error)
        return dict(re.findall(r"^(license\w*):[ \t]*['\"]?([\w.:/-]+)['\"]?[ \t]*$", header[1], re.MULTILINE))
    return metadata if isinstance(metadata, dict) else {}
