"""What a run leaves for people to read: training curves, the cost of compressions, and results with their origin."""

from .cost_figure import format_cost_table, plot_cost
from .curves import plot_curves
from .results import environment, write_json

__all__ = ["environment", "format_cost_table", "plot_cost", "plot_curves", "write_json"]
