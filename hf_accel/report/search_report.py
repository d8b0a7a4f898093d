"""The report of a search: figures, and a page in Markdown and HTML that holds them beside the tables."""

from collections.abc import Sequence
from datetime import date
from itertools import pairwise, product
from pathlib import Path

from ..compression import Compression, Schedule, Strategy
from ..schedule_search.error_table import ErrorTable, Row, percent
from .origin import environment
from .pages import escape, write_page
from .search_figures import plot_gradient_error, plot_heatmap, plot_schedule
from .tables import format_table

BEST = 5
"""Strategies of least CA-MSE, or of the largest gain, that the report lists for each stage."""

RULES = {
    "ca_mse": "of least CA-MSE (the chosen one need not have it: within the interval of the best the cheaper wins)",
    "gain": "of the largest gain (the chosen one need not have it: the lower end of the interval counts)",
}

UNITS = {
    True: "bias², variance and CA-MSE relative to the squared norm of the uncompressed gradient at that stage, gains "
    "to the uncompressed strategy's",
    False: "bias², variance and CA-MSE in squared units of the gradient, gains in its units, as at some stage its norm "
    "is lost in the noise",
}
"""By whether the table's values are relative."""

OF_HEATMAPS = (
    "over token dropout and patch size. Each stage has its own colours, from its least to its largest value, as "
    "strategies are chosen within a stage; the numbers can be compared between stages."
)

CAPTIONS = {
    "gradient_error": "Squared bias, cost-adjusted variance and CA-MSE (their sum) of the gradient under every "
    "strategy, and the gain: the first-order decrease of the uncompressed loss that a unit buys when the learning rate "
    "sets the length of a step. 95% intervals, but for the variance. An estimate of the squared bias can be negative "
    "where the bias is small; such points stand at the end of the axis as open triangles.",
    "ca_mse_heatmap": f"CA-MSE {OF_HEATMAPS}",
    "gain_heatmap": f"Gain {OF_HEATMAPS}",
    "schedule": "The schedule found: patch tokens per image, compressions (p: patch size in pixels, d: token dropout) "
    "and cost per training image.",
}


def write_search_report(
    table: ErrorTable,
    schedule: Schedule,
    output: Path,
    title: str,
    criterion: str = "ca_mse",
    has_target_branch: bool = True,
) -> None:
    """Write report.md, report.html and their figures, each as .png and .svg, into `output`.

    The heatmap is that of the criterion, and one of another criterion, from an earlier choice, is removed.

    Args:
        schedule: of strategies that the table holds.
        title: of the page and the figures.
        criterion: "ca_mse" or "gain", by which the schedule was chosen.
        has_target_branch: whether the objective has one, which is shown then.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name, suffix in product(RULES, (".png", ".svg")):
        (output / f"{name}_heatmap").with_suffix(suffix).unlink(missing_ok=True)
    plot_gradient_error(table, output / "gradient_error", title)
    plot_heatmap(table, output / f"{criterion}_heatmap", title, criterion)
    plot_schedule(schedule, table.cost, table.image_size, output / "schedule", title, has_target_branch)
    write_page(build_report(table, schedule, title, criterion, has_target_branch), output / "report.md", title)


def build_report(
    table: ErrorTable, schedule: Schedule, title: str, criterion: str, has_target_branch: bool = True
) -> str:
    """Build the Markdown of the report."""
    origin = environment()
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    commit = f"{str(origin['commit'])[:12]}{' with changes' if origin['dirty'] else ''}"
    gpus = ", ".join(origin["hardware"]["gpus"]) or "none"
    branches = ["online", "target"][: 1 + has_target_branch]
    draws = ", ".join(map(str, sorted({row["draws"] for row in table.rows.values()})))
    return f"""# {escape(title)}

    {origin["command"]}

{date.today()}, commit {commit}; {escape(versions)}; {escape(str(origin["hardware"]["cpu"]))}, GPUs: {escape(gpus)}

## Schedule

{_schedule_table(table, schedule, branches)}

Over a whole budget it trains on {_images(table, schedule):.2f} times as many images as without compression.

{_figure("schedule")}

## Best strategies of each stage

The chosen strategy (bold) and those {RULES[criterion]}, with 95% intervals; {UNITS[table.relative]}.
Paired draws: {draws}. Cost never falls as training goes on. All rows, as measured, are in `gradient_error.parquet`.

{_best_table(table, criterion, branches)}

## Gradient error

{_figure("gradient_error")}

{_figure(f"{criterion}_heatmap")}
"""


def _figure(name: str) -> str:
    return f"![{name}]({name}.png)\n\n*{CAPTIONS[name]}*"


def _compressions(strategy: Strategy, branches: Sequence[str]) -> list[Compression]:
    return [strategy.online, strategy.target_branch][: len(branches)]


def _schedule_table(table: ErrorTable, schedule: Schedule, branches: Sequence[str]) -> str:
    starts = [0.0, *(stage.until for stage in schedule.stages)]
    rows = []
    for (start, end), stage in zip(pairwise(starts), schedule.stages, strict=True):
        compressions = _compressions(stage.strategy, branches)
        tokens = " / ".join(str(compression.kept_tokens(table.image_size)) for compression in compressions)
        cells = [f"{percent(start)} to {percent(end)}", *(compression.abbreviate() for compression in compressions)]
        rows.append([*cells, tokens, f"{table.cost[stage.strategy]:.3f}"])
    tokens = f"tokens, {' / '.join(branches)}" if len(branches) > 1 else "tokens"
    return format_table(["progress", *branches, tokens, "relative cost"], rows)


def _images(table: ErrorTable, schedule: Schedule) -> float:
    """Images that a budget pays for, over those without compression; progress is the share of the budget spent."""
    starts = [0.0, *(stage.until for stage in schedule.stages)]
    spans = [end - start for start, end in pairwise(starts)]
    return sum(span / table.cost[stage.strategy] for span, stage in zip(spans, schedule.stages, strict=True))


def _best_table(table: ErrorTable, criterion: str, branches: Sequence[str]) -> str:
    header = ["at", "choice", *branches, "tokens", "relative cost"]
    header += ["bias²", "95% interval", "cost-adj. variance", "CA-MSE", "95% interval", "gain", "95% interval"]
    lines = []
    for progress in table.points:
        stage = [row for (at, _), row in table.rows.items() if at == progress]
        stage.sort(key=lambda row: (not row["chosen"], row["ca_mse"] if criterion == "ca_mse" else -row["gain"]))
        for row in stage[:BEST]:
            cells = _best_cells(table, row, branches)
            lines.append([f"**{cell}**" for cell in cells] if row["chosen"] else cells)
    return format_table(header, lines)


def _best_cells(table: ErrorTable, row: Row, branches: Sequence[str]) -> list[str]:
    cells = [percent(row["progress"]), "chosen" if row["chosen"] else ""]
    cells += [compression.abbreviate() for compression in _compressions(Strategy.from_dict(row), branches)]
    cells += [str(row["tokens"]), f"{row['relative_cost']:.3f}"]
    for name in ("bias2", "ca_variance", "ca_mse", "gain"):
        ends = [f"{name}_low", f"{name}_high"] if f"{name}_low" in row else []
        shown = [f"{row[key] / table.unit(row, key):#.3g}".rstrip(".") for key in (name, *ends)]
        cells += [shown[0], *[" to ".join(shown[1:])] * bool(ends)]
    return cells
