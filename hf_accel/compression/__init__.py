"""Shortened token sequences: what they are, what they cost, and when to use which."""

from .cost import CostTable, cost_grid, cost_rows, forward_cost, forward_flops, measure_costs
from .schedule import Plan, Schedule, Stage, Step
from .strategy import Compression, Strategy, check_compression, possible_patch_sizes

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
