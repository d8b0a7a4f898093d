"""What a budget buys: the cost of each strategy, and the plan or the controller that spends the budget."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from ..compression import Compression, CostTable, Plan, Schedule, Strategy, forward_cost, measure_costs
from ..compression.cost import TABLE_NAME, ForwardCost, StepCosts, load_costs
from ..distributed import barrier, broadcast_object, is_main, world_size
from ..models import AccelViTConfig
from ..objectives import ObjectiveForPreTraining
from ..run_folder import RunFolder
from ..schedule_search.ladder import OnlineController, build_ladder
from ..utils.errors import SettingError, fail, format_value
from ..utils.pretrain_settings import budget_in_seconds, budget_in_units
from .config import PretrainConfig
from .extending import EarlierRun

UnitsPerImage = Callable[[Strategy], float]
Costs = CostTable | StepCosts


def read_schedule(
    args: PretrainConfig, config: AccelViTConfig, local_crop_size: int | None, earlier: EarlierRun | None = None
) -> Schedule:
    """Return the schedule of `args` for this encoder, whose training goes on after the `earlier` run if there is one.

    Raises:
        SettingError: the encoder cannot follow the schedule.
    """
    value = args.schedule
    if value == "standard" and earlier is not None:
        value = earlier.schedule
    try:
        released = config.init_from is not None
        value = None if value == "auto" else value
        schedule = Schedule.parse(value, config.patch_size, image_size=config.image_size, one_patch_size=released)
        schedule.validate(config.image_size, config.patch_size, local_crop_size)
    except ValueError as error:
        raise SettingError(f"schedule={args.schedule!r}: {error}") from None
    return schedule


def make_forward_cost(
    args: PretrainConfig, config: AccelViTConfig, device: torch.device, strategies: Iterable[Strategy]
) -> ForwardCost:
    """Return the units of a forward pass for a search, from FLOPs or from its own measured table.

    The table is measured once, for `strategies`, and kept in `output_dir`.
    """
    if args.cost == "analytic":
        return partial(forward_cost, config)
    path = Path(str(args.output_dir)) / TABLE_NAME
    if is_main() and not path.exists():
        wanted = [c for strategy in strategies for c in (strategy.online, strategy.target_branch)]
        share = args.batch_size // (args.gradient_accumulation_steps * world_size())
        # A small batch on a GPU would time the host, not the device.
        batch_size = 64 if device.type == "cpu" else share
        path.parent.mkdir(parents=True, exist_ok=True)
        measure_costs(config, wanted, device, batch_size, dtype=args.autocast_dtype).save(path)
    barrier()
    return CostTable.load(path)


def read_costs(folder: RunFolder, precision: str) -> Costs | None:
    """Read the costs that the run in a folder has measured, there or in its last checkpoint. None: there are none.

    A run that has saved nothing starts from the beginning in another `precision`, and its steps are timed again. All
    processes must call this function.
    """
    costs = None
    if is_main():
        checkpoint = folder.last_complete_checkpoint()
        paths = [folder.cost_table, *([checkpoint / TABLE_NAME] if checkpoint else [])]
        same = folder.has_trained() or folder.read_recipe().get("mixed_precision", precision) == precision
        costs = next((load_costs(path) for path in paths if path.exists()), None) if same else None
    return broadcast_object(costs)


def analytic_units(model: ObjectiveForPreTraining) -> UnitsPerImage:
    """Return what training on one image costs by FLOPs."""
    return partial(model.units_per_image, forward_cost=partial(forward_cost, model.config))


def strategies_to_time(args: PretrainConfig, model: ObjectiveForPreTraining, schedule: Schedule) -> list[Strategy]:
    """List the strategies whose steps are timed, the uncompressed one first.

    With `schedule="auto"` they are the rungs of the ladder by analytic costs. The run's ladder consists of those that
    are far enough apart by measured costs, too.
    """
    config = model.config
    strategies = schedule.strategies
    if args.schedule == "auto":
        strategies = build_ladder(config.image_size, config.patch_size, analytic_units(model))
    return list(dict.fromkeys([Strategy(Compression(config.patch_size)), *strategies]))


def plan_run(
    args: PretrainConfig, model: ObjectiveForPreTraining, schedule: Schedule, images: int, costs: Costs | None = None
) -> tuple[Plan, OnlineController | None]:
    """Make the plan of a run by analytic or by measured costs. See `make_plan`.

    Measured costs may be None as long as no step has been timed. The plan is then a provisional one, by analytic costs
    and without a controller, and a budget in time counts as one epoch.
    """
    config, units = model.config, analytic_units(model)
    if args.cost == "analytic":
        return make_plan(args, config, schedule, units, images)
    if costs is None:
        uncompressed = units(Strategy(Compression(config.patch_size)))
        in_time = budget_in_seconds(args.budget) is not None
        epoch = max(images, args.batch_size) * uncompressed
        budget = epoch if in_time else budget_in_units(args.budget or 0.0, images, uncompressed)
        return _spend(args, budget, schedule, units), None
    if isinstance(costs, CostTable):  # of a run that an earlier version has started
        return make_plan(args, config, schedule, partial(model.units_per_image, forward_cost=costs), images)
    problem = f"remove {TABLE_NAME} in {args.output_dir}, and steps are timed again"
    for strategy in (Strategy(Compression(config.patch_size)), *schedule.strategies):
        if strategy not in costs.units:
            fail("cost", args.cost, f"the table holds no cost of a step under {strategy}; {problem}")
    if budget_in_seconds(args.budget) is not None and costs.budget_requested != args.budget:
        made_for = f"the measured costs were made for budget={costs.budget_requested!r}"
        fail("budget", args.budget, f"{made_for}; {problem}")
    return make_plan(args, config, schedule, costs, images)


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
        units_per_image: units of training on one image under a strategy. Of `StepCosts`, a budget in time is taken.
        images: of the training set, of which an epoch is one pass.

    Raises:
        SettingError: the budget does not pay for one step, or for the probes.
    """
    uncompressed = Strategy(Compression(config.patch_size))
    timed = units_per_image if isinstance(units_per_image, StepCosts) else None
    if timed and timed.budget is not None and budget_in_seconds(args.budget) is not None:
        budget = timed.budget
    else:
        budget = budget_in_units(args.budget or 0.0, images, units_per_image(uncompressed))
    controller = None
    if args.schedule == "auto":
        ladder = build_ladder(config.image_size, config.patch_size, units_per_image, timed and timed.units)
        overhead = args.batch_size * (timed.probe_overhead if timed else 0.0)
        settings = (budget, args.auto_share, args.auto_draws, args.search_criterion, overhead)
        try:
            controller = OnlineController(ladder, lambda s: args.batch_size * units_per_image(s), *settings)
        except ValueError as error:
            raise SettingError(f"schedule='auto': {error}") from None
        schedule = controller.schedule()
    return _spend(args, budget, schedule, units_per_image), controller


def _spend(args: PretrainConfig, budget: float, schedule: Schedule, units_per_image: UnitsPerImage) -> Plan:
    try:
        return Plan(budget, schedule, args.batch_size, units_per_image)
    except ValueError as error:
        fail("budget", args.budget, str(error))


def describe_plan(args: PretrainConfig, model: ObjectiveForPreTraining, plan: Plan) -> list[str]:
    """Describe what the run will do, and point out what may not be intended."""
    # Probes are charged, and a compression that ends later or earlier changes how many steps the rest pays for.
    budget = (
        f"Budget: {'at most ' * (args.schedule == 'auto')}{plan.num_steps:,} steps of {args.batch_size} images, "
        f"{plan.total_cost:,.0f} of {plan.budget:,.0f} units"
        f"{f' ({args.budget})' if budget_in_seconds(args.budget) is not None else ''}"
    )
    return [budget, *(f"Note: {oddity}" for oddity in find_oddities(args, model, plan))]


def find_oddities(args: PretrainConfig, model: ObjectiveForPreTraining, plan: Plan) -> list[str]:
    """Describe each thing about a plan that may not be intended."""
    found, micro_batches = [], args.gradient_accumulation_steps
    if micro_batches > 1 and model.least_batch > 1:
        found.append(
            f"gradient_accumulation_steps={micro_batches}: in {model.name} the loss of an image depends on the "
            f"{args.batch_size // micro_batches} images of its micro-batch, not on the {args.batch_size} of the whole "
            "batch"
        )
    if args.schedule != "auto" and not plan.pays_for_last_stage():
        found.append(
            f"budget={format_value(args.budget)} pays for no step of the schedule's last stage "
            f"({plan.schedule.stages[-1].strategy}): raise the budget, lower batch_size, or let the stage begin earlier"
        )
    return found
