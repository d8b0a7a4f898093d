"""`PretrainConfig`: transformers' `TrainingArguments` for pretraining on a budget."""

import os
import sys
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_type_hints

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from ..compression import Schedule
from ..compression.schedule import names_file
from ..data import AUGMENTATIONS
from ..distributed.launch import DTYPES, autocast_arguments, check_launch, choose_precision, on_cpu
from ..objectives.base import REPLAYED
from ..run_folder import RunFolder
from ..utils.errors import SettingError, fail
from ..utils.pretrain_settings import PretrainSettings, take_types

EVALUATION = (
    *("per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
    *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "greater_is_better", "bf16_full_eval"),
    "fp16_full_eval",
)
LOADER = (
    *("dataloader_drop_last", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataloader_in_order", "train_sampling_strategy", "length_column_name"),
)
TEXT = (
    *("neftune_noise_alpha", "use_liger_kernel", "liger_kernel_config", "use_cache"),
    "average_tokens_across_devices",
)

INSTEAD = {
    "num_train_epochs": "set budget='N epochs'",
    "max_steps": "training ends when the budget is spent: set budget",
    "lr_scheduler_type": "set lr_schedule",
    "warmup_steps": "set warmup, a share of the budget",
    "per_device_train_batch_size": "set batch_size, which counts the images of all processes",
    "auto_find_batch_size": "a batch size is part of the result: set batch_size, and save memory by "
    "gradient_accumulation_steps",
    "eval_strategy": "set eval_points",
    "eval_steps": "set eval_points",
    "eval_delay": "set eval_points",
    "eval_on_start": "with 0.0 in eval_points the features are measured before the first step",
    "load_best_model_at_end": "the result of a run is its last encoder; set keep_points to keep earlier ones",
    "metric_for_best_model": "the result of a run is its last encoder; set keep_points to keep earlier ones",
    "lr_scheduler_kwargs": "set lr_schedule",
    "data_seed": "the order of the images is a function of seed",
    "remove_unused_columns": "the image is found in each item; leave it out",
    "ignore_data_skip": "the loader starts at the step that is next; leave it out",
    "label_smoothing_factor": "labels are never trained on; leave it out",
    "label_names": "labels are found in each item; leave it out",
    "ddp_find_unused_parameters": "the trainer sets it; leave it out",
    "ddp_broadcast_buffers": "the trainer sets it; leave it out",
    "hub_token": "log in by `hf auth login`, or set HF_TOKEN",
    "hub_revision": "a run is pushed to the main branch; leave it out",
    "hub_always_push": "a push that waits is replaced by a newer one; leave it out",
    **dict.fromkeys(EVALUATION, "kNN accuracy is measured at eval_points; leave it out"),
    **dict.fromkeys(LOADER, "the loader has one setting, dataloader_num_workers; leave it out"),
    **dict.fromkeys(TEXT, "it is for text; leave it out"),
}
"""Arguments of the Trainer that have no meaning here, and what to set in place of them."""

SET_HERE = {"lr_scheduler_type": "constant", "ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
"""Those that `PretrainConfig` sets itself, which a copy by `dataclasses.replace` passes on."""

ABOVE_0 = ("learning_rate", "gradient_accumulation_steps", "logging_steps", "save_steps")
AT_LEAST_0 = ("weight_decay", "max_grad_norm", "dataloader_num_workers", "adam_epsilon")


class Derived(int):
    """A number that follows from other settings. A copy by `dataclasses.replace` passes it on, and it is set again."""


@dataclass
class PretrainConfig(PretrainSettings, TrainingArguments):
    """
    The arguments of a [`PretrainTrainer`].

    Beside its own fields it has those of [`~transformers.TrainingArguments`], with defaults for pretraining. The budget
    decides how long training lasts, and every schedule is a function of the share of it that is spent, so arguments
    that count steps or epochs are refused.

    Args:
        output_dir (`str`): Folder of the run.
        budget (`float` or `str`): Units to spend, or `"N epochs"`: what N epochs cost without compression. A unit is a
            forward pass of the encoder on one uncompressed image. Or `"N minutes"` or `"N hours"`, from `train` to the
            last step. Required.
        continue_from (`str`, *optional*): A finished run, by its `output_dir`, or one of its checkpoints. `train`
            starts from its weights and optimizer, and `budget` is what the new run spends. The model must be made as
            it was there.
        schedule (`list`, `str`, [`Schedule`], *optional*, defaults to `"standard"`): Stages of compression, the path of
            a YAML file that holds them, `"standard"`, `"auto"`, which finds stages while training runs, or `None`, no
            compression. `"standard"` is patches of four times the side until 40% of the budget and twice until 80%.
            For a model from `from_encoder` it is half of the patches left out until 80%, and with `continue_from` the
            compression of the last step there.
        cost (`str`, *optional*): Whether units are `"analytic"`, counted in FLOPs, or `"measured"`, timed on this
            device. Default: analytic, and measured where the budget is a time.
        auto_share (`float`, defaults to 0.03): Share of the budget that the probes of `schedule="auto"` may spend.
        auto_draws (`int`, defaults to 8): Paired gradients of a probe, or up to 64 if the share pays for them.
        search_criterion (`str`, defaults to `"ca_mse"`): What a strategy is chosen by, `"ca_mse"` or `"gain"`.
        batch_size (`int`, defaults to 256): Images of a step, over all processes and micro-batches.
        lr_schedule (`str`, defaults to `"cosine"`): Learning rate after the warm-up, `"cosine"` or `"poly"`.
        learning_rate (`float`, *optional*, defaults to 1.5e-4): The highest one, for this batch size. `None` takes the
            objective's published one for 256 images, times `batch_size / 256`.
        warmup (`float`, defaults to 0.1): Progress over which the learning rate rises.
        weight_decay_end (`float`, *optional*): Weight decay at the end, reached along a cosine.
        freeze_encoder (`float`, *optional*): Progress until which only the heads learn. Default: 0.1 for a model from
            `from_encoder`, otherwise 0.
        layer_decay (`float`, *optional*): Factor on the learning rate from each layer of the encoder to the one below.
            Default: 0.75 for a model from `from_encoder`, otherwise 1.
        augmentation (`str`, defaults to `"moco"`): How views are drawn.
        normalisation (`str`, *optional*): What channels are normalised by, `"imagenet"` or `"data"`, the mean and
            deviation of training images. Default: as a model from `from_encoder` has it, ImageNet for RGB, else data.
        view_resolution (`str`, defaults to `"matched"`): Makes the views of larger patches smaller. `"full"` does not.
        view_backend (`str`, defaults to `"auto"`): `"eager"` makes views operation by operation, `"fused"` by compiled
            graphs in fewer passes over memory, and `"auto"` measures which is faster.
        cache (`str`, defaults to `"auto"`): Where images are kept, decoded once and shrunk to what their crops need:
            `"none"`, `"ram"`, `"device"`, or `"auto"`, which takes at most half of the free memory.
        eval_points (`list[float]`): Progress at which the features are measured.
        keep_points (`list[float]`): Progress at which a checkpoint is kept for good, for a search.
        knn_k (`int`, defaults to 20), knn_temperature (`float`, defaults to 0.07): Neighbours, and their votes.
        bf16 (`bool`, *optional*): Autocast in bf16. Default: on a GPU that has it.
        torch_compile (`bool`, defaults to `False`): Compile the encoders, once for each shape of the schedule. One GPU
            without accumulation also replays CUDA graphs, unless `torch_compile_mode="default"`.

    Raises:
        SettingError: a value or a combination that is not possible. It is a `ValueError`.

    Example:
        >>> config = PretrainConfig("runs/photos", budget="100 epochs")
    """

    learning_rate: float | None = field(
        default=1.5e-4,
        metadata={"help": "peak of the learning rate, for this batch_size; None: the objective's, by the batch"},
    )
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay of matrices; biases and norms have none"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "norm to which gradients are clipped; 0: no clipping"})
    bf16: bool | None = field(default=None, metadata={"help": "autocast in bf16; default: on a GPU that has it"})
    seed: int = field(
        default=0, metadata={"help": "seed of every draw of training; call set_seed before the model is made"}
    )
    logging_steps: float = field(default=50, metadata={"help": "steps between log lines"})
    save_steps: float = field(
        default=0.1, metadata={"help": "steps between checkpoints, or below 1 a share of the run"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept, at least 2"})
    report_to: list[str] | str | None = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "trackers of the Trainer"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "has no meaning here"})
    ignore_data_skip: bool = field(default=True, metadata={"help": "has no meaning here"})
    hub_private_repo: bool | None = field(default=False, metadata={"help": "create the repository as a private one"})

    def __post_init__(self) -> None:
        self.output_dir = os.path.expanduser(self.output_dir or "runs/default")
        if isinstance(self.continue_from, str | os.PathLike):
            self.continue_from = os.path.expanduser(self.continue_from)
        if isinstance(self.schedule, Schedule):
            self.schedule = self.schedule.to_list()
        elif isinstance(self.schedule, os.PathLike):
            self.schedule = os.fspath(self.schedule)
        self.check_pretraining()
        if self.augmentation not in AUGMENTATIONS:
            fail("augmentation", self.augmentation, f"must be one of {list(AUGMENTATIONS)}")
        if self.save_total_limit is not None and self.save_total_limit < 2:
            problem = "must be at least 2, so that a kill during a save loses none"
            fail("save_total_limit", self.save_total_limit, problem)
        if self.hub_strategy == "all_checkpoints":
            fail("hub_strategy", "all_checkpoints", "a push holds one checkpoint; take every_save, checkpoint or end")
        if self.save_only_model:
            fail("save_only_model", True, "a run could not be resumed exactly; leave it out, and call save_model()")
        check_launch()
        self._check_schedule()
        self._refuse_foreign()
        self._check_numbers()
        if self.torch_compile_mode in REPLAYED and self.gradient_accumulation_steps > 1:
            problem = "CUDA graphs overwrite the gradients of earlier micro-batches; take default, or no accumulation"
            fail("torch_compile_mode", self.torch_compile_mode, problem)
        if self.bf16 and self.fp16:
            fail("fp16", True, "bf16 is true as well; choose one of the two")
        share = self._images_per_process()
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else "no" if self.bf16 is False else "auto"
        begun = RunFolder(str(self.output_dir)).read_recipe().get("mixed_precision")
        given = ("fp16", True) if asked == "fp16" else ("bf16", self.bf16)
        self.precision = choose_precision(asked, begun, None if asked == "auto" else given)
        for name, value in autocast_arguments(self.precision).items():
            setattr(self, name, value)
        self.per_device_train_batch_size = Derived(share)
        for name, value in SET_HERE.items():  # The learning rate is a function of progress, set at each step.
            setattr(self, name, value)
        self.use_cpu = self.use_cpu or on_cpu()
        self.logging_nan_inf_filter = False
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        compilation = self.torch_compile, self.torch_compile_backend, self.torch_compile_mode
        # Accelerate would compile the random draws as well.
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        super().__post_init__()
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = compilation
        self.torch_compile = any(compilation)  # as in `TrainingArguments`

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast computes in; None in fp32."""
        return DTYPES[self.precision]

    @property
    def compile_options(self) -> dict[str, Any]:
        """The arguments of `compile_encoders`. A GPU that works alone replays the graphs, if nothing speaks against it.

        Replayed graphs overwrite gradients at the next forward, and would be kept for every strategy that is probed.
        """
        mode = self.torch_compile_mode
        plain = self.gradient_accumulation_steps == 1 and not self.activation_checkpointing and self.schedule != "auto"
        if self.device.type == "cuda" and PartialState().distributed_type == DistributedType.NO:
            mode = mode or ("reduce-overhead" if plain and self.torch_compile_backend is None else None)
        return {"backend": self.torch_compile_backend or "inductor", "mode": mode}

    def to_dict(self) -> dict[str, Any]:
        """The arguments that the run uses, for trackers."""
        return {name: value for name, value in super().to_dict().items() if name not in INSTEAD}

    def to_sanitized_dict(self) -> dict[str, Any]:
        used = self.to_dict()
        return {name: value for name, value in super().to_sanitized_dict().items() if name in used}

    def _images_per_process(self) -> int:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        parts = self.gradient_accumulation_steps * processes
        if self.batch_size % parts:
            problem = f"must be a multiple of gradient_accumulation_steps x processes = {parts}"
            fail("batch_size", self.batch_size, problem)
        return self.batch_size // parts

    def _check_schedule(self) -> None:
        """Check all of the schedule that does not depend on the model."""
        try:
            if self.schedule != "auto":
                Schedule.parse(self.schedule, None)
        except ValueError as error:
            recorded = RunFolder(str(self.output_dir)).offer_stages() if names_file(self.schedule) else ""
            raise SettingError(f"schedule={self.schedule!r}: {error}{recorded}") from None

    def _refuse_foreign(self) -> None:
        """Refuse INSTEAD, except for what this class sets itself and for defaults.

        A dataclass does not tell an argument that was given from a default that it equals.
        """
        arguments = {argument.name: argument for argument in fields(self)}
        for name, instead in INSTEAD.items():
            value, factory = getattr(self, name), arguments[name].default_factory
            default = arguments[name].default if factory is MISSING else factory()
            ours = isinstance(value, Derived) or (name in SET_HERE and value == SET_HERE[name])
            if value != default and not ours:
                fail(name, "..." if name == "hub_token" else value, f"has no meaning here; {instead}")

    def _check_numbers(self) -> None:
        """Check the numbers among the arguments that `TrainingArguments` declares, which takes them as they are."""
        hints = {**get_type_hints(TrainingArguments), "learning_rate": float | None}
        numbers = (int, float, int | None, float | None)
        take_types(self, {name: hint for name, hint in hints.items() if hint in numbers and name not in INSTEAD})
        for name in ABOVE_0:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                fail(name, getattr(self, name), "must be above 0")
        for name in AT_LEAST_0:
            if getattr(self, name) < 0:
                fail(name, getattr(self, name), "must not be negative")
        if not 0 <= self.seed < 2**32:
            fail("seed", self.seed, "must be a whole number from 0 to 2^32 - 1")


for _name, _field in PretrainConfig.__dataclass_fields__.items():
    if "resume" in _field.metadata:  # `HfArgumentParser` takes everything in there for arguments of argparse.
        PretrainConfig.__dataclass_fields__[_name] = copy(_field)
        PretrainConfig.__dataclass_fields__[_name].metadata = MappingProxyType({"help": _field.metadata["help"]})
