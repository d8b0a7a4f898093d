"""The keys of recipes in groups, each declared once: type, default, help text, and what a resumed run may do with it.

The settings of pretraining that `PretrainConfig` has as well are declared in `utils/pretrain_settings.py`.
"""

import typing
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal

from ..utils.pretrain_settings import Rule, correction, fixed, free
from .checks import OBJECTIVES, PRESETS, objectives_of_batches


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
    output_dir: str = free(
        "runs/default", "folder of everything that a run writes; an interrupted run resumes from it", "run"
    )
    seed: int = fixed(0, "number that every random draw is a function of")


@dataclass
class DataKeys:
    data: str = fixed(
        "bundled",
        "images: 'bundled' digits, id of a dataset on the Hub, image folder, or parquet/arrow file or folder",
        "data",
    )
    data_config: str | None = fixed(
        None, "configuration of a dataset that has several, as its page on the Hub names them"
    )
    streaming: bool = fixed(
        False,
        "read Parquet files (in a folder, behind a URL, on the Hub) or tar files in the layout of webdataset where "
        "they lie, in a random order by pieces of files; for tar files, image_column and label_column name extensions "
        "or JSON keys",
    )
    train_split: str | None = fixed(
        None, "split to train on, or a part of it as train[:1000] or train[:10%]; default: train"
    )
    validation_split: str | None = fixed(
        None, "split to measure accuracy on; default: validation, val, test or a held-out tenth"
    )
    image_column: str | None = fixed(None, "column of the images; default: the one of type Image")
    label_column: str | None = fixed(
        None,
        "column of the labels, which only evaluation needs, or none: no labels, and folders are no classes; default: "
        "the one of type ClassLabel, or the names of the folders",
    )


@dataclass
class WorkerKeys:
    num_workers: int | Literal["auto"] = free(
        "auto",
        "processes that decode images: a number, or auto, the run's share of the CPU cores less one; images held in "
        "memory need none",
        "data",
    )


@dataclass
class ModelKeys:
    init_from: str | None = fixed(
        None,
        "folder or Hub id of an encoder to continue from: an AccelViT, a ViT, DINO, ViT-MAE or DINOv2 of transformers, "
        "a plain ViT of timm, or a file of timm's weights; it brings model, patch_size, pooling and normalisation, and "
        "image_size up to 224 pixels",
        "model",
    )
    model: str | None = fixed(
        "vit_small", f"size of the encoder: one of {', '.join(PRESETS)}; null: that of init_from, or of model_config"
    )
    model_config: dict[str, Any] = fixed(
        {}, "fields of AccelViTConfig that replace the preset's, e.g. model_config.num_hidden_layers=6"
    )
    num_channels: int = fixed(
        3, "channels of the images, from 1 to 16: 3 takes images as RGB, 1 as gray; all but RGB keep 16 bits"
    )
    image_size: int = fixed(224, "side of a view in pixels")
    patch_size: int = fixed(16, "base patch size in pixels; must divide image_size")


@dataclass
class ObjectiveKeys:
    attn_implementation: str | None = fixed(
        None, "attention of the encoder: sdpa (default), eager or flash_attention_2", "objective"
    )
    torch_compile: bool = fixed(False, "compile the encoder with torch.compile, once for each shape of the schedule")
    objective: str = fixed("moco", f"what is learned: one of {', '.join(OBJECTIVES)}")
    objective_config: dict[str, Any] = fixed({}, "settings of the objective, listed below")


@dataclass
class StepKeys:
    gradient_accumulation_steps: int = fixed(
        1,
        f"micro-batches of a step; in {objectives_of_batches()} the loss of an image depends on the other images of "
        "its micro-batch only",
        "optimisation",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = correction(
        "auto",
        "precision of autocast: no is fp32, auto what accelerate launch names, else bf16 on a GPU that has it, else no",
    )


@dataclass
class OptimizerKeys:
    learning_rate: float | Literal["auto"] = correction(
        1.5e-4,
        "highest learning rate, for this batch_size; auto: the objective's published one for 256 images (with "
        "init_from at most that of MoCo-v3), times batch_size / 256",
        "optimisation",
    )
    weight_decay: float = fixed(0.1, "weight decay of matrices; biases and norms have none")
    max_grad_norm: float = correction(0.0, "norm that gradients are clipped to; 0: they are not clipped")
    gradient_checkpointing: bool = fixed(False, "compute activations again in the backward pass, to save memory")


@dataclass
class LoggingKeys:
    logging_steps: int = free(50, "steps between two log lines", "logging and saving")
    report_to: list[str] = free(["tensorboard"], "trackers of the Trainer: tensorboard, trackio, ..., or none")


@dataclass
class SavingKeys:
    save_steps: float = free(
        0.1, "steps between two checkpoints, or below 1 a fraction of the run", "logging and saving"
    )
    save_total_limit: int = free(2, "checkpoints that are kept; at least 2, so that a kill during a save loses none")


@dataclass
class HubKeys:
    push_to_hub: bool = free(False, "upload to the Hub at checkpoints, in the background, and at the end", "Hub")
    hub_model_id: str | None = free(
        None, "repository on the Hub, as user/name; default: the name of output_dir, in your account"
    )
    hub_private: bool = free(False, "make the repository on the Hub private when it is created")
    hub_optimizer: bool = free(False, "upload the optimizer's state, too, so that others can resume the run")
    license: str = free("apache-2.0", "license of the model, for its card; with init_from that of the weights")
