"""`task=search`: gradient errors at the kept checkpoints of a pilot run, and the schedule found from them."""

import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from ..compression import Schedule, Strategy
from ..data import ImageSource
from ..distributed import barrier, is_main, say
from ..distributed.launch import check_launch, start_processes
from ..evaluation import weights_digest
from ..objectives import ObjectiveForPreTraining
from ..recipe import Recipe, RecipeError
from ..report import environment, write_search_report
from ..run_folder import RUN_STATE_NAME, RunFolder, read_state
from ..schedule_search.choose import (
    build_grid,
    build_schedule,
    build_schedule_file,
    choose_strategies,
    has_certain_gain,
    list_tied,
)
from ..schedule_search.error_table import ErrorTable
from ..schedule_search.gradient_error import GradientError, chunks, estimate_errors
from ..schedule_search.gradient_probe import GradientProbe
from ..training.config import PretrainConfig
from ..training.normalising import normalise_source
from ..training.planning import make_forward_cost
from ..utils.counts import count_of
from ..utils.errors import fail
from ..utils.writing import write_text
from .setup import build_objective, continue_recipe, images_of, naming, output_of, pretrain_config

LEAST_DRAWS, SIGNAL, SHARE = 16, 4.0, 0.05
"""Of search_draws=auto: the least number, what it aims for (see `choose_draws`), and the share of the pilot's units."""

ERRORS_NAME = "gradient_error.parquet"
SCHEDULE_NAME = "schedule.yaml"

OF_THE_PILOT = (
    *("data", "train_split", "augmentation", "normalisation", "view_resolution", "batch_size"),
    *("init_from", "num_channels", "image_size", "patch_size", "model_config", "objective", "objective_config"),
)
"""The settings under which the gradients of a search are those of its pilot's training."""


class Parts(NamedTuple):
    """What a search measures gradients with.

    `unit_price` is the price of one uncompressed gradient in units, and `affordable` the price, in such gradients, that
    search_draws=auto may pay at a checkpoint.
    """

    recipe: Recipe
    config: PretrainConfig
    objective: ObjectiveForPreTraining
    source: ImageSource
    unit_price: float
    affordable: float


def search(recipe: Recipe) -> None:
    """Write `schedule.yaml`, `gradient_error.parquet` and a report with figures into `output_dir`.

    The table is written after each checkpoint, so that a killed search continues with the next one. Rows of weights
    that the pilot no longer has at that progress, because it was trained again, are measured again.
    """
    checkpoints = kept_checkpoints(Path(str(recipe.pilot)))
    check_launch()
    folder = RunFolder(output_of(recipe))
    config = pretrain_config(recipe)
    start_processes(config, config.precision, config.torch_compile)
    with folder.lock():
        continue_recipe(recipe)
        search_checkpoints(recipe, config, checkpoints)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def search_checkpoints(recipe: Recipe, config: PretrainConfig, checkpoints: list[tuple[float, Path]]) -> None:
    """Measure each checkpoint, choose the schedule, and write it with the table and the report."""
    output = Path(recipe.output_dir)
    objective = build_objective(recipe)
    if config.torch_compile:
        objective.compile_encoders(**config.compile_options)
    has_target_branch = objective.has_target_branch
    if not has_target_branch and recipe.search_symmetry != ["paper"]:
        fail("search_symmetry", recipe.search_symmetry, f"{objective.display_name} has no target branch; leave it out")
    with naming("the grid of the search"):
        of_grid = recipe.search_token_dropout, recipe.search_patch_size, recipe.search_symmetry
        strategies = build_grid(recipe.image_size, recipe.patch_size, *of_grid)
    wanted = [*recipe.compression_schedule().strategies, *strategies]
    forward_cost = make_forward_cost(config, objective.config, config.device, wanted)
    base = objective.units_per_image(strategies[0], forward_cost)
    cost = {strategy: objective.units_per_image(strategy, forward_cost) / base for strategy in strategies}
    source, _ = images_of(recipe)
    source = normalise_source(source, objective.config, config.normalisation)
    if len(source) < recipe.batch_size:
        raise RecipeError(f"batch_size={recipe.batch_size}: {source.title} has only {count_of(len(source), 'image')}")
    objective.to(config.device)  # pyright: ignore[reportArgumentType]
    load_weights(objective, checkpoints[0][1])
    if is_main():  # not before everything that a user may have to correct has been checked
        write_text(RunFolder(output).recipe, recipe.to_yaml())
    unit_price = recipe.batch_size * base
    affordable = SHARE * units_of_pilot(checkpoints) / len(checkpoints) / unit_price
    parts = Parts(recipe, config, objective, source, unit_price, affordable)
    report_differences(recipe)
    report_unfinished(recipe, checkpoints)
    finished, rows = ErrorTable.load(output / ERRORS_NAME), []
    for progress, folder in checkpoints:
        rows += measure_checkpoint(parts, folder, progress, cost, finished)
        if is_main():
            later = [row for row in finished.rows.values() if row["progress"] > progress]
            ErrorTable([*rows, *later]).save(output / ERRORS_NAME)
    table = ErrorTable(rows)
    stages = [table.errors(progress) for progress in table.points]
    chosen = choose_strategies(stages, cost, recipe.search_criterion)
    if is_main():
        schedule = build_schedule(table.points, chosen)
        write_result(recipe, table.choose(chosen), schedule, source.name, has_target_branch)
    barrier()
    for progress, strategy, errors in zip(table.points, chosen, stages, strict=True):
        (best,) = choose_strategies([errors], cost, recipe.search_criterion)
        taken, alone = (s if has_target_branch else s.online for s in (strategy, best))
        doubt = describe_doubt(errors[strategies[0]], table.rows[progress, strategies[0]]["draws"])
        doubt += describe_tie(errors, recipe.search_criterion)
        doubt += describe_order(f"{alone} (cost {cost[best]:.2f})", cost[best], cost[strategy])
        say(f"progress {progress:.0%}: {taken} (cost {cost[strategy]:.2f} of uncompressed){doubt}")
    say(f"schedule: {output / SCHEDULE_NAME} (use it as schedule={output / SCHEDULE_NAME}), report in {output}")


def write_result(
    recipe: Recipe, table: ErrorTable, schedule: Schedule, data_name: str, has_target_branch: bool
) -> None:
    """Write the schedule, the table and the report into `output_dir`."""
    output = Path(recipe.output_dir)
    origin = {
        **{key: getattr(recipe, key) for key in ("data", "model", "model_config", "objective", "image_size")},
        "criterion": recipe.search_criterion,
        "pilot": recipe.pilot,
        "command": environment()["command"],
        "date": str(date.today()),
    }
    text = yaml.safe_dump(build_schedule_file(schedule, recipe.patch_size, **origin), sort_keys=False)
    write_text(output / SCHEDULE_NAME, text)
    table.save(output / ERRORS_NAME)
    title = f"{recipe.objective} on {data_name}"
    write_search_report(table, schedule, output, title, recipe.search_criterion, has_target_branch)


def kept_checkpoints(pilot: Path) -> list[tuple[float, Path]]:
    """Find the checkpoints that a run has kept for good: (progress, folder), in order.

    Raises:
        RecipeError: there is none.
    """
    folders = [path.parent for path in RunFolder(pilot).kept.glob(f"*/{RUN_STATE_NAME}")]
    if not folders:
        raise RecipeError(
            f"pilot={str(pilot)!r}: no checkpoints in {RunFolder(pilot).kept}; train the pilot with "
            "keep_points=[0.0,0.25,0.5,0.75,1.0]"
        )
    return sorted((round(read_state(folder)["progress"], 6), folder) for folder in folders)


def units_of_pilot(checkpoints: list[tuple[float, Path]]) -> float:
    """Estimate the units of a whole pilot from its last kept checkpoint, 0 where it has none but the first."""
    progress, folder = checkpoints[-1]
    return read_state(folder)["units"] / progress if progress else 0.0


def report_differences(recipe: Recipe) -> None:
    """Say which settings of the search differ from the pilot's. That may be intended, and weights do not show it."""
    trained = RunFolder(str(recipe.pilot)).read_recipe()
    for key in OF_THE_PILOT:
        here = getattr(recipe, key)
        if key in trained and trained[key] != here:
            say(f"Note: the pilot was trained with {key}={trained[key]!r}, and is searched with {here!r}")


def report_unfinished(recipe: Recipe, checkpoints: list[tuple[float, Path]]) -> None:
    """Say so if the pilot has not ended, because the schedule then rests on the checkpoints that it has kept so far."""
    if not RunFolder(str(recipe.pilot)).is_complete():
        say(
            f"Note: the pilot has not finished, and this search sees its checkpoints up to {checkpoints[-1][0]:.0%} of "
            "progress; when it has finished, the same command measures the later ones"
        )


def load_weights(objective: ObjectiveForPreTraining, folder: Path) -> None:
    """Load a checkpoint. Raises RecipeError if it cannot be read, or names the first tensor that differs."""
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{folder} cannot be read: {error}") from None
    here = objective.state_dict()
    for name in [*here, *(name for name in weights if name not in here)]:
        shapes = [tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (weights, here)]
        if shapes[0] != shapes[1]:
            raise RecipeError(
                f"{folder} does not hold this recipe's model: {name} is {shapes[0]} there and {shapes[1]} here; "
                "take the pilot's model, model_config, objective and objective_config"
            )
    objective.load_state_dict(weights)


def measure_checkpoint(
    parts: Parts, folder: Path, progress: float, cost: dict[Strategy, float], finished: ErrorTable
) -> list[Mapping[str, Any]]:
    """Measure the rows of one checkpoint, or take those that an earlier launch has finished for the same weights."""
    load_weights(parts.objective, folder)
    weights = weights_digest(parts.objective)
    stage = [row for row in finished.rows.values() if (row["progress"], row.get("weights")) == (progress, weights)]
    if stage:
        say(f"progress {progress:.0%}: found in {Path(parts.recipe.output_dir) / ERRORS_NAME}")
        return stage
    errors, draws = measure_errors(parts, folder, progress, cost)
    size = parts.recipe.image_size
    return [ErrorTable.build_row(progress, s, errors[s], cost[s], size, draws, weights) for s in cost]


def measure_errors(
    parts: Parts, folder: Path, progress: float, cost: dict[Strategy, float]
) -> tuple[dict[Strategy, GradientError], int]:
    """Measure the errors of every strategy at the parameters of one checkpoint, with a progress bar.

    Returns:
        The errors, and the number of draws that they come from.

    Raises:
        RecipeError: search_memory is too small, or a gradient is not finite.
    """
    recipe = parts.recipe
    probe = GradientProbe(parts.objective, parts.config, parts.source, progress)
    memory = recipe.search_memory * 1e9
    size = sum(parameter.numel() for parameter in probe.parameters)
    passes = len(chunks(list(cost), max(1, int(memory // (8 * size)))))
    with naming(f"the search at {folder}"):
        price = passes + sum(cost.values())
        draws, why = (
            (recipe.search_draws, "") if recipe.search_draws != "auto" else choose_draws(probe, parts.affordable, price)
        )
        units = f"for {draws * price * parts.unit_price:,.0f} units"
        say(f"progress {progress:.0%}: measuring {len(cost)} strategies with {draws} draws {units}{why}")
        total = draws * (len(cost) + passes)
        with tqdm(total=total, desc=f"progress {progress:.0%}", disable=None if is_main() else True) as bar:
            return estimate_errors(probe, cost, range(draws), memory, bar.update, probe.base), draws


def choose_draws(probe: GradientProbe, affordable: float, price: float) -> tuple[int, str]:
    """Choose the draws of search_draws=auto from the noise of the first LEAST_DRAWS uncompressed gradients.

    With n draws the mean gradient G has n x ||G||^2 / var(g) times as much signal as noise, in squares. The number
    aims for SIGNAL. It is at least LEAST_DRAWS, and more only if that is affordable.

    Args:
        affordable, price: of all draws and of one, in uncompressed gradients.

    Returns:
        The number, and what to say about it.
    """
    most = int((affordable - LEAST_DRAWS) / price)  # The noise is measured first.
    if most <= LEAST_DRAWS:
        return LEAST_DRAWS, f"; the pilot is too small to pay for more (they would cost over {SHARE:.0%} of its units)"
    error = estimate_errors(probe, {probe.base: 1.0}, range(LEAST_DRAWS), uncompressed=probe.base)[probe.base]
    signal = max(error.reference_norm2, 0.0) / max(error.variance, 1e-300)
    if signal * most < SIGNAL:
        return most, f"; the gradients are noisy, and more draws would cost over {SHARE:.0%} of the pilot's units"
    return max(LEAST_DRAWS, math.ceil(SIGNAL / signal)), ""


def describe_doubt(uncompressed: GradientError, draws: int) -> str:
    """Say so where the mean of all draws is more noise than gradient; nothing at any other stage."""
    if draws * uncompressed.reference_norm2 >= uncompressed.variance:
        return ""
    return f"; the mean of {draws} draws is more noise than gradient here: with more search_draws the choice may differ"


def describe_tie(errors: Mapping[Strategy, GradientError], criterion: str) -> str:
    """Say so where the errors do not tell strategies apart, and what is chosen then; nothing at any other stage."""
    if criterion == "gain":
        unsure = "" if has_certain_gain(errors) else "no gain is certain here, and so the most expensive one"
    else:
        tied = len(list_tied(errors))
        unsure = "" if tied == 1 else f"{tied} of {len(errors)} cannot be told apart here, and the cheapest of them"
    return f"; {unsure} counts as best" if unsure else ""


def describe_order(best: str, cost_of_best: float, cost_of_choice: float) -> str:
    """Say so where another stage forbids the strategy that is best at this stage alone; nothing at any other stage."""
    if cost_of_best == cost_of_choice:
        return ""
    # Without such a neighbour the best one could take the place of the choice.
    neighbour = "an earlier stage costs more" if cost_of_best < cost_of_choice else "a later stage costs less"
    return f"; the best here alone is {best}, but compression may never increase with progress, and {neighbour}"
