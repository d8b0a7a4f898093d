"""The plan that spends a budget along a schedule: strategy and progress of every step."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .schedule import Schedule, Stage
from .strategy import Strategy


@dataclass(frozen=True)
class Step:
    """One optimizer step of a plan. `spent` are the units before it, and `progress` is their share of the budget.

    Units that a probe spent before the first step do not count as progress. Otherwise a warm-up would be half over.
    """

    index: int
    strategy: Strategy
    spent: float
    cost: float
    progress: float


@dataclass(frozen=True)
class _Segment:
    first: int
    strategy: Strategy
    spent: float
    cost: float


class Plan:
    """Every step of a run, with its strategy and progress, from budget, schedule and batch size.

    The run takes as many steps as the budget pays for: `total_cost <= budget`, and less than a step is left.

    Args:
        budget: units (one unit = one forward of the base encoder on one uncompressed image).
        schedule: progress -> Strategy.
        batch_size: images an optimizer step, over all processes and accumulated micro-batches.
        units_per_image: what one training image costs under a strategy, in units (an objective's).

    Raises:
        ValueError: the budget does not pay for one step.
    """

    def __init__(
        self, budget: float, schedule: Schedule, batch_size: int, units_per_image: Callable[[Strategy], float]
    ):
        self.budget, self.schedule, self.batch_size = float(budget), schedule, batch_size
        self.units_per_image = units_per_image
        self.segments, self.num_steps, self.total_cost = self._following(schedule, 0, 0.0)
        if not self.num_steps:
            cost = batch_size * units_per_image(schedule(0.0))
            raise ValueError(
                f"a budget of {self.budget:g} units does not pay for one step of {batch_size} images, which costs "
                f"{cost:g} units; raise the budget or lower the batch size"
            )

    def _following(self, schedule: Schedule, first: int, spent: float) -> tuple[list[_Segment], int, float]:
        """Build the segments from step `first` on, after `spent` units. Return also the steps and units at the end."""
        segments, start = [], spent if first == 0 else self.start
        for stage in schedule.stages:
            cost = self.batch_size * self.units_per_image(stage.strategy)
            # The tolerance (in steps) keeps a budget of exactly n steps from losing one to rounding.
            stage_end = start + stage.until * (self.budget - start)
            to_stage_end = math.ceil((stage_end - spent) / cost - 1e-9)
            affordable = math.floor((self.budget - spent) / cost + 1e-9)
            steps = max(0, min(to_stage_end, affordable))
            if steps:
                segments.append(_Segment(first, stage.strategy, spent, cost))
                first, spent = first + steps, spent + steps * cost
            if affordable < to_stage_end:  # the progress of a later, cheaper stage is never reached
                break
        return segments, first, spent

    def pays_for_last_stage(self) -> bool:
        """Whether a step of the schedule's last stage is taken. The budget may be spent before that begins."""
        begin = self.schedule.stages[-2].until if len(self.schedule.stages) > 1 else 0.0
        last = self.segments[-1]
        return last.spent >= self.start + begin * (self.budget - self.start) - 1e-9 * last.cost

    def revise(self, step: int, schedule: Schedule, charge: float = 0.0) -> None:
        """Follow `schedule` from `step` to the end of the budget, after `charge` units for a probe.

        A stage that cannot pay for one step is left out, and the one before it continues.

        Raises:
            ValueError: the budget does not pay for the charge and one more step.
        """
        spent = self.spent_after(step) + charge
        segments, _, _ = self._following(schedule, step, spent)
        if not segments:
            cost = self.batch_size * self.units_per_image(schedule(self.progress(spent) if step else 0.0))
            raise ValueError(f"{self.budget - spent:g} units are left at step {step}, and one more costs {cost:g}")
        self.segments = [*(segment for segment in self.segments if segment.first < step), *segments]
        self._run_to_the_end()

    @property
    def start(self) -> float:
        """The units spent before the first step."""
        return self.segments[0].spent

    def progress(self, spent: float) -> float:
        """Return the progress in [0, 1] after `spent` units."""
        return min(1.0, (spent - self.start) / (self.budget - self.start))

    def _run_to_the_end(self) -> None:
        """Extend the last segment to the end of the budget."""
        last = self.segments[-1]
        steps = math.floor((self.budget - last.spent) / last.cost + 1e-9)
        self.num_steps, self.total_cost = last.first + steps, last.spent + steps * last.cost

    def stage_ends(self) -> list[tuple[float, Strategy]]:
        """Return (units spent, strategy) at the end of each segment, in order."""
        counted = zip(self.segments, self.stage_steps(), strict=True)
        return [(segment.spent + steps * segment.cost, strategy) for segment, (strategy, steps) in counted]

    def stage_steps(self) -> list[tuple[Strategy, int]]:
        """Return (strategy, steps) of each segment, in order."""
        ends = [*(segment.first for segment in self.segments[1:]), self.num_steps]
        return [(segment.strategy, end - segment.first) for segment, end in zip(self.segments, ends, strict=True)]

    def followed(self) -> Schedule:
        """Return the schedule that the segments follow, which revisions may have changed."""
        stages: list[Stage] = []
        for segment, later in zip(self.segments, [*self.segments[1:], None], strict=True):
            if stages and stages[-1].strategy == segment.strategy:
                stages.pop()
            stages.append(Stage(self.progress(later.spent) if later else 1.0, segment.strategy))
        return Schedule(tuple(stages))

    def state(self) -> list[list[Any]]:
        """Return the segments in values that JSON can hold."""
        return [[s.first, s.spent, *Schedule.constant(s.strategy).to_list()] for s in self.segments]

    def restore(self, state: list[list[Any]], base_patch_size: int) -> None:
        """Continue with the segments of a revised plan. The last one runs to the end of the budget."""
        for number, (first, spent, stage) in enumerate(state):
            strategy = Strategy.from_dict(stage, base_patch_size)
            cost = self.batch_size * self.units_per_image(strategy)
            self.segments = [*self.segments[:number], _Segment(first, strategy, spent, cost)]
        self._run_to_the_end()

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, index: int) -> Step:
        if not 0 <= index < self.num_steps:
            raise IndexError(f"the plan has steps 0 to {self.num_steps - 1}, asked for {index}")
        segment = self.segments[bisect_right(self.segments, index, key=lambda s: s.first) - 1]
        spent = segment.spent + (index - segment.first) * segment.cost
        return Step(index, segment.strategy, spent, segment.cost, self.progress(spent))

    def __iter__(self) -> Iterator[Step]:
        return (self[index] for index in range(self.num_steps))

    def spent_after(self, steps: int) -> float:
        """Units spent once `steps` steps are done."""
        return self.total_cost if steps >= self.num_steps else self[steps].spent

    def share_done(self, steps: int) -> float:
        """Return the share, in [0, 1], of what the plan spends from its first step to its last."""
        return (self.spent_after(steps) - self.start) / (self.total_cost - self.start)
