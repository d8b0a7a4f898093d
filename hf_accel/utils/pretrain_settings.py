"""The settings of pretraining that transformers' `TrainingArguments` do not have.

`PretrainConfig` and the recipes of pretraining have them in common: names, types, defaults, help texts and checks. This
module imports no torch, so that a recipe is checked, and `--help` answered, before anything slow is imported.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

from .errors import fail
from .values import as_type

_AMOUNT = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*"
EPOCHS = re.compile(_AMOUNT + r"epochs?\s*")
TIME = re.compile(_AMOUNT + r"(minute|hour)s?\s*")

CONTINUED_RATE = 1.5e-4
"""The highest learning rate of `auto` for 256 images where training continues from released weights."""

Rule = Literal["fixed", "correction", "free"]
"""Whether a setting may change between an interrupted run and its continuation.

A fixed one may not. A correction may change from a checkpoint on, because everything before it stays as it was. A free
one may always change, because the training does not depend on it.
"""


def setting(default: Any, text: str, group: str = "", *, resume: Rule) -> Any:
    """A dataclass field with its help text, and for a recipe the heading that it opens in `--help`."""
    metadata = {"help": text, "group": group, "resume": resume}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


fixed = partial(setting, resume="fixed")
correction = partial(setting, resume="correction")
free = partial(setting, resume="free")


@dataclass
class PretrainSettings:
    """What a budget, its schedule and the kNN accuracy need."""

    budget: float | str | None = fixed(
        None,
        "units to spend; or 'N epochs': what so many epochs cost without compression (a unit is a forward pass of the "
        "encoder on one uncompressed image); or 'N minutes' or 'N hours', which implies cost=measured",
        "budget",
    )
    continue_from: str | None = fixed(
        None,
        "output_dir of a finished run, or one of its checkpoints, to train further in another output_dir: from its "
        "weights and optimizer, for a budget of its own; what a recipe leaves open is as in that run",
    )
    schedule: list[Any] | str | None = fixed(
        "standard",
        "list of stages, path of a YAML file of them, standard, auto (found while the run trains), or null (no "
        "compression); standard: patches of four times the side until 40% of the budget, twice until 80%; with "
        "init_from half of the patches left out until 80%; with continue_from the compression of the last step there",
    )
    cost: Literal["analytic", "measured"] | None = fixed(
        None,
        "units from FLOPs (analytic), or timed on this device (measured): whole steps of a run, forward passes of a "
        "search; default: analytic, for a budget in minutes or hours measured",
    )
    auto_share: float = fixed(0.03, "share of the budget that the probes of schedule=auto may spend")
    auto_draws: int = fixed(8, "paired gradients of a probe of schedule=auto; up to 64 if auto_share pays for them")
    search_criterion: Literal["ca_mse", "gain"] = fixed(
        "ca_mse",
        "what a strategy is chosen by: ca_mse, the paper's cost-adjusted error, or gain, the decrease of the loss per "
        "unit to first order",
    )
    batch_size: int = fixed(256, "images of a step, over all processes and micro-batches", "optimisation")
    lr_schedule: Literal["cosine", "poly"] = fixed(
        "cosine", "learning rate after the warm-up: cosine, or poly, which is base x (1 - progress^2)"
    )
    warmup: float = correction(0.1, "progress over which the learning rate rises linearly")
    weight_decay_end: float | None = fixed(
        None, "weight decay at the end, reached along a cosine of progress; default: weight_decay throughout"
    )
    freeze_encoder: float | None = fixed(
        None,
        "progress until which the encoder stays as it is while the heads learn, at the cost of any other step; its "
        "learning rate then rises over warmup; default: 0.1 with init_from, otherwise 0",
    )
    layer_decay: float | None = fixed(
        None,
        "factor on the learning rate from each layer of the encoder to the one below it; default: 0.75 with init_from, "
        "otherwise 1",
    )
    augmentation: str = fixed(
        "moco", "how views are drawn: moco, or digits, which neither mirrors nor colours them", "views"
    )
    normalisation: Literal["imagenet", "data"] | None = fixed(
        None,
        "mean and deviation that channels are normalised by: imagenet, or data, measured on 128 training images; "
        "default: those of init_from, imagenet for RGB images, data for other channels",
    )
    view_resolution: Literal["full", "matched"] = fixed(
        "matched",
        "pixels of the views: matched, which makes the views of larger patches at a proportionally lower resolution "
        "(same tokens, less data work), or full; where the patches of the two branches differ, views are full",
    )
    view_backend: Literal["auto", "eager", "fused"] = correction(
        "auto",
        "how views are made: eager, operation by operation, or fused, by compiled graphs in fewer passes over memory; "
        "auto measures which is faster, where compiling pays",
    )
    cache: Literal["none", "ram", "device", "auto"] = correction(
        "auto",
        "where images are kept, decoded once and shrunk to what their crops need: none, ram, device (the accelerator's "
        "memory), or auto, which takes at most half of the free memory",
    )
    eval_points: list[float] = free(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        "progress at which the features are measured: RankMe, alpha-ReQ, with labels accuracy, and LiDAR if the budget "
        "pays for its views",
        "evaluation",
    )
    keep_points: list[float] = free([], "progress at which a checkpoint is kept for good, in kept/ of output_dir")
    knn_k: int = free(20, "neighbours of the kNN accuracy")
    knn_temperature: float = free(0.07, "temperature of the neighbours' votes")

    def check_pretraining(self) -> None:
        """Take each setting to its type, check what its values allow, and choose a cost where none is named.

        Raises:
            SettingError: a value or a combination that is not possible.
        """
        self._check_budget()
        if isinstance(self.schedule, str) and self.schedule.lower() in ("none", "null"):
            self.schedule = None  # A command line of `HfArgumentParser` knows no other None.
        for name in ("batch_size", "knn_k", "knn_temperature"):
            if getattr(self, name) <= 0:
                fail(name, getattr(self, name), "must be above 0")
        if not 0 <= self.warmup <= 1:
            fail("warmup", self.warmup, "must lie in [0, 1]")
        if self.weight_decay_end is not None and self.weight_decay_end < 0:
            fail("weight_decay_end", self.weight_decay_end, "must not be negative")
        if self.freeze_encoder is not None and not 0 <= self.freeze_encoder < 1:
            fail("freeze_encoder", self.freeze_encoder, "must be a share of the budget, from 0 to below 1")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            fail("layer_decay", self.layer_decay, "must be above 0 and at most 1")
        if not 0 < self.auto_share < 1:
            fail("auto_share", self.auto_share, "must lie between 0 and 1")
        if self.auto_draws < 3:
            fail("auto_draws", self.auto_draws, "an estimate with an interval needs at least 3")
        for name in ("eval_points", "keep_points"):
            if any(not isinstance(p, int | float) or not 0 <= p <= 1 for p in getattr(self, name)):
                fail(name, getattr(self, name), "must be numbers in [0, 1]")

    def _check_budget(self) -> None:
        if isinstance(self.budget, str):
            amount = EPOCHS.fullmatch(self.budget) or TIME.fullmatch(self.budget)
            if amount and not float(amount[1]):
                fail("budget", self.budget, "must be above 0")
            try:
                self.budget = self.budget if amount else float(self.budget)
            except ValueError:
                problem = "must be a number of units or, as '100 epochs', a number of epochs, minutes or hours"
                fail("budget", self.budget, problem)
        take_types(self, {key.name: key.type for key in fields(PretrainSettings)})
        if self.budget is None or (isinstance(self.budget, int | float) and not 0 < self.budget < float("inf")):
            fail("budget", self.budget, "pretraining needs a budget, e.g. '100 epochs' or 400000 (units)")
        in_time = budget_in_seconds(self.budget) is not None
        if in_time and self.cost == "analytic":
            fail("cost", self.cost, f"budget={self.budget!r} is a time, which takes cost=measured: leave cost out")
        self.cost = self.cost or ("measured" if in_time else "analytic")


def budget_in_seconds(budget: float | str | None) -> float | None:
    """Return the seconds of a budget in minutes or hours, and None for any other budget."""
    time = TIME.fullmatch(budget) if isinstance(budget, str) else None
    return float(time[1]) * {"minute": 60, "hour": 3600}[time[2]] if time else None


def scale_learning_rate(objective: str, base: float | None, batch_size: int, continues: bool) -> float:
    """Return the learning rate that `auto` stands for: linear in the batch, as MoCo-v3, SLIP and DINO scale theirs.

    Released weights are to be changed little, so no objective continues from them with more than `CONTINUED_RATE`, the
    rate of MoCo-v3. It is that of the heads: `layer_decay` and `freeze_encoder` take care of the encoder.

    Args:
        objective, base: name of the objective, and its `base_learning_rate`, for 256 images.
        batch_size: images of a step, over all processes and micro-batches.
        continues: whether training continues from released weights.

    Raises:
        SettingError: the objective has no such rate.
    """
    if base is None:
        fail("learning_rate", "auto", f"{objective} has no base_learning_rate: give a number, or set it in its class")
    return (min(base, CONTINUED_RATE) if continues else base) * batch_size / 256


def take_types(settings: Any, hints: Mapping[str, Any]) -> None:
    """Take attributes to the types of `hints`: a tuple to a list, and text such as 1e-3 to the number.

    Raises:
        SettingError: a value is of another type.
    """
    for name, hint in hints.items():
        value = getattr(settings, name)
        if hasattr(value, "item"):  # a number of NumPy or torch
            value = value.item()
        setattr(settings, name, as_type(name, [*value] if isinstance(value, tuple) else value, hint))


def budget_in_units(budget: float | str, images: int, units_per_image: float) -> float:
    """`budget` in units; "N epochs" is what N passes over `images` cost at `units_per_image`, uncompressed."""
    epochs = EPOCHS.fullmatch(budget) if isinstance(budget, str) else None
    return float(epochs[1]) * images * units_per_image if epochs else float(budget)
