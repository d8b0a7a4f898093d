"""The schedule of compressions (progress -> Strategy) and the plan that spends a budget along it."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..strict_yaml import as_number, load_yaml
from .strategy import Compression, Strategy, check_compression

COMPRESSION_KEYS = ("patch_size", "token_dropout")
STAGE_KEYS = (
    "until",
    *COMPRESSION_KEYS,
    *(f"{branch}_{key}" for branch in ("target", "local") for key in COMPRESSION_KEYS),
)


@dataclass(frozen=True)
class Stage:
    """A strategy that holds while progress < `until`."""

    until: float
    strategy: Strategy


@dataclass(frozen=True)
class Schedule:
    """A stepwise function from progress in [0, 1] to a Strategy: stages in order, the last one until 1.

    Raises:
        ValueError: no stage, `until` not increasing, or a last `until` other than 1.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        ends = [stage.until for stage in self.stages]
        if not ends:
            raise ValueError("a schedule needs at least one stage")
        if any(later <= earlier for earlier, later in zip([0.0, *ends], ends, strict=False)):
            raise ValueError(f"the stages' `until` must increase from above 0, got {ends}")
        if ends[-1] != 1:
            raise ValueError(f"progress runs from 0 to 1: the last stage must have `until: 1.0`, got {ends[-1]}")

    @classmethod
    def constant(cls, strategy: Strategy) -> "Schedule":
        return cls((Stage(1.0, strategy),))

    def __call__(self, progress: float) -> Strategy:
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        index = bisect_right([stage.until for stage in self.stages], progress)
        return self.stages[min(index, len(self.stages) - 1)].strategy

    @property
    def strategies(self) -> list[Strategy]:
        """The distinct strategies, in order of first use."""
        return list(dict.fromkeys(stage.strategy for stage in self.stages))

    def validate(self, image_size: int, base_patch_size: int, local_crop_size: int | None = None) -> None:
        """Raises ValueError if a stage asks for a patch size that this model and these image sizes do not allow, or
        compresses local crops where there are none."""
        for number, stage in enumerate(self.stages, 1):
            strategy = stage.strategy
            try:
                for compression in (strategy.online, strategy.target_branch):
                    check_compression(compression, image_size, base_patch_size)
                if strategy.local and local_crop_size is None:
                    raise ValueError("it compresses local crops, and this objective has none")
                if strategy.local and local_crop_size:
                    check_compression(strategy.local, local_crop_size, base_patch_size)
            except ValueError as error:
                raise ValueError(f"stage {number} of the schedule: {error}") from None

    @classmethod
    def parse(cls, value: Any, base_patch_size: int, folder: Path | None = None) -> "Schedule":
        """From the form that recipes use: a list of stages, or the path of a YAML file that holds such a list.

        A stage is a mapping with STAGE_KEYS, all but `until` optional; patch_size defaults to the base patch,
        token_dropout to 0, the target's to the paper's (same patch, no dropout), local crops to being left whole. A
        file may hold `{patch_size, stages}`: stages meant for another base patch size are brought to this one.
        """
        if value is None:
            return cls.constant(Strategy(Compression(base_patch_size)))
        if isinstance(value, str):
            path = Path(value) if folder is None or Path(value).exists() else folder / value
            if not path.is_file():
                raise ValueError(f"schedule: no file {value!r}; give a list of stages or the path of a YAML file")
            value = load_yaml(path.read_text())
        if isinstance(value, Mapping):
            meant_for, stages = value.get("patch_size", base_patch_size), value.get("stages")
            if type(meant_for) is not int or meant_for < 1 or not isinstance(stages, list):
                raise ValueError(
                    "schedule: a file holds a list of stages, or `stages`, such a list, and `patch_size`, the base "
                    f"patch in pixels that they are meant for; got stages={stages!r} and patch_size={meant_for!r}"
                )
            return cls.parse(stages, meant_for).transferred(meant_for, base_patch_size)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"schedule: expected a list of stages or a path, got {value!r}")
        return cls(tuple(_parse_stage(stage, number, base_patch_size) for number, stage in enumerate(value, 1)))

    def transferred(self, old_patch_size: int, new_patch_size: int) -> "Schedule":
        """This schedule for another base patch size: patches larger by the same factor, and so the same relative
        number of tokens. Progress needs no change: it knows neither budgets nor data sets.

        Raises:
            ValueError: a patch would not be a whole number of pixels.
        """
        if old_patch_size == new_patch_size:
            return self

        def move(compression: Compression) -> Compression:
            pixels, rest = divmod(compression.patch_size * new_patch_size, old_patch_size)
            if rest:
                raise ValueError(
                    f"schedule: patches of {compression.patch_size} pixels at base patch {old_patch_size} would be "
                    f"{compression.patch_size * new_patch_size / old_patch_size:g} pixels at base patch "
                    f"{new_patch_size}; search a schedule for this base patch"
                )
            return Compression(pixels, compression.token_dropout)

        stages = []
        for stage in self.stages:
            old = stage.strategy
            local = move(old.local) if old.local else None
            stages.append(Stage(stage.until, Strategy(move(old.online), move(old.target_branch), local)))
        return Schedule(tuple(stages))

    def to_list(self) -> list[dict[str, Any]]:
        """The recipe's form of this schedule, every key spelled out."""
        written = []
        for stage in self.stages:
            entry: dict[str, Any] = {"until": stage.until}
            branches = {
                "": stage.strategy.online,
                "target_": stage.strategy.target_branch,
                "local_": stage.strategy.local,
            }
            for prefix, compression in branches.items():
                if compression:
                    entry |= {prefix + key: getattr(compression, key) for key in COMPRESSION_KEYS}
            written.append(entry)
        return written


def _parse_stage(stage: Any, number: int, base_patch_size: int) -> Stage:
    if not isinstance(stage, Mapping):
        raise ValueError(f"stage {number} of the schedule: expected a mapping with keys {STAGE_KEYS}, got {stage!r}")
    unknown = set(stage) - set(STAGE_KEYS)
    if unknown:
        raise ValueError(f"stage {number} of the schedule: unknown key {sorted(unknown)[0]!r}; keys are {STAGE_KEYS}")
    stage = {key: as_number(value) for key, value in stage.items()}
    until = stage.get("until")
    if isinstance(until, bool) or not isinstance(until, int | float):
        raise ValueError(f"stage {number} of the schedule: `until` must be a number in (0, 1], got {until!r}")
    try:
        online = Compression(stage.get("patch_size", base_patch_size), stage.get("token_dropout", 0.0))
        target = Compression(stage.get("target_patch_size", online.patch_size), stage.get("target_token_dropout", 0.0))
        local = None
        if "local_patch_size" in stage or "local_token_dropout" in stage:
            local = Compression(stage.get("local_patch_size", base_patch_size), stage.get("local_token_dropout", 0.0))
    except ValueError as error:
        raise ValueError(f"stage {number} of the schedule: {error}") from None
    return Stage(float(until), Strategy(online, target, local))


@dataclass(frozen=True)
class Step:
    """One optimizer step of a plan. `spent` are the units before it; `progress` is the share of the budget that is.

    What was spent before the first step, on a probe, is no part of progress: or a warm-up would be half over by then.
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
    """Every step of a run, known before it starts: budget + schedule + batch size -> strategy and progress of each.

    The run takes as many steps as the budget pays for and never one more: `total_cost <= budget`, and what is left is
    less than a step.

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
        """The segments of `schedule` from step `first` on, before which `spent` units are; steps and units then."""
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
            if affordable < to_stage_end:  # a later, cheaper stage is for a progress that is never reached
                break
        return segments, first, spent

    def pays_for_last_stage(self) -> bool:
        """Whether at least one step is of the schedule's last stage: the budget may be spent before that begins."""
        begin = self.schedule.stages[-2].until if len(self.schedule.stages) > 1 else 0.0
        last = self.segments[-1]
        return last.spent >= self.start + begin * (self.budget - self.start) - 1e-9 * last.cost

    def revise(self, step: int, schedule: Schedule, charge: float = 0.0) -> None:
        """From `step` on follow `schedule` to the end of the budget; before it, `charge` units are spent on a probe.

        A stage of which not one step can be paid is left out, and the one before it goes on.

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
        """Units spent before the first step."""
        return self.segments[0].spent

    def progress(self, spent: float) -> float:
        """In [0, 1], once so many units are spent."""
        return min(1.0, (spent - self.start) / (self.budget - self.start))

    def _run_to_the_end(self) -> None:
        """Of the budget, with the last segment."""
        last = self.segments[-1]
        steps = math.floor((self.budget - last.spent) / last.cost + 1e-9)
        self.num_steps, self.total_cost = last.first + steps, last.spent + steps * last.cost

    def stage_ends(self) -> list[tuple[float, Strategy]]:
        """(units spent, strategy) at the end of each run of steps under one strategy, in order."""
        ends = []
        for segment, later in zip(self.segments, [*self.segments[1:], None], strict=True):
            steps = (later.first if later else self.num_steps) - segment.first
            ends.append((segment.spent + steps * segment.cost, segment.strategy))
        return ends

    def followed(self) -> Schedule:
        """The schedule that the segments amount to: what was planned, or what revisions made of it."""
        stages: list[Stage] = []
        for segment, later in zip(self.segments, [*self.segments[1:], None], strict=True):
            if stages and stages[-1].strategy == segment.strategy:
                stages.pop()
            stages.append(Stage(self.progress(later.spent) if later else 1.0, segment.strategy))
        return Schedule(tuple(stages))

    def state(self) -> list[list[Any]]:
        """The segments, as JSON can hold them."""
        return [[s.first, s.spent, *(Schedule.constant(s.strategy).to_list())] for s in self.segments]

    def restore(self, state: list[list[Any]], base_patch_size: int) -> None:
        """Take over the segments of a revised plan's state, the last of which runs to the end of the budget."""
        for number, (first, spent, stage) in enumerate(state):
            strategy = Schedule.parse([stage], base_patch_size).stages[0].strategy
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
        """In [0, 1]: of what the plan spends from its first step on, which is all but a last step that was too dear."""
        return (self.spent_after(steps) - self.start) / (self.total_cost - self.start)
