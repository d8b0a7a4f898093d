"""What a budget buys: the cost of each strategy, and the plan or the controller that spends the budget."""

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from ..compression import Compression, CostTable, Plan, Schedule, Strategy, forward_cost, measure_costs
from ..compression.cost import TABLE_NAME, ForwardCost
from ..distributed import barrier, is_main, world_size
from ..models import AccelViTConfig
from ..objectives import ObjectiveForPreTraining
from ..run_folder import RunFolder
from ..schedule_search.choose import build_grid
from ..schedule_search.ladder import LADDER_DROPOUTS, OnlineController, build_ladder
from ..utils.errors import SettingError, fail
from ..utils.pretrain_settings import budget_in_units
from .config import PretrainConfig

UnitsPerImage = Callable[[Strategy], float]


def read_schedule(args: PretrainConfig, config: AccelViTConfig, local_crop_size: int | None) -> Schedule:
    """Return the schedule of `args` for this encoder. Raises SettingError for one that the encoder cannot follow."""
    try:
        schedule = Schedule.parse(None if args.schedule == "auto" else args.schedule, config.patch_size)
        schedule.validate(config.image_size, config.patch_size, local_crop_size)
    except ValueError as error:
        raise SettingError(f"schedule={args.schedule!r}: {error}") from None
    return schedule


def make_forward_cost(
    args: PretrainConfig, config: AccelViTConfig, device: torch.device, strategies: Iterable[Strategy]
) -> ForwardCost:
    """Return the units of a forward pass, from FLOPs or from the run's own measured table.

    The table is measured once, for `strategies`, and kept in the run's folder and in its checkpoints.
    """
    if args.cost == "analytic":
        return partial(forward_cost, config)
    path = Path(str(args.output_dir)) / TABLE_NAME
    checkpoint = RunFolder(path.parent).last_complete_checkpoint()
    if is_main() and not path.exists() and checkpoint and (checkpoint / TABLE_NAME).exists():
        shutil.copy(checkpoint / TABLE_NAME, path)
    elif is_main() and not path.exists():
        wanted = [c for strategy in strategies for c in (strategy.online, strategy.target_branch)]
        share = args.batch_size // (args.gradient_accumulation_steps * world_size())
        # A small batch on a GPU would time the host, not the device.
        batch_size = 64 if device.type == "cpu" else share
        path.parent.mkdir(parents=True, exist_ok=True)
        measure_costs(config, wanted, device, batch_size, dtype=args.autocast_dtype).save(path)
    barrier()
    return CostTable.load(path)


def strategies_of_run(args: PretrainConfig, config: AccelViTConfig, schedule: Schedule) -> list[Strategy]:
    """List every strategy that the run may follow."""
    if args.schedule != "auto":
        return schedule.strategies
    return [*schedule.strategies, *build_grid(config.image_size, config.patch_size, LADDER_DROPOUTS)]


def make_plan(
    args: PretrainConfig,
    config: AccelViTConfig,
    schedule: Schedule,
    units_per_image: UnitsPerImage,
    images: int,
) -> tuple[Plan, OnlineController | None]:
    """Strategy and progress of every step, and what revises them where `schedule="auto"`.

    Args:
        schedule: see `read_schedule`; a controller starts with its own longest.
        units_per_image: units of training on one image under a strategy.
        images: of the training set, of which an epoch is one pass.

    Raises:
        SettingError: the budget does not pay for one step, or for the probes.
    """
    uncompressed = Strategy(Compression(config.patch_size))
    budget, controller = budget_in_units(args.budget or 0.0, images, units_per_image(uncompressed)), None
    if args.schedule == "auto":
        ladder = build_ladder(config.image_size, config.patch_size, units_per_image)
        settings = (budget, args.auto_share, args.auto_draws, args.search_criterion)
        try:
            controller = OnlineController(ladder, lambda s: args.batch_size * units_per_image(s), *settings)
        except ValueError as error:
            raise SettingError(f"schedule='auto': {error}") from None
        schedule = controller.schedule()
    try:
        return Plan(budget, schedule, args.batch_size, units_per_image), controller
    except ValueError as error:
        fail("budget", args.budget, str(error))


def describe_plan(args: PretrainConfig, model: ObjectiveForPreTraining, plan: Plan) -> list[str]:
    """Describe what the run will do, and point out what may not be intended."""
    micro_batches = args.gradient_accumulation_steps
    lines = [
        # Probes are charged, and a compression that ends later or earlier changes how many steps the rest pays for.
        f"Budget: {'at most ' * (args.schedule == 'auto')}{plan.num_steps:,} steps of {args.batch_size} images, "
        f"{plan.total_cost:,.0f} of {plan.budget:,.0f} units"
    ]
    if micro_batches > 1 and model.least_batch > 1:
        lines.append(
            f"Note: gradient_accumulation_steps={micro_batches}: {model.name} contrasts the "
            f"{args.batch_size // micro_batches} images of each micro-batch with each other, not the "
            f"{args.batch_size} of the whole batch"
        )
    if args.schedule != "auto" and not plan.pays_for_last_stage():
        lines.append(
            f"Note: budget={args.budget} pays for no step of the schedule's last stage "
            f"({plan.schedule.stages[-1].strategy}): raise the budget, lower batch_size, or let the stage begin earlier"
        )
    return lines
