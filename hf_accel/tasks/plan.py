"""`hf-accel plan RECIPE`: what a pretraining run will do, and what that takes, without training anything."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from transformers import set_seed

from ..compression import Plan, Strategy
from ..data import ImageSource
from ..data.cache import storage_side
from ..distributed import say
from ..distributed.launch import choose_precision
from ..recipe import Recipe
from ..report import format_table
from ..run_folder import RunFolder
from ..training.caching import choose_cache
from ..training.console import describe_run
from ..training.memory import explained_memory
from ..training.step_costs import prepare_steps
from ..training.timing import StepTime, format_duration, predict_seconds, time_steps
from ..training.trainer import PretrainTrainer
from .setup import build_objective, earlier_defaults, load_images, pretrain_config

NOTE = (
    "`until` is the progress at which a stage ends, p the patch size in pixels, tokens those that the trained branch "
    "keeps of a view with its prefix tokens. Seconds are predicted from a few steps that were timed now, without "
    "evaluations and checkpoints. "
)
ON_CPU, ON_GPU = "Memory is that of the whole process.", "Memory is the peak of what torch allocates."
AUTO = (
    "schedule=auto: the stages are those of a run that climbs at the deadlines only. The probes of a run let it climb "
    "earlier, and take up to {share:.0%} of the budget, which is not counted here."
)
CACHED = (
    "cache={cache}: a run decodes all images once, at its start, which is not counted here. The steps above read and "
    "decode their images, so those of the run are faster."
)


@contextmanager
def preview_run(
    recipe: Recipe, images: tuple[ImageSource, ImageSource | None] | None = None
) -> Iterator[PretrainTrainer]:
    """Make the trainer of a run, to look at it. Its measured costs are taken over, and `output_dir` stays as it is.

    Args:
        images: those of the recipe, if they are loaded already.
    """
    run = RunFolder(recipe.output_dir)
    begun = run.read_recipe()
    precision = choose_precision(recipe.mixed_precision, begun.get("mixed_precision"))
    kept = earlier_defaults(recipe, begun)
    with tempfile.TemporaryDirectory() as folder:
        if run.cost_table.exists():
            shutil.copy(run.cost_table, folder)
        apart = {"output_dir": folder, "report_to": [], "push_to_hub": False}
        recipe = replace(recipe, mixed_precision=precision, **apart, **kept)
        config = pretrain_config(recipe)
        set_seed(recipe.seed)
        trainer = PretrainTrainer(build_objective(recipe), config, *(images or load_images(recipe)))
        try:
            with explained_memory(config, trainer.objective):
                yield trainer
        finally:
            trainer.end()


def plan(recipe: Recipe) -> None:
    """Time a few steps of every strategy of a run, and print a table of its stages."""
    with preview_run(recipe) as trainer:
        times = time_stages(trainer)
        say("\n".join([*describe_run(trainer), ""]))
        say(describe_stages(trainer, times))


def time_stages(trainer: PretrainTrainer) -> dict[Strategy, StepTime]:
    """Time a few steps of every strategy of a run."""
    times = prepare_steps(trainer, time.perf_counter())
    return times or time_steps(trainer, [strategy for strategy, _ in trainer.plan.stage_steps()])


def predict_run(plan: Plan, times: Mapping[Strategy, StepTime]) -> tuple[str, str]:
    """Return the predicted time of a whole run, and its peak memory."""
    most = max(times.values(), key=lambda step: step.memory)
    return format_duration(sum(predict_seconds(plan, times))), format_memory(most)


def describe_stages(trainer: PretrainTrainer, times: dict) -> str:
    """Format the table of a plan's stages, with notes on what it shows."""
    plan, config = trainer.plan, trainer.objective.config
    seconds, ends = predict_seconds(plan, times), plan.stage_ends()
    rows, before = [], plan.start
    for number, ((strategy, steps), taken, (end, _)) in enumerate(zip(plan.stage_steps(), seconds, ends, strict=True)):
        online, step = strategy.online, times[strategy]
        until = 1.0 if number == len(ends) - 1 else plan.progress(end)
        tokens = online.kept_tokens(config.image_size) + config.num_prefix_tokens
        cells = [f"{number + 1} (until {until:.0%})", f"p{online.patch_size}", f"{online.token_dropout:g}", f"{tokens}"]
        rows.append([*cells, f"{steps:,}", f"{end - before:,.0f}", format_duration(taken), format_memory(step)])
        before = end
    totals = [f"{plan.num_steps:,}", f"{plan.total_cost:,.0f}", *predict_run(plan, times)]
    header = ["stage", "patch size", "token dropout", "tokens", "steps", "units", "time", "peak memory"]
    table = format_table(header, [*rows, ["whole run", "", "", "", *totals]])
    notes = [NOTE + (ON_GPU if trainer.args.device.type == "cuda" else ON_CPU)]
    if trainer.controller:
        notes.append(AUTO.format(share=trainer.args.auto_share))
    cache = choose_cache(trainer, storage_side(trainer.view_configs, config.image_size))
    if cache != "none" and trainer.source.pixels is None:
        notes.append(CACHED.format(cache=cache))
    return "\n\n".join([table, *notes])


def format_memory(step: StepTime) -> str:
    return f"{step.memory / 1e9:.2f} GB"
