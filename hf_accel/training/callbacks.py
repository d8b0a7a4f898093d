"""What happens around each step of a run: settings that are functions of progress, the target branch, a clean stop."""

from typing import Any, cast

import torch
from transformers import TrainerCallback

from ..distributed import say
from ..distributed.stopping import stop_agreed
from ..utils.progress import cosine, learning_rate_factor, thaw_factor
from .config import PretrainConfig


class ProgressCallback(TrainerCallback):
    """Sets what is a function of progress, updates the target branch, and answers a request to stop."""

    def __init__(self, trainer: Any):
        self.trainer, self.seen = trainer, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen = self.share_done(state)
        if self.trainer.is_deepspeed_enabled:
            self.wrap_engine_step(self.trainer.deepspeed, state)
        if self.trainer.earlier:
            self.trainer.objective.skip_warmup()
            for group in cast(Any, self.trainer.optimizer).param_groups:
                group["freezable"] = False
        if state.global_step == 0 and 0 in self.trainer.args.keep_points:
            self.trainer.keep_start()

    def share_done(self, state) -> float:
        """The tolerance is for points that rounding puts just above their step."""
        return self.trainer.plan.share_done(state.global_step) + 1e-12

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        progress = self.trainer.plan[state.global_step].progress
        rate = args.learning_rate * learning_rate_factor(progress, args.lr_schedule, args.warmup)
        end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
        decay = cosine(args.weight_decay, end, progress)
        frozen = bool(self.trainer.objective.frozen_parameters(progress))
        thawed = thaw_factor(progress, self.trainer.pace.freeze_encoder, args.warmup)
        for group in cast(Any, self.trainer.optimizer).param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)  # Checkpoints of earlier versions hold no factors.
            if group.get("of_encoder"):
                group["lr"] *= thawed
            if frozen and group.get("freezable"):
                group["lr"] = 0.0
            group["weight_decay"] = decay * group.get("weight_decay_factor", float(group["weight_decay"] > 0))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.is_deepspeed_enabled:  # its engine has stepped together with the backward
            return
        # fp16's gradients are true to scale: the Trainer, which has just taken their norm, has unscaled them for that
        self.before_step(state)

    def before_step(self, state) -> None:
        self.trainer.objective.before_optimizer_step(self.trainer.plan[state.global_step].progress)

    def wrap_engine_step(self, engine: Any, state) -> None:
        """DeepSpeed calls its `step` itself: do before it what is ours to do."""
        step = engine.step

        def wrapped(*args, **kwargs):
            self.before_step(state)
            step(*args, **kwargs)

        engine.step = wrapped

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.objective.update_target(self.trainer.plan[state.global_step].progress)

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        state.epoch = state.global_step * trainer.plan.batch_size / len(trainer.source)
        before, self.seen = self.seen, self.share_done(state)
        control.should_evaluate = any(before < point <= self.seen for point in trainer.args.eval_points)
        trainer.keep_now = any(before < point <= self.seen for point in trainer.args.keep_points)
        control.should_save |= trainer.keep_now
        control.should_log |= state.global_step == state.max_steps  # what came after the last full window, too
        if stop_agreed():
            trainer.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save where another callback has stopped training: the whole run is one epoch, and this is its end."""
        if state.global_step < state.max_steps and not self.trainer.stopped:
            self.trainer.stopped = control.should_save = True
            say(
                f"A callback stopped training at step {state.global_step} of {state.max_steps}. The run is not "
                "finished: train(resume_from_checkpoint=True) continues it, and save_model(folder) saves its encoder"
            )


def note_factors(optimizer: torch.optim.Optimizer, args: PretrainConfig) -> None:
    """Note for each parameter group its learning rate and weight decay relative to the run's, which schedules keep."""
    for group in cast(Any, optimizer).param_groups:
        group["lr_factor"] = group["lr"] / cast(float, args.learning_rate)
        if args.weight_decay:
            group["weight_decay_factor"] = group["weight_decay"] / args.weight_decay
        else:  # Weight decay may begin later: it is then for matrices.
            group["weight_decay_factor"] = float(all(parameter.ndim > 1 for parameter in group["params"]))
