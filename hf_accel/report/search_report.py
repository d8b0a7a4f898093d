"""The report of a search: figures, and one HTML page that holds them beside the tables and needs nothing else."""

import base64
from collections.abc import Iterable, Sequence
from datetime import date
from html import escape
from itertools import pairwise
from pathlib import Path

from ..compression import Schedule, Strategy
from ..schedule_search.error_table import ErrorTable, Row, percent
from .origin import environment
from .search_figures import plot_ca_mse_heatmap, plot_gradient_error, plot_learning_rate, plot_schedule

REPORT_NAME = "report.html"
BEST = 5
"""Strategies of least CA-MSE, or of the largest gain, that the page lists for each stage."""

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

CAPTIONS = {
    "gradient_error": "Squared bias, cost-adjusted variance and CA-MSE (their sum) of the gradient under every "
    "strategy, and the gain: the first-order decrease of the uncompressed loss that a unit buys when the learning rate "
    "sets the length of a step. 95% intervals, but for the variance. An estimate of the squared bias can be negative "
    "where the bias is small; such points stand at the end of the axis as open triangles.",
    "ca_mse_heatmap": "CA-MSE over token dropout and patch size. Each stage has its own colours, from its least to its "
    "largest value, as strategies are chosen within a stage; the numbers can be compared between stages.",
    "schedule": "The schedule found: patch tokens per image, compressions (p: patch size in pixels, d: token dropout) "
    "and cost per training image.",
    "learning_rate": "Learning rates that training can follow, over the same progress; dotted: changes of compression.",
}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; break-after: avoid; }
figure { margin: 1rem 0; } figure img { max-width: 100%; } figcaption, .note { color: #444; font-size: 0.9em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.4rem; text-align: right; border-bottom: 1px solid #ccc; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; border-bottom: 2px solid #555; }
tr.chosen td { font-weight: bold; background: #e3eef6; }
tr.first td { border-top: 2px solid #999; } code { overflow-wrap: anywhere; } summary { cursor: pointer; }
@page { margin: 14mm; }
@media print { body { font-size: 10pt; max-width: none; margin: 0; } figure, tr { break-inside: avoid; }
  figure img { max-height: 22cm; }
  .wide { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: 0.1rem 0.3rem; }
  details table { font-size: 5pt; } details th, details td { padding: 0.05rem 0.15rem; } }
"""


def write_search_report(
    table: ErrorTable, schedule: Schedule, output: Path, title: str, warmup: float = 0.1, criterion: str = "ca_mse"
) -> None:
    """Write gradient_error, ca_mse_heatmap, schedule and learning_rate (.png and .svg) and report.html into `output`.

    Args:
        schedule: of strategies that the table holds.
        title: of the page and the figures.
        warmup: progress over which the learning rate rises.
        criterion: "ca_mse" or "gain", by which the schedule was chosen.

    Raises:
        ValueError: the table has no row without token dropout, or a strategy of the schedule has no row.
    """
    unknown = [str(strategy) for strategy in schedule.strategies if strategy not in table.cost]
    if unknown:
        raise ValueError(f"the schedule's strategies have no row in the error table: {'; '.join(unknown)}")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    plot_gradient_error(table, output / "gradient_error", title)
    plot_ca_mse_heatmap(table, output / "ca_mse_heatmap", title)
    plot_schedule(table, schedule, output / "schedule", title)
    plot_learning_rate(schedule, warmup, output / "learning_rate", title)
    (output / REPORT_NAME).write_text(_page(table, schedule, output, title, criterion), encoding="utf-8")


def _page(table: ErrorTable, schedule: Schedule, output: Path, title: str, criterion: str) -> str:
    origin = environment()
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    commit = f"{origin['commit'] or 'unknown'}{' with changes' if origin['dirty'] else ''}"
    draws = ", ".join(map(str, sorted({row["draws"] for row in table.rows.values()})))
    rule, unit = RULES[criterion], UNITS[table.relative]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="note"><code>{escape(origin["command"])}</code><br>
{date.today()}, commit {escape(commit)}<br>
{escape(versions)}<br>
{escape(str(origin["hardware"]["cpu"]))}, GPUs: {escape(", ".join(origin["hardware"]["gpus"]) or "none")}</p>
<h2>Schedule</h2>
{_schedule_table(table, schedule)}
<p>Over a whole budget it trains on {_images(table, schedule):.2f} times as many images as without compression.</p>
{_figure(output, "schedule")}
<h2>Best strategies of each stage</h2>
<p class="note">The chosen strategy (bold) and those {rule}, with 95% intervals;
{unit}. Paired draws: {draws}. Cost never falls as training goes on.</p>
{_best_table(table, criterion)}
<h2>Gradient error</h2>
{_figure(output, "gradient_error")}
{_figure(output, "ca_mse_heatmap")}
<h2>Learning rate</h2>
{_figure(output, "learning_rate")}
<h2>All strategies</h2>
<details><summary>{len(table.rows)} rows, as measured (not relative)</summary>
{_full_table(table)}
</details>
</body>
</html>
"""


def _figure(output: Path, name: str) -> str:
    data = base64.b64encode((output / f"{name}.png").read_bytes()).decode("ascii")
    caption = escape(CAPTIONS[name])
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">\n<figcaption>{caption}</figcaption></figure>'
    )


def _table(header: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Lines are (class of the row, cells); every text is escaped."""
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "\n".join(
        f'<tr class="{name}">' + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>"
        for name, cells in lines
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _schedule_table(table: ErrorTable, schedule: Schedule) -> str:
    starts = [0.0, *(stage.until for stage in schedule.stages)]
    lines = []
    for (start, end), stage in zip(pairwise(starts), schedule.stages, strict=True):
        online, target = stage.strategy.online, stage.strategy.target_branch
        tokens = f"{table.tokens(online)} / {table.tokens(target)}"
        cells = [f"{percent(start)} to {percent(end)}", online.abbreviate(), target.abbreviate(), tokens]
        lines.append(("", [*cells, f"{table.cost[stage.strategy]:.3f}"]))
    return _table(["progress", "online", "target", "tokens, online / target", "relative cost"], lines)


def _images(table: ErrorTable, schedule: Schedule) -> float:
    """Images that a budget pays for, over those without compression; progress is the share of the budget spent."""
    starts = [0.0, *(stage.until for stage in schedule.stages)]
    spans = [end - start for start, end in pairwise(starts)]
    return sum(span / table.cost[stage.strategy] for span, stage in zip(spans, schedule.stages, strict=True))


def _best_table(table: ErrorTable, criterion: str) -> str:
    header = ["at", "", "online", "target", "tokens", "relative cost"]
    header += ["bias²", "95% interval", "cost-adj. variance", "CA-MSE", "95% interval", "gain", "95% interval"]
    lines = []
    for progress in table.points:
        stage = [row for (at, _), row in table.rows.items() if at == progress]
        stage.sort(key=lambda row: (not row["chosen"], row["ca_mse"] if criterion == "ca_mse" else -row["gain"]))
        for number, row in enumerate(stage[: max(BEST, 1)]):
            lines.append(("chosen " * row["chosen"] + "first" * (number == 0), _best_cells(table, row)))
    return _table(header, lines)


def _best_cells(table: ErrorTable, row: Row) -> list[str]:
    strategy = Strategy.from_dict(row)

    def relative(*names: str) -> str:
        return " to ".join(f"{row[name] / table.unit(row, name):#.3g}".rstrip(".") for name in names)

    return [
        percent(row["progress"]),
        "chosen" if row["chosen"] else "",
        strategy.online.abbreviate(),
        strategy.target_branch.abbreviate(),
        str(row["tokens"]),
        f"{row['relative_cost']:.3f}",
        relative("bias2"),
        relative("bias2_low", "bias2_high"),
        relative("ca_variance"),
        relative("ca_mse"),
        relative("ca_mse_low", "ca_mse_high"),
        relative("gain"),
        relative("gain_low", "gain_high"),
    ]


def _full_table(table: ErrorTable) -> str:
    columns = ["relative_cost", "bias2", "bias2_low", "bias2_high", "variance", "ca_variance"]
    columns += ["ca_mse", "ca_mse_low", "ca_mse_high", "gain", "gain_low", "gain_high", "reference_norm2"]
    lines = []
    for progress in table.points:
        for number, strategy in enumerate(table.strategies):
            if row := table.row(progress, strategy):
                cells = [
                    percent(progress),
                    strategy.online.abbreviate(),
                    strategy.target_branch.abbreviate(),
                    str(row["tokens"]),
                ]
                cells += [f"{row[name]:.6g}" for name in columns]
                lines.append(("chosen " * row["chosen"] + "first" * (number == 0), [*cells, str(row["draws"])]))
    return _table(["at", "online", "target", "tokens", *columns, "draws"], lines)
