"""Figures, tables and pages of runs, searches and evaluations."""

from .contact_sheet import SeenView, StageViews, plot_contact_sheet
from .cost_figure import format_cost_table, plot_cost
from .curves import plot_accuracies, plot_curves
from .evaluations import add_run, describe_differences, find_run, format_evaluations
from .origin import describe_data, environment
from .search_figures import plot_schedule
from .search_report import write_search_report
from .tables import format_table
