"""`PretrainTrainer`: the transformers Trainer, driven by a plan that spends a budget along a schedule."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import distributed
from ..compression import Compression, Plan, Strategy
from ..compression.cost import TABLE_NAME
from ..data import AUGMENTATIONS, ImageSource, TrainSampler, eval_loader, image_processor, make_views, train_loader
from ..data.loader import StepBatches, WholeRun
from ..distributed.launch import engine_of
from ..distributed.sharding import is_sharded, separate_group, shards, whole_state
from ..distributed.signals import stopping_on_sigterm
from ..distributed.stopping import Stopped, stop_agreed, stop_requested
from ..evaluation import extract_features, knn_accuracy
from ..objectives import Draw, ObjectiveForPreTraining
from ..recipe import Recipe
from ..run_folder import last_complete_checkpoint, remove_interrupted, remove_old, seal, writing
from ..schedule_search.ladder import OnlineController
from ..utils.seeding import generator
from .auto_schedule import AutoScheduleCallback
from .callbacks import ProgressCallback
from .monitoring import CollapseMonitor
from .resuming import take_over

KEPT_NAME = "kept"
"""Folder in `output_dir` of the checkpoints at `keep_points`, which are not removed."""


class TrainingDiverged(RuntimeError):
    """The loss is NaN or infinite."""


class PretrainTrainer(Trainer):
    """Trains an objective until its budget is spent.

    Args:
        recipe: the settings.
        plan: strategy and progress of every step.
        source: training images.
        validation: labelled images for kNN accuracy, or None.
        controller: revises the plan while it is followed (`schedule: auto`), or None.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: ObjectiveForPreTraining,
        args: TrainingArguments,
        recipe: Recipe,
        plan: Plan,
        source: ImageSource,
        validation: ImageSource | None = None,
        controller: OnlineController | None = None,
        **kwargs: Any,
    ):
        self.recipe, self.plan, self.source, self.validation = recipe, plan, source, validation
        self.controller, self.most_steps, self.keep_now = controller, plan.num_steps, False
        self.stopped = self.evaluation_due = False
        self.view_configs = model.view_configs(AUGMENTATIONS[recipe.augmentation])
        self.seconds = {"total": 0.0, "data": 0.0, "forward_backward": 0.0, "evaluation": 0.0}
        self.cpu_seconds = 0.0
        self._metric_sums: dict[str, torch.Tensor] = {}
        self._metric_count = 0
        self._window = (time.perf_counter(), 0, 0.0)
        images: dict[str, Any] = {"train_dataset": source, "eval_dataset": validation}
        processor = image_processor(source, recipe.image_size)  # saved in checkpoints, which pipelines open with it
        super().__init__(model=model, args=args, processing_class=processor, **images, **kwargs)
        if controller:
            self.add_callback(AutoScheduleCallback(self, controller))
        self.add_callback(ProgressCallback(self))
        self.add_callback(CollapseMonitor(model.collapse_symptoms))

    @property
    def objective(self) -> ObjectiveForPreTraining:
        """The model itself, out of what an engine wraps around it."""
        return cast(ObjectiveForPreTraining, self.accelerator.unwrap_model(cast(Any, self.model)))

    def whole_objective(self) -> ObjectiveForPreTraining:
        """The objective as a single process would hold it: itself, or a copy of what an engine keeps in shards.

        All processes must ask for it.
        """
        objective = self.objective
        if not is_sharded(objective):
            return objective
        with torch.random.fork_rng(devices=[]):  # its initialisation is thrown away
            copy = cast(Any, type(objective))(objective.config, **self.recipe.objective_config)
        copy.load_state_dict(whole_state(objective))
        return copy.to(self.args.device).train(objective.training)

    # Data

    def view_size(self, step: int) -> int:
        """Pixels of the views of a step: the image size, or, matched, what the step's patches leave of it."""
        if self.recipe.view_resolution == "full":
            return self.recipe.image_size
        return self.recipe.view_size(self.plan[step].strategy)

    def get_train_dataloader(self):
        """One pass is the whole run, from the step that is next: a resumed run reads no batch only to skip it."""
        args, recipe = self.args, self.recipe
        shard = (args.per_device_train_batch_size, args.world_size, args.process_index)
        steps = {"first_step": self._first_step, "last_step": self.most_steps}
        sampler = TrainSampler(len(self.source), *shard, args.gradient_accumulation_steps, recipe.seed, **steps)
        views, pinned = (self.view_configs, self.view_size), args.device.type != "cpu"
        loader = train_loader(self.source, sampler, *views, recipe.num_workers, recipe.seed, pin_memory=pinned)
        return WholeRun(loader, self.most_steps * args.gradient_accumulation_steps)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any):
        """As the Trainer's. SIGTERM stops it at a checkpoint, and `stopped` is then true."""
        self._first_step, self.stopped = 0, False
        if resume_from_checkpoint:
            self._first_step = take_over(self, Path(resume_from_checkpoint))
        self._started, self._seconds_before = time.perf_counter(), self.seconds["total"]
        self._cpu_before = self.cpu_seconds - time.process_time()
        self._window = (self._started, self._first_step, self.seconds["data"])
        with stopping_on_sigterm():
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                self.stopped |= stop_agreed()  # a signal that came after the last step
                return output
            except Stopped:
                self._save_between_steps()

    def _save_between_steps(self) -> None:
        """Save after a stop in a probe. After one before the first step of this launch there is nothing new to save."""
        self.stopped, step = True, self.state.global_step
        folder = Path(self.recipe.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        is_saved = distributed.broadcast_object(last_complete_checkpoint(self.recipe.output_dir) == folder)
        if step > self._first_step and not is_saved:
            self._save_checkpoint(cast(Any, self.model_wrapped), None)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Gives the micro-batches of a step one by one: a list of hundreds would hold their memory and open files."""
        return cast(Any, StepBatches(epoch_iterator, num_batches, self._count_wait)), None

    def _count_wait(self, seconds: float) -> None:
        self.seconds["data"] += seconds

    def _prepare_input(self, data):
        """What lies in pinned memory is on its way to the device while the host goes on."""
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # One step

    def training_step(self, model, inputs: dict[str, Any], num_items_in_batch=None):
        start = time.perf_counter()
        stop_requested()  # a sign that the run goes on, also in a step of many micro-batches
        # Stochastic depth draws from the global generators: make those, too, a function of the step alone.
        key = (inputs["step"], inputs["micro_step"], distributed.rank())
        torch.manual_seed(generator(self.recipe.seed, "model", *key).initial_seed())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seconds["forward_backward"] += time.perf_counter() - start
        return loss

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        step, micro_step = inputs["step"], inputs["micro_step"]
        views = make_views(
            inputs,
            self.view_configs,
            self.view_size(step),
            self.recipe.seed,
            step,
            micro_step,
            inputs["rows"],
            inputs["global_batch"],
            self.source.mean,
            self.source.std,
        )
        now = self.plan[step]
        output = model(views, now.strategy, Draw(self.recipe.seed, step, micro_step), now.progress)
        for name, value in output.metrics.items():
            self._metric_sums[name] = self._metric_sums.get(name, 0) + value
        self._metric_count += 1
        return (output.loss, output) if return_outputs else output.loss

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay is for matrices; by names and layer types, BatchNorms' weights would slip through."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.is_deepspeed_enabled:  # there only lr 0 keeps what is frozen for now out of a step
            separate_group(optimizer, self.objective.frozen_parameters(0.0))
        return optimizer

    def _get_learning_rate(self) -> float:
        return cast(Any, self.optimizer).param_groups[0]["lr"]

    def floating_point_ops(self, inputs) -> int:
        return 0  # the ledger is in units

    # Logging, evaluation, saving

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        steps = self.state.global_step
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self.diverged()
            logs.update(self._step_logs(steps))
        logs["units"] = self.plan.spent_after(steps)
        logs["progress"] = self.plan.progress(logs["units"])
        super().log(logs, start_time)

    def _step_logs(self, steps: int) -> dict[str, float]:
        strategy, size = self.plan[steps - 1].strategy, self.recipe.image_size
        online, target = strategy.online, strategy.target_branch
        prefix = self.objective.config.num_prefix_tokens
        now, data = time.perf_counter(), self.seconds["data"]
        since, first, data_before = self._window
        self._window = (now, steps, data)
        logs = {
            "patch_size": online.patch_size,
            "token_dropout": online.token_dropout,
            "tokens": online.kept_tokens(size) + prefix,
            "target_patch_size": target.patch_size,
            "target_token_dropout": target.token_dropout,
            "target_tokens": target.kept_tokens(size) + prefix,
            "images_per_second": (steps - first) * self.plan.batch_size / max(now - since, 1e-9),
            "data_wait_fraction": (data - data_before) / max(now - since, 1e-9),
        }
        if self.recipe.torch_compile:
            from torch._dynamo.utils import counters  # an import of seconds

            logs["compilations"] = counters["stats"]["unique_graphs"]
        for name, total in self._metric_sums.items():
            logs[name] = float(total) / self._metric_count
        self._metric_sums, self._metric_count = {}, 0
        return logs

    def diverged(self) -> NoReturn:
        """End the run with what is known and what to try."""
        kept = last_complete_checkpoint(self.recipe.output_dir)
        raise TrainingDiverged(
            f"the loss, a gradient or the weights are not finite at step {self.state.global_step} "
            f"(seed {self.recipe.seed}). Last good checkpoint: {kept or 'none yet'}. Try a lower learning_rate, a "
            "longer warmup, max_grad_norm=1.0 or mixed_precision=bf16 instead of fp16 with the same command, or, in a "
            "new output_dir, model_config.freeze_patch_projection=true"
        )

    def _is_finite(self) -> bool:
        """Whether the losses since the last log line, and the weights, are finite on every process.

        A loss tells of the weights before its step: what a step has just ruined shows in the weights alone.
        """
        weights = shards(self.objective.parameters())
        tensors = [cast(torch.Tensor, self._tr_loss), *weights, *self.objective.buffers()]
        finite = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all()
        return bool(cast(torch.Tensor, self.accelerator.gather(finite.int())).all())

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """kNN accuracy of the exported encoder, as a fraction; nothing without labels.

        After a stop there is nothing, either, and the launch that resumes evaluates first of all.

        Raises:
            Stopped: the stop came before the first step of this launch, so that there is nothing to save.
        """
        start, cpu_start = time.perf_counter(), time.process_time()
        metrics: dict[str, float] = {}
        self.evaluation_due = False
        try:
            if self.validation is not None and self.validation.labels is not None and self.source.labels is not None:
                encoder = self.whole_objective().encoder
                with torch.compiler.set_stance("force_eager"):  # its shapes are not worth a compilation
                    accuracy = knn_of(encoder, self.source, self.validation, self.recipe, self.args.device)
                metrics = {f"{metric_key_prefix}_knn_{name}": value for name, value in accuracy.items()}
                self.log(dict(metrics))
        except Stopped:
            if self.state.global_step == self._first_step:
                raise
            self.stopped = self.evaluation_due = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.stopped:
            self.control.should_save = self.control.should_training_stop = True
        taken = time.perf_counter() - start
        self.seconds["evaluation"] += taken
        self._cpu_before -= time.process_time() - cpu_start
        since, steps, data = self._window
        self._window = (since + taken, steps, data)
        return metrics

    def _save_checkpoint(self, model, trial) -> None:
        output = Path(self.recipe.output_dir)
        if self.args.should_save:  # here, as what follows makes the others wait for it
            remove_interrupted(output, self.state.global_step)
        if not self._is_finite():
            self.diverged()
        folder = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # A process that fails ends, and its launcher the others: they may wait for it within an engine's own saving
        good = last_complete_checkpoint(output)
        with writing(folder, f"Last good checkpoint: {good or 'none yet'}. Make room, and the same command resumes"):
            super()._save_checkpoint(model, trial)
            distributed.barrier()
            if self.args.should_save:
                self._complete_checkpoint(folder)
                remove_old(output, self.recipe.save_total_limit)
        distributed.barrier()  # a process that ended first could have its launcher end the others while they save

    def _complete_checkpoint(self, folder: Path) -> None:
        if self.recipe.cost == "measured":
            shutil.copy(Path(self.recipe.output_dir) / TABLE_NAME, folder)
        state = self.run_state()
        if self.keep_now:  # first: after a kill in between, the checkpoint is not resumed from and both are redone
            kept = Path(self.recipe.output_dir) / KEPT_NAME / folder.name
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            seal(kept, state)
        seal(folder, state)

    def keep_start(self) -> None:
        """Keep the model as it was initialised: there is no optimizer state yet."""
        folder = Path(self.recipe.output_dir) / KEPT_NAME / f"{PREFIX_CHECKPOINT_DIR}-0"
        with writing(folder, "Make room, and launch the same command again"):
            self.save_model(str(folder))
            if self.args.should_save:
                seal(folder, self.run_state())

    def run_state(self) -> dict[str, Any]:
        """Counters that a resumed run continues from."""
        self.seconds["total"] = self._seconds_before + time.perf_counter() - self._started
        self.cpu_seconds = self._cpu_before + time.process_time()
        steps = self.state.global_step
        units = self.plan.spent_after(steps)
        progress = self.plan.progress(units)
        state: dict[str, Any] = {"step": steps, "units": units, "progress": progress, "seconds": self.seconds}
        state["cpu_seconds"] = self.cpu_seconds
        state |= {"plan": self.plan.state(), "engine": engine_of(self.accelerator)}
        state["unreadable"] = {str(index): what for index, what in self.source.bad.items()}
        state |= {"evaluation_due": True} if self.evaluation_due else {}
        if self.controller:
            state["controller"] = self.controller.state()
        return state

    def results(self) -> dict[str, Any]:
        """What results.json tells of the training so far."""
        state, plan = self.run_state(), self.plan
        accuracies = [entry for entry in self.state.log_history if "eval_knn_top1" in entry]
        seconds = state["seconds"]
        in_parts = seconds["data"] + seconds["forward_backward"] + seconds["evaluation"]
        schedule = plan.followed()
        uncompressed = Strategy(Compression(self.recipe.patch_size))
        return {
            "knn_top1": accuracies[-1]["eval_knn_top1"] if accuracies else None,
            "knn_top5": accuracies[-1].get("eval_knn_top5") if accuracies else None,
            "knn_top1_random_init": next((e["eval_knn_top1"] for e in accuracies if e["step"] == 0), None),
            "units": state["units"],
            "budget": plan.budget,
            "steps": state["step"],
            "images_seen": state["step"] * plan.batch_size,
            "seconds": {**seconds, "rest": seconds["total"] - in_parts},
            # Of the main process, without its evaluations. Other work on the machine hardly changes this time.
            "cpu_seconds": state["cpu_seconds"],
            "processes": self.args.world_size,
            "seed": self.recipe.seed,
            "objective": self.recipe.objective,
            "schedule": schedule.to_list(),
            "units_per_image": [plan.units_per_image(stage.strategy) for stage in schedule.stages],
            "units_per_image_uncompressed": plan.units_per_image(uncompressed),
        }


def knn_of(
    encoder: torch.nn.Module,
    source: ImageSource,
    validation: ImageSource,
    recipe: Recipe,
    device: torch.device,
    patch_size: int | None = None,
    features: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> dict[str, float]:
    """kNN accuracy {"top1", "top5"} on the labelled images of `validation`, bank those of `source`.

    `features(loader)` replaces the encoder.
    """
    pairs = []
    for images in (source.labelled(), validation.labelled()):
        loader = eval_loader(images, recipe.image_size, 256, recipe.num_workers)
        pairs.append(features(loader) if features else extract_features(encoder, loader, device, patch_size))
    (bank, bank_labels), (queries, labels) = pairs
    return knn_accuracy(bank, bank_labels, queries, labels, recipe.knn_k, recipe.knn_temperature)
