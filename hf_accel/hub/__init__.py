"""A run on the Hugging Face Hub: its model card, and uploads that neither stall a step nor lose anything."""

from .accuracy import FINAL
from .card import CARD_NAME, FIGURES, Run, card_text, read_run, schedule_of, write_card
from .export_card import Export, agreement, export_card, stated_licence
from .redact import without_local_paths
from .repository import STATE_FOLDER, Files, HubRepository, PushFailed, PushRefused, patiently, push_failure, stage

__all__ = [
    "CARD_NAME",
    "FIGURES",
    "FINAL",
    "STATE_FOLDER",
    "Export",
    "Files",
    "HubRepository",
    "PushFailed",
    "PushRefused",
    "Run",
    "agreement",
    "card_text",
    "export_card",
    "patiently",
    "push_failure",
    "read_run",
    "schedule_of",
    "stage",
    "stated_licence",
    "without_local_paths",
    "write_card",
]
