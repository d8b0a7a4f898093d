"""`schedule: auto` inside a run: probes before the steps where one is due, and the plan that follows from them."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from ..compression import Strategy
from ..distributed.stopping import stop_together
from ..objectives import ObjectiveForPreTraining
from ..schedule_search.gradient_error import GradientErrorAccumulator, GradientNotFinite
from ..schedule_search.gradient_probe import GradientProbe
from ..schedule_search.ladder import OnlineController
from .config import Derived


def take_probe(
    trainer: Any, objective: ObjectiveForPreTraining, cost: Mapping[Strategy, float], draws: range, progress: float
) -> GradientErrorAccumulator[Strategy]:
    """Take paired gradients of `objective` under each strategy of `cost`, which is relative to the uncompressed one.

    All processes must call it.

    Raises:
        Stopped: a stop was requested. The launch that resumes probes from the first draw on.
        TrainingDiverged: a gradient is not finite.
    """
    accumulator = GradientErrorAccumulator(cost)
    probe = GradientProbe(objective, trainer.args, trainer.source, progress)
    for draw in draws:
        stop_together()
        reference = probe(None, draw)
        gradients = {strategy: reference if strategy == probe.base else probe(strategy, draw) for strategy in cost}
        try:
            accumulator.add(reference, gradients)
        except GradientNotFinite:
            trainer.diverged()
    return accumulator


class AutoScheduleCallback(TrainerCallback):
    """Probes when the controller says so, charges the plan, and keeps the Trainer's number of steps true.

    A probe is a pure function of the step and the weights: a run that is killed in the middle of one comes to the same
    decision when it is resumed.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    @property
    def controller(self) -> OnlineController:
        return self.trainer.controller

    def on_step_begin(self, args, state, control, **kwargs):
        trainer, controller, step = self.trainer, self.controller, state.global_step
        plan, progress = trainer.plan, trainer.plan[step].progress
        due = controller.due(progress, plan.budget - plan[step].spent)
        if not due:
            return
        cost = {strategy: controller.relative_cost[strategy] for strategy in due}
        draws = range(step * controller.draws, (step + 1) * controller.draws)
        accumulator = take_probe(trainer, trainer.whole_objective(), cost, draws, progress)
        before, strategy = controller.strategy, controller.decide(accumulator, progress)
        charge = controller.cost_of(due)
        plan.revise(step, controller.schedule(), charge)
        args.max_steps = state.max_steps = Derived(plan.num_steps)
        errors = accumulator.result()
        logs = {"probe_units": charge, "probe_moved": float(strategy != before), "probe_tokens": 0.0}
        if step:  # the first probe, of all rungs, compares no pair
            logs["probe_evidence"] = controller.score  # of this probe and those before it; clear above 1.96
        logs["probe_tokens"] = float(strategy.online.kept_tokens(trainer.objective.config.image_size))
        for name, probed in (("", due[0]), ("_next", due[-1])) if len(due) == 2 else (("", strategy),):
            error = errors[probed]
            logs[f"probe_bias2{name}"], logs[f"probe_ca_mse{name}"] = error.bias2, error.ca_mse
            logs["probe_reference_norm2"] = error.reference_norm2  # of few draws it may be negative: no ratios
        trainer.log(logs)
