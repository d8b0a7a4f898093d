"""`task=evaluate`: kNN, linear probe, logistic regression, fine-tuning of any encoder; adds to `results.json`."""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from ..data import ImageSource, image_processor
from ..distributed import barrier, broadcast_object, is_main, say, world_size
from ..distributed.launch import autocast_arguments, check_launch, shards_weights
from ..evaluation import (
    FineTuneConfig,
    LinearConfig,
    NotFineTunable,
    base_patch_size,
    count_input_channels,
    describe_input,
    extract_features,
    finetune,
    knn_accuracy,
    linear_probe,
    logistic_regression,
    open_encoder,
    processed_loader,
    processor_for,
    takes_patch_size,
    topk_accuracy,
    weights_digest,
)
from ..recipe import Recipe, RecipeError
from ..report import add_run, environment, find_run, format_evaluations
from ..run_folder import RunFolder
from ..utils.counts import count_of
from ..utils.errors import fail
from .setup import EVALUATED_BATCH, build_objective, choose_workers, images_of, naming, output_of, start

RANDOM = "random"
"""As `checkpoint`: the recipe's own encoder, as a run with its `seed` starts from."""


@dataclass
class Bench:
    """An encoder and the images that it is measured on."""

    recipe: Recipe
    arguments: TrainingArguments
    encoder: PreTrainedModel
    processor: Any
    weights: str
    input: dict[str, Any]
    source: ImageSource
    validation: ImageSource
    _features: dict[int | None, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.source.class_names or [])

    def features(self, patch_size: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features and labels of the training images, then of the validation images. They are cached."""
        if patch_size not in self._features:
            self._features.clear()  # evaluations of one patch size follow each other
            option = patch_size if takes_patch_size(self.encoder) else None
            pairs: list[Tensor] = []
            for images in (self.source, self.validation):
                loader = processed_loader(images, self.processor, EVALUATED_BATCH, choose_workers(self.recipe))
                pairs += extract_features(self.encoder, loader, self.arguments.device, option)
            self._features[patch_size] = tuple(pairs)
        train, train_labels, test, labels = self._features[patch_size]
        return train, train_labels, test, labels


def evaluate(recipe: Recipe) -> None:
    """Run each evaluation of the recipe at each patch size with each seed, and add each result to `results.json`.

    Patch sizes that an encoder or an evaluation does not have are skipped. So is the fine-tuning of an encoder for
    which transformers has no classifier. The table names both. A result that is there already, for the same weights,
    images, settings and seed, is not computed again, so the same command continues an interrupted evaluation. The
    encoder is the same for all seeds, so their standard deviation is that of the probe or the fine-tuning alone. Every
    process computes the same results; the main one writes them.
    """
    check_launch()
    output_of(recipe)
    if "finetune" in recipe.evaluations and shards_weights():
        raise RecipeError(
            f"evaluations={recipe.evaluations} under DeepSpeed or FSDP: fine-tuning holds whole weights in each "
            "process; launch with accelerate_configs/ddp.yaml, or in one process"
        )
    arguments = start(recipe)
    channels = recipe.num_channels
    if recipe.checkpoint != RANDOM:
        with naming(f"checkpoint={recipe.checkpoint!r}"):
            channels = count_input_channels(str(recipe.checkpoint))
    source, validation = labelled_images(recipe, channels)
    _check_batch(recipe, source)
    with naming(f"checkpoint={recipe.checkpoint!r}"):
        encoder, processor = encoder_of(recipe, source)
        shown = describe_input(processor)
    encoder.to(arguments.device)  # pyright: ignore[reportArgumentType]
    bench = Bench(recipe, arguments, encoder, processor, weights_digest(encoder), shown, source, validation)
    chosen, skipped = combinations(recipe, encoder)
    for name, patch_size in chosen:
        try:
            for seed in recipe.eval_seeds if name != "knn" else [None]:
                take(bench, name, patch_size, seed)
        except NotFineTunable as error:
            skipped.append((name, patch_size, str(error)))
    if is_main():
        entries = RunFolder(recipe.output_dir).read_results().get("evaluations", [])
        same = [entry for entry in entries if (entry["data"], entry["validation"]) == (recipe.data, validation.name)]
        table = format_evaluations(same, [(str(recipe.checkpoint), *row) for row in skipped])
        say(f"\n{validation.title}, {count_of(len(validation), 'image')}:\n{table}")
    barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def take(bench: Bench, name: str, patch_size: int | None, seed: int | None) -> None:
    """Run one evaluation with one seed, or with None where nothing is drawn, unless `results.json` holds it."""
    recipe = bench.recipe
    settings, run = EVALUATIONS[name]
    question = {
        "evaluation": name,
        "checkpoint": recipe.checkpoint,
        "weights": bench.weights,
        "data": recipe.data,
        "train": bench.source.name,
        "train_images": len(bench.source),
        "validation": bench.validation.name,
        "validation_images": len(bench.validation),
        "image_column": recipe.image_column,
        "label_column": recipe.label_column,
        "data_seed": recipe.seed,
        "input": bench.input,
        "patch_size": patch_size,
        "settings": settings(recipe),
    }
    label = f"{name} of {recipe.checkpoint}" + f" at patch {patch_size}" * (patch_size is not None)
    label += f", seed {seed}" * (seed is not None)
    if broadcast_object(is_main() and find_run(recipe.output_dir, question, seed) is not None):
        say(f"{label}: found in {recipe.output_dir}/results.json")
        return
    started = time.perf_counter()
    with naming(f"{name} of checkpoint={recipe.checkpoint!r}"):
        results = run(bench, patch_size, seed or 0, folder_name(question, seed))
    for images in (bench.source, bench.validation):
        images.gather_bad()
    if is_main():
        about = {
            "unreadable_images": len(bench.source.bad),
            "unreadable_validation_images": len(bench.validation.bad),
            "seconds": time.perf_counter() - started,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "processes": world_size(),
            "environment": environment(),
        }
        add_run(recipe.output_dir, question, {"seed": seed, **results, **about})
    kept = f"; the classifier is in {Path(recipe.output_dir) / results['folder']}" if "folder" in results else ""
    say(f"{label}: top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%}{kept}")


# The evaluations. Each returns "top1" and "top5" as fractions, and the settings that it chose.


def _knn(bench: Bench, patch_size: int | None, seed: int, folder: str) -> dict[str, Any]:
    return dict(knn_accuracy(*bench.features(patch_size), bench.recipe.knn_k, bench.recipe.knn_temperature))


def _linear(bench: Bench, patch_size: int | None, seed: int, folder: str) -> dict[str, Any]:
    train, train_labels, test, labels = bench.features(patch_size)
    config = LinearConfig(**bench.recipe.linear_config)
    device = bench.arguments.device
    scores, chosen = linear_probe(train, train_labels, test, bench.num_classes, config, seed, device)
    return {**_accuracy(scores, labels), "learning_rate": chosen}


def _logistic(bench: Bench, patch_size: int | None, seed: int, folder: str) -> dict[str, Any]:
    train, train_labels, test, labels = bench.features(patch_size)
    scores, chosen = logistic_regression(train, train_labels, test, bench.num_classes, seed)
    return {**_accuracy(scores, labels), "C": chosen}


def _finetune(bench: Bench, patch_size: int | None, seed: int, folder: str) -> dict[str, Any]:
    recipe = bench.recipe
    output = Path(recipe.output_dir) / folder
    accuracy = finetune(
        bench.encoder,
        bench.processor,
        bench.source,
        bench.validation,
        FineTuneConfig(**recipe.finetune_config),
        seed,
        output,
        use_cpu=bench.arguments.use_cpu,
        disable_tqdm=not sys.stderr.isatty(),
        logging_steps=recipe.logging_steps,
        report_to=recipe.report_to,
        dataloader_num_workers=choose_workers(recipe),
        **autocast_arguments(recipe.mixed_precision),
    )
    return {**accuracy, "folder": folder}


def _accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    return {f"top{n}": topk_accuracy(scores, labels, n) for n in (1, 5)}


Run = Callable[[Bench, int | None, int, str], dict[str, Any]]
EVALUATIONS: dict[str, tuple[Callable[[Recipe], dict[str, Any]], Run]] = {
    "knn": (lambda recipe: {"k": recipe.knn_k, "temperature": recipe.knn_temperature}, _knn),
    "linear": (lambda recipe: asdict(LinearConfig(**recipe.linear_config)), _linear),
    "logistic": (lambda recipe: {}, _logistic),
    "finetune": (
        lambda recipe: {
            **asdict(FineTuneConfig(**recipe.finetune_config)),
            "mixed_precision": recipe.mixed_precision,
        },
        _finetune,
    ),
}
"""For each evaluation the settings that its result depends on, and the function that runs it."""


# The images and the encoder, with checks


def _check_batch(recipe: Recipe, source: ImageSource) -> None:
    """Refuse a batch of fine-tuning that other evaluations would run before. Raises SettingError."""
    size = FineTuneConfig(**recipe.finetune_config).batch_size
    if "finetune" not in recipe.evaluations:
        return
    if size > len(source):
        few = f"{source.title} has only {count_of(len(source), 'labelled image')}; set a lower one"
        fail("finetune_config.batch_size", size, few)
    if size % world_size():
        fail("finetune_config.batch_size", size, f"must be a multiple of {world_size()} processes")


def labelled_images(recipe: Recipe, num_channels: int | None = None) -> tuple[ImageSource, ImageSource]:
    """Return the training and the validation images that have a label, with these channels or the recipe's.

    Raises:
        RecipeError: no labels, fewer than two classes, or a class in validation that training lacks.
    """
    source, validation = images_of(recipe, num_channels)
    about = f"data={recipe.data!r}"
    if source.labels is None or validation is None or validation.labels is None:
        raise RecipeError(
            f"{about}: task=evaluate needs labels of training and validation images; name their column with "
            "label_column=, and splits that have them with train_split= and validation_split="
        )
    source, validation = source.labelled(), validation.labelled()
    names = source.class_names or []
    present, asked = (set(cast(Tensor, images.labels).unique().tolist()) for images in (source, validation))
    if len(present) < 2:
        raise RecipeError(
            f"{about}: {source.title} has only the class {names[present.pop()]!r}: choose a label_column with more "
            "classes, or a train_split of shuffled images"
        )
    unseen = sorted(asked - present)
    if unseen:
        listed = ", ".join(names[label] for label in unseen[:5])
        raise RecipeError(
            f"{about}: {source.title} lacks {count_of(len(unseen), 'class')} of {validation.title} ({listed}): choose "
            "a train_split that has images of every class"
        )
    return source, validation


def encoder_of(recipe: Recipe, source: ImageSource) -> tuple[PreTrainedModel, Any]:
    """Return the encoder that `checkpoint` names and its image processor, or one for `source` if it has none.

    Raises:
        ValueError: the checkpoint is no vision encoder.
    """
    if recipe.checkpoint == RANDOM:
        set_seed(recipe.seed)
        return build_objective(recipe).encoder, processor_for(source, image_processor(source, recipe.image_size))
    return open_encoder(str(recipe.checkpoint), source, recipe.image_size)


def combinations(
    recipe: Recipe, encoder: PreTrainedModel
) -> tuple[list[tuple[str, int | None]], list[tuple[str, int | None, str]]]:
    """Return the (evaluation, patch size) pairs to run, and those to skip with the reason.

    An evaluation that supports none of the recipe's patch sizes runs at the encoder's own patch size, which is None if
    it has none. One command thus serves encoders of every kind.
    """
    base = base_patch_size(encoder)
    only = f"the encoder has one patch size, {base}" if base else "the encoder has no patch size to choose"
    if takes_patch_size(encoder):
        only = f"fine-tuning is at the base patch size, {base}"
    fixed = [name for name in recipe.evaluations if name == "finetune" or not takes_patch_size(encoder)]
    chosen: list[tuple[str, int | None]] = []
    skipped: list[tuple[str, int | None, str]] = []
    for size in dict.fromkeys(recipe.eval_patch_sizes or [base]):
        for name in recipe.evaluations:
            if size is not None and size != base and name in fixed:
                skipped.append((name, size, only))
            else:
                chosen.append((name, size))
    return chosen + [(name, base) for name in fixed if (name, base) not in chosen], skipped


def folder_name(question: dict[str, Any], seed: int | None) -> str:
    """Return the name of a fine-tuned model's folder, which differs for each encoder, data set and settings."""
    name = re.sub(r"[^0-9A-Za-z.]+", "-", str(question["checkpoint"])).strip("-.")[-40:]
    digest = blake2b(repr(sorted(question.items())).encode(), digest_size=3).hexdigest()
    return f"finetuned-{name}-{digest}-seed{seed}"
