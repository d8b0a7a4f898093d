"""`task=search`: gradient errors at the kept checkpoints of a pilot run, and the schedule found from them."""

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from ..compression import Plan, Schedule, Strategy
from ..data import ImageSource
from ..distributed import barrier, is_main, say
from ..evaluation import weights_digest
from ..objectives import ObjectiveForPreTraining
from ..recipe import Recipe, RecipeError
from ..report import environment, write_search_report
from ..run_folder import RUN_STATE_NAME, write_text
from ..schedule_search.choose import choose_strategies, schedule_file, schedule_of
from ..schedule_search.error_table import strategy_of
from ..schedule_search.gradient_error import GradientError, chunks, estimate_gradient_errors
from ..schedule_search.gradient_probe import GradientProbe
from ..training.trainer import KEPT_NAME, PretrainTrainer
from .setup import build_objective, continue_recipe, cost_function, grid_of, images_of, output_of, start

ERRORS_NAME = "gradient_error.parquet"
SCHEDULE_NAME = "schedule.yaml"

OF_THE_PILOT = (
    *("data", "train_split", "augmentation", "view_resolution"),
    *("image_size", "patch_size", "model_config", "objective", "objective_config"),
)
"""What makes the gradients of a search those of its pilot's training."""


def search(recipe: Recipe) -> None:
    """Writes `schedule.yaml`, `gradient_error.parquet` and a report with figures into `output_dir`.

    The table is written after each checkpoint, so that a killed search continues with the next one. Rows of weights
    that the pilot no longer has at that progress, as after it was trained anew, are measured again.
    """
    continue_recipe(recipe)
    checkpoints = kept_checkpoints(Path(str(recipe.pilot)))
    output = output_of(recipe)
    arguments = start(recipe)
    if is_main():
        write_text(output / "recipe.yaml", recipe.to_yaml())
    objective = build_objective(recipe)
    forward_cost = cost_function(recipe, arguments.device)
    strategies = grid_of(recipe)
    base = objective.units_per_image(strategies[0], forward_cost)
    cost = {strategy: objective.units_per_image(strategy, forward_cost) / base for strategy in strategies}
    source, _ = images_of(recipe)
    objective.to(arguments.device)  # pyright: ignore[reportArgumentType]
    no_plan = Plan(1, Schedule.constant(strategies[0]), 1, lambda strategy: 1.0)  # nothing is trained
    trainer = PretrainTrainer(objective, arguments, recipe, no_plan, source)
    tell_differences(recipe)
    finished, rows = finished_rows(output / ERRORS_NAME), []
    for progress, folder in checkpoints:
        rows += rows_at(trainer, folder, progress, cost, source, finished)
        if is_main():
            write_rows([*rows, *(row for row in finished if row["progress"] > progress)], output / ERRORS_NAME)
    points = [progress for progress, _ in checkpoints]
    table = [errors_of(rows, progress, strategies) for progress in points]
    chosen = choose_strategies(table, cost, recipe.search_criterion)
    schedule = schedule_of(points, chosen)
    if is_main():
        origin = {
            "data": recipe.data,
            "model": recipe.model,
            "model_config": recipe.model_config,
            "objective": recipe.objective,
            "image_size": recipe.image_size,
            "criterion": recipe.search_criterion,
            "pilot": recipe.pilot,
            "command": environment()["command"],
            "date": str(date.today()),
        }
        text = yaml.safe_dump(schedule_file(schedule, recipe.patch_size, **origin), sort_keys=False)
        write_text(output / SCHEDULE_NAME, text)
        for row in rows:
            row["chosen"] = chosen[points.index(row["progress"])] == strategy_of(row)
        write_rows(rows, output / ERRORS_NAME)
        title = f"{recipe.objective} on {source.name}"
        write_search_report(rows, schedule, output, title, recipe.warmup, recipe.search_criterion)
    barrier()
    for progress, strategy, errors in zip(points, chosen, table, strict=True):
        doubt = doubt_of(errors[strategies[0]], recipe.search_draws)
        say(f"progress {progress:.0%}: {strategy} (cost {cost[strategy]:.2f} of uncompressed){doubt}")
    say(f"schedule: {output / SCHEDULE_NAME} (use it as schedule={output / SCHEDULE_NAME}), report in {output}")
    trainer.end()


def kept_checkpoints(pilot: Path) -> list[tuple[float, Path]]:
    """(progress, folder) of the checkpoints that a run has kept for good, in order.

    Raises:
        RecipeError: there is none.
    """
    found = []
    for path in (pilot / KEPT_NAME).glob(f"*/{RUN_STATE_NAME}"):
        found.append((round(json.loads(path.read_text())["progress"], 6), path.parent))
    if not found:
        raise RecipeError(
            f"pilot={str(pilot)!r}: no checkpoints in {pilot / KEPT_NAME}; train the pilot with "
            "keep_points=[0.0,0.25,0.5,0.75,1.0]"
        )
    return sorted(found)


def tell_differences(recipe: Recipe) -> None:
    """Say where a pilot was trained otherwise than it is searched: weights do not tell, and it may be meant so."""
    path = Path(str(recipe.pilot)) / "recipe.yaml"
    trained = yaml.safe_load(path.read_text()) if path.exists() else {}
    for key in OF_THE_PILOT:
        here = getattr(recipe, key)
        if key in trained and trained[key] != here:
            say(f"Note: the pilot was trained with {key}={trained[key]!r}, and is searched with {here!r}")


def load_weights(objective: ObjectiveForPreTraining, folder: Path) -> None:
    """Raises RecipeError if the checkpoint cannot be read or is of another model, naming what differs first."""
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


def rows_at(
    trainer: PretrainTrainer,
    folder: Path,
    progress: float,
    cost: dict[Strategy, float],
    source: ImageSource,
    finished: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of one checkpoint: those that an earlier launch has `finished` for the same weights, or measured now."""
    load_weights(trainer.objective, folder)
    weights = weights_digest(trainer.objective)
    known = [row for row in finished if (row["progress"], row.get("weights")) == (progress, weights)]
    if known:
        say(f"progress {progress:.0%}: found in {Path(trainer.recipe.output_dir) / ERRORS_NAME}")
        return known
    errors = errors_at(trainer, folder, progress, cost, source)
    stage = [row_of(progress, strategy, cost[strategy], errors[strategy], trainer.recipe) for strategy in cost]
    return [{**row, "weights": weights} for row in stage]


def errors_at(
    trainer: PretrainTrainer, folder: Path, progress: float, cost: dict[Strategy, float], source: ImageSource
) -> dict[Strategy, GradientError]:
    """Errors of every strategy at the parameters of one checkpoint, with a progress bar.

    Raises:
        RecipeError: search_memory is too small, or a gradient is not finite.
    """
    recipe = trainer.recipe
    probe = GradientProbe(trainer.objective, recipe, source, progress)
    memory = recipe.search_memory * 1e9
    size = sum(parameter.numel() for parameter in probe.parameters)
    passes = len(chunks(list(cost), max(1, int(memory // (8 * size)))))
    total = recipe.search_draws * (len(cost) + passes)
    try:
        with tqdm(total=total, desc=f"progress {progress:.0%}", disable=not is_main(), file=sys.stderr) as bar:
            draws = range(recipe.search_draws)
            return estimate_gradient_errors(probe, cost, draws, memory, bar.update, probe.base)
    except ValueError as error:
        raise RecipeError(f"the search at {folder}: {error}") from error


def row_of(progress: float, strategy: Strategy, cost: float, error: GradientError, recipe: Recipe) -> dict[str, Any]:
    """One row of the table; `strategy_of` and `errors_of` read it back."""
    online, target = strategy.online, strategy.target_branch
    return {
        "progress": progress,
        "patch_size": online.patch_size,
        "token_dropout": online.token_dropout,
        "target_patch_size": target.patch_size,
        "target_token_dropout": target.token_dropout,
        "tokens": online.kept_tokens(recipe.image_size),
        "relative_cost": cost,
        "bias2": error.bias2,
        "variance": error.variance,
        "ca_variance": error.ca_variance,
        "ca_mse": error.ca_mse,
        "reference_norm2": error.reference_norm2,
        "bias2_low": error.bias2_interval[0],
        "bias2_high": error.bias2_interval[1],
        "ca_mse_low": error.ca_mse_interval[0],
        "ca_mse_high": error.ca_mse_interval[1],
        "gain": error.gain,
        "gain_low": error.gain_interval[0],
        "gain_high": error.gain_interval[1],
        "draws": recipe.search_draws,
        "chosen": False,
    }


def errors_of(rows: list[dict[str, Any]], progress: float, strategies: list[Strategy]) -> dict[Strategy, GradientError]:
    """The errors of one stage, by strategy."""
    stage = {strategy_of(row): row for row in rows if row["progress"] == progress}
    names = ("bias2", "variance", "ca_variance", "ca_mse", "reference_norm2", "gain")
    return {
        strategy: GradientError(
            **{name: stage[strategy][name] for name in names},
            bias2_interval=(stage[strategy]["bias2_low"], stage[strategy]["bias2_high"]),
            ca_mse_interval=(stage[strategy]["ca_mse_low"], stage[strategy]["ca_mse_high"]),
            gain_interval=(stage[strategy]["gain_low"], stage[strategy]["gain_high"]),
        )
        for strategy in strategies
    }


def doubt_of(uncompressed: GradientError, draws: int) -> str:
    """What to say of a stage where the mean of all draws is more noise than gradient; of another one nothing."""
    if draws * uncompressed.reference_norm2 >= uncompressed.variance:
        return ""
    return f"; here the mean of {draws} draws is more noise than gradient: with more search_draws it may be another one"


def finished_rows(path: Path) -> list[dict[str, Any]]:
    """Raises RecipeError if the table of an earlier launch cannot be read."""
    try:
        return pyarrow.parquet.read_table(path).to_pylist() if path.exists() else []
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(f"{path} cannot be read; remove it to measure anew: {str(error).splitlines()[0]}") from None


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Whole or not at all: a kill leaves the earlier table."""
    temporary = path.with_suffix(".partial")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    temporary.replace(path)
