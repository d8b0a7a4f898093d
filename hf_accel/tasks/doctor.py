"""`hf-accel doctor [RECIPE]`: what is wrong with an installation or a recipe, and what to do about it."""

import argparse
import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token

from ..data import CorruptDataError, CorruptImage, ImageSource
from ..recipe import Recipe, RecipeError, load_recipe, split_words
from ..training.console import quiet
from ..training.planning import find_oddities
from ..training.trainer import PretrainTrainer
from ..utils.causes import reason
from ..utils.counts import count_of
from .machine import Check, check_disk, check_machine, check_writing
from .plan import predict_run, preview_run, time_stages
from .setup import load_images

Images = tuple[ImageSource, ImageSource | None]

READ = 32
"""Images that are decoded, spread over the dataset."""


def run_checks(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Print a line for each check. The exit code is 1 if one of them has failed."""
    parser.usage = "hf-accel doctor [RECIPE] [key=value ...]"
    parser.add_argument("words", nargs="*", metavar="RECIPE", help="a pretraining recipe to check, too, and its keys")
    failed = 0
    for check in find_problems(parser.parse_args(argv).words):
        print(check, flush=True)
        failed += check.state == "failed"
    if failed:
        sys.exit(1)


def find_problems(words: list[str]) -> Iterator[Check]:
    """Check the machine and then, if words name one, a recipe."""
    yield from check_machine()
    if not words:
        yield from check_output(Path("runs"))
        return
    path, overrides = split_words(words)
    try:
        recipe = load_recipe(path, ["task=pretrain", *overrides])
    except RecipeError as error:
        yield Check("recipe", "failed", str(error), "hf-accel pretrain --help lists the keys")
        return
    yield Check("recipe", "ok", f"its keys and values can be followed ({path or 'of the command line'})")
    yield from check_recipe(recipe)


def check_output(folder: Path, needed: float = 0.0) -> Iterator[Check]:
    yield check_writing(folder)
    yield check_disk("disk of output_dir", folder, needed)


def check_recipe(recipe: Recipe) -> Iterator[Check]:
    """Check what a pretraining recipe needs, ending with a few of its steps."""
    if recipe.push_to_hub:
        yield check_token()
    data, images = check_data(recipe)
    yield data
    if images is None:
        yield from check_output(Path(recipe.output_dir))
    else:
        yield from check_steps(recipe, images)


def check_token() -> Check:
    """See whether there is a token for the Hub, which is not asked whether it is valid."""
    if get_token() is None:
        advice = "Run hf auth login, set HF_TOKEN, or set push_to_hub=false"
        return Check("Hub", "failed", "push_to_hub=true, and there is no token", advice)
    return Check("Hub", "ok", "there is a token")


def check_data(recipe: Recipe) -> tuple[Check, Images | None]:
    """Open the images, decode a few of them, and return them if a run could train on them."""
    advice = "See docs/data.md for what data may be"
    try:
        with silence():
            images = load_images(recipe)
    except (RecipeError, CorruptDataError) as error:
        return Check("data", "failed", str(error), advice), None
    source = images[0]
    bad = [f"{name}: {why}" for name, why in source.bad.values()]  # of a set that is decoded when it is loaded
    indices = torch.linspace(0, len(source) - 1, min(len(source), READ)).long().tolist()
    for index in indices:
        try:
            source.read(index)
        except CorruptImage as error:
            bad.append(f"{error.bad[1]}: {error.bad[2]}")
    if len(bad) >= len(indices):
        return Check("data", "failed", f"none of {len(indices)} images can be read, as {bad[0]}", advice), None
    found = f"{count_of(len(source), 'image')} of {source.title}, {len(indices)} of them decoded"
    if bad:
        advice = "A run takes another image in place of each, and ends if they are more than 1%"
        return Check("data", "warning", f"{found}; {len(bad)} cannot be read, as {bad[0]}", advice), images
    return Check("data", "ok", found), images


def check_steps(recipe: Recipe, images: Images) -> Iterator[Check]:
    """Take a few steps of each strategy with the model at its real size, and predict time and memory by them."""
    try:
        with silence(), preview_run(recipe, images) as trainer:
            times = time_stages(trainer)
            disk, (seconds, memory) = checkpoint_bytes(trainer), predict_run(trainer.plan, times)
            steps, device = trainer.plan.num_steps, trainer.args.device
            oddities = find_oddities(trainer.args, trainer.objective, trainer.plan)
    except RecipeError as error:
        yield Check("steps", "failed", str(error))
    except Exception as error:  # whatever stops a step would stop the run
        yield Check("steps", "failed", reason(error), "hf-accel plan with the same recipe shows where it comes from")
    else:
        losses = [step.loss for step in times.values()]
        if all(map(math.isfinite, losses)):
            yield Check(
                "steps", "ok", f"forward and backward on {device}, losses {min(losses):.3g} to {max(losses):.3g}"
            )
        else:
            yield Check("steps", "failed", "a loss is not finite", "Try mixed_precision=no, or a lower learning_rate")
        yield from (Check("plan", "warning", oddity) for oddity in oddities)
        yield Check("prediction", "ok", f"{steps:,} steps, {seconds} without evaluations, peak memory {memory}")
        yield from check_output(Path(recipe.output_dir), disk)
        return
    yield from check_output(Path(recipe.output_dir))


def checkpoint_bytes(trainer: PretrainTrainer) -> float:
    """Return the bytes of all checkpoints, one of them being written: weights in fp32, and two moments of AdamW."""
    sizes = [(p.numel(), 3 if p.requires_grad else 1) for p in trainer.objective.parameters()]
    limit: Any = trainer.args.save_total_limit
    return 4.0 * sum(count * copies for count, copies in sizes) * (limit + 1)


@contextmanager
def silence() -> Iterator[None]:
    """Hide what loading and timing print, so that each line is a check."""
    with quiet(), redirect_stdout(io.StringIO()):
        yield
