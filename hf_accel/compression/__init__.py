"""Compressions of views: strategies, their costs, schedules of them, and the plan that spends a budget."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .plan import Plan, Step
from .schedule import Schedule, Stage
from .strategy import Compression, Strategy, check_compression, possible_patch_sizes

if TYPE_CHECKING:
    from .cost import CostTable, build_cost_grid, build_cost_rows, forward_cost, forward_flops, measure_costs


def __getattr__(name: str) -> Any:
    """Import the names of `cost` on first use, because they need torch, whose import takes seconds."""
    if name == "cost" or name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".cost", __name__), name)
