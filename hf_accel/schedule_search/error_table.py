"""The table of a search: gradient errors by stage (a point of progress) and strategy, in the order of their cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..compression import Compression, Strategy
from .choose import SYMMETRIES, search_grid

Row = Mapping[str, Any]


class ErrorTable:
    """Rows of a search, one a stage and strategy.

    Args:
        rows: of "progress", "patch_size", "token_dropout", "target_patch_size", "target_token_dropout", "tokens" (of
            the online branch's patches), "relative_cost" (to uncompressed), "bias2", "variance", "ca_variance",
            "ca_mse", "reference_norm2", "gain", "bias2_low", "bias2_high", "ca_mse_low", "ca_mse_high", "gain_low",
            "gain_high", "draws", "chosen".

    Attributes:
        points: progress of each stage, in order.
        strategies: from the cheapest to the dearest.
        symmetries: {name: the strategies that have it}, as few as hold all strategies of `search_grid`. One without
            dropout, or with the base patch, can be in more than one.
        uncompressed: the base patch on both branches, without dropout; by measured costs it need not be the dearest.
        relative: whether `values` are relative to || G ||^2, gains to the uncompressed one; not if the estimate of
            || G ||^2 is not above 0 at some stage.

    Raises:
        ValueError: no rows, or none without token dropout, which tells the image size.
    """

    def __init__(self, rows: Sequence[Row]):
        if not rows:
            raise ValueError("the error table has no rows")
        self.rows = {(row["progress"], strategy_of(row)): row for row in rows}
        self.points = sorted({progress for progress, _ in self.rows})
        cost = {strategy: row["relative_cost"] for (_, strategy), row in self.rows.items()}
        self.strategies = sorted(cost, key=lambda strategy: (cost[strategy], strategy))
        self.cost = {strategy: cost[strategy] for strategy in self.strategies}
        self.uncompressed = Strategy(Compression(min(strategy.online.patch_size for strategy in cost)))
        self.image_size = _image_size(rows)
        self.symmetries = self._symmetries()
        self.relative = all(row["reference_norm2"] > 0 for row in rows)

    def row(self, progress: float, strategy: Strategy) -> Row | None:
        return self.rows.get((progress, strategy))

    def values(self, name: str, progress: float) -> np.ndarray:
        """Column `name` of a stage (strategies,), as `relative` says; NaN where there is no row."""
        rows = [self.row(progress, strategy) for strategy in self.strategies]
        return np.array([math.nan if row is None else row[name] / self.unit(row, name) for row in rows])

    def unit(self, row: Row, name: str) -> float:
        """What `values` are divided by."""
        if not self.relative:
            return 1.0
        if not name.startswith("gain"):
            return row["reference_norm2"]
        uncompressed = self.row(row["progress"], self.uncompressed)
        return uncompressed["gain"] if uncompressed else math.nan

    def chosen(self, progress: float) -> list[Strategy]:
        return [strategy for strategy in self.strategies if (row := self.row(progress, strategy)) and row["chosen"]]

    def tokens(self, compression: Compression) -> int:
        """Patch tokens of a view."""
        return compression.kept_tokens(self.image_size)

    def label(self, strategy: Strategy) -> str:
        """As "p8 d0.5"; where the table has several symmetries, with the target's compression if that differs."""
        online, target = short(strategy.online), short(strategy.target_branch)
        return online if len(self.symmetries) == 1 or target == online else f"{online} | {target}"

    def _symmetries(self) -> dict[str, list[Strategy]]:
        online = [strategy.online for strategy in self.strategies]
        patch_sizes = sorted({compression.patch_size for compression in online})
        dropouts = sorted({compression.token_dropout for compression in online})
        found = {}
        for name in SYMMETRIES:
            grid = search_grid(self.image_size, patch_sizes[0], dropouts, patch_sizes, [name])
            found[name] = [strategy for strategy in self.strategies if strategy in grid]
        holders = {s: [name for name in found if s in found[name]] for s in self.strategies}
        shown = {names[0] for names in holders.values() if len(names) == 1}
        shown |= {names[0] for names in holders.values() if names and not shown.intersection(names)}
        return {name: found[name] for name in SYMMETRIES if name in shown}


def strategy_of(row: Row) -> Strategy:
    """The strategy that a row is about."""
    online = Compression(int(row["patch_size"]), float(row["token_dropout"]))
    return Strategy(online, Compression(int(row["target_patch_size"]), float(row["target_token_dropout"])))


def short(compression: Compression) -> str:
    """As "p8 d0.5": patch size in pixels, token dropout."""
    return f"p{compression.patch_size} d{compression.token_dropout:g}"


def percent(progress: float) -> str:
    return f"{100 * progress:.3g}%"


def _image_size(rows: Sequence[Row]) -> int:
    for row in rows:
        if row["token_dropout"] == 0:
            return int(row["patch_size"]) * math.isqrt(int(row["tokens"]))
    raise ValueError("the error table has no strategy without token dropout, not even the uncompressed one")
