"""What a person sees of a run: its opening summary, a bar, a line for each log entry, and no chatter of libraries."""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from ..compression import Compression, Schedule, Stage
from ..data import ImageSource, describe_labels
from ..distributed.launch import describe_launch
from .config import PretrainConfig
from .planning import describe_plan
from .timing import name_bound

CHATTY = ("DeepSpeed", "accelerate", "transformers.trainer_utils")
"""Loggers of libraries that say on each run what it has not asked for. Their errors are shown.

The last one takes `save_steps=0.1` of a resumed run for a change: the checkpoint holds the steps that this makes.
"""


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, libraries show neither their progress bars nor what is of no use to someone who watches a run."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    def no_bar(factory: Any, args: Any, kwargs: Any) -> Any:
        return transformers_logging.EmptyTqdm(*args, **kwargs)

    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    hook = transformers_logging.set_tqdm_hook(no_bar)
    try:
        with warnings.catch_warnings():
            for logger in loggers:
                logger.addFilter(is_error)  # DeepSpeed sets its level when it is imported.
                logger.setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed|accelerate)\b")
            yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeFilter(is_error)
            logger.setLevel(level)


def describe_run(trainer: Any) -> list[str]:
    """Describe a run in the lines that it opens with: model, data, device, length, and what may not be intended."""
    args, model, source = trainer.args, trainer.objective, trainer.source
    sizes = [sum(weights.numel() for weights in part.parameters()) for part in (model.encoder, model)]
    stages = "found while training runs (schedule=auto)"
    if args.schedule != "auto":
        stages = in_words(trainer.plan.schedule, model.has_target_branch)
    return [
        f"Images: {len(source):,} of {source.title}{describe_pixels(source)}",
        describe_labels(source, trainer.validation),
        f"Model:  {model.name}; encoder of {sizes[0]:,} parameters; {sizes[1]:,} with all branches and heads",
        describe_launch(args, args.precision),
        f"Stages: {stages}",
        *(describe_plan(args, model, trainer.plan) if trainer.plan_is_final else []),
        *([describe_rate(args)] if trainer.scales_rate else []),
    ]


def describe_rate(args: PretrainConfig) -> str:
    """Say what `learning_rate=auto` stands for."""
    rate = cast(float, args.learning_rate)
    return (
        f"Rate:   {rate:g}, that is {rate * 256 / args.batch_size:g} for 256 images, scaled to {args.batch_size:,} "
        "(learning_rate=auto)"
    )


def describe_pixels(source: ImageSource) -> str:
    """Describe the pixels of images that are not RGB of 8 bits."""
    if source.channels == 3 and not source.deep:
        return ""
    return f", {source.channels} channel{'s' * (source.channels > 1)} of {8 * source.dtype.itemsize} bits"


def in_words(schedule: Schedule, has_target_branch: bool = True) -> str:
    """Describe a schedule in one line, without its middle if it has many stages, and a target where there is one."""

    def stage_in_words(stage: Stage) -> str:
        strategy = stage.strategy
        usual = strategy.target_branch == Compression(strategy.online.patch_size) and not strategy.local
        return f"{strategy.online if usual or not has_target_branch else strategy} until {stage.until:.0%}"

    stages = [stage_in_words(stage) for stage in schedule.stages]
    return "; ".join(stages if len(stages) <= 4 else [*stages[:2], f"({len(stages) - 3} more)", stages[-1]])


def describe_logs(logs: Mapping[str, Any], step: int, steps: int) -> str | None:
    """Format the line of a log entry. Return None for one that is of no use to someone who watches."""
    start = f"step {step:>{len(str(steps))}}/{steps}  {logs.get('progress', 0.0):>4.0%}  "
    if "loss" in logs:
        return (
            f"{start}loss {logs['loss']:>7.4f}  lr {logs['learning_rate']:.2e}  tokens {logs['tokens']:>4}  "
            f"{logs['images_per_second']:>7,.0f} images/s  bound by {name_bound(logs)}"
        )
    if "probe_moved" in logs:
        return f"{start}probe: the compression {'changes' if logs['probe_moved'] else 'stays'}"
    measured = {name: value for name, value in logs.items() if name.endswith(("knn_top1", "ridge_top1", "rank_me"))}
    if not measured:
        return None
    shown = {"knn_top1": "kNN  {:>7.2%}", "ridge_top1": "linear {:>7.2%}", "rank_me": "RankMe {:>6.1f}"}
    texts = [
        text.format(value) for end, text in shown.items() for name, value in measured.items() if name.endswith(end)
    ]
    return start + "  ".join(texts)


class ConsoleCallback(TrainerCallback):
    """Shows one line for each log entry and, on a terminal, a bar.

    The bar counts units: steps of a later stage take longer, so steps would predict too early an end.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if sys.stderr.isatty() and not args.disable_tqdm:
            plan = self.trainer.plan
            counts: dict[str, Any] = {"total": plan.total_cost, "initial": plan.spent_after(state.global_step)}
            self.bar = tqdm(**counts, unit=" units", unit_scale=True, dynamic_ncols=True, smoothing=0.1)
        recipe = f"```yaml\n{self.trainer.folder.recipe.read_text()}```"
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                callback.tb_writer.add_text("recipe", recipe)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.total = self.trainer.plan.total_cost  # A probe may have changed the plan.
            self.bar.update(self.trainer.plan.spent_after(state.global_step) - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        plan, step = self.trainer.plan, state.global_step
        # A budget rarely pays for whole steps. The share of the plan is 100% after the last one, as a reader expects.
        line = describe_logs({**(logs or {}), "progress": plan.share_done(step)}, step, plan.num_steps)
        if line and state.is_world_process_zero:
            tqdm.write(line)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is, also where an error has ended training."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
