"""The check of what a program passes to `PretrainTrainer`, before anything slow begins."""

from collections.abc import Mapping
from copy import copy
from typing import Any

from transformers import EarlyStoppingCallback

from ..models import AccelViTConfig, AccelViTModel
from ..objectives import ObjectiveForPreTraining
from ..utils.errors import SettingError
from ..utils.pretrain_settings import scale_learning_rate
from .config import PretrainConfig

REFUSED = {
    "compute_metrics": "kNN accuracy is measured at eval_points; a callback can measure more",
    "preprocess_logits_for_metrics": "kNN accuracy is measured at eval_points; a callback can measure more",
    "compute_loss_func": "the objective computes the loss; write an objective for another one",
    "data_collator": "the trainer makes batches and views itself; augmentation says how",
    "processing_class": "the image processor follows from the images and the model's image_size",
    "model_init": "pass the model itself",
    "label_column": "make the column of labels by dataset.class_encode_column(name)",
    "image_column": "make the column of images by dataset.cast_column(name, datasets.Image()), and remove the others",
}
"""Arguments of transformers' Trainer that would have no effect, keys of recipes, and what to do in place of them."""


def check_arguments(model: Any, args: Any, eval_dataset: Any, others: dict[str, Any]) -> None:
    """Check what type hints do not enforce, and drop from `others` what is not taken and None.

    Raises:
        TypeError: an object of another kind.
        SettingError: an argument that is not taken.
    """
    for name, instead in REFUSED.items():
        if others.pop(name, None) is not None:
            raise SettingError(f"{name}: PretrainTrainer does not take it; {instead}")
    if not isinstance(model, ObjectiveForPreTraining):
        how = "pass an objective, e.g. MoCoForPreTraining(vit_small())"
        if isinstance(model, AccelViTConfig):
            how = "pass an objective made from it, e.g. MoCoForPreTraining(config)"
        elif isinstance(model, AccelViTModel):
            how = "save it with save_pretrained(folder), and pass e.g. MoCoForPreTraining.from_pretrained(folder)"
        raise TypeError(f"model: an object of type {type(model).__name__} cannot be pretrained; {how}")
    if not isinstance(args, PretrainConfig):
        how = "pass a PretrainConfig, e.g. PretrainConfig('runs/photos', budget='100 epochs')"
        raise TypeError(f"args: an object of type {type(args).__name__} has no budget; {how}")
    if isinstance(eval_dataset, Mapping):
        raise TypeError(f"eval_dataset: it holds several datasets ({', '.join(map(str, eval_dataset))}); pass one")
    for callback in others.get("callbacks") or []:
        if callback is EarlyStoppingCallback or isinstance(callback, EarlyStoppingCallback):
            raise SettingError("callbacks: EarlyStoppingCallback has no effect: training ends when the budget is spent")


def settle_learning_rate(args: PretrainConfig, model: ObjectiveForPreTraining) -> PretrainConfig:
    """Return the arguments with the learning rate that None stands for. The given ones stay as they are."""
    if args.learning_rate is None:
        args, continues = copy(args), bool(model.config.init_from)
        args.learning_rate = scale_learning_rate(model.name, model.base_learning_rate, args.batch_size, continues)
    return args
