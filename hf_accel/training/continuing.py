"""Training on from a released encoder: slower than its heads and after them, with the best weights kept."""

import logging
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from ..distributed import barrier, broadcast_object, is_main
from ..evaluation.finetune import compute_layer_scales
from ..models import AccelViTModel
from ..objectives import ObjectiveForPreTraining
from ..utils.errors import fail
from ..utils.writing import AGAIN, writing
from .config import PretrainConfig

logger = logging.getLogger(__name__)

WATCHED: dict[str, Callable[[float], float]] = {
    "eval_knn_top1": lambda start: start - 0.01,
    "eval_rank_me": lambda start: 0.9 * start,
}
"""What tells whether training does good: for a metric of evaluations, what it is not to fall below, by its start.

The first one that an evaluation has is watched: RankMe where there are no labels.
"""


class Pace(NamedTuple):
    """How an encoder learns beside its heads: the settings of these names, with their defaults filled in."""

    freeze_encoder: float = 0.0
    layer_decay: float = 1.0


def choose_pace(
    args: PretrainConfig, objective: ObjectiveForPreTraining, own_optimizer: bool, heads_have_learnt: bool = False
) -> Pace:
    """Return the settings, or the defaults, which are those of random weights unless the encoder is a released one.

    The encoder waits for new heads only.

    Raises:
        SettingError: one of them is given, and a program has passed an optimizer with groups of its own.
    """
    default = Pace()
    if objective.config.init_from and not own_optimizer:
        default = Pace(0.0 if heads_have_learnt else 0.1, 0.75)
    given = {name: getattr(args, name) for name in Pace._fields if getattr(args, name) is not None}
    for name, value in given.items():
        if own_optimizer and value != getattr(default, name):
            fail(name, value, "the optimizer that was passed has its own groups; set their lr there, and leave it out")
    return default._replace(**given)


def separate_encoder(optimizer: torch.optim.Optimizer, objective: ObjectiveForPreTraining, pace: Pace) -> None:
    """Split the groups of a new optimizer: by learning rate, and apart from the heads, with the mark "of_encoder".

    A learning rate of 0 freezes the encoder, so that every engine works as ever: weight decay is multiplied by it.
    """
    scales: dict[torch.nn.Parameter, float] = {}
    for encoder in objective.modules():
        if isinstance(encoder, AccelViTModel):
            factors = compute_layer_scales(encoder, pace.layer_decay)
            scales |= {parameter: factors[name] for name, parameter in encoder.named_parameters()}
    for group in list(optimizer.param_groups):
        heads = [parameter for parameter in group["params"] if parameter not in scales]
        parts: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter in scales:
                parts.setdefault(scales[parameter], []).append(parameter)
        group["params"] = heads
        for scale, parameters in parts.items():
            part = {**group, "params": parameters, "lr": group["lr"] * scale, "of_encoder": True}
            optimizer.add_param_group(part)


def watched_metric(metrics: Mapping[str, float]) -> str | None:
    """Return the metric of an evaluation that a run is judged by, if there is one."""
    return next((name for name in WATCHED if name in metrics), None)


def watched_values(history: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The evaluations of a log that measured a metric, in their order."""
    return [entry for entry in history if name in entry]


def describe_best(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the evaluation whose encoder `best/` holds, the metric it was chosen by ("measure") and its "start"."""
    name = next((name for name in WATCHED if watched_values(history, name)), None)
    if name is None:
        return None
    measured, measure = watched_values(history, name), name.removeprefix("eval_")
    best, first = max(measured, key=lambda entry: entry[name]), measured[0]
    return {
        **{"measure": measure, "step": best["step"], "progress": best["progress"], measure: best[name]},
        "start": first[name] if first["step"] == 0 else None,
    }


class BestCallback(TrainerCallback):
    """Keeps the best encoder in `best/`, and warns once if training makes it worse than the one it started from."""

    def __init__(self, trainer: Any):
        self.trainer, self.has_warned = trainer, False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        name = watched_metric(metrics or {})
        if name is None:
            return
        measured = watched_values(state.log_history, name)
        now, start = measured[-1][name], measured[0]
        is_best = broadcast_object(all(now > entry[name] for entry in measured[:-1]))
        if is_best and self.trainer.is_in_train:  # evaluate() may also be called before, or after, training
            self.keep()
        least = WATCHED[name](start[name])
        if start["step"] == 0 and now < least and not self.has_warned and state.is_world_process_zero:
            self.has_warned = True
            logger.warning(
                "%s is %.4g at step %d, and was %.4g with the weights that training started from: training "
                "makes the encoder worse. best/ holds the best one. If it does not recover, try in a new output_dir a "
                "lower learning_rate, a lower layer_decay or a longer freeze_encoder",
                name.removeprefix("eval_"),
                now,
                state.global_step,
                start[name],
            )

    def keep(self) -> None:
        """Replace what `best/` holds. All processes must call it."""
        folder, new = self.trainer.folder.best, self.trainer.folder.path / ".best"
        with writing(folder, AGAIN):
            self.trainer.save_model(str(new))
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
        barrier()
