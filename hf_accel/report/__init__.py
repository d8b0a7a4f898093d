"""What a run leaves for people to read: training curves, the cost of compressions, the report of a search,
and results with their origin."""

from .cost_figure import format_cost_table, plot_cost
from .curves import plot_curves
from .results import environment, write_json
from .search_figures import StrategyCosts, plot_schedule
from .search_report import write_search_report

__all__ = [
    "StrategyCosts",
    "environment",
    "format_cost_table",
    "plot_cost",
    "plot_curves",
    "plot_schedule",
    "write_json",
    "write_search_report",
]
