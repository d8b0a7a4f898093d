"""`schedule: auto`: a run finds its schedule while it trains, and pays for the search out of its own budget.

The strategies form a ladder, from the cheapest to the uncompressed one. Each rung costs at least twice as much as the
one below it. All rungs are probed before the first step. The run starts on the cheapest rung that is not clearly worse
than the best one: its ca_mse is not above the least, or, by the criterion "gain", its gain is not below the largest, at
the 2.5% level.

At evenly spaced points of progress the run then probes its rung and the next one, with the same images under both. It
climbs when its rung is clearly worse, by the evidence of the last four probes of this rung together. Without clear
evidence it climbs at the deadline of the rung. The deadlines divide the first 80% of progress evenly among the rungs,
and the last 20% are uncompressed. The run never climbs down, because compression never increases.

There are as many points as the share of the budget pays for, at most 20. If the share pays for more, each probe takes
more draws, at most 64.

The deadlines are there because the error of a single step is not the goal of a run. Training on a rung makes the
gradients of that rung small and accurate, so that the next rung looks no better. Meanwhile the encoder, which is used
with full sequences, never sees one.

The rule fails in three cases. A probe may be a large part of a small budget; then an error says so. The noise of few
draws may hide the difference; then the run climbs at its deadlines only, or up to three probes late, because older
probes count, too. And it may be best to stay on a cheap rung beyond its deadline.
"""

import math
from collections.abc import Callable, Container, Mapping
from itertools import pairwise
from typing import Any

from ..compression.schedule import Schedule, Stage
from ..compression.strategy import Strategy
from .choose import build_grid
from .gradient_error import CLEAR, GradientErrorAccumulator

RUNG_RATIO = 0.5
"""A rung costs at most this much of the next one."""

LADDER_DROPOUTS = (0.0, 0.5)

MAX_POINTS, MAX_DRAWS = 20, 64

UNCOMPRESSED_FROM = 0.8
"""Progress from which on the run is uncompressed, whatever the probes find. Schedules by hand did best with it."""

POOLED = 4
"""Number of the latest probes of a rung that are judged together. More would have less noise, but be out of date."""


def build_ladder(
    image_size: int,
    base_patch_size: int,
    units: Callable[[Strategy], float],
    among: Container[Strategy] | None = None,
) -> list[Strategy]:
    """Build the rungs by rising cost, the last one uncompressed: possible patches, with and without half the tokens.

    Args:
        among: the strategies that have a cost. Default: all.
    """
    grid = build_grid(image_size, base_patch_size, LADDER_DROPOUTS)
    ladder, others = [grid[0]], [strategy for strategy in grid[1:] if among is None or strategy in among]
    for strategy in sorted(others, key=units, reverse=True):
        tokens = strategy.online.kept_tokens(image_size)
        if tokens >= 4 and units(strategy) <= RUNG_RATIO * units(ladder[-1]):
            ladder.append(strategy)
    return ladder[::-1]


class OnlineController:
    """It decides when to probe, and which rung of the ladder a run trains on.

    Args:
        ladder: strategies by rising cost, the last one uncompressed.
        units_per_batch: cost of one training batch under a strategy, in units.
        budget: of the whole run, in units.
        share: of the budget that probes may spend.
        draws: paired gradients of a probe, at least.
        criterion: "ca_mse" or "gain" (of `GradientError`), by which strategies are compared.
        overhead: units of a draw beyond those of a batch under each of its strategies.

    Raises:
        ValueError: the share does not pay for the first probe and one more.
    """

    def __init__(
        self,
        ladder: list[Strategy],
        units_per_batch: Callable[[Strategy], float],
        budget: float,
        share: float = 0.03,
        draws: int = 8,
        criterion: str = "ca_mse",
        overhead: float = 0.0,
    ):
        self.criterion, self.overhead = criterion, overhead
        self.ladder, self.budget, self.draws, self.rung, self.probed = ladder, budget, draws, 0, 0
        self.evidence: list[float] = []
        self.score = 0.0
        self.units = {strategy: units_per_batch(strategy) for strategy in ladder}
        self.relative_cost = {strategy: units / self.units[ladder[-1]] for strategy, units in self.units.items()}
        start = self.cost_of(ladder)
        one = max((self.cost_of(pair) for pair in pairwise(ladder)), default=0.0)
        if len(ladder) < 2:
            raise ValueError(
                "there is no strategy to choose from: of those with 4 tokens or more, none costs much less"
            )
        count = min(MAX_POINTS, math.floor((share * budget - start) / one))
        if count < 1:
            raise ValueError(
                f"probes of {draws} draws take {start + one:,.0f} units, and a share of {share:g} of the budget is "
                f"{share * budget:,.0f}: raise auto_share or the budget, lower auto_draws, or name a schedule"
            )
        if count == MAX_POINTS:
            of_all = (start + MAX_POINTS * one) / draws
            self.draws = max(draws, min(MAX_DRAWS, math.floor(share * budget / of_all)))
        self.points = [0.0, *(UNCOMPRESSED_FROM * (point + 1) / (count + 1) for point in range(count))]
        self.deadlines = [UNCOMPRESSED_FROM * (rung + 1) / (len(ladder) - 1) for rung in range(len(ladder) - 1)]

    @property
    def strategy(self) -> Strategy:
        return self.ladder[self.rung]

    def schedule(self) -> Schedule:
        """Return the schedule from the present rung up the ladder, each rung until its deadline."""
        return Schedule(self._stages()[self.rung :])

    def _stages(self) -> tuple[Stage, ...]:
        return tuple(map(Stage, [*self.deadlines, 1.0], self.ladder))

    def cost_of(self, strategies) -> float:
        """Return the units of a probe of these strategies, with its uncompressed gradients."""
        base = self.ladder[-1]
        return self.draws * (self.overhead + self.units[base] + sum(self.units[s] for s in strategies if s != base))

    def due(self, progress: float, left: float) -> list[Strategy]:
        """Return the strategies to probe now: none before the next point, on the last rung, or without budget.

        A rung whose deadline has passed is left first, as `schedule` says.

        Args:
            progress: of the plan's next step.
            left: units of the budget that are not spent.
        """
        passed = sum(progress >= deadline - 1e-9 for deadline in self.deadlines)
        if passed > self.rung:
            self.rung, self.evidence = passed, []
        if self.probed == len(self.points) or progress < self.points[self.probed] or self.rung == len(self.ladder) - 1:
            return []
        strategies = self.ladder if self.probed == 0 else self.ladder[self.rung : self.rung + 2]
        cost = self.cost_of(strategies)
        if cost >= left:
            return []
        # The budget must pay for one more step, on the rung of the plan or the next one. The first probe's cost is no
        # progress.
        after = self.schedule()(min(1.0, progress + (1 - progress) * cost / left) if self.probed else 0.0)
        return strategies if cost + max(self.units[after], self.units[strategies[-1]]) <= left else []

    def decide(self, accumulator: GradientErrorAccumulator[Strategy], progress: float) -> Strategy:
        """Decide by the errors of the strategies that were due, and return the strategy to follow from now on."""
        if self.probed == 0:
            self.rung = self.ladder.index(self._first(accumulator))
        else:
            this, above = self.ladder[self.rung : self.rung + 2]
            self.evidence = [*self.evidence, self._worse(accumulator, this, above)][-POOLED:]
            self.score = sum(self.evidence) / math.sqrt(len(self.evidence))
            if self.score > CLEAR:
                self.rung, self.evidence = self.rung + 1, []
        while self.probed < len(self.points) and self.points[self.probed] <= progress:
            self.probed += 1
        return self.strategy

    def _first(self, accumulator: GradientErrorAccumulator[Strategy]) -> Strategy:
        """Return the cheapest strategy that is not clearly worse than the best. A run never climbs down."""
        errors = accumulator.result()
        better = max if self.criterion == "gain" else min
        best = better(self.ladder, key=lambda strategy: getattr(errors[strategy], self.criterion))
        return next(s for s in self.ladder if s == best or self._worse(accumulator, s, best) <= CLEAR)

    def _worse(self, accumulator: GradientErrorAccumulator[Strategy], one: Strategy, other: Strategy) -> float:
        """Return a standard normal score of how surely one strategy is worse than the other."""
        score = accumulator.evidence(self.criterion, one, other)
        return -score if self.criterion == "gain" else score

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, in values that JSON can hold."""
        ladder = [f"{stage.strategy} until {stage.until:g}" for stage in self._stages()]
        return {"ladder": ladder, "rung": self.rung, "probed": self.probed, "evidence": self.evidence}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: the state is of another ladder, which another version of hf_accel may have built.
        """
        ladder = self.state()["ladder"]
        if state.get("ladder") != ladder:
            raise ValueError(
                f"the checkpoint's run climbs another ladder, {state.get('ladder', 'unknown')}, than this version's, "
                f"{ladder}. Resume with the version that started it, or start again in another output_dir"
            )
        self.rung, self.probed, self.evidence = state["rung"], state["probed"], list(state["evidence"])
