"""The schedule that follows from gradient errors: the best strategy of each stage, at a cost that never falls."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..compression.schedule import Schedule, Stage
from ..compression.strategy import Compression, Strategy, possible_patch_sizes
from .gradient_error import GradientError

SYMMETRIES = ("paper", "symmetric", "asymmetric")
"""Which of a strategy's compressions the target branch shares: the larger patch (the paper's), both, or none."""


def build_grid(
    image_size: int,
    base_patch_size: int,
    token_dropouts: Sequence[float],
    patch_sizes: Sequence[int] | None = None,
    symmetries: Sequence[str] = ("paper",),
) -> list[Strategy]:
    """Build every strategy of the grid, the uncompressed one first. `patch_sizes` defaults to all possible ones.

    Raises:
        ValueError: a patch size is not possible, or a symmetry is unknown.
    """
    possible = possible_patch_sizes(image_size, base_patch_size)
    grid = [Strategy(Compression(base_patch_size))]
    for patch_size in patch_sizes or possible:
        if patch_size not in possible:
            raise ValueError(f"patch_size {patch_size}: at image_size {image_size} it must be one of {possible}")
        for token_dropout in token_dropouts:
            online = Compression(patch_size, token_dropout)
            targets = {
                "paper": Compression(patch_size),
                "symmetric": online,
                "asymmetric": Compression(base_patch_size),
            }
            for symmetry in symmetries:
                if symmetry not in targets:
                    raise ValueError(f"symmetry {symmetry!r}: must be one of {', '.join(SYMMETRIES)}")
                grid.append(Strategy(online, targets[symmetry]))
    return list(dict.fromkeys(grid))


def choose_strategies(
    stages: Sequence[Mapping[Strategy, GradientError]],
    relative_cost: Mapping[Strategy, float],
    criterion: str = "ca_mse",
) -> list[Strategy]:
    """Choose one strategy for each stage, so that the cost never falls from a stage to the next.

    The choice has the least sum of log ca_mse over the stages, or the largest sum of log gain. With the logarithm a
    stage counts by its ratios, because gradients shrink by orders of magnitude over training.

    By ca_mse, strategies within the 95% interval of the best one count as equal to it, and the cheapest of them wins.
    A gain already contains the whole cost. So strategies are compared by the lower end of its interval, which is gained
    with near certainty. If no strategy of a stage has such a gain, as at the end of training, where noise hides the
    differences, the most expensive strategy is chosen.

    Args:
        stages: the errors of the same strategies at each stage.
        criterion: "ca_mse", the cost-adjusted error of the paper, or "gain", the decrease of the loss per unit.
    """
    strategies = sorted(stages[0], key=lambda strategy: relative_cost[strategy])
    # best[k] is the least (sum of logs, sum of costs) of stages that end with strategy k, and their strategies.
    best: list[tuple[tuple[float, float], list[Strategy]]] = [((0.0, 0.0), []) for _ in strategies]
    for stage in stages:
        losses = _log_ca_mse(stage) if criterion == "ca_mse" else _minus_log_gain(stage, relative_cost)
        reached: list[tuple[tuple[float, float], list[Strategy]]] = []
        for k, strategy in enumerate(strategies):
            before, way = min(best[: k + 1], key=lambda entry: entry[0])
            reached.append(((before[0] + losses[strategy], before[1] + relative_cost[strategy]), [*way, strategy]))
        best = reached
    return min(best, key=lambda entry: (round(entry[0][0], 9), entry[0][1]))[1]


def list_tied(stage: Mapping[Strategy, GradientError]) -> list[Strategy]:
    """List the strategies whose ca_mse lies within the 95% interval of the least one, which count as equal to it."""
    least = min(stage.values(), key=lambda error: error.ca_mse)
    tied_to = max(least.ca_mse, least.ca_mse_interval[1])
    return [strategy for strategy, error in stage.items() if error.ca_mse <= tied_to]


def has_certain_gain(stage: Mapping[Strategy, GradientError]) -> bool:
    """Whether the interval of some strategy's gain lies above 0."""
    return any(error.gain_interval[0] > 0 for error in stage.values())


def _log_ca_mse(stage: Mapping[Strategy, GradientError]) -> dict[Strategy, float]:
    floor = min((error.ca_mse for error in stage.values() if error.ca_mse > 0), default=1.0)
    least, tied = min(error.ca_mse for error in stage.values()), list_tied(stage)
    return {
        strategy: math.log(max(least if strategy in tied else error.ca_mse, floor)) for strategy, error in stage.items()
    }


def _minus_log_gain(
    stage: Mapping[Strategy, GradientError], relative_cost: Mapping[Strategy, float]
) -> dict[Strategy, float]:
    """Take the lower ends of the intervals. One of 0 or less counts as a thousandth of the best.

    If all are 0 or less, the most expensive strategy is the best.
    """
    if has_certain_gain(stage):
        sure = {strategy: error.gain_interval[0] for strategy, error in stage.items()}
    else:
        sure = {max(stage, key=lambda strategy: relative_cost[strategy]): 1.0}
    best = max(sure.values())
    return {strategy: -math.log(max(sure.get(strategy, 0.0), best / 1000)) for strategy in stage}


def build_schedule(points: Sequence[float], strategies: Sequence[Strategy]) -> Schedule:
    """Build the schedule in which each strategy holds around its point of progress, halfway to the neighbouring points.

    The points increase within [0, 1].
    """
    ends = [*((a + b) / 2 for a, b in pairwise(points)), 1.0]
    stages: list[Stage] = []
    for end, strategy in zip(ends, strategies, strict=True):
        if stages and stages[-1].strategy == strategy:
            stages.pop()
        stages.append(Stage(round(end, 6), strategy))
    return Schedule(tuple(stages))


def build_schedule_file(schedule: Schedule, base_patch_size: int, **origin: Any) -> dict[str, Any]:
    """Build what a schedule's YAML file holds: the stages, the base patch size that they are for, and their origin."""
    return {**origin, "patch_size": base_patch_size, "stages": schedule.to_list()}
