"""Fine-tune a whole encoder with a linear classifier, with the transformers Trainer and the recipe of DeiT and MAE.

The recipe is AdamW with layer decay (arXiv 2003.10555), cosine with warm-up, random resized crops and mirror images,
mixup, CutMix, label smoothing and stochastic depth (arXiv 2012.12877, 2111.06377), without erasing and RandAugment.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from .. import distributed
from ..checkpoints import input_of
from ..data import ImageSource, TrainSampler, ViewConfig, make_views, train_loader
from ..distributed.stopping import stop_together
from ..utils.causes import reason
from ..utils.seeding import generator
from .encoders import processed_loader
from .metrics import topk_hits
from .mixing import mix_batch

DEPTH = re.compile(r"(?:^|\.)(?:layers?|blocks|stages)\.(\d+)\.")
NOT_DECAYED = ("cls_token", "mask_token", "register_tokens", "position_embeddings")


class NotFineTunable(ValueError):
    """The encoder cannot be fine-tuned, or not with these settings, whatever the images are."""


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings of fine-tuning; the defaults are for a ViT-S or ViT-B on some thousands of natural images or more.

    Args:
        epochs: passes over the training images.
        batch_size: images of a step, over all processes.
        learning_rate: highest learning rate of the last layers, for this batch size.
        warmup: share of the steps over which the learning rate rises.
        weight_decay: weight decay of matrices.
        layer_decay: factor on the learning rate from each layer to the one below.
        label_smoothing: share of the target that is spread over all classes.
        mixup: alpha of mixup's Beta distribution; 0 turns mixup off.
        cutmix: alpha of CutMix's Beta distribution; 0 turns CutMix off.
        drop_path_rate: stochastic depth of the last layer, for encoders whose config has it (ViT's does not).
        crop_scale: least area of a crop, as a fraction of the image's.
        flip: probability of a mirror image; 0 where mirroring changes the meaning, as for digits.
    """

    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    drop_path_rate: float = 0.1
    crop_scale: float = 0.08
    flip: float = 0.5

    def __post_init__(self):
        ranges = {
            "epochs": (1, None),
            "batch_size": (1, None),
            "learning_rate": (1e-12, None),
            "warmup": (0, 1),
            "weight_decay": (0, None),
            "layer_decay": (1e-12, 1),
            "label_smoothing": (0, 0.999),
            "mixup": (0, None),
            "cutmix": (0, None),
            "drop_path_rate": (0, 0.999),
            "crop_scale": (1e-6, 1),
            "flip": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                raise ValueError(f"{name}={value} must be at least {low}" + (f" and at most {high}" if high else ""))


def build_classifier(
    encoder: PreTrainedModel, class_names: list[str], drop_path_rate: float, seed: int
) -> PreTrainedModel:
    """Build `AutoModelForImageClassification` with the weights of `encoder` and a new classifier, drawn by `seed`.

    No part of the encoder is frozen. Its stochastic depth is `drop_path_rate` if its config has that field.

    Raises:
        NotFineTunable: no classification model exists for the encoder's type, or it has another structure.
    """
    try:
        return _load_classifier(encoder, class_names, drop_path_rate, seed)
    except NotFineTunable:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise NotFineTunable(f"{type(encoder).__name__} cannot be made a classifier: {reason(error)}") from error


def _load_classifier(
    encoder: PreTrainedModel, class_names: list[str], drop_path_rate: float, seed: int
) -> PreTrainedModel:
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    config.architectures = []  # transformers reads them if a type has several classification models
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: label for label, name in enumerate(class_names)}
    for name, value in {"drop_path_rate": drop_path_rate, "freeze_patch_projection": False}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "classifier").initial_seed())
        try:
            model = AutoModelForImageClassification.from_config(config)
        except ValueError as error:
            raise NotFineTunable(
                f"transformers has no image classification model of type {config.model_type!r}"
            ) from error
    inner = getattr(model, model.base_model_prefix)
    missing, left = inner.load_state_dict(encoder.state_dict(), strict=False)
    odd = [*missing, *(name for name in left if not name.startswith("pooler."))]
    if odd:
        raise NotFineTunable(f"{type(model).__name__} and {type(encoder).__name__} differ in {', '.join(odd[:3])}, ...")
    return model


def compute_layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter by name: `layer_decay ** (layers above it)`.

    As in BEiT and MAE, parameters before the L layers count as layer 0, the layers as 1 to L, and those after them as
    L + 1. A hierarchical encoder is divided by its stages. Raises NotFineTunable if no name has a number.
    """
    names = [name for name, _ in model.named_parameters()]
    depths = {name: int(found[1]) for name in names if (found := DEPTH.search(name))}
    if not depths and layer_decay != 1:
        raise NotFineTunable(
            f"layer_decay={layer_decay}: {type(model).__name__} has no numbered layers; "
            "set finetune_config.layer_decay=1.0"
        )
    last = max(depths.values(), default=-1) + 2
    layer = {name: depths[name] + 1 if name in depths else 0 if "embeddings." in name else last for name in names}
    return {name: layer_decay ** (last - number) for name, number in layer.items()}


def parameter_groups(model: nn.Module, config: FineTuneConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups by learning rate and weight decay, which tokens, positions and vectors do not have."""
    scales, groups = compute_layer_scales(model, config.layer_decay), {}
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and not name.endswith(NOT_DECAYED)
        groups.setdefault((scales[name], decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": config.learning_rate * scale, "weight_decay": config.weight_decay * decayed}
        for (scale, decayed), parameters in groups.items()
    ]


class FineTuneTrainer(Trainer):
    """Trains a classifier on augmented `source` and measures it on `validation`, whose images `processor` makes."""

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        config: FineTuneConfig,
        source: ImageSource,
        validation: ImageSource,
        processor: Any,
    ):
        self.config, self.source, self.validation, self.processor = config, source, validation, processor
        self.size, self.mean, self.std = input_of(processor)
        crop_scale = (config.crop_scale, 1.0)
        self.views = [ViewConfig(crop_scale=crop_scale, jitter=0, grayscale=0, blur=0, flip=config.flip)]
        groups = parameter_groups(model.to(args.device), config)  # pyright: ignore[reportArgumentType]
        images: dict[str, Any] = {"train_dataset": source, "eval_dataset": validation}
        super().__init__(
            model=model,
            args=args,
            optimizers=(torch.optim.AdamW(groups, lr=config.learning_rate), None),
            compute_metrics=average_hits,
            preprocess_logits_for_metrics=count_hits,
            **images,
        )
        self.add_callback(StopCallback())

    def get_train_dataloader(self):
        """One pass is the whole run."""
        args = self.args
        shard = (args.per_device_train_batch_size, args.world_size, args.process_index)
        order: dict[str, Any] = {"seed": args.seed, "last_step": args.max_steps, "shards": self.source.shards}
        sampler = TrainSampler(len(self.source), *shard, **order)
        options: dict[str, Any] = {"seed": args.seed, "pin_memory": args.device.type == "cuda"}
        workers = args.dataloader_num_workers
        return train_loader(self.source, sampler, self.views, lambda step: self.size, workers, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None):
        loader = processed_loader(
            self.validation, self.processor, self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model, inputs: dict[str, Any], num_items_in_batch=None):
        # because stochastic depth draws from the global generators
        torch.manual_seed(generator(self.args.seed, "model", inputs["step"], distributed.rank()).initial_seed())
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        if "step" in inputs:
            images, targets = self._augmented(inputs)
            return F.cross_entropy(
                model(pixel_values=images).logits, targets, label_smoothing=self.config.label_smoothing
            )
        self.validation.report(inputs["bad"])
        logits = model(pixel_values=inputs["pixel_values"]).logits
        return F.cross_entropy(logits, inputs["labels"]), {"logits": logits}

    def _augmented(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        seed, step, classes = self.args.seed, inputs["step"], len(self.source.class_names or [])
        draw = (inputs["rows"], inputs["global_batch"])
        (images,) = make_views(inputs, self.views, self.size, seed, step, 0, *draw, self.mean, self.std)
        labels = self.source.labels[inputs["index"].cpu()].to(images.device)  # pyright: ignore[reportOptionalSubscript]
        alphas = (self.config.mixup, self.config.cutmix)
        return mix_batch(images, labels, classes, *alphas, seed, step, distributed.rank())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The Trainer takes the whole run, which is one pass of the loader, for one epoch.
        self.state.epoch = self.state.global_step * self.config.epochs / self.args.max_steps
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        return 0  # batches have no input that the Trainer's estimate knows


class StopCallback(TrainerCallback):
    """Ends training or evaluation between two batches when a stop is requested."""

    def on_step_begin(self, args, state, control, **kwargs):
        stop_together()

    def on_prediction_step(self, args, state, control, **kwargs):
        stop_together()


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (B, 2) top-1 and top-5 hits for the Trainer, as the logits of all images may not fit into memory."""
    return torch.stack([topk_hits(logits, labels, n) for n in (1, 5)], 1)


def average_hits(predicted: Any) -> dict[str, float]:
    """Return `{"top1", "top5"}`, as the Trainer's `compute_metrics`."""
    top1, top5 = torch.as_tensor(predicted.predictions).double().mean(0).tolist()
    return {"top1": top1, "top5": top5}


def finetune(
    encoder: PreTrainedModel,
    processor: Any,
    source: ImageSource,
    validation: ImageSource,
    config: FineTuneConfig,
    seed: int,
    folder: Path,
    **arguments: Any,
) -> dict[str, float]:
    """Train on labelled `source` and return `{"top1", "top5"}` on `validation`; save the classifier in `folder`.

    Accuracy is measured once, at the end, so that test images do not choose an epoch. An interrupted run starts from
    the beginning. Each process takes its share of every batch, and mixup's partners come from the same process.

    Args:
        arguments: further `TrainingArguments`, such as bf16=True.

    Raises:
        NotFineTunable: the encoder has no classifier, or does not support this layer decay.
        ValueError: a processor or batch size does not fit; the message says what to change.
        Stopped: a stop was requested.
    """
    world_size = distributed.world_size()
    if config.batch_size % world_size:
        raise ValueError(
            f"finetune_config.batch_size={config.batch_size}: must be a multiple of {world_size} processes"
        )
    names = source.class_names or []
    model = build_classifier(encoder, names, config.drop_path_rate, seed)
    sampler = TrainSampler(len(source), config.batch_size)
    training = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.epochs * sampler.steps_per_epoch,
        per_device_train_batch_size=config.batch_size // world_size,
        per_device_eval_batch_size=256,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(config.warmup * config.epochs * sampler.steps_per_epoch),
        max_grad_norm=0.0,
        seed=seed,
        save_strategy="no",
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # DINOv2 has a token for masks, which are not used here
        **arguments,
    )
    training._n_gpu = min(training._n_gpu, 1)  # several GPUs need several processes, by accelerate launch
    trainer = FineTuneTrainer(model, training, config, source, validation, processor)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder))
    if distributed.is_main():
        processor.save_pretrained(folder)
    return {name: metrics[f"eval_{name}"] for name in ("top1", "top5")}
