"""Pushes the checkpoints of a run while it trains."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import TrainerCallback

from ..checkpoints import CARD_NAME
from ..models import AccelViTConfig
from .card import Run, card_text
from .publish import Publication, public_yaml
from .repository import Files, stage

logger = logging.getLogger(__name__)


class PushCallback(TrainerCallback):
    """Uploads each checkpoint in the background. The last one is left to `Publication.publish`.

    Example:
        >>> trainer.add_callback(PushCallback(Publication("runs/moco", "ann/moco"), trainer.results))

    Args:
        publication: the run and its repository.
        results: returns what results.json would hold if the run ended now.
    """

    def __init__(self, publication: Publication, results: Callable[[], dict[str, Any]]):
        self.publication, self.results = publication, results

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            return
        publication = self.publication
        checkpoint = publication.run.checkpoint(state.global_step)
        folder = publication.run.hub / checkpoint.name
        try:
            staged = stage(checkpoint, folder, publication.optimizer)
        except OSError as error:  # The disk is full. The checkpoint itself is complete.
            logger.warning("%s is not pushed: %s", checkpoint, error)
            return
        results, config = self.results(), AccelViTConfig.from_pretrained(checkpoint)
        message = f"Step {state.global_step}, {results['units'] / results['budget']:.0%} of the budget"
        publication.repository.push_later(partial(self.files, staged, results, config), message, folder)

    def files(self, staged: Files, results: dict[str, Any], config: AccelViTConfig, repo_id: str) -> Files:
        """Return the model files of a checkpoint, with a card that says how far training is."""
        run = self.publication.run
        recipe = run.read_recipe()
        card = card_text(Run(repo_id.split("/")[-1], recipe, results, config, is_complete=False), repo_id)
        return {**staged, CARD_NAME: card.encode(), run.recipe.name: public_yaml(recipe)}
