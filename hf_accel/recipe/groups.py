"""The keys of recipes in groups, each declared once: type, default, help text, and what a resumed run may do with it.

The settings of pretraining that `PretrainConfig` has as well are declared in `utils/pretrain_settings.py`.
"""

import typing
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal

from ..utils.pretrain_settings import Rule, setting
from .checks import OBJECTIVES, PRESETS, contrastive_objectives


def take(group: type, *names: str, resume: Rule | None = None) -> Any:
    """Make a dataclass that has only these keys of a group.

    Args:
        resume: what a resumed run may do with the keys, if it is not what the group declares.
    """
    hints, heading, taken = typing.get_type_hints(group), "", []
    for key in fields(group):
        heading = key.metadata["group"] or heading
        if key.name in names:
            metadata = {**key.metadata, "group": heading, "resume": resume or key.metadata["resume"]}
            copy = field(default=key.default, default_factory=key.default_factory, metadata=metadata)  # pyright: ignore
            taken.append((key.name, hints[key.name], copy))
    return make_dataclass("".join(name.title() for name in names), taken)


@dataclass
class RunKeys:
    output_dir: str = setting(
        "runs/default",
        "folder of everything that a run writes; an interrupted run resumes from it",
        "run",
        resume="free",
    )
    seed: int = setting(0, "number that every random draw is a function of", resume="fixed")


@dataclass
class DataKeys:
    data: str = setting(
        "bundled",
        "images: 'bundled' digits, id of a dataset on the Hub, image folder, or parquet/arrow file or folder",
        "data",
        resume="fixed",
    )
    data_config: str | None = setting(
        None, "configuration of a dataset that has several, as its page on the Hub names them", resume="fixed"
    )
    train_split: str | None = setting(
        None, "split to train on, or a part of it as train[:1000] or train[:10%]; default: train", resume="fixed"
    )
    validation_split: str | None = setting(
        None, "split to measure accuracy on; default: validation, val, test or a held-out tenth", resume="fixed"
    )
    image_column: str | None = setting(None, "column of the images; default: the one of type Image", resume="fixed")
    label_column: str | None = setting(
        None,
        "column of the labels, which only evaluation needs, or none: no labels, and folders are no classes; default: "
        "the one of type ClassLabel, or the names of the folders",
        resume="fixed",
    )


@dataclass
class WorkerKeys:
    num_workers: int = setting(
        0, "processes that decode images; 0 is right for data held in memory", "data", resume="free"
    )


@dataclass
class ModelKeys:
    model: str = setting("vit_small", f"size of the encoder: one of {', '.join(PRESETS)}", "model", resume="fixed")
    model_config: dict[str, Any] = setting(
        {},
        "fields of AccelViTConfig that replace the preset's, e.g. model_config.num_hidden_layers=6",
        resume="fixed",
    )
    image_size: int = setting(224, "side of a view in pixels", resume="fixed")
    patch_size: int = setting(16, "base patch size in pixels; must divide image_size", resume="fixed")


@dataclass
class ObjectiveKeys:
    attn_implementation: str | None = setting(
        None, "attention of the encoder: sdpa (default), eager or flash_attention_2", "objective", resume="fixed"
    )
    torch_compile: bool = setting(
        False, "compile the encoder with torch.compile, once for each shape of the schedule", resume="fixed"
    )
    objective: str = setting("moco", f"what is learned: one of {', '.join(OBJECTIVES)}", resume="fixed")
    objective_config: dict[str, Any] = setting({}, "settings of the objective, listed below", resume="fixed")


@dataclass
class StepKeys:
    gradient_accumulation_steps: int = setting(
        1,
        f"micro-batches of a step; {' and '.join(contrastive_objectives())} contrast the images of a micro-batch only",
        "optimisation",
        resume="fixed",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto",
        "precision of autocast: no is fp32, auto what accelerate launch names, else bf16 on a GPU that has it, else no",
        resume="correction",
    )


@dataclass
class OptimizerKeys:
    learning_rate: float = setting(
        1.5e-4, "highest learning rate, for this batch_size", "optimisation", resume="correction"
    )
    weight_decay: float = setting(0.1, "weight decay of matrices; biases and norms have none", resume="fixed")
    max_grad_norm: float = setting(
        0.0, "norm that gradients are clipped to; 0: they are not clipped", resume="correction"
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass, to save memory", resume="fixed"
    )


@dataclass
class LoggingKeys:
    logging_steps: int = setting(50, "steps between two log lines", "logging and saving", resume="free")
    report_to: list[str] = setting(
        ["tensorboard"], "trackers of the Trainer: tensorboard, trackio, ..., or none", resume="free"
    )


@dataclass
class SavingKeys:
    save_steps: float = setting(
        0.1,
        "steps between two checkpoints, or below 1 a fraction of the run",
        "logging and saving",
        resume="free",
    )
    save_total_limit: int = setting(
        2, "checkpoints that are kept; at least 2, so that a kill during a save loses none", resume="free"
    )


@dataclass
class HubKeys:
    push_to_hub: bool = setting(
        False, "upload to the Hub at checkpoints, in the background, and at the end", "Hub", resume="free"
    )
    hub_model_id: str | None = setting(
        None, "repository on the Hub, as user/name; default: the name of output_dir, in your account", resume="free"
    )
    hub_private: bool = setting(False, "make the repository on the Hub private when it is created", resume="free")
    hub_optimizer: bool = setting(
        False, "upload the optimizer's state, too, so that others can resume the run", resume="free"
    )
    license: str = setting("apache-2.0", "license of the model, for its card", resume="free")
