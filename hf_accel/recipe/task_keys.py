"""Which keys of a recipe each task reads. What a task does not read has no effect on it and is not recorded as used."""

from collections.abc import Iterable

_ALWAYS = ("task",)
_IMAGES = ("data", "data_config", "train_split", "validation_split", "image_column", "label_column")
_SIZES = ("model", "model_config", "image_size", "patch_size")
_OBJECTIVE = ("attn_implementation", "torch_compile", "objective", "objective_config")
_HUB = ("push_to_hub", "hub_model_id", "hub_private", "hub_optimizer", "license")

_NOT_OF_PRETRAINING = {
    *("checkpoint", "evaluations", "eval_patch_sizes", "eval_seeds", "linear_config", "finetune_config"),
    *("baseline", "export_format", "pilot", "search_draws", "search_memory"),
    *("search_token_dropout", "search_patch_size", "search_symmetry"),
}

_OTHER_TASKS = {
    "search": {
        *("output_dir", "seed", *_IMAGES, "augmentation", "view_resolution", *_SIZES, *_OBJECTIVE),
        *("schedule", "cost", "batch_size", "gradient_accumulation_steps", "warmup", "mixed_precision", "pilot"),
        *("search_criterion", "search_draws", "search_memory"),
        *("search_token_dropout", "search_patch_size", "search_symmetry"),
    },
    "evaluate": {
        *("output_dir", "seed", *_IMAGES, "num_workers", *_SIZES, *_OBJECTIVE, "mixed_precision"),
        *("knn_k", "knn_temperature", "logging_steps", "report_to"),
        *("checkpoint", "evaluations", "eval_patch_sizes", "eval_seeds", "linear_config", "finetune_config"),
    },
    "export": {"output_dir", "checkpoint", "export_format", "eval_patch_sizes", "model_config"},
    "card": {"checkpoint", "baseline", *_HUB},
    "cost": {"output_dir", *_SIZES, "mixed_precision"},
}

TASKS = ("pretrain", *_OTHER_TASKS)


def task_reads(task: str, key: str) -> bool:
    if key in _ALWAYS:
        return True
    return key not in _NOT_OF_PRETRAINING if task == "pretrain" else key in _OTHER_TASKS[task]


def overrides_for(task: str, overrides: Iterable[str]) -> list[str]:
    """The `key=value` overrides that the task reads, for a program that gives several tasks the same ones."""
    return [override for override in overrides if task_reads(task, override.partition("=")[0].partition(".")[0])]


def tasks_that_read(key: str) -> list[str]:
    return [task for task in TASKS if task_reads(task, key)]
