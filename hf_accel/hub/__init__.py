"""A run on the Hugging Face Hub: its model card, and uploads that neither stall a step nor lose anything."""

from ..checkpoints import CARD_NAME, stated_licence
from .callback import PushCallback
from .card import Run, card_text, write_card
from .export_card import Export, agreement, export_card
from .publish import Publication
from .repository import HubRepository, PushFailed, PushRefused
