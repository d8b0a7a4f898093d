"""What a recipe names, built: images, objective, costs, and the arguments of the Trainer."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ..compression import CostTable, Plan, Strategy, forward_cost, measure_costs
from ..compression.cost import TABLE_NAME, ForwardCost
from ..data import CorruptDataError, ImageSource, describe_labels, load_sources
from ..data.tables import NO_LABELS
from ..distributed import barrier, is_main, say, world_size
from ..distributed.launch import (
    autocast_arguments,
    check_launch,
    describe_launch,
    on_cpu,
    set_deepspeed,
    settle_precision,
)
from ..models import AccelViTModel
from ..objectives import OBJECTIVES, ObjectiveForPreTraining
from ..recipe import Recipe, RecipeError
from ..run_folder import RunFolder, last_complete_checkpoint
from ..schedule_search.choose import build_grid
from ..schedule_search.ladder import LADDER_DROPOUTS, OnlineController, build_ladder
from ..utils.causes import reason


def output_of(recipe: Recipe) -> Path:
    """`output_dir`, made where it is missing. Raises RecipeError where nothing can be written."""
    output = Path(recipe.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise RecipeError(f"output_dir={recipe.output_dir!r}: nothing can be written there: {error}") from error
    return output


def start(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments, with processes, threads and random state as the run needs them.

    Raises:
        RecipeError: the batch size does not divide among the processes, not all of them take part, the engine cannot
            do what is asked of it, or a tracker is not there.
    """
    check_launch(recipe)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = training_arguments(recipe, world_size)
    check_trackers(arguments)
    _ = arguments.device  # starts the process group
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several GPUs want several processes: accelerate launch
    if arguments.world_size != world_size:
        raise RecipeError(f"{world_size} processes were started but {arguments.world_size} take part")
    set_deepspeed(arguments, recipe)
    if arguments.device.type == "cpu":
        use_all_cores(world_size)
    set_seed(recipe.seed)
    say(describe_launch(arguments, recipe))
    return arguments


def training_arguments(recipe: Recipe, world_size: int) -> TrainingArguments:
    share = recipe.gradient_accumulation_steps * world_size
    if recipe.reads("batch_size") and recipe.batch_size % share:
        raise RecipeError(
            f"batch_size={recipe.batch_size}: must be a multiple of gradient_accumulation_steps x processes = {share}"
        )
    return TrainingArguments(
        output_dir=recipe.output_dir,
        max_steps=1,  # the plan's, once it is made
        per_device_train_batch_size=max(1, recipe.batch_size // share),
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",  # the true one is a function of progress, set at each step
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        **autocast_arguments(recipe),
        activation_checkpointing=recipe.gradient_checkpointing,
        use_cpu=on_cpu(),
        seed=recipe.seed,
        eval_on_start=0.0 in recipe.eval_points,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=int(recipe.save_steps) if recipe.save_steps >= 1 else recipe.save_steps,
        report_to=recipe.report_to if recipe.reads("report_to") else "none",
        remove_unused_columns=False,
        ignore_data_skip=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )


def check_trackers(arguments: TrainingArguments) -> None:
    """Before any work is done: that the Trainer knows them and finds their packages."""
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"report_to={arguments.report_to!r}: {error}") from None


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
        try:
            with torch.device("meta"):
                AccelViTModel(config)
        except (ValueError, ImportError) as error:
            raise RecipeError(f"attn_implementation={recipe.attn_implementation!r}: {error}") from None
    objective: Any = OBJECTIVES[recipe.objective]
    try:
        model = objective(config, **recipe.objective_config)
    except ValueError as error:
        raise RecipeError(f"objective_config={recipe.objective_config!r}: {error}") from None
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
        if recipe.task == "search":
            strategies = [*strategies, *grid_of(recipe)]
        if recipe.schedule == "auto":
            strategies = [*strategies, *build_grid(recipe.image_size, recipe.patch_size, LADDER_DROPOUTS)]
        wanted = [c for strategy in strategies for c in (strategy.online, strategy.target_branch)]
        share = recipe.batch_size // (recipe.gradient_accumulation_steps * world_size())
        batch_size = 64 if device.type == "cpu" else share  # of a small batch a GPU shows how fast it is given work
        measure_costs(config, wanted, device, batch_size, dtype=recipe.precision()).save(path)
    barrier()
    return CostTable.load(path)


def plan_of(
    recipe: Recipe, units_per_image: Callable[[Strategy], float], controller: OnlineController | None = None
) -> Plan:
    """The plan of the recipe's schedule, or, before anything is probed, of a controller's longest."""
    schedule = controller.schedule() if controller else recipe.compression_schedule()
    try:
        return Plan(recipe.budget, schedule, recipe.batch_size, units_per_image)
    except ValueError as error:
        raise RecipeError(f"budget={recipe.budget!r}: {error}") from None


def grid_of(recipe: Recipe) -> list[Strategy]:
    try:
        return build_grid(
            recipe.image_size,
            recipe.patch_size,
            recipe.search_token_dropout,
            recipe.search_patch_size,
            recipe.search_symmetry,
        )
    except ValueError as error:
        raise RecipeError(f"the grid of the search: {error}") from None


def controller_of(recipe: Recipe, units_per_image: Callable[[Strategy], float]) -> OnlineController | None:
    """What `schedule: auto` follows; None for a schedule that is known."""
    if recipe.schedule != "auto":
        return None
    ladder = build_ladder(recipe.image_size, recipe.patch_size, units_per_image)
    try:
        return OnlineController(
            ladder,
            lambda strategy: recipe.batch_size * units_per_image(strategy),
            recipe.budget,
            recipe.auto_share,
            recipe.auto_draws,
            recipe.search_criterion,
        )
    except ValueError as error:
        raise RecipeError(f"schedule='auto': {error}") from None


def images_of(recipe: Recipe) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images; says where their labels come from.

    Raises:
        RecipeError: what cannot be read, or fewer images than a batch takes.
    """
    for key in ("data_config", "train_split", "validation_split", "image_column", "label_column"):
        value = getattr(recipe, key)
        if recipe.data == "bundled" and value and (key, value) != ("label_column", NO_LABELS):
            kind = "no columns to choose from" if key.endswith("column") else "only their split by seed"
            raise RecipeError(f"{key}={value!r}: the bundled digits have {kind}; leave it out")
    splits, columns = (recipe.train_split, recipe.validation_split), (recipe.image_column, recipe.label_column)
    try:
        source, validation = load_sources(recipe.data, *splits, *columns, recipe.seed, recipe.data_config)
    except CorruptDataError:  # says enough
        raise
    except (ValueError, OSError, RuntimeError) as error:  # datasets' own errors become one of these
        raise RecipeError(f"data={recipe.data!r}: {reason(error)}") from error
    if recipe.reads("batch_size") and len(source) < recipe.batch_size:
        raise RecipeError(f"batch_size={recipe.batch_size}: {source.name} has only {len(source)} images")
    say(describe_labels(source, validation))
    return source, validation


def continue_recipe(recipe: Recipe) -> list[str]:
    """Settle the precision as the run in `output_dir` has it, and refuse to continue it under other settings.

    Returns:
        What to say about settings that change from its last checkpoint on.

    Raises:
        RecipeError: the run there was started with another value of a key that its result depends on.
    """
    run = RunFolder(recipe.output_dir)
    settle_precision(recipe, run.read_recipe().get("mixed_precision"))
    now = recipe.used()
    return run.compare_settings(now, {key: recipe.resume_rule(key) for key in now})
