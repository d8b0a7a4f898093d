"""`PretrainConfig`: transformers' `TrainingArguments` for pretraining on a budget."""

import os
import sys
from copy import copy
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from transformers import TrainingArguments

from ..compression import Schedule
from ..data import AUGMENTATIONS
from ..distributed.launch import DTYPES, autocast_arguments, check_launch, choose_precision, on_cpu
from ..run_folder import RunFolder
from ..utils.errors import fail
from ..utils.pretrain_settings import PretrainSettings

INSTEAD = {
    "num_train_epochs": "set budget='N epochs'",
    "max_steps": "training ends when the budget is spent: set budget",
    "lr_scheduler_type": "set lr_schedule",
    "warmup_steps": "set warmup, a share of the budget",
    "per_device_train_batch_size": "set batch_size, which counts the images of all processes",
    "auto_find_batch_size": "a batch size is part of the result: set batch_size, and save memory by "
    "gradient_accumulation_steps",
    "eval_strategy": "set eval_points",
}
"""Arguments of the Trainer that have no meaning here, and what to set in place of them."""

UNUSED = {*INSTEAD, "lr_scheduler_kwargs", "eval_steps", "eval_delay", "per_device_eval_batch_size"}
"""Arguments that trackers do not get, as a run does not use them."""


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
            forward pass of the encoder on one uncompressed image. Required.
        schedule (`list`, `str`, [`Schedule`], *optional*): Stages of compression, the path of a YAML file that holds
            them, or `"auto"`, which finds them while training runs. Default: no compression.
        cost (`str`, defaults to `"analytic"`): Whether units are counted in FLOPs or `"measured"` on this device.
        auto_share (`float`, defaults to 0.03): Share of the budget that the probes of `schedule="auto"` may spend.
        auto_draws (`int`, defaults to 8): Paired gradients of a probe, or up to 64 if the share pays for them.
        search_criterion (`str`, defaults to `"ca_mse"`): What a strategy is chosen by, `"ca_mse"` or `"gain"`.
        batch_size (`int`, defaults to 256): Images of a step, over all processes and micro-batches.
        lr_schedule (`str`, defaults to `"cosine"`): Learning rate after the warm-up, `"cosine"` or `"poly"`.
        warmup (`float`, defaults to 0.1): Progress over which the learning rate rises.
        weight_decay_end (`float`, *optional*): Weight decay at the end, reached along a cosine.
        augmentation (`str`, defaults to `"moco"`): How views are drawn.
        view_resolution (`str`, defaults to `"full"`): `"matched"` makes the views of larger patches smaller.
        view_backend (`str`, defaults to `"auto"`): `"eager"` makes views operation by operation, `"fused"` by compiled
            graphs in fewer passes over memory, and `"auto"` measures which is faster.
        eval_points (`list[float]`): Progress at which kNN accuracy is measured.
        keep_points (`list[float]`): Progress at which a checkpoint is kept for good, for a search.
        knn_k (`int`, defaults to 20), knn_temperature (`float`, defaults to 0.07): Neighbours, and their votes.
        bf16 (`bool`, *optional*): Autocast in bf16. Default: on a GPU that has it.
        torch_compile (`bool`, defaults to `False`): Compile the encoders, once for each shape of the schedule.

    Raises:
        SettingError: a value or a combination that is not possible. It is a `ValueError`.

    Example:
        >>> config = PretrainConfig("runs/photos", budget="100 epochs", schedule="auto")
    """

    learning_rate: float = field(default=1.5e-4, metadata={"help": "peak of the learning rate, for this batch_size"})
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay of matrices; biases and norms have none"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "norm to which gradients are clipped; 0: no clipping"})
    bf16: bool | None = field(default=None, metadata={"help": "autocast in bf16; default: on a GPU that has it"})
    seed: int = field(default=0, metadata={"help": "seed, of which every random draw is a function"})
    logging_steps: float = field(default=50, metadata={"help": "steps between log lines"})
    save_steps: float = field(
        default=0.1, metadata={"help": "steps between checkpoints, or below 1 a share of the run"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept, at least 2"})
    report_to: list[str] | str | None = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "trackers of the Trainer"}
    )
    hub_private_repo: bool | None = field(default=False, metadata={"help": "create the repository as a private one"})

    def __post_init__(self) -> None:
        self.output_dir = os.path.expanduser(self.output_dir or "runs/default")
        if isinstance(self.schedule, Schedule):
            self.schedule = self.schedule.to_list()
        self.check_pretraining()
        if self.augmentation not in AUGMENTATIONS:
            fail("augmentation", self.augmentation, f"must be one of {list(AUGMENTATIONS)}")
        if self.save_total_limit is not None and self.save_total_limit < 2:
            problem = "must be at least 2, so that a kill during a save loses none"
            fail("save_total_limit", self.save_total_limit, problem)
        check_launch()
        share = self._images_per_process()
        self._refuse_foreign(share)
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else "no" if self.bf16 is False else "auto"
        self.precision = choose_precision(asked, RunFolder(str(self.output_dir)).read_recipe().get("mixed_precision"))
        for name, value in autocast_arguments(self.precision).items():
            setattr(self, name, value)
        self.per_device_train_batch_size = share
        self.lr_scheduler_type = "constant"  # The learning rate is a function of progress, set at each step.
        self.use_cpu = self.use_cpu or on_cpu()
        self.eval_on_start = 0.0 in self.eval_points
        self.logging_nan_inf_filter = self.remove_unused_columns = False
        self.ddp_find_unused_parameters = self.ddp_broadcast_buffers = False
        self.ignore_data_skip = True  # The loader starts at the step that is next.
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        compiled, self.torch_compile = self.torch_compile, False  # Accelerate would compile the random draws as well.
        super().__post_init__()
        self.torch_compile = compiled

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast computes in; None in fp32."""
        return DTYPES[self.precision]

    def to_dict(self) -> dict[str, Any]:
        """The arguments that the run uses, as trackers record them."""
        return {name: value for name, value in super().to_dict().items() if name not in UNUSED}

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

    def _refuse_foreign(self, images_per_process: int) -> None:
        """Refuse INSTEAD, except what this class sets itself: a copy by `dataclasses.replace` passes that on."""
        ours = {"per_device_train_batch_size": images_per_process, "lr_scheduler_type": "constant"}
        defaults = {argument.name: argument.default for argument in fields(TrainingArguments)}
        for name, instead in INSTEAD.items():
            value = getattr(self, name)
            if value != defaults[name] and value != ours.get(name, defaults[name]):
                fail(name, value, f"has no meaning here; {instead}")


for _name, _field in PretrainConfig.__dataclass_fields__.items():
    if "resume" in _field.metadata:  # `HfArgumentParser` takes everything in there for arguments of argparse.
        PretrainConfig.__dataclass_fields__[_name] = copy(_field)
        PretrainConfig.__dataclass_fields__[_name].metadata = MappingProxyType({"help": _field.metadata["help"]})
