"""`task=views`: a contact sheet of the views of a pretraining run, and of the patches that each stage keeps."""

import time
from dataclasses import replace

from ..distributed import is_main, say
from ..recipe import ViewsRecipe
from ..report import describe_data, plot_contact_sheet
from ..run_folder import RunFolder
from ..training.stage_views import collect_stage_views
from ..training.step_costs import prepare_steps
from ..utils.counts import count_of
from .plan import preview_run
from .setup import output_of

NOTE = (
    "Each stage shows the first images of its first step as the run draws them. The boxes on an image are the crops "
    "of view 1 (blue) and view 2 (orange); a view may be mirrored. White lines are the patch grid. Faded patches are "
    "dropped before the encoder; every image has its own draw."
)
AUTO = "schedule=auto: the stages are those of a run that climbs at the deadlines only; probes let a run climb earlier."
TIMED = "The steps were timed now. A run times its own, so its stages may begin at other steps, with other images."


def views(recipe: ViewsRecipe) -> None:
    """Draw `views.png` in `output_dir`, where nothing else changes."""
    output_of(recipe)
    run = RunFolder(recipe.output_dir)
    with preview_run(replace(recipe.run(), torch_compile=False, view_backend="eager")) as trainer:
        notes = [NOTE]
        if not trainer.plan_is_final:
            prepare_steps(trainer, time.perf_counter())
            notes.append(TIMED)
        if trainer.controller:
            notes.append(AUTO)
        objective = trainer.objective
        data = describe_data(recipe.data, trainer.source, None)["name"]
        title = f"Views of {objective.display_name} on {data}, {recipe.image_size} px"
        stages = collect_stage_views(trainer)
        if is_main():
            plot_contact_sheet(stages, run.views, f"{title}, seed {recipe.seed}", notes)
    say(f"Views of {count_of(len(stages), 'stage')}: {run.views}")
