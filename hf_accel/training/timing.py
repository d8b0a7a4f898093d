"""What a step costs in seconds and memory, timed before a run or in it, and what follows for the whole run."""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .. import distributed
from ..compression import Plan, Strategy
from ..data import TrainSampler, train_loader
from ..distributed.stopping import stop_together
from ..objectives import Draw

TIMED_STEPS = 20
"""Steps of a run that are timed before it predicts its end."""

TIMED_AT = 0.5
"""Progress at which steps are timed: nothing of an objective is frozen there."""


@dataclass(frozen=True)
class StepTime:
    """What one optimizer step takes: seconds, and peak memory in bytes.

    On a GPU the memory is what torch allocates for the run. On a CPU it is that of the whole process. The loss is that
    of the last micro-batch.
    """

    seconds: float
    memory: int
    loss: float = 0.0


def time_steps(trainer: Any, strategies: Sequence[Strategy], steps: int = 3) -> dict[Strategy, StepTime]:
    """Time whole optimizer steps: loading, views, forward, backward, optimizer and target branch.

    A copy of the model takes them, so the trainer, its model and the random state stay bit for bit as they are. The
    strategies take turns, so that a slow moment of the machine affects all of them. The first step of each is a
    warm-up. All processes must call this; the exchange of gradients between them is not timed.

    Args:
        trainer ([`PretrainTrainer`]): Its model, settings and images are used.
        strategies: Those to time.
        steps: Steps of each, of which the median is taken.

    Raises:
        Stopped: a stop was requested, by a signal in `train`.
    """
    device, wanted = trainer.args.device, list(dict.fromkeys(strategies))
    known_bad = dict(trainer.source.bad)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        timer = _Timer(trainer)
        batches = timer.load(wanted, (steps + 1) * len(wanted))
        taken: dict[Strategy, list[StepTime]] = {strategy: [] for strategy in wanted}
        for _ in range(steps + 1):
            stop_together()
            for strategy in wanted:
                taken[strategy].append(timer.take_step(strategy, batches))
    trainer.source.bad.clear()
    trainer.source.bad.update(known_bad)
    return {
        strategy: StepTime(
            statistics.median(step.seconds for step in each[1:]), max(step.memory for step in each[1:]), each[-1].loss
        )
        for strategy, each in taken.items()
    }


class _Timer:
    """A copy of a trainer's model with an optimizer of its own, which takes steps."""

    def __init__(self, trainer: Any):
        self.trainer, self.args, self.device = trainer, trainer.args, trainer.args.device
        self.other_memory = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.model = copy.deepcopy(trainer.whole_objective()).to(self.device).train()
        if self.args.activation_checkpointing:
            kwargs = self.args.activation_checkpointing_kwargs
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        if self.args.torch_compile:
            self.model.compile_encoders(**self.args.compile_options)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        kind, settings = trainer.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind(self.parameters, **settings)

    def load(self, strategies: Sequence[Strategy], steps: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of steps that follow the strategies in turn."""
        trainer, args = self.trainer, self.args
        shard = (args.per_device_train_batch_size, args.world_size, args.process_index)
        source, accumulation = trainer.source, args.gradient_accumulation_steps
        order = {"last_step": steps, "shards": source.shards}
        sampler = TrainSampler(len(source), *shard, accumulation, args.seed, **order)

        def view_size(step: int) -> int:
            return trainer.crop_size(trainer.size_under(strategies[step % len(strategies)]))

        workers, pinned = args.dataloader_num_workers, self.device.type != "cpu"
        return iter(train_loader(source, sampler, trainer.view_configs, view_size, workers, args.seed, pinned))

    def take_step(self, strategy: Strategy, batches: Iterator[dict[str, Any]]) -> StepTime:
        args, precision, memory = self.args, self.args.autocast_dtype, 0
        size, start, loss = self.trainer.size_under(strategy), self._now(), torch.zeros(())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for batch in islice(batches, args.gradient_accumulation_steps):
            inputs = self.trainer._prepare_inputs(batch)
            views = self.trainer.views_of(inputs, size)
            draw = Draw(args.seed, inputs["step"], inputs["micro_step"])
            with torch.autocast(self.device.type, precision, enabled=precision is not None):
                loss = self.model(views, strategy, draw, TIMED_AT).loss
            memory = max(memory, self._memory())
            (loss.float() / args.gradient_accumulation_steps).backward()
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.model.before_optimizer_step(TIMED_AT)
        self.optimizer.step()
        self.model.update_target(TIMED_AT)
        memory = max(memory, self._memory())
        self.optimizer.zero_grad()
        return StepTime(self._now() - start, memory, float(loss.detach()))

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.other_memory
        return psutil.Process().memory_info().rss

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def predict_seconds(plan: Plan, times: Mapping[Strategy, StepTime]) -> list[float]:
    """Predict the seconds of each stage of a plan, in order; their sum is the time of the run's steps."""
    return [steps * times[strategy].seconds for strategy, steps in plan.stage_steps()]


def format_duration(seconds: float) -> str:
    """Format a predicted duration in two or three digits."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.3g} s"


def name_bound(logs: Mapping[str, float]) -> str:
    """Name the part that took most of the time of the logged steps: "data", "views" or "model", the whole rest.

    The host does not wait for a GPU, so its clock does not tell views and model apart. Together they are the "device".
    "launches" bound the steps for most of which the GPU waited for the host.
    """
    data = logs["data_wait_fraction"]
    if "views_fraction" not in logs:
        launches = "launches" if logs.get("device_idle_fraction", 0.0) > 0.5 else "device"
        return "data" if data > 0.5 else launches
    parts = {"data": data, "views": logs["views_fraction"]}
    parts["model"] = 1.0 - sum(parts.values())
    return max(parts, key=lambda part: parts[part])


class PredictedTime(TrainerCallback):
    """Says how long the rest of the run takes, once, after TIMED_STEPS timed steps.

    The remaining units of each strategy count with the seconds a unit that the strategy has taken so far, and those of
    a strategy that has not been seen with the mean. The first step of each strategy in this launch is a warm-up.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds: dict[Strategy, float] = {}
        self.units: dict[Strategy, float] = {}
        self.timed, self.before = 0, self._clock()

    def _clock(self) -> float:
        return time.perf_counter() - self.trainer.seconds["evaluation"]

    def on_step_end(self, args, state, control, **kwargs):
        plan, before, self.before = self.trainer.plan, self.before, self._clock()
        if self.timed >= TIMED_STEPS or state.global_step >= plan.num_steps:
            return
        step = plan[state.global_step - 1]
        if step.strategy not in self.seconds:
            self.seconds[step.strategy] = self.units[step.strategy] = 0.0
            return
        self.seconds[step.strategy] += self.before - before
        self.units[step.strategy] += step.cost
        self.timed += 1
        if self.timed == TIMED_STEPS:
            left = format_duration(self.predict_rest(state.global_step))
            if distributed.is_main():
                tqdm.write(f"About {left} for the remaining {plan.num_steps - state.global_step:,} steps")

    def predict_rest(self, done: int) -> float:
        """Predict the seconds of the steps after the first `done` ones."""
        mean, total, first = sum(self.seconds.values()) / sum(self.units.values()), 0.0, 0
        for strategy, steps in self.trainer.plan.stage_steps():
            left, first = max(0, min(steps, first + steps - done)), first + steps
            seen = self.units.get(strategy)
            units = left * self.trainer.plan.batch_size * self.trainer.plan.units_per_image(strategy)
            total += units * (self.seconds[strategy] / seen if seen else mean)
        return total
