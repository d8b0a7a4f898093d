"""The table of a search: gradient errors by stage (a point of progress) and strategy, in the order of their cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from ..compression import Compression, Strategy
from ..utils.errors import SettingError
from .choose import SYMMETRIES, build_grid
from .gradient_error import GradientError

Row = Mapping[str, Any]

NUMBERS = [field.name for field in fields(GradientError) if not field.name.endswith("_interval")]
INTERVALS = [field.name.removesuffix("_interval") for field in fields(GradientError) if field.name not in NUMBERS]


class ErrorTable:
    """The errors of a search: a row for each stage and strategy. It is the one place that reads and writes rows.

    A row holds "progress", the keys of `Strategy.to_dict`, "tokens" (of the online branch's patches), "relative_cost"
    (to uncompressed), the numbers of `GradientError` with both ends of each interval ("bias2_low", "bias2_high"),
    "draws", "weights" (a digest of the weights that were probed) and "chosen".

    Args:
        rows: as `build_row` makes them. A table without rows can be saved and searched for weights only.

    Attributes:
        rows: {(progress, strategy): row}.
        points: progress of each stage, in order.
        strategies: in the order of their cost, the cheapest first.
        cost: {strategy: its relative cost}, in the same order.
        symmetries: {name: the strategies that have it}, as few as hold all strategies of `build_grid`. A strategy
            without dropout, or with the base patch, can be in more than one.
        uncompressed: the base patch on both branches, without dropout. By measured costs another may cost more.
        relative: whether `values` are relative to || G ||^2, and gains to the uncompressed one. They are not if the
            estimate of || G ||^2 is not above 0 at some stage.
    """

    def __init__(self, rows: Sequence[Row] = ()):
        self.rows = {(row["progress"], Strategy.from_dict(row)): row for row in rows}
        self.points = sorted({progress for progress, _ in self.rows})
        cost = {strategy: row["relative_cost"] for (_, strategy), row in self.rows.items()}
        self.strategies = sorted(cost, key=lambda s: (cost[s], s.online, s.target_branch, str(s.local)))
        self.cost = {strategy: cost[strategy] for strategy in self.strategies}
        self.relative = all(row["reference_norm2"] > 0 for row in rows)

    @staticmethod
    def build_row(
        progress: float,
        strategy: Strategy,
        error: GradientError,
        cost: float,
        image_size: int,
        draws: int,
        weights: str = "",
    ) -> dict[str, Any]:
        """Write the errors of one strategy at one stage as a row."""
        intervals = {name: getattr(error, f"{name}_interval") for name in INTERVALS}
        return {
            "progress": progress,
            **strategy.to_dict(),
            "tokens": strategy.online.kept_tokens(image_size),
            "relative_cost": cost,
            **{name: getattr(error, name) for name in NUMBERS},
            **{f"{name}_low": low for name, (low, _) in intervals.items()},
            **{f"{name}_high": high for name, (_, high) in intervals.items()},
            "draws": draws,
            "weights": weights,
            "chosen": False,
        }

    def errors(self, progress: float) -> dict[Strategy, GradientError]:
        """Read the errors of one stage, by strategy."""
        found = {}
        for (at, strategy), row in self.rows.items():
            if at == progress:
                values: dict[str, Any] = {name: row[name] for name in NUMBERS}
                values |= {f"{name}_interval": (row[f"{name}_low"], row[f"{name}_high"]) for name in INTERVALS}
                found[strategy] = GradientError(**values)
        return found

    def choose(self, strategies: Sequence[Strategy]) -> "ErrorTable":
        """Return the same table with one chosen strategy for each point."""
        chosen = set(zip(self.points, strategies, strict=True))
        return ErrorTable([{**row, "chosen": key in chosen} for key, row in self.rows.items()])

    @classmethod
    def load(cls, path: Path) -> "ErrorTable":
        """Read a table; one without rows if there is no file.

        Raises:
            SettingError: the file cannot be read.
        """
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist() if path.exists() else []
        except (pyarrow.ArrowException, OSError) as error:
            cause = str(error).splitlines()[0]
            raise SettingError(f"{path} cannot be read. Remove it to measure again. Cause: {cause}") from None
        return cls([{name: value for name, value in row.items() if value is not None} for row in rows])

    def save(self, path: Path) -> None:
        """Write the table. A kill on the way leaves the earlier file whole."""
        names = dict.fromkeys(name for row in self.rows.values() for name in row)
        columns = {name: [row.get(name) for row in self.rows.values()] for name in names}
        temporary = path.with_suffix(".partial")
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
        temporary.replace(path)

    @property
    def uncompressed(self) -> Strategy:
        return Strategy(Compression(min(strategy.online.patch_size for strategy in self.strategies)))

    @cached_property
    def image_size(self) -> int:
        """Pixels of a view, which follow from a row without token dropout."""
        row = self.rows[self.points[0], self.uncompressed]
        return row["patch_size"] * math.isqrt(row["tokens"])

    def values(self, name: str, progress: float) -> np.ndarray:
        """Return column `name` of a stage, (strategies,), in the units that `relative` says."""
        rows = [self.rows[progress, strategy] for strategy in self.strategies]
        return np.array([row[name] / self.unit(row, name) for row in rows])

    def unit(self, row: Row, name: str) -> float:
        """Return what `values` are divided by."""
        if not self.relative:
            return 1.0
        if not name.startswith("gain"):
            return row["reference_norm2"]
        return self.rows[row["progress"], self.uncompressed]["gain"]

    def chosen(self, progress: float) -> list[Strategy]:
        return [strategy for strategy in self.strategies if self.rows[progress, strategy]["chosen"]]

    def label(self, strategy: Strategy) -> str:
        """Name a strategy as "p8 d0.5". Several symmetries in a table need the target branch, too, where it differs."""
        online, target = strategy.online.abbreviate(), strategy.target_branch.abbreviate()
        return online if len(self.symmetries) == 1 or target == online else f"{online} | {target}"

    @cached_property
    def symmetries(self) -> dict[str, list[Strategy]]:
        online = [strategy.online for strategy in self.strategies]
        patch_sizes = sorted({compression.patch_size for compression in online})
        dropouts = sorted({compression.token_dropout for compression in online})
        found = {}
        for name in SYMMETRIES:
            grid = build_grid(self.image_size, patch_sizes[0], dropouts, patch_sizes, [name])
            found[name] = [strategy for strategy in self.strategies if strategy in grid]
        holders = {s: [name for name in found if s in found[name]] for s in self.strategies}
        shown = {names[0] for names in holders.values() if len(names) == 1}
        shown |= {names[0] for names in holders.values() if names and not shown.intersection(names)}
        return {name: found[name] for name in SYMMETRIES if name in shown}


def percent(progress: float) -> str:
    return f"{100 * progress:.3g}%"
