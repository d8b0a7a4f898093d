"""The schedule of compressions: progress -> Strategy."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from ..utils.shipped import find_file
from ..utils.strict_yaml import as_number, load_yaml
from .strategy import BRANCHES, Compression, Strategy, check_compression, check_type, possible_patch_sizes

STANDARD = ((0.4, 4), (0.8, 2), (1.0, 1))
"""The stages of `schedule: standard`: where each ends, and how many base patches the side of its patches measures."""
STANDARD_DROPOUT = ((0.8, 0.5), (1.0, 0.0))
"""The same for an encoder that knows one patch size only: where each stage ends, and its token dropout."""

FILE_KEYS = ("patch_size", "stages")
ORIGIN_KEYS = ("data", "model", "model_config", "objective", "image_size", "criterion", "pilot", "command", "date")
"""The keys of a schedule's file, and those with which a search says where its schedule comes from."""


def names_file(schedule: Any) -> TypeGuard[str]:
    """Whether a `schedule` is the path of a file, whose stages may change while its name stays."""
    return isinstance(schedule, str) and schedule not in ("standard", "auto")


def describe_change(before: Any, now: list[dict[str, Any]]) -> str:
    """Name the keys in which the stages of two schedules differ, or show both where that does not tell them apart."""
    changes: list[str] = []
    if isinstance(before, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True), 1):
            differing = [key for key in new if key in old and old[key] != new[key]]
            changes += [f"stage {number} had {key}={old[key]} and now has {new[key]}" for key in differing]
    return "; ".join(changes) or f"they were {before} and now are {now}"


def list_stage_keys() -> list[str]:
    """The keys of a stage in a recipe or a schedule's file."""
    return ["until", *Strategy.keys()]


@dataclass(frozen=True)
class Stage:
    """A strategy that holds while progress < `until`."""

    until: float
    strategy: Strategy

    def __post_init__(self):
        check_type("strategy", self.strategy, Strategy)


@dataclass(frozen=True)
class Schedule:
    """A stepwise function from progress in [0, 1] to a Strategy: stages in order, the last one until 1.

    Raises:
        ValueError: no stage, `until` not increasing, or a last `until` other than 1.

    Example:
        >>> stages = [{"until": 0.5, "patch_size": 32}, {"until": 1.0, "patch_size": 16}]
        >>> schedule = Schedule.parse(stages, base_patch_size=16)
        >>> schedule(0.25).online
        Compression(patch_size=32, token_dropout=0.0)
    """

    stages: tuple[Stage, ...]

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            check_type("stages", stage, Stage, "; Schedule.parse reads lists of these")
        ends = [stage.until for stage in self.stages]
        if not ends:
            raise ValueError("a schedule needs at least one stage")
        if not all(later > earlier for earlier, later in zip([0.0, *ends], ends, strict=False)):  # also for NaN
            raise ValueError(f"the stages' `until` must increase from above 0, got {ends}")
        if ends[-1] != 1:
            raise ValueError(f"progress runs from 0 to 1: the last stage must have `until: 1.0`, got {ends[-1]}")

    @classmethod
    def constant(cls, strategy: Strategy) -> "Schedule":
        return cls((Stage(1.0, strategy),))

    @classmethod
    def standard(cls, image_size: int, base_patch_size: int, one_patch_size: bool = False) -> "Schedule":
        """Build the schedule of `schedule: standard`: patches of four times the side, then twice, then the base patch.

        Where a size does not divide the image, the one with the closest ratio does, among those that leave 4 patches.
        With `one_patch_size`, for weights that were trained at the base patch size alone, patches keep their size, and
        half of them are left out until 80%.

        Example:
            >>> [stage.strategy.online.patch_size for stage in Schedule.standard(224, 16).stages]
            [56, 32, 16]
        """
        if one_patch_size:
            dropouts = [(until, Compression(base_patch_size, dropout)) for until, dropout in STANDARD_DROPOUT]
            return cls(tuple(Stage(until, Strategy(compression)) for until, compression in dropouts))
        possible = possible_patch_sizes(image_size, base_patch_size) or [base_patch_size]
        patches: dict[int, float] = {}
        for until, factor in STANDARD:
            ratios = {size: abs(math.log(size / (factor * base_patch_size))) for size in possible}
            patches[min(possible, key=ratios.__getitem__)] = until
        return cls(tuple(Stage(until, Strategy(Compression(size))) for size, until in patches.items()))

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
        """Check the schedule against a model and its image sizes.

        Raises:
            ValueError: a patch size is not possible, or local crops are compressed where there are none.
        """
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
    def parse(
        cls,
        value: Any,
        base_patch_size: int | None,
        folder: Path | None = None,
        image_size: int | None = None,
        one_patch_size: bool = False,
    ) -> "Schedule":
        """Read the form that recipes use: a list of stages, the path of a YAML file that holds one, or "standard".

        A stage is a mapping with the keys of `list_stage_keys`. All but `until` are optional and have the defaults of
        `Strategy.from_dict`. A file may hold `{patch_size, stages}`: stages meant for another base patch size are
        transferred to this one. None is no compression, and "standard" needs an `image_size` and takes `one_patch_size`
        (see `standard`). Without a `base_patch_size` only the form is checked, and patches stay as they are written.

        Raises:
            ValueError: it is no such list and no path of one.
        """
        if value == "auto":
            raise ValueError("schedule='auto' is searched while a run trains: it has no stages before")
        if value == "standard" and base_patch_size:
            if image_size is None:
                raise ValueError("schedule='standard' depends on the size of the images: give image_size, too")
            return cls.standard(image_size, base_patch_size, one_patch_size)
        if value is None or value == "standard":
            return cls.constant(Strategy(Compression(base_patch_size or 1)))
        if isinstance(value, str):
            named = Path(value).expanduser()
            path = find_file(named if folder is None or named.exists() else folder / named, "recipes")
            if not path.is_file():
                forms = "a list of stages, the path of a YAML file, standard, auto, or null for no compression"
                raise ValueError(f"schedule: no file {value!r}; give {forms}")
            try:
                loaded = load_yaml(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"schedule: {path} is not valid YAML: {error}") from None
            try:
                return cls._build(loaded, base_patch_size)
            except ValueError as error:
                raise ValueError(f"schedule: {path}: {str(error).removeprefix('schedule: ')}") from error
        return cls._build(value, base_patch_size)

    @classmethod
    def _build(cls, value: Any, base_patch_size: int | None) -> "Schedule":
        """Build a schedule from a list of stages, or from what a file holds."""
        if isinstance(value, Mapping):
            if unknown := [key for key in value if key not in (*FILE_KEYS, *ORIGIN_KEYS)]:
                instead = "give the list alone, without this key" if unknown == ["schedule"] else "leave it out"
                raise ValueError(
                    f"schedule: {unknown[0]!r} is no key of a schedule's file, which has {' and '.join(FILE_KEYS)}; "
                    f"{instead}"
                )
            meant_for, stages = value.get("patch_size", base_patch_size or 1), value.get("stages")
            if type(meant_for) is not int or meant_for < 1 or not isinstance(stages, list):
                raise ValueError(
                    "schedule: a file holds a list of stages, or `stages`, such a list, and `patch_size`, the base "
                    f"patch in pixels that they are meant for; got stages={stages!r} and patch_size={meant_for!r}"
                )
            return cls._build(stages, meant_for).transferred(meant_for, base_patch_size or meant_for)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"schedule: expected a list of stages or a path, got {value!r}")
        return cls(tuple(_parse_stage(stage, number, base_patch_size or 1) for number, stage in enumerate(value, 1)))

    def transferred(self, old_patch_size: int, new_patch_size: int) -> "Schedule":
        """Return this schedule for another base patch size, with all patches larger or smaller by the same factor.

        The relative number of tokens stays the same.

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
            return replace(compression, patch_size=pixels)

        stages = []
        for stage in self.stages:
            old = stage.strategy
            branches = {name: move(branch) for name in BRANCHES if (branch := getattr(old, name))}
            stages.append(Stage(stage.until, replace(old, **branches)))
        return Schedule(tuple(stages))

    def to_list(self) -> list[dict[str, Any]]:
        """Return the form that recipes use, with every key."""
        return [{"until": stage.until, **stage.strategy.to_dict()} for stage in self.stages]


def _parse_stage(stage: Any, number: int, base_patch_size: int) -> Stage:
    keys = list_stage_keys()
    if not isinstance(stage, Mapping):
        raise ValueError(f"stage {number} of the schedule: expected a mapping with keys {keys}, got {stage!r}")
    unknown = set(stage) - set(keys)
    if unknown:
        raise ValueError(f"stage {number} of the schedule: unknown key {sorted(unknown)[0]!r}; keys are {keys}")
    stage = {key: as_number(value) for key, value in stage.items()}
    until = stage.get("until")
    if isinstance(until, bool) or not isinstance(until, int | float):
        raise ValueError(f"stage {number} of the schedule: `until` must be a number in (0, 1], got {until!r}")
    try:
        return Stage(float(until), Strategy.from_dict(stage, base_patch_size))
    except ValueError as error:
        raise ValueError(f"stage {number} of the schedule: {error}") from None
