"""What tells the evaluations of a table apart, for the card of the Hub and the table of a report alike."""

from collections.abc import Mapping, Sequence
from typing import Any


def telling_settings(entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The settings of one of `entries` in which others of the same evaluation differ, as text."""
    alike = [other.get("settings", {}) for other in entries if other["evaluation"] == entry["evaluation"]]
    named = entry.get("settings", {}).items()
    return ", ".join(f"{name}={value}" for name, value in named if any(o.get(name) != value for o in alike))
