"""A run on the Hugging Face Hub: its model card, and uploads that neither stall a step nor lose anything."""

from .callback import PushCallback
from .card import CARD_NAME, Run, card_text, write_card
from .export_card import Export, agreement, export_card, stated_licence
from .publish import Publication
from .repository import HubRepository, PushFailed, PushRefused
