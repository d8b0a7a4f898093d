"""`task=pretrain`: train until the budget is spent, and resume where a run was interrupted."""

import os
import sys

from transformers import set_seed

from ..distributed import say
from ..distributed.launch import check_launch
from ..distributed.signals import STOPPED
from ..recipe import Recipe
from ..run_folder import RunFolder
from ..training.finish import restore_final
from ..training.trainer import PretrainTrainer
from ..utils.pretrain_settings import Rule
from .card import publication_of
from .setup import build_objective, continue_recipe, load_images, output_of, pretrain_config


def pretrain(recipe: Recipe) -> None:
    """Train, or resume the run in `output_dir`. After a stop by SIGTERM the exit code is that of such an end."""
    check_launch()
    continue_recipe(recipe)
    folder = RunFolder(recipe.output_dir)
    if folder.is_complete():
        say(f"This run is complete: {folder.results}. Choose another output_dir for a new one.")
        if int(os.environ.get("RANK", 0)) == 0:  # The processes are not connected yet.
            restore_final(folder, publication_of(recipe))
        if recipe.push_to_hub:
            publication_of(recipe).publish()
        return
    output_of(recipe)
    config = pretrain_config(recipe)
    set_seed(recipe.seed)
    model = build_objective(recipe)
    settings = recipe.used()
    rules: dict[str, Rule] = {key: recipe.resume_rule(key) for key in settings}
    trainer = PretrainTrainer(model, config, *load_images(recipe), record=settings, rules=rules)
    trainer.train(resume_from_checkpoint="auto")
    if trainer.stopped:
        say(f"Stopped at step {trainer.state.global_step} of {trainer.plan.num_steps}; the same command resumes.")
    trainer.end()
    if trainer.stopped:
        sys.exit(STOPPED)
