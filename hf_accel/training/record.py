"""What a run records about itself: its settings, the state of a checkpoint, and its results."""

import json
import time
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ..compression import Compression, Strategy
from ..compression.schedule import names_file
from ..data import CorruptImage, ImageSource
from ..distributed.launch import engine_of
from ..models.configuration_accel_vit import changed_fields
from ..utils.clock import cpu_seconds
from ..utils.pretrain_settings import PretrainSettings, Rule
from .continuing import describe_best
from .extending import note_earlier

RULES: dict[str, Rule] = {
    **{key.name: key.metadata["resume"] for key in fields(PretrainSettings)},
    **dict.fromkeys(("learning_rate", "max_grad_norm", "mixed_precision", "tf32"), "correction"),
    **dict.fromkeys(("task", "output_dir", "data", "num_workers", "logging_steps", "save_steps"), "free"),
    **dict.fromkeys(("save_total_limit", "report_to", "push_to_hub", "hub_model_id", "hub_private", "license"), "free"),
}
"""What a resumed run may do with a setting. Those that are not named are fixed."""


COLOUR_SAMPLE, COLOUR_TOLERANCE = 16, 2.0

OPTIMIZER_SETTINGS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules", "tf32")


def describe_optimizer(trainer: Any) -> dict[str, Any] | None:
    """Describe the optimizer that a program has passed, in plain values. Return None if the Trainer is to make one.

    The optimizer's learning rate and weight decay count relative to those of the run, which is how they are kept.
    """
    if trainer.optimizer is not None:
        of_run = {"params", "lr", "initial_lr", "weight_decay"}
        groups = [
            {key: value for key, value in group.items() if key not in of_run}
            for group in trainer.optimizer.param_groups
        ]
        found: dict[str, Any] = {"class": type(trainer.optimizer).__name__, "groups": groups}
    elif trainer.optimizer_cls_and_kwargs is not None:
        kind, settings = trainer.optimizer_cls_and_kwargs
        found = {"class": kind.__name__, **settings}
    else:
        return None
    return json.loads(
        json.dumps(found, default=lambda value: value.tolist() if torch.is_tensor(value) else repr(value))
    )


def describe_settings(trainer: Any) -> dict[str, Any]:
    """The settings of a run that a program has started, by the names that recipes give them."""
    args, model = trainer.args, trainer.objective
    sizes = {key: getattr(model.config, key) for key in ("image_size", "patch_size", "num_channels")}
    same = (
        *("output_dir", "seed", *(key.name for key in fields(PretrainSettings)), "gradient_accumulation_steps"),
        *("learning_rate", "weight_decay", "max_grad_norm", "torch_compile", "logging_steps", "save_steps"),
        *("save_total_limit", "report_to", "push_to_hub", "hub_model_id"),
    )
    return {
        "task": "pretrain",
        "data": trainer.source.name,
        "streaming": trainer.source.shards is not None,
        "model_config": changed_fields(model.config),
        **sizes,
        "objective": model.name,
        "objective_config": model.settings,
        **{key: getattr(args, key) for key in same},
        **({"schedule": trainer.schedule.to_list()} if names_file(args.schedule) else {}),
        **trainer.pace._asdict(),
        "optim": args.optim.value,
        **{key: getattr(args, key) for key in OPTIMIZER_SETTINGS},
        "optimizer": trainer.own_optimizer,
        "num_workers": args.dataloader_num_workers,
        "gradient_checkpointing": bool(args.activation_checkpointing),
        "mixed_precision": args.precision,
        "hub_private": bool(args.hub_private_repo),
        "license": trainer.publication().license,
        **dict.fromkeys(("model", "data_config", "image_column", "label_column")),  # a recipe's ways of naming things
    }


def sample_colours(source: ImageSource) -> list[list[float] | None]:
    """Return the mean of each channel of a few images, in levels of 8 bits, by which a resume knows other images.

    Decoders differ by less than one level. None stands for an image that cannot be read.
    """
    colours: list[list[float] | None] = []
    for index in torch.linspace(0, len(source) - 1, min(len(source), COLOUR_SAMPLE)).long().tolist():
        try:
            pixels = np.asarray(source.read(index))
            mean = pixels.mean((0, 1), dtype=np.float64) / (np.iinfo(pixels.dtype).max // 255)
        except CorruptImage:
            colours.append(None)
        else:
            colours.append([round(float(level), 1) for level in mean])
    return colours


def are_other_images(before: list[Any], now: list[Any]) -> bool:
    """Whether most images of two samples differ in their colours."""
    pairs = [pair for pair in zip(before, now, strict=True) if None not in pair]
    differ = [max(abs(a - b) for a, b in zip(*pair, strict=True)) > COLOUR_TOLERANCE for pair in pairs]
    return 2 * sum(differ) > len(pairs)


def run_state(trainer: Any) -> dict[str, Any]:
    """The counters that a resumed run continues from."""
    trainer.seconds["total"] = trainer._seconds_before + time.perf_counter() - trainer._started
    trainer.cpu_seconds = trainer._cpu_before + cpu_seconds()
    steps = trainer.state.global_step
    units = trainer.plan.spent_after(steps)
    progress = trainer.plan.progress(units)
    return {
        **{"step": steps, "units": units, "progress": progress},
        **{"seconds": trainer.seconds, "cpu_seconds": trainer.cpu_seconds},
        **{"plan": trainer.plan.state(), "engine": engine_of(trainer.accelerator), "images": len(trainer.source)},
        "colours": trainer.colours,
        **{"view_backend": trainer.view_backend, "cache": trainer.cache},
        "unreadable": {str(index): what for index, what in trainer.source.bad.items()},
        **({"evaluation_due": True} if trainer.evaluation_due else {}),
        **{"separates_encoder": trainer.separates_encoder, "continued_from": note_earlier(trainer.earlier)},
        **({"controller": trainer.controller.state()} if trainer.controller else {}),
    }


def training_results(trainer: Any) -> dict[str, Any]:
    """What results.json holds about the training so far."""
    state, plan = run_state(trainer), trainer.plan
    history = [entry for entry in trainer.state.log_history if "eval_rank_me" in entry or "eval_knn_top1" in entry]
    # Of a finished run only the end counts, and the start is no result of training.
    least = state["step"] if state["step"] >= plan.num_steps else min(1, state["step"])
    measured = next((entry for entry in reversed(history) if entry["step"] >= least), {})
    seconds = state["seconds"]
    in_parts = seconds["data"] + seconds["forward_backward"] + seconds["evaluation"]
    schedule = plan.followed()
    start, earlier = trainer.objective.config.init_from, trainer.earlier
    began_with = "continued_from" if earlier else "init_from" if start else "random_init"
    before = next((entry.get("eval_knn_top1") for entry in history if entry["step"] == 0), None)
    uncompressed = Strategy(Compression(trainer.objective.config.patch_size))
    return {
        **{name: measured.get(f"eval_{name}") for name in ("knn_top1", "knn_top5")},
        **{f"knn_top1_{name}": None for name in ("random_init", "init_from", "continued_from")},
        f"knn_top1_{began_with}": before,
        "init_from": start,
        "continued_from": note_earlier(earlier),
        "best": describe_best(trainer.state.log_history) if start else None,
        **{name: measured.get(f"eval_{name}") for name in ("ridge_top1", "rank_me", "alpha_req", "lidar")},
        "units": state["units"],
        "total_units": state["units"] + (earlier.units if earlier else 0.0),
        "budget": plan.budget,
        "budget_requested": trainer.args.budget,
        "steps": state["step"],
        "images_seen": state["step"] * plan.batch_size,
        "learning_rate": trainer.args.learning_rate,
        "seconds": {**seconds, "rest": seconds["total"] - in_parts},
        # Of the main process and its children, such as compilers, without evaluations.
        "cpu_seconds": state["cpu_seconds"],
        "processes": trainer.args.world_size,
        **{"view_backend": trainer.view_backend, "cache": trainer.cache},
        "seed": trainer.args.seed,
        "objective": trainer.objective.name,
        "schedule": schedule.to_list(),
        "units_per_image": [plan.units_per_image(stage.strategy) for stage in schedule.stages],
        "units_per_image_uncompressed": plan.units_per_image(uncompressed),
    }
