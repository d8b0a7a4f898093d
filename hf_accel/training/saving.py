"""The part of `PretrainTrainer` that saves: checkpoints that a kill cannot tear, and the encoder alone."""

import shutil
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from .. import distributed
from ..distributed.sharding import is_sharded, shards, whole_state
from ..objectives import ObjectiveForPreTraining
from ..utils.writing import AGAIN, writing
from .config import PretrainConfig
from .console import quiet
from .extending import EarlierRun, load_earlier
from .publishing import PublishingTrainer
from .record import run_state


class TrainingDiverged(RuntimeError):
    """The loss is NaN or infinite."""


class SavingTrainer(PublishingTrainer):
    """A Trainer whose checkpoints are sealed once they are complete, and hold finite weights only."""

    args: PretrainConfig
    stopped: bool
    keep_now: bool
    earlier: EarlierRun | None
    _first_step: int

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """A run that continues another one begins with its weights and optimizer."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.earlier and resume_from_checkpoint is None:
            load_earlier(self)
        return prepared

    @property
    def objective(self) -> ObjectiveForPreTraining:
        """The model itself, out of what an engine wraps around it."""
        if isinstance(self.model, ObjectiveForPreTraining):  # Each step asks, and accelerate reads files to unwrap.
            return self.model
        return cast(ObjectiveForPreTraining, self.accelerator.unwrap_model(cast(Any, self.model)))

    def whole_objective(self) -> ObjectiveForPreTraining:
        """The objective as a single process would hold it: itself, or a copy of what an engine keeps in shards.

        All processes must ask for it.
        """
        objective = self.objective
        if not is_sharded(objective):
            return objective
        with torch.random.fork_rng(devices=[]):  # its initialisation is thrown away
            copy = cast(Any, type(objective))(objective.config, **objective.settings)
        copy.load_state_dict(whole_state(objective))
        return copy.to(self.args.device).train(objective.training)

    @quiet()
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the encoder that evaluation uses, with its processor and code: `AutoModel` opens the folder.

        The checkpoints of a run hold the whole model. All processes must call it.
        """
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        encoder, folder = self.whole_objective().encoder, output_dir or str(self.args.output_dir)
        if self.args.should_save:
            with writing(Path(folder), "Make room, and save again"):
                encoder.save_pretrained(folder)
                cast(Any, self.processing_class).save_pretrained(folder)

    def _save_checkpoint(self, model, trial) -> None:
        if self.args.should_save:  # First, as the others wait for it in what follows.
            self.folder.remove_interrupted(self.state.global_step)
        if not self._is_finite():
            self.diverged()
        checkpoint = self.folder.checkpoint(self.state.global_step)
        # A process that fails ends, and its launcher ends the others: they may wait for it within an engine's saving.
        good = self.folder.last_complete_checkpoint()
        remedy = f"Last good checkpoint: {good or 'none yet'}. Make room, and the same command resumes"
        with writing(checkpoint, remedy):
            limit, self.args.save_total_limit = self.args.save_total_limit, None  # Only sealed checkpoints count.
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            distributed.barrier()
            if self.args.should_save:
                self._complete_checkpoint(checkpoint)
                self.folder.remove_old(limit or 10**9)
        distributed.barrier()  # A process that ended first could have its launcher end the others while they save.

    def _complete_checkpoint(self, checkpoint: Path) -> None:
        if self.args.cost == "measured":
            shutil.copy(self.folder.cost_table, checkpoint)
        state = run_state(self)
        if self.keep_now:  # First: after a kill in between, the checkpoint is not resumed from and both are redone.
            kept = self.folder.kept / checkpoint.name
            shutil.copytree(checkpoint, kept, dirs_exist_ok=True)
            self.folder.seal(kept, state)
        self.folder.seal(checkpoint, state)

    def keep_start(self) -> None:
        """Keep the model as it was initialised; there is no optimizer state yet."""
        folder = self.folder.kept / self.folder.checkpoint(0).name
        with writing(folder, AGAIN):
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                self.folder.seal(folder, run_state(self))

    def _save_between_steps(self) -> None:
        """Save after a stop in a probe. After one before the first step of this launch there is nothing new to save."""
        self.stopped, step = True, self.state.global_step
        last = self.folder.last_complete_checkpoint()
        is_saved = distributed.broadcast_object(last == self.folder.checkpoint(step))
        if step > self._first_step and not is_saved:
            self._save_checkpoint(cast(Any, self.model_wrapped), None)

    def _is_finite(self) -> bool:
        """Whether the losses since the last log line, and the weights, are finite on every process.

        A loss is computed before its step. What the step itself has ruined shows only in the weights.
        """
        weights = shards(self.objective.parameters())
        tensors = [cast(torch.Tensor, self._tr_loss), *weights, *self.objective.buffers()]
        finite = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all()
        return bool(cast(torch.Tensor, self.accelerator.gather(finite.int())).all())

    def diverged(self) -> NoReturn:
        """End the run with what is known and what to try."""
        kept = self.folder.last_complete_checkpoint()
        raise TrainingDiverged(
            f"the loss, a gradient or the weights are not finite at step {self.state.global_step} "
            f"(seed {self.args.seed}). Last good checkpoint: {kept or 'none yet'}. Try a lower learning_rate, a "
            "longer warmup, max_grad_norm=1.0 or mixed_precision=bf16 instead of fp16 with the same command, or, in a "
            "new output_dir, model_config.freeze_patch_projection=true"
        )
