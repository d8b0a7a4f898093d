"""The entry point: a recipe in, a task out. `accelerate launch hf_accel/run.py RECIPE [key=value ...]`."""

import os
import sys
from pathlib import Path

# As a script, this folder comes first on the path and its modules would hide installed ones of the same name.
_FOLDER = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _FOLDER]
if str(_FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(_FOLDER.parent))

import argparse  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
from dataclasses import asdict  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import yaml  # noqa: E402
from transformers import AutoModel, TrainingArguments, set_seed  # noqa: E402

from hf_accel.compression import CostTable, Plan, cost_grid, cost_rows, forward_cost, measure_costs  # noqa: E402
from hf_accel.compression.cost import TABLE_NAME, ForwardCost  # noqa: E402
from hf_accel.data import CorruptDataError, ImageSource, image_processor, load_sources  # noqa: E402
from hf_accel.distributed import barrier, is_main  # noqa: E402
from hf_accel.evaluation import raw_pixel_features  # noqa: E402
from hf_accel.models import AccelViTModel  # noqa: E402
from hf_accel.objectives import OBJECTIVES, ObjectiveForPreTraining  # noqa: E402
from hf_accel.recipe import Recipe, RecipeError, describe_keys, load_recipe  # noqa: E402
from hf_accel.report import environment, format_cost_table, plot_cost, plot_curves, write_json  # noqa: E402
from hf_accel.trainer import PretrainTrainer, TrainingDiverged, knn_of, last_complete_checkpoint  # noqa: E402

# Keys that may change between an interrupted run and its continuation: none has a part in the result.
FREE_KEYS = {"task", "output_dir", "num_workers", "logging_steps", "save_steps", "save_total_limit", "report_to"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="hf_accel/run.py",
        usage="accelerate launch hf_accel/run.py RECIPE [key=value ...]",
        description="Runs the task of a recipe. Keys, for the YAML file or as key=value:",
        epilog=describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/moco.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the recipe")
    arguments = parser.parse_args(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        {"pretrain": pretrain, "evaluate": evaluate, "cost": cost_report}[recipe.task](recipe)
    except (RecipeError, TrainingDiverged, CorruptDataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def training_arguments(recipe: Recipe, plan_steps: int, world_size: int, resuming: bool) -> TrainingArguments:
    share = recipe.gradient_accumulation_steps * world_size
    if recipe.batch_size % share:
        raise RecipeError(
            f"batch_size={recipe.batch_size}: must be a multiple of gradient_accumulation_steps x processes = {share}"
        )
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
    return TrainingArguments(
        output_dir=recipe.output_dir,
        max_steps=plan_steps,
        per_device_train_batch_size=recipe.batch_size // share,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",  # the true one is a function of progress, set at each step
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.mixed_precision == "bf16",
        fp16=recipe.mixed_precision == "fp16",
        activation_checkpointing=recipe.gradient_checkpointing,
        use_cpu=on_cpu,
        seed=recipe.seed,
        eval_on_start=0.0 in recipe.eval_points and not resuming,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=int(recipe.save_steps) if recipe.save_steps >= 1 else recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        report_to=recipe.report_to,
        remove_unused_columns=False,
        ignore_data_skip=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )


def use_all_cores(world_size: int) -> None:
    """Share the cores among the processes, unless OMP_NUM_THREADS says otherwise.

    `accelerate launch` without a number of threads sets OMP_NUM_THREADS to 1, which is no choice of the user's.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is None or (chosen == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))


def build_objective(recipe: Recipe) -> ObjectiveForPreTraining:
    config = recipe.encoder_config()
    if recipe.attn_implementation:
        config._attn_implementation = recipe.attn_implementation
    objective: Any = OBJECTIVES[recipe.objective]
    model = objective(config, **recipe.objective_config)
    if recipe.torch_compile:
        for module in model.modules():
            if isinstance(module, AccelViTModel):
                module.compile()  # in place: names in checkpoints stay, and the draws around it are no part of graphs
    return model


def cost_function(recipe: Recipe, device: torch.device) -> ForwardCost:
    """Analytic, or the run's own measured table, which is made once, kept beside the run and in its checkpoints."""
    config = recipe.encoder_config()
    if recipe.cost == "analytic":
        return partial(forward_cost, config)
    path = Path(recipe.output_dir) / TABLE_NAME
    checkpoint = last_complete_checkpoint(recipe.output_dir)
    if is_main() and not path.exists() and checkpoint and (checkpoint / TABLE_NAME).exists():
        shutil.copy(checkpoint / TABLE_NAME, path)
    elif is_main() and not path.exists():
        strategies = recipe.compression_schedule().strategies
        wanted = [c for strategy in strategies for c in (strategy.online, strategy.target_branch)]
        measure_costs(config, wanted, device).save(path)
    barrier()
    return CostTable.load(path)


def images_of(recipe: Recipe) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images."""
    splits, columns = (recipe.train_split, recipe.validation_split), (recipe.image_column, recipe.label_column)
    try:
        return load_sources(recipe.data, *splits, *columns, recipe.seed)
    except (ValueError, OSError) as error:  # datasets' own errors are of these, too
        raise RecipeError(f"data={recipe.data!r}: {error}") from error


def check_same_recipe(recipe: Recipe) -> None:
    """Refuse to continue a run under other settings than it was started with."""
    path = Path(recipe.output_dir) / "recipe.yaml"
    if not path.exists():
        return
    started, now = yaml.safe_load(path.read_text()), asdict(recipe)
    for key in now.keys() - FREE_KEYS:
        if key in started and started[key] != now[key]:
            raise RecipeError(
                f"{key}={now[key]!r}: {recipe.output_dir} holds a run with {key}={started[key]!r}; "
                "choose another output_dir, or restore the key to continue that run"
            )


def pretrain(recipe: Recipe) -> None:
    output = Path(recipe.output_dir)
    check_same_recipe(recipe)
    if (output / "results.json").exists():
        say(f"This run is complete: {output / 'results.json'}. Choose another output_dir for a new one.")
        return
    output.mkdir(parents=True, exist_ok=True)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    checkpoint = last_complete_checkpoint(output)
    arguments = training_arguments(recipe, 1, world_size, resuming=checkpoint is not None)
    _ = arguments.device  # starts the process group
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several GPUs want several processes: accelerate launch
    if arguments.world_size != world_size:
        raise RecipeError(f"{world_size} processes were started but {arguments.world_size} take part")
    if arguments.device.type == "cpu":
        use_all_cores(world_size)
    set_seed(recipe.seed)
    try:
        model = build_objective(recipe)
    except ValueError as error:
        raise RecipeError(f"objective_config={recipe.objective_config!r}: {error}") from None
    units = partial(model.units_per_image, forward_cost=cost_function(recipe, arguments.device))
    try:
        plan = Plan(recipe.budget, recipe.compression_schedule(), recipe.batch_size, units)
    except ValueError as error:
        raise RecipeError(f"budget={recipe.budget!r}: {error}") from None
    arguments.max_steps = plan.num_steps
    source, validation = images_of(recipe)
    if len(source) < recipe.batch_size:
        raise RecipeError(
            f"batch_size={recipe.batch_size}: {source.name} has {len(source)} images, and a step takes more"
        )
    if is_main():
        (output / "recipe.yaml").write_text(recipe.to_yaml())
    say(
        f"{recipe.objective} on {source.name}: {len(source)} images, {plan.num_steps} steps of {recipe.batch_size}, "
        f"{plan.total_cost:,.0f} of {plan.budget:,.0f} units"
    )
    trainer = PretrainTrainer(model, arguments, recipe, plan, source, validation)
    if checkpoint:
        say(f"Resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < plan.num_steps:
        say(f"Stopped at step {trainer.state.global_step} of {plan.num_steps}; the same command resumes.")
    else:
        finish(trainer, recipe, source, validation)
    trainer.end()


def finish(trainer: PretrainTrainer, recipe: Recipe, source: ImageSource, validation: ImageSource | None) -> None:
    """Write `final/`, `curves.png` and, last, `results.json`, which marks the run as complete."""
    state, history = trainer.run_state(), trainer.state.log_history
    accuracies = [entry for entry in history if "eval_knn_top1" in entry]
    raw = None
    if validation is not None and validation.labels is not None and source.labels is not None:
        raw = knn_of(trainer.objective, source, validation, recipe, trainer.args.device, features=raw_pixel_features)
    if not is_main():
        return
    output, seconds = Path(recipe.output_dir), state["seconds"]
    trainer.objective.encoder.save_pretrained(output / "final")
    image_processor(source, recipe.image_size).save_pretrained(output / "final")
    spent_in_parts = seconds["data"] + seconds["forward_backward"]
    results: dict[str, Any] = {
        "knn_top1": accuracies[-1]["eval_knn_top1"] if accuracies else None,
        "knn_top5": accuracies[-1].get("eval_knn_top5") if accuracies else None,
        "knn_top1_random_init": next((e["eval_knn_top1"] for e in accuracies if e["step"] == 0), None),
        "knn_top1_raw_pixels": raw and raw["top1"],
        "units": state["units"],
        "budget": trainer.plan.budget,
        "steps": state["step"],
        "images_seen": state["step"] * trainer.plan.batch_size,
        "seconds": {**seconds, "rest": seconds["total"] - spent_in_parts - seconds["evaluation"]},
        "processes": trainer.args.world_size,
        "seed": recipe.seed,
        "objective": recipe.objective,
        "schedule": trainer.plan.schedule.to_list(),
        "environment": environment(),
    }
    baselines = {"raw pixels": raw["top1"]} if raw else {}
    if results["knn_top1_random_init"] is not None:
        baselines["random init"] = results["knn_top1_random_init"]
    plot_curves(history, output / "curves.png", title=f"{recipe.objective} on {source.name}", baselines=baselines)
    write_json(output / "log_history.json", {"log_history": history})
    write_json(output / "results.json", results)
    if results["knn_top1"] is not None:
        start = results["knn_top1_random_init"]
        start = "" if start is None else f" (random initialisation {start:.2%})"
        say(f"kNN accuracy {results['knn_top1']:.2%}{start}; results in {output}")


def evaluate(recipe: Recipe) -> None:
    """kNN accuracy of any saved vision encoder, at any patch size, appended to its run's evaluations.json."""
    source, validation = images_of(recipe)
    if validation is None or validation.labels is None:
        raise RecipeError(f"data={recipe.data!r}: task=evaluate needs labels; name their column with label_column=")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = AutoModel.from_pretrained(str(recipe.checkpoint)).to(device)
    accuracy = knn_of(encoder, source, validation, recipe, device, recipe.eval_patch_size)
    patch_size = recipe.eval_patch_size or getattr(encoder.config, "patch_size", None)
    entry = {"checkpoint": recipe.checkpoint, "data": recipe.data, "patch_size": patch_size, **accuracy}
    path = Path(recipe.output_dir) / "evaluations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text())["evaluations"] if path.exists() else []
    write_json(path, {"evaluations": [*earlier, entry]})
    say(f"kNN top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%} at patch {patch_size}; appended to {path}")


def cost_report(recipe: Recipe) -> None:
    """Print and save the cost of every compression, analytic beside measured."""
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = recipe.encoder_config()
    table = measure_costs(config, cost_grid(config), device)
    rows = cost_rows(config, table)
    write_json(output / "cost.json", {"rows": rows, "environment": environment()})
    plot_cost(rows, output / "cost.png", title=f"{recipe.model}, {recipe.image_size} px, {table.device}")
    print(format_cost_table(rows))
    print(f"saved to {output / 'cost.json'} and {output / 'cost.png'}")


if __name__ == "__main__":
    main()
