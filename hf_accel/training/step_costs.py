"""What the steps of a run cost on this device: timed at its start, and a budget in time turned into units by it."""

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..compression import Compression, Strategy
from ..compression.cost import StepCosts, device_name
from ..distributed import broadcast_object, is_main, say
from ..utils.errors import fail
from ..utils.pretrain_settings import budget_in_seconds
from ..utils.writing import AGAIN, writing
from .auto_schedule import take_probe
from .planning import analytic_units, strategies_to_time
from .timing import TIMED_AT, StepTime, format_duration, time_steps
from .views import start_views

AGAIN_FOR = 5.0
"""Seconds for which short steps are timed again, as the median of three would be noise."""

MOST_STEPS = 20
"""Timed steps of each strategy, at most."""


def prepare_steps(trainer: Any, started: float) -> dict[Strategy, StepTime]:
    """Compile the views of a run, and, where its costs are to be measured, time its steps and fix its plan.

    All processes must call it. The main process measures.

    Args:
        trainer ([`PretrainTrainer`]): Its `costs` and `plan` are set, unless it has costs already.
        started: Reading of `time.perf_counter` from which a budget in time counts.

    Returns:
        The times of the steps, if they were timed.
    """
    args, costs = trainer.args, trainer.costs
    if trainer.plan_is_final:
        if isinstance(costs, StepCosts) and trainer.view_backend is None:
            trainer.view_backend = costs.view_backend
        start_views(trainer)
        _keep(trainer)
        return {}
    strategies, known_bad = strategies_to_time(args, trainer.objective, trainer.schedule), dict(trainer.source.bad)
    times: dict[Strategy, StepTime] = {}
    if args.view_backend == "auto":  # Whether compilation pays depends on the number of steps.
        times = _measure(trainer, strategies, started)
    start_views(trainer)
    if not times or trainer.view_backend == "fused":
        times = _measure(trainer, strategies, started)
    trainer.source.bad.clear()
    trainer.source.bad.update(known_bad)
    base = times[strategies[0]].seconds
    took = format_duration(time.perf_counter() - started)
    say(f"Costs:  measured in {took}; an uncompressed step takes {format_duration(base)}")
    _keep(trainer, are_new=True)
    return times


def _keep(trainer: Any, are_new: bool = False) -> None:
    """Save the measured costs in the folder of the run, from where each checkpoint copies them."""
    path = trainer.folder.cost_table
    if trainer.costs is not None and is_main() and (are_new or not path.exists()):
        with writing(path, AGAIN):
            path.parent.mkdir(parents=True, exist_ok=True)
            trainer.costs.save(path)


def _measure(trainer: Any, strategies: Sequence[Strategy], started: float) -> dict[Strategy, StepTime]:
    """Time steps, and plan by their costs."""
    args, begun = trainer.args, time.perf_counter()
    times = broadcast_object(time_steps(trainer, strategies))
    more = int(AGAIN_FOR / sum(step.seconds for step in times.values()))
    if more > 3:
        times = broadcast_object(time_steps(trainer, strategies, min(more, MOST_STEPS)))
    uncompressed = Strategy(Compression(trainer.objective.config.patch_size))
    units, base = analytic_units(trainer.objective)(uncompressed), times[uncompressed].seconds
    per_image = {strategy: units * (step.seconds / base) for strategy, step in times.items()}
    costs = StepCosts(
        per_image, base / (units * args.batch_size), device_name(args.device), trainer.view_backend or "eager"
    )
    if args.schedule == "auto":
        costs = replace(costs, probe_overhead=_probe_overhead(trainer, costs))
    timing = time.perf_counter() - begun
    if budget_in_seconds(args.budget) is not None:
        # The timed steps were those of a copy of the model, and the model itself is compiled in the run.
        costs = _with_budget(trainer, costs, started - (timing if args.torch_compile else 0.0))
    trainer.set_costs(costs)
    return times


def _probe_overhead(trainer: Any, costs: StepCosts) -> float:
    """Return the units an image by which a draw of a probe takes longer than the steps under its strategies.

    A probe loads its images without workers, makes its views operation by operation, and compares gradients.
    """
    objective, seconds = copy.deepcopy(trainer.whole_objective()).to(trainer.args.device), []
    if trainer.args.torch_compile:
        objective.compile_encoders()
    for draw in range(4):
        start = time.perf_counter()
        take_probe(trainer, objective, costs.units, range(draw, draw + 1), TIMED_AT)
        seconds.append(time.perf_counter() - start)
    taken = statistics.median(seconds[1:]) / (costs.seconds_per_unit * trainer.args.batch_size)
    return broadcast_object(max(0.0, taken - sum(costs.units.values())))


def _with_budget(trainer: Any, costs: StepCosts, started: float) -> StepCosts:
    """Turn what is left of a budget in time into units, after evaluations and saves of the whole run."""
    args = trainer.args
    evaluations, checkpoints = len(set(args.eval_points)), len(set(args.keep_points))
    whole = budget_in_seconds(args.budget) or 0.0

    def plan_with(left: float) -> StepCosts:
        left = broadcast_object(left)
        if left <= 0:
            problem = "timing, evaluations and saves alone take longer; raise it, or name fewer eval_points"
            fail("budget", args.budget, problem)
        return replace(costs, budget_requested=args.budget, budget=left / costs.seconds_per_unit)

    trainer.set_costs(plan_with(whole - (time.perf_counter() - started)))  # What an evaluation measures follows it.
    others = evaluations * _evaluation_seconds(trainer)
    save = _save_seconds(trainer)
    seconds = whole - (time.perf_counter() - started) - others
    trainer.set_costs(plan_with(seconds))  # The number of checkpoints may depend on the number of steps.
    steps = trainer.plan.num_steps
    checkpoints += steps / args.save_steps if args.save_steps >= 1 else 1 / args.save_steps
    return plan_with(seconds - math.ceil(checkpoints) * save)


def _evaluation_seconds(trainer: Any) -> float:
    """Time one evaluation. Each of the run counts with as much."""
    start = time.perf_counter()
    if trainer.args.eval_points:  # An engine may place the model on its device later.
        trainer.measure_encoder(copy.deepcopy(trainer.whole_objective().encoder).to(trainer.args.device))
    return time.perf_counter() - start


def _save_seconds(trainer: Any) -> float:
    """Time writing the weights three times, which is what a checkpoint holds: the weights and AdamW's two moments."""
    weights, folder = trainer.whole_objective().state_dict(), trainer.folder.path
    start = time.perf_counter()
    if is_main():
        with writing(folder, AGAIN):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                for _ in range(3):
                    torch.save(weights, file)
    return time.perf_counter() - start
