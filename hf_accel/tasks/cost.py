"""`task=cost`: what a forward pass costs under every compression, by FLOPs and as timed on this device."""

import torch

from ..compression import build_cost_grid, build_cost_rows, measure_costs
from ..distributed.launch import DTYPES, choose_precision
from ..recipe import Recipe
from ..report import environment, format_cost_table, plot_cost
from ..utils.writing import write_json
from .setup import output_of


def cost_report(recipe: Recipe) -> None:
    """Print and save the cost of every compression, analytic beside measured."""
    recipe.mixed_precision = choose_precision(recipe.mixed_precision)  # pyright: ignore
    output = output_of(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = recipe.encoder_config()
    table = measure_costs(config, build_cost_grid(config), device, dtype=DTYPES[recipe.mixed_precision])
    rows = build_cost_rows(config, table)
    write_json(output / "cost.json", {"rows": rows, "environment": environment()})
    plot_cost(
        rows, output / "cost.png", title=f"{recipe.model or recipe.init_from}, {recipe.image_size} px, {table.device}"
    )
    print(format_cost_table(rows))
    print(f"saved to {output / 'cost.json'} and {output / 'cost.png'}")
