"""`hf-accel init FOLDER`: a look at images and device, and a recipe that suits both, with a reason for each value."""

import argparse
import os
import shlex
from collections import Counter
from pathlib import Path

import psutil
import torch

from ..data import CorruptDataError, ImageSource, WorkersFailed, explained_failures
from ..data.cache import storage_side, store_images
from ..data.folders import scan_folder
from ..data.sources import MAX_BAD
from ..data.survey import Survey, count_kinds, guess_channels, survey
from ..data.workers import cores_of_process
from ..distributed.launch import on_cpu
from ..recipe import PretrainRecipe
from ..recipe.proposal import Device, Images, Proposal, propose, settle_budget, settle_rate, write_text
from ..training.caching import choose_cache
from ..training.console import quiet
from ..training.memory import OutOfMemory
from ..training.timing import StepTime, format_duration, predict_seconds, time_steps
from ..training.trainer import PretrainTrainer
from ..utils.causes import reason
from ..utils.counts import count_of
from ..utils.errors import fail
from .plan import format_memory, preview_run
from .setup import load_images

NAMED = 3
"""How many files the report names of each kind."""

LEAST_BATCH = 16
"""A batch that does not fit the device's memory is halved down to this."""

CHANNEL_SAMPLE = 32
"""Images whose headers say how many channels are to be read."""

STORED = 512
"""Images that are decoded once to time the steps of a run that stores its images."""

Loaded = tuple[ImageSource, ImageSource | None]


def init(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Report what a folder holds, and write a recipe for it. Nothing is overwritten or downloaded."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of images, or Parquet or Arrow file or folder")
    parser.add_argument("--output", default="recipe.yaml", metavar="FILE", help="the recipe; default: %(default)s")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output).expanduser()
    check_output(output)
    folder, channels = check_folder(arguments.folder)
    images = load_images(PretrainRecipe(data=folder, budget=1.0, num_channels=channels), in_memory=False)
    found, device, path = survey(*images), find_device(), Path(folder)
    if not found.looks:
        name, why = found.unreadable[0]
        fail("FOLDER", arguments.folder, f"none of {found.images:,} images can be read; the first one, {name}: {why}")
    if found.images == 1:
        fail("FOLDER", arguments.folder, "it holds one image, and pretraining compares images: add more")
    print("\n".join(describe(found, device, folder)), flush=True)
    facts = Images(found.images, found.median_side(), len(found.classes), channels)
    output_dir = free_folder(runs_folder(path), path.name if path.is_dir() else path.stem)
    proposal = propose(folder, output_dir, facts, device)
    print("\nTiming a few steps ...", flush=True)
    predict(proposal, images, device)
    number = f"{found.images:,} images and {device.name}"
    text = write_text(proposal, f"Pretraining on {folder}, as `hf-accel init` proposes it for {number}.", str(output))
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        fail("--output", str(output), f"it cannot be written: {reason(error)}; name another file")
    print("\n".join(describe_end(proposal, output)))


def check_output(output: Path) -> None:
    """Raises SettingError where a recipe cannot be written, before anything slow begins."""
    if output.exists() or output.is_symlink():
        fail("--output", str(output), "it exists, and nothing is overwritten: name another file with --output FILE")
    if not output.parent.is_dir():
        fail("--output", str(output), f"there is no folder {output.parent}: make it, or name another file")
    if not os.access(output.parent, os.W_OK):
        where = output.parent.resolve()
        fail("--output", str(output), f"nothing can be written in {where}: name a file elsewhere with --output FILE")


def check_folder(name: str) -> tuple[str, int]:
    """Return the absolute path of the images, and their channels. Raises SettingError where there are none."""
    path = Path(name).expanduser()
    absolute = os.path.abspath(path)
    if absolute.encode(errors="ignore").decode() != absolute:
        fail("FOLDER", name, "the path is not valid UTF-8, as a recipe must be: rename it")
    if not path.exists():
        fail("FOLDER", name, "no such file or folder; init reads images on this machine, and downloads none")
    try:
        found = scan_folder(path) if path.is_dir() else None
    except OSError as error:
        fail("FOLDER", name, f"it cannot be listed: {reason(error)}")
    saved = ("dataset_dict.json", "state.json")
    if found and not (found.images or found.tables or any((path / file).exists() for file in saved)):
        if found.unusable:
            file, why = next(iter(found.unusable.items()))
            fail("FOLDER", name, f"it holds no image that can be loaded. {file} is left out, as {why}")
        empty = next(path.iterdir(), None) is None
        fail("FOLDER", name, "it is empty" if empty else "it holds no images, and neither do the folders in it")
    files = found.images[:: max(1, len(found.images) // CHANNEL_SAMPLE)] if found else []
    return absolute, guess_channels([path / file for file in files])


def find_device() -> Device:
    """Describe what a run on this machine computes on."""
    if on_cpu():
        return Device(f"{max(1, cores_of_process())} CPU cores", psutil.virtual_memory().total, is_gpu=False)
    if torch.cuda.is_available():
        return Device(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, is_gpu=True)
    kind = torch.accelerator.current_accelerator()
    return Device(f"an accelerator ({kind})", psutil.virtual_memory().total, is_gpu=True)


def runs_folder(images: Path) -> Path:
    """Return `runs` in this folder or, if that lies inside the images, beside them: runs would train on figures."""
    here, images = Path.cwd(), images.resolve()
    return Path(os.path.relpath(images.parent, here) if images in (here, *here.parents) else "", "runs")


def free_folder(parent: Path, name: str) -> str:
    """Return a folder in `parent` that no run has taken yet."""
    names = [name or "images", *(f"{name or 'images'}-{number}" for number in range(2, 1000))]
    return str(next(path for path in (parent / name for name in names) if not path.exists()))


def predict(proposal: Proposal, images: Loaded, device: Device) -> None:
    """Time a few steps, and settle the budget by them. A batch that needs too much memory is halved."""
    values = proposal.values
    try:
        seconds, memory = _time(proposal, images)
    except (CorruptDataError, OutOfMemory, WorkersFailed) as error:
        if isinstance(error, OutOfMemory) and values["batch_size"] >= 2 * LEAST_BATCH:
            values["batch_size"] //= 2
            proposal.why["batch_size"] = "Images of a step, over all processes. Twice as many need too much memory."
            settle_rate(proposal)
            return predict(proposal, images, device)
        values["budget"] = "20 epochs"
        proposal.why["budget"] = "What so many passes over the images cost without compression. Steps were not timed."
        proposal.predicted = f"Time and memory could not be predicted: {_in_one_line(error)}"
        return None
    taken = format_duration(settle_budget(proposal, seconds, device.is_gpu))
    proposal.why["budget"] = (
        f"What so many passes over the images cost without compression: about {taken} here. More is better."
    )
    proposal.predicted = (
        f"Predicted: about {taken}, and {format_memory(StepTime(0.0, memory))} of memory at most, from a few steps. "
        "Evaluations, checkpoints and the first reading of the images are not counted."
    )


def _in_one_line(error: Exception) -> str:
    """Return the first line of a message, and the first of the examples that follow it."""
    first, *examples = str(error).splitlines()
    return f"{first} {examples[0].strip()}" + ", ..." * (len(examples) > 1) if first.endswith(":") else first


def _time(proposal: Proposal, images: Loaded) -> tuple[float, int]:
    """Return the seconds of the proposed budget, and the peak memory in bytes."""
    recipe = PretrainRecipe(**proposal.for_timing())
    with quiet(), explained_failures(), preview_run(recipe, images) as trainer:
        _store_some(trainer)
        times = time_steps(trainer, [strategy for strategy, _ in trainer.plan.stage_steps()])
        return sum(predict_seconds(trainer.plan, times)), max(step.memory for step in times.values())


def _store_some(trainer: PretrainTrainer) -> None:
    """Let the steps take stored images, as far as those of the run do, from a part of the images."""
    side = storage_side(trainer.view_configs, trainer.objective.config.image_size)
    place = choose_cache(trainer, side)
    if place == "none":
        return
    rows = torch.arange(min(len(trainer.source), max(trainer.args.batch_size, STORED)))
    trainer.source = trainer.source.take(rows)
    device = trainer.args.device if place == "device" else torch.device("cpu")
    trainer.source.stored = store_images(trainer.source, side, device)


def describe(found: Survey, device: Device, folder: str) -> list[str]:
    """The report on images and device, as aligned lines."""
    sides, (formats, kinds) = found.short_sides(), count_kinds(found.looks)
    total = found.images + found.held_out
    part = "" if found.looked_at == total else f" (of {found.looked_at:,} that were opened)"
    held = f": {found.images:,} to train on, {found.held_out:,} to measure accuracy on" if found.held_out else ""
    lines = {
        "Images": f"{total:,} in {folder}{held}",
        "Sizes": f"short side {sides[0]} to {sides[-1]} pixels, median {found.median_side()}{part}",
        "Formats": _list(formats) + part,
        "Channels": _list(kinds) + part,
        "Labels": _describe_labels(found),
        "Unreadable": _describe_unreadable(found, folder, part),
        "Duplicates": _describe_copies(found, folder),
        "Device": f"{device.name}, {device.memory / 1e9:.0f} GB of memory",
    }
    return [f"{name + ':':<12}{text}" for name, text in lines.items()]


def _list(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))  # not by which file was opened first
    return ", ".join(f"{name} ({count:,})" for name, count in ordered)


def _describe_labels(found: Survey) -> str:
    if not found.classes:
        return "none"
    counts, names = sorted(found.classes.values()), ", ".join([*found.classes][:NAMED])
    more = ", ..." if len(found.classes) > NAMED else ""
    without = f"; {found.unlabelled:,} images have none" if found.unlabelled else ""
    sizes = f"{counts[0]:,} to {counts[-1]:,} training images"
    return f"{found.labels_from}, {count_of(len(counts), 'class')} ({names}{more}) of {sizes}{without}"


def _describe_unreadable(found: Survey, folder: str, part: str) -> str:
    if not found.unreadable:
        return f"none{part}"
    text = f"{len(found.unreadable):,}{part}: " + _name(
        [f"{_relative(name, folder)} ({why})" for name, why in found.unreadable]
    )
    if len(found.unreadable) > max(1, MAX_BAD * found.looked_at):
        text += f". A run stops if more than {MAX_BAD:.0%} are unreadable: remove or replace them first"
    return text


def _describe_copies(found: Survey, folder: str) -> str:
    part = "" if found.compared == found.images + found.held_out else f" (of {found.compared:,} that were compared)"
    if not found.copies:
        return f"none{part}"
    pairs = [f"{_relative(copy, folder)} = {_relative(first, folder)}" for copy, first in found.copies]
    return f"{len(pairs):,} images equal another one to the byte{part}: {_name(pairs)}"


def _name(entries: list[str]) -> str:
    more = f" and {len(entries) - NAMED:,} more" if len(entries) > NAMED else ""
    return ", ".join(entries[:NAMED]) + more


def _relative(name: str, folder: str) -> str:
    return os.path.relpath(name, folder) if name.startswith(os.path.realpath(folder) + os.sep) else name


def describe_end(proposal: Proposal, output: Path) -> list[str]:
    """What the recipe does, and the next commands."""
    values, path = proposal.values, shlex.quote(str(output))
    encoder = f"from {values['init_from']}" if "init_from" in values else f"{values['model']} from random weights"
    sizes = f"{values['image_size']} px images, batches of {values['batch_size']}"
    return [
        f"Wrote {output}: {values['objective']}, {encoder}, {sizes}, {values['budget']}.",
        proposal.predicted,
        "\nNext:",
        f"  hf-accel views {path}      # see the views that it learns from, in {values['output_dir']}",
        f"  hf-accel plan {path}       # see stages, time and memory",
        f"  hf-accel pretrain {path}   # train",
    ]
