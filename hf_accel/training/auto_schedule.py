"""`schedule: auto` inside a run: probes before the steps where one is due, and the plan that follows from them."""

from typing import Any

from transformers import TrainerCallback

from ..distributed.stopping import stop_together
from ..schedule_search.gradient_error import GradientErrorAccumulator, GradientNotFinite
from ..schedule_search.gradient_probe import GradientProbe
from ..schedule_search.ladder import OnlineController
from .config import Derived


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
        accumulator = self._probe(due, step, progress)
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

    def _probe(self, due, step: int, progress: float) -> GradientErrorAccumulator:
        trainer, controller = self.trainer, self.controller
        cost = {strategy: controller.relative_cost[strategy] for strategy in due}
        accumulator = GradientErrorAccumulator(cost)
        probe = GradientProbe(trainer.whole_objective(), trainer.args, trainer.source, progress)
        for draw in range(step * controller.draws, (step + 1) * controller.draws):
            stop_together()  # the launch that resumes probes from the first draw on
            reference = probe(None, draw)
            gradients = {s: reference if s == controller.ladder[-1] else probe(s, draw) for s in due}
            try:
                accumulator.add(reference, gradients)
            except GradientNotFinite:
                trainer.diverged()
        return accumulator
