"""`PretrainTrainer`: transformers' Trainer, driven by a plan that spends a budget along a schedule."""

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from .. import distributed
from ..compression import Strategy
from ..compression.schedule import names_file
from ..data import AUGMENTATIONS, Renderer, TrainSampler, image_processor, image_source, make_views, train_loader
from ..data.loader import StepBatches, WholeRun
from ..distributed.launch import connect_processes
from ..distributed.sharding import separate_group
from ..distributed.signals import stopping_on_sigterm
from ..distributed.stopping import Stopped, stop_agreed, stop_requested
from ..objectives import Draw, ObjectiveForPreTraining
from ..run_folder import RunFolder
from ..utils.clock import cpu_seconds
from ..utils.counts import count_of
from ..utils.errors import fail
from ..utils.pretrain_settings import Rule
from ..utils.seeding import generator
from ..utils.writing import AGAIN, write_text, writing
from .arguments import check_arguments, settle_learning_rate
from .auto_schedule import AutoScheduleCallback
from .caching import start_cache
from .callbacks import ProgressCallback, note_factors
from .config import Derived, PretrainConfig
from .console import ConsoleCallback, describe_run, quiet
from .continuing import BestCallback, Pace, choose_pace, separate_encoder
from .evaluating import EvaluatingTrainer
from .extending import choose_draw_seed, describe_earlier, read_earlier, take_normalisation
from .finish import finish_run
from .memory import explained_memory
from .monitoring import CollapseMonitor, read_metrics
from .normalising import normalise_source
from .planning import Costs, describe_plan, plan_run, read_costs, read_schedule
from .record import RULES, describe_optimizer, describe_settings, sample_colours
from .resuming import choose_checkpoint, find_costs, load_complete, take_over
from .step_costs import prepare_steps
from .streams import GpuSteps
from .timing import PredictedTime, name_bound


class PretrainTrainer(EvaluatingTrainer):
    """
    Trains an objective until its budget is spent.

    It is transformers' Trainer: callbacks, trackers, Accelerate and DeepSpeed work as there. At the end of `train` the
    folder `args.output_dir` holds `results.json`, curves, and in `final/` the encoder with its processor and card.

    Args:
        model ([`ObjectiveForPreTraining`]): For example a [`MoCoForPreTraining`].
        args ([`PretrainConfig`]): The settings.
        train_dataset: A `datasets.Dataset` or a torch `Dataset` of PIL images, uint8 or uint16 tensors (C, H, W) or
            arrays (H, W, C), bare or in dicts or tuples. Labels are optional; they serve accuracy only.
        eval_dataset (*optional*): Labelled images of the same kind, on which kNN accuracy is measured.
        record (`dict`, *optional*): The settings that `recipe.yaml` records, in place of those of `model` and `args`.
        rules (`dict`, *optional*): For each of these whether a resumed run may change it: "fixed" (the default),
            "free" or "correction".

    Attributes:
        plan ([`Plan`]): Strategy and progress of every step. With `cost="measured"` it is provisional until `train` has
            timed the steps.
        costs ([`StepCosts`] or [`CostTable`]): The measured costs that it follows from, if they are measured.
        stopped (`bool`): Whether SIGTERM or a callback has ended `train` early, at a checkpoint.

    Example:
        >>> set_seed(0)  # of transformers; the model draws its first weights when it is made
        >>> trainer = PretrainTrainer(MoCoForPreTraining(vit_small()), config, train_dataset=photos)
        >>> trainer.train()
        >>> trainer.save_model("encoder")
    """

    args: PretrainConfig
    loss_is_scaled_for_ga = False

    @quiet()
    def __init__(
        self,
        model: ObjectiveForPreTraining,
        args: PretrainConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        record: Mapping[str, Any] | None = None,
        rules: Mapping[str, Rule] | None = None,
        **kwargs: Any,
    ):
        check_arguments(model, args, eval_dataset, kwargs)
        self.scales_rate, args = args.learning_rate is None, settle_learning_rate(args, model)
        connect_processes(args, args.precision, args.torch_compile)
        self.args, self.folder, config = args, RunFolder(str(args.output_dir)), model.config
        self.source = image_source(train_dataset, "train_dataset", num_channels=config.num_channels)
        given = (eval_dataset, "eval_dataset", self.source, config.num_channels)
        self.validation = None if eval_dataset is None else image_source(*given)
        measured = take_normalisation(args, config) and args.normalisation == "data"
        self.source = normalise_source(self.source, config, None if measured else args.normalisation)
        self.validation = self.validation and self.validation.renormalised(self.source.mean, self.source.std)
        if len(self.source) < args.batch_size:
            fail("batch_size", args.batch_size, f"{self.source.title} has only {count_of(len(self.source), 'image')}")
        if args.batch_size < model.least_batch * args.gradient_accumulation_steps:
            least = f"{model.name} needs at least {model.least_batch} images in each micro-batch"
            fail("batch_size", args.batch_size, least)
        if args.torch_compile:
            model.compile_encoders(**args.compile_options)
        self.view_configs = model.view_configs(AUGMENTATIONS[args.augmentation])
        self.earlier = read_earlier(args, model)
        self.draw_seed = choose_draw_seed(args.seed, self.earlier)
        local_crop_size = next((view.size for view in self.view_configs if view.size), None)
        self.schedule = read_schedule(args, config, local_crop_size, self.earlier)
        self._make_plan = partial(plan_run, args, model, self.schedule, len(self.source))
        self.set_costs(read_costs(self.folder, args.precision) if args.cost == "measured" else None)
        self.given_record, self.rules, self.colours = record, rules or RULES, None
        self.stopped = self.evaluation_due = self.keep_now = False
        self.cache: str | None = None
        self.view_backend: str | None = None
        self.render: Renderer | None = None
        self.seconds = {"total": 0.0, "data": 0.0, "forward_backward": 0.0, "evaluation": 0.0}
        self.cpu_seconds = 0.0
        self._start_clock()
        self._metric_sums: dict[str, torch.Tensor] = {}
        self._metric_count = self._first_step = 0
        self._seconds_of_views = 0.0
        self._window = (time.perf_counter(), 0, 0.0, 0.0)
        self._gpu_steps: GpuSteps | None = None
        datasets: dict[str, Any] = {"train_dataset": self.source, "eval_dataset": self.validation}
        processor = image_processor(self.source, config.image_size)  # Pipelines open checkpoints with it.
        own_optimizer = any(kwargs.get("optimizers") or ())
        self.pace = choose_pace(args, model, own_optimizer, self.earlier is not None)
        apart = self.earlier is not None and self.earlier.separates_encoder
        self.separates_encoder = not own_optimizer and (apart or self.pace != Pace())
        super().__init__(model=model, args=args, processing_class=processor, **datasets, **kwargs)
        if self.optimizer is not None:
            note_factors(cast(Any, self.optimizer), args)
        self.own_optimizer = describe_optimizer(self)
        if args.schedule == "auto":
            self.add_callback(AutoScheduleCallback(self))
        self.add_callback(ProgressCallback(self))
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(callback)
        self.console = ConsoleCallback(self)
        self.add_callback(self.console)
        self.add_callback(CollapseMonitor(model.collapse_symptoms))
        self.add_callback(PredictedTime(self))
        if config.init_from:
            self.add_callback(BestCallback(self))

    # Costs

    def set_costs(self, costs: Costs | None) -> None:
        """Plan the run by measured costs, or by analytic ones if there are none."""
        self.costs = costs
        self.plan, self.controller = self._make_plan(costs)
        self.most_steps = self.plan.num_steps
        self.args.max_steps = Derived(self.most_steps)

    @property
    def plan_is_final(self) -> bool:
        """Whether the costs that the plan is to follow are known."""
        return self.args.cost == "analytic" or self.costs is not None

    # Data

    def view_size(self, step: int) -> int:
        """Pixels of the views of a step."""
        return self.size_under(self.plan[step].strategy)

    def size_under(self, strategy: Strategy) -> int:
        """Pixels of the views of a step under `strategy`."""
        if self.args.view_resolution == "full":
            return self.objective.config.image_size
        return self.objective.matched_view_size(strategy)

    def crop_size(self, size: int) -> int:
        """Pixels of the crops that workers cut for views of `size` pixels.

        Workers cut ahead, and under `schedule="auto"` a probe may change what is to come: then all crops are full, and
        `make_views` resizes them.
        """
        return self.objective.config.image_size if self.args.schedule == "auto" else size

    def get_train_dataloader(self):
        """One pass is the whole run, from the step that is next: a resumed run reads no batch only to skip it."""
        args = self.args
        shard = (args.per_device_train_batch_size, args.world_size, args.process_index)
        steps: dict[str, Any] = {"first_step": self._first_step, "last_step": self.most_steps}
        steps["shards"] = self.source.shards
        sampler = TrainSampler(len(self.source), *shard, args.gradient_accumulation_steps, self.draw_seed, **steps)
        # Workers also cut for steps that a plan which a probe has shortened no longer has.
        size = self.objective.config.image_size
        views = self.view_configs, (lambda step: size) if self.controller else self.view_size
        pinned = args.dataloader_pin_memory and args.device.type != "cpu"
        workers = args.dataloader_num_workers
        loader = train_loader(self.source, sampler, *views, workers, self.draw_seed, pin_memory=pinned)
        return WholeRun(loader, self.most_steps * args.gradient_accumulation_steps)

    # The run

    @quiet()
    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any):
        """Train until the budget is spent, and write results and encoder.

        SIGTERM, or a callback that sets `control.should_training_stop`, stops training at a checkpoint; `stopped` is
        then true, and nothing is finished.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): Default: start, in a folder that holds no run. True
                resumes the last complete checkpoint in `output_dir` exactly, a path that checkpoint, and `"auto"` the
                last one if there is one, as a job does that a queue may interrupt. `"auto"` returns at once where the
                run is complete, with its weights in the model.

        Raises:
            SettingError: the folder holds a run, or there is nothing to resume, or it was started with other settings.
            TrainingDiverged: the loss, a gradient or the weights are not finite.
        """
        with self.folder.lock():
            checkpoint = choose_checkpoint(self.folder, resume_from_checkpoint)
            if checkpoint and not self.plan_is_final:
                self.set_costs(find_costs(checkpoint))
            record = dict(self.given_record or describe_settings(self))
            rules: dict[str, Rule] = {key: self.rules.get(key, "fixed") for key in record}
            files = {"schedule": self.args.schedule} if names_file(self.args.schedule) else {}
            for note in self.folder.compare_settings(record, rules, files):
                distributed.say(note)
            if self.folder.is_complete() and resume_from_checkpoint == "auto":
                return load_complete(self)
            if self.args.should_save:
                with writing(self.folder.recipe, AGAIN):
                    write_text(self.folder.recipe, yaml.safe_dump(record, sort_keys=False))
            is_trained = bool(self.objective.config.init_from or self.earlier)
            starts_measured = (0.0 in self.args.eval_points or is_trained) and checkpoint is None
            self.args.eval_on_start = Derived(starts_measured)  # pyright: ignore[reportAttributeAccessIssue]
            for line in describe_run(self):
                distributed.say(line)
            if checkpoint:
                distributed.say(f"Resuming from {checkpoint}")
            elif self.earlier:
                distributed.say(describe_earlier(self.earlier))
            output = self._train(checkpoint, **kwargs)
            if not self.stopped:
                finish_run(self)
        if self.args.push_to_hub and not self.stopped:
            self.push_to_hub()
        distributed.barrier()  # A launcher ends all processes when one ends badly, and the main one may still write.
        return output

    def _train(self, checkpoint: Path | None, **kwargs: Any):
        self._first_step, self.stopped = 0, False
        self.colours = sample_colours(self.source)
        self.seconds, self.cpu_seconds = dict.fromkeys(self.seconds, 0.0), 0.0  # evaluate() may have come before
        if checkpoint:
            self._first_step = take_over(self, checkpoint)
        self._start_clock()
        start_cache(self)
        with stopping_on_sigterm():
            try:
                if prepare_steps(self, self._started):
                    for line in describe_plan(self.args, self.objective, self.plan):
                        distributed.say(line)
                self._window = (time.perf_counter(), self._first_step, self.seconds["data"], self._seconds_of_views)
                self._gpu_steps = GpuSteps(self.args.device) if self.args.device.type == "cuda" else None
                output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
                self.stopped |= stop_agreed()  # A signal may come after the last step.
                return output
            except Stopped:
                self._save_between_steps()
            finally:
                self.console.close()

    def _start_clock(self) -> None:
        self._started, self._seconds_before = time.perf_counter(), self.seconds["total"]
        self._cpu_before = self.cpu_seconds - cpu_seconds()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Gives the micro-batches of a step one by one: a list of hundreds would hold their memory and open files."""
        batches = self._gpu_steps.begin_step(epoch_iterator) if self._gpu_steps else epoch_iterator
        return cast(Any, StepBatches(batches, num_batches, self._count_wait)), None

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
        torch.manual_seed(generator(self.draw_seed, "model", *key).initial_seed())
        with explained_memory(self.args, self.objective):
            # A name for the dictionary would keep the views during the backward pass.
            loss = super().training_step(
                model, self._gpu_steps.with_views(self, inputs) if self._gpu_steps else inputs, num_items_in_batch
            )
        if self._gpu_steps:
            self._gpu_steps.end_backward()
        self.seconds["forward_backward"] += time.perf_counter() - start
        return loss

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        step, micro_step = inputs["step"], inputs["micro_step"]
        now, start = self.plan[step], time.perf_counter()
        views = inputs.pop("views", None) or self.views_of(inputs, self.view_size(step))
        self._seconds_of_views += time.perf_counter() - start
        output = model(views, now.strategy, Draw(self.draw_seed, step, micro_step), now.progress)
        for name, value in read_metrics(output.metrics, self.objective.name).items():
            self._metric_sums[name] = self._metric_sums.get(name, 0) + value
        self._metric_count += 1
        return (output.loss, output) if return_outputs else output.loss

    def views_of(self, inputs: dict[str, Any], size: int) -> list[torch.Tensor]:
        """The views of a micro-batch of the loader, `size` pixels wide where they have no size of their own."""
        where = (inputs["step"], inputs["micro_step"], inputs["rows"], inputs["global_batch"])
        normalisation = self.source.mean, self.source.std
        return make_views(inputs, self.view_configs, size, self.draw_seed, *where, *normalisation, self.render)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay is for matrices; by names and layer types, BatchNorms' weights would slip through."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.separates_encoder:
            separate_encoder(optimizer, self.objective, self.pace)
        if self.is_deepspeed_enabled:  # there only lr 0 keeps what is frozen for now out of a step
            separate_group(optimizer, self.objective.frozen_parameters(0.0))
        note_factors(optimizer, self.args)
        return optimizer

    def _get_learning_rate(self) -> float:
        return cast(Any, self.optimizer).param_groups[0]["lr"]

    def floating_point_ops(self, inputs) -> int:
        return 0  # the ledger is in units

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        steps = self.state.global_step
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self.diverged()
            logs.update(self._step_logs(steps))
        logs["units"] = self.plan.spent_after(steps)
        logs["progress"] = self.plan.progress(logs["units"])
        super().log(logs, start_time)
        if "loss" in logs:  # Trackers take numbers only.
            cast(Any, self.state.log_history[-1])["bound_by"] = name_bound(logs)

    def _step_logs(self, steps: int) -> dict[str, float]:
        strategy, config = self.plan[steps - 1].strategy, self.objective.config
        since, first, data_before, views_before = self._window
        self._window = (time.perf_counter(), steps, self.seconds["data"], self._seconds_of_views)
        now, _, data, views = self._window
        logs: dict[str, float] = {}
        for prefix, branch in (("", strategy.online), ("target_", strategy.target_branch)):
            tokens = branch.kept_tokens(config.image_size) + config.num_prefix_tokens
            logs |= branch.to_dict(prefix) | {f"{prefix}tokens": tokens}
        taken = max(now - since, 1e-9)
        logs["images_per_second"] = (steps - first) * self.plan.batch_size / taken
        logs["data_wait_fraction"] = (data - data_before) / taken
        if self.args.device.type == "cpu":
            logs["views_fraction"] = (views - views_before) / taken
        if self._gpu_steps:
            logs["device_idle_fraction"] = self._gpu_steps.take_idle_fraction()
        if self.args.torch_compile:
            from torch._dynamo.utils import counters  # an import of seconds

            logs["compilations"] = counters["stats"]["unique_graphs"]
        for name, total in self._metric_sums.items():
            logs[name] = float(total) / self._metric_count
        self._metric_sums, self._metric_count = {}, 0
        return logs
