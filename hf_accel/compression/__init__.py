"""Shortened token sequences: what they are, what they cost, and when to use which."""

from typing import TYPE_CHECKING, Any

from .plan import Plan, Step
from .schedule import Schedule, Stage
from .strategy import Compression, Strategy, check_compression, possible_patch_sizes

if TYPE_CHECKING:
    from .cost import CostTable, cost_grid, cost_rows, forward_cost, forward_flops, measure_costs

__all__ = [
    "Compression",
    "CostTable",
    "Plan",
    "Schedule",
    "Stage",
    "Step",
    "Strategy",
    "check_compression",
    "cost_grid",
    "cost_rows",
    "forward_cost",
    "forward_flops",
    "measure_costs",
    "possible_patch_sizes",
]


def __getattr__(name: str) -> Any:
    """The names of `cost` are imported when they are first asked for: with them comes torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import cost

    return getattr(cost, name)
