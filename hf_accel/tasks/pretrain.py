"""`task=pretrain`: train until the budget is spent, resume where a run was interrupted, and write `final/`."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..compression import Plan
from ..data import ImageSource, image_processor
from ..distributed import barrier, broadcast_object, is_main, say
from ..distributed.signals import STOPPED
from ..evaluation import raw_pixel_features, weights_digest
from ..hub import PushCallback
from ..objectives import ObjectiveForPreTraining
from ..recipe import Recipe
from ..report import describe_data, environment, plot_curves, read_results, run_is_complete
from ..run_folder import AGAIN, checkpoints, damage, sole_launch, write_json, write_text, writing
from ..training.trainer import PretrainTrainer, knn_of
from .card import publication_of
from .setup import (
    build_objective,
    continue_recipe,
    controller_of,
    cost_function,
    images_of,
    output_of,
    plan_of,
    start,
)


def pretrain(recipe: Recipe) -> None:
    output = Path(recipe.output_dir)
    notes = continue_recipe(recipe)
    if run_is_complete(output):
        say(f"This run is complete: {output / 'results.json'}. Choose another output_dir for a new one.")
        if recipe.push_to_hub:
            publication_of(recipe).publish()
        return
    output = output_of(recipe)
    arguments = start(recipe)
    for note in notes:
        say(note)
    with sole_launch(output):
        train(recipe, arguments, checkpoint_to_resume(output))


def train(recipe: Recipe, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Train from `checkpoint`, or from the start, and finish the run. After a stop exit with the code STOPPED."""
    output, publication = Path(recipe.output_dir), publication_of(recipe)
    if recipe.push_to_hub:
        publication.start()
    arguments.eval_on_start &= checkpoint is None
    model = build_objective(recipe)
    units = partial(model.units_per_image, forward_cost=cost_function(recipe, arguments.device))
    controller = controller_of(recipe, units)
    plan = plan_of(recipe, units, controller)
    arguments.max_steps = plan.num_steps
    source, validation = images_of(recipe)
    if is_main():
        with writing(output / "recipe.yaml", AGAIN):
            write_text(output / "recipe.yaml", recipe.to_yaml())
    say(
        f"{recipe.objective} on {source.name}: {len(source)} images, {plan.num_steps} steps of {recipe.batch_size}, "
        f"{plan.total_cost:,.0f} of {plan.budget:,.0f} units"
    )
    for note in notes_on(recipe, model, plan):
        say(note)
    trainer = PretrainTrainer(model, arguments, recipe, plan, source, validation, controller)
    if recipe.push_to_hub and is_main():
        here = environment()

        def results_so_far() -> dict[str, Any]:
            data = describe_data(recipe.data, source, validation)
            return {**trainer.results(), "data": data, "environment": here}

        trainer.add_callback(PushCallback(publication, results_so_far))
    if checkpoint:
        say(f"Resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopped:
        say(f"Stopped at step {trainer.state.global_step} of {plan.num_steps}; the same command resumes.")
        barrier()  # a launcher ends the other processes when the first one ends with a code other than 0
        trainer.end()
        sys.exit(STOPPED)
    finish(trainer, recipe, source, validation)
    trainer.end()
    if recipe.push_to_hub and run_is_complete(output):
        publication.publish()


def notes_on(recipe: Recipe, model: ObjectiveForPreTraining, plan: Plan) -> list[str]:
    """What a run does that its recipe may not be meant to ask for."""
    notes, micro_batches = [], recipe.gradient_accumulation_steps
    if micro_batches > 1 and model.least_batch > 1:
        notes.append(
            f"Note: gradient_accumulation_steps={micro_batches}: {recipe.objective} contrasts the "
            f"{recipe.batch_size // micro_batches} images of each micro-batch with each other, not the "
            f"{recipe.batch_size} of the whole batch"
        )
    if recipe.schedule != "auto" and not plan.pays_for_last_stage():
        notes.append(
            f"Note: budget={recipe.budget:g} pays for no step of the schedule's last stage "
            f"({plan.schedule.stages[-1].strategy}): raise the budget, lower batch_size, or let the stage begin earlier"
        )
    return notes


def checkpoint_to_resume(output: Path) -> Path | None:
    """The newest complete checkpoint, the same on all processes; tells of newer ones why they are none."""
    found = None
    for path in checkpoints(output) if is_main() else []:
        wrong = damage(path)
        if wrong is None:
            found = path
            break
        say(f"Not resumed from {path}: {wrong}")
    return broadcast_object(found)


def finish(trainer: PretrainTrainer, recipe: Recipe, source: ImageSource, validation: ImageSource | None) -> None:
    """Write `final/` with its card, figures and, last, the run's part of `results.json`, which marks it as complete."""
    so_far, history, raw = trainer.results(), trainer.state.log_history, None
    if validation is not None and validation.labels is not None and source.labels is not None:
        raw = knn_of(trainer.objective, source, validation, recipe, trainer.args.device, features=raw_pixel_features)
    encoder = trainer.whole_objective().encoder
    for images in filter(None, (source, validation)):
        images.gather_bad()
    if not is_main():
        return
    output = Path(recipe.output_dir)
    results: dict[str, Any] = {
        **so_far,
        "knn_top1_raw_pixels": raw and raw["top1"],
        "weights": weights_digest(encoder),
        "data": describe_data(recipe.data, source, validation),
        "environment": environment(),
    }
    with writing(output, AGAIN):
        encoder.save_pretrained(output / "final")
        image_processor(source, recipe.image_size).save_pretrained(output / "final")
        write_results(recipe, results, history, trainer.plan)
    if results["knn_top1"] is not None:
        start = results["knn_top1_random_init"]
        start = "" if start is None else f" (random initialisation {start:.2%})"
        say(f"kNN accuracy {results['knn_top1']:.2%}{start}; results in {output}")
    else:
        say(f"Results in {output}; no accuracy, for lack of labels or of images kept for it")


def write_results(recipe: Recipe, results: dict[str, Any], history: list[dict[str, Any]], plan: Plan) -> None:
    """Beside the encoder in `final/`, which is written: figures, card, log and, last, `results.json`."""
    output, raw = Path(recipe.output_dir), results["knn_top1_raw_pixels"]
    baselines = {} if raw is None else {"raw pixels": raw}
    if results["knn_top1_random_init"] is not None:
        baselines["random init"] = results["knn_top1_random_init"]
    title = f"{recipe.objective} on {results['data']['name']}"
    curves = {"title": title, "baselines": baselines, "plan": plan, "image_size": recipe.image_size}
    plot_curves(history, output / "curves.png", **curves)
    write_json(output / "log_history.json", {"log_history": history})
    earlier = read_results(output).get("evaluations")  # of a checkpoint, while the run went on
    results |= {"evaluations": earlier} if earlier else {}
    publication_of(recipe).complete_final(results)
    write_json(output / "results.json", results)
