"""A recipe that suits a set of images and a device, with the reason for each value."""

import textwrap
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from ..utils.pretrain_settings import scale_learning_rate
from .checks import base_learning_rate

RELEASED = "facebook/dinov2-small"
RELEASED_PATCH = 14
RELEASED_SIDE = 160
"""Images whose short side is smaller would be enlarged much for `RELEASED`, which knows photographs of 224 pixels."""
MANY = 200_000
"""With so many images, training from random weights is worth its time, too."""

GPU_SIZES = ((224, 16), (192, 16), (128, 8), (96, 8), (64, 8), (32, 4))
CPU_SIZES = ((64, 8), (32, 4))
"""Sides of images and patches, in pixels. The first that the images are not too small for is taken."""

SMALL_ENCODER = {
    **{"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512},
    **{"pooling": "mean", "freeze_patch_projection": False},
}
SMALL_HEADS = {"projector_hidden_size": 1024, "projection_size": 128, "temperature": 0.2}
SMALL_RATE = 1.0e-3
"""Encoder, heads and learning rate of recipes/imagenette/simclr_64px_cpu.yaml."""
MEASURED_BATCHES = (64, 256)
"""The least and the largest batch that SMALL_RATE was measured with."""

HOURS = {True: 4.0, False: 1 / 6}
"""What a run may take on a GPU, and on a CPU."""
EPOCHS, EPOCHS_RELEASED = 100, 50
"""The most that is proposed, from random weights and from released ones."""

WIDTH = 120


class Device(NamedTuple):
    """What a run computes on; `memory` in bytes."""

    name: str
    memory: int
    is_gpu: bool


class Images(NamedTuple):
    """What a proposal depends on: the training images, the median of their short sides, classes and channels."""

    images: int
    side: int
    classes: int
    channels: int = 3


@dataclass
class Proposal:
    """The values of a recipe by key, and for some keys why they have it."""

    values: dict[str, Any]
    why: dict[str, str]
    not_released: str | None = None
    """Why the recipe does not continue from released weights, or None if it does."""
    predicted: str = ""

    def for_timing(self) -> dict[str, Any]:
        """The values without released weights, which are not read: of random ones of the same sizes."""
        values = dict(self.values)
        if values.pop("init_from", None):
            values |= {"model": "vit_small", "patch_size": RELEASED_PATCH}
        return values


def propose(data: str, output_dir: str, images: Images, device: Device) -> Proposal:
    """Choose every value but the budget, which is the most that is proposed until steps have been timed."""
    values: dict[str, Any] = {"output_dir": output_dir, "data": data}
    why = {"output_dir": "Everything that the run writes; the same command resumes an interrupted run from it."}
    why["data"] = (
        f"{images.classes} classes serve measured accuracy only, never training; `label_column: none` reads none."
        if images.classes
        else "The images have no labels: RankMe is measured in place of accuracy."
    )
    if images.channels != 3:
        values["num_channels"] = images.channels
        why["num_channels"] = "The images are not RGB. Mean and deviation are taken from them."
    proposal = Proposal(values, why, _why_not_released(images, device))
    (_propose_released if proposal.not_released is None else _propose_random)(proposal, images, device)
    values["eval_points"] = [0.0, 0.25, 0.5, 0.75, 1.0]
    why["eval_points"] = "Shares of the budget at which the features are measured."
    return proposal


def _why_not_released(images: Images, device: Device) -> str | None:
    if images.channels != 3:
        return f"It takes RGB images, and these have {images.channels} channels, or 16 bits."
    if not device.is_gpu:
        return "It sees 256 patches of 224 px images, and a step of 256 such images takes a CPU minutes."
    if images.side < RELEASED_SIDE:
        return f"It was trained on photographs of 224 px, and the median short side of these images is {images.side}."
    if images.images >= MANY:
        return f"{images.images:,} images also suffice for random weights; with it a shorter run does."
    return None


def _propose_released(proposal: Proposal, images: Images, device: Device) -> None:
    values, why = proposal.values, proposal.why
    values |= {"init_from": RELEASED, "image_size": 224, "objective": "moco", "budget": f"{EPOCHS_RELEASED} epochs"}
    why["init_from"] = (
        f"{images.images:,} images are few for random weights, so training continues from released ones. They are "
        "downloaded (90 MB) when the run starts, and bring model, patch size and normalisation. Without this line a "
        "ViT-S/16 starts from random weights."
    )
    why["image_size"] = f"The median short side of the images is {images.side} pixels; 224 gives 256 patches."
    why["objective"] = "MoCo-v3, as in recipes/own_images.yaml."
    values["schedule"] = "standard"
    why["schedule"] = "Half of the patches are left out at first. Released weights know one patch size, so it stays."
    _propose_steps(proposal, images, most=_gpu_batch(device))


def _propose_random(proposal: Proposal, images: Images, device: Device) -> None:
    values, why = proposal.values, proposal.why
    sizes = GPU_SIZES if device.is_gpu else CPU_SIZES
    side, patch = next((size for size in sizes if size[0] <= images.side), sizes[-1])
    if device.is_gpu:
        values["model"] = "vit_small"
        why["model"] = "22 million parameters, the usual size for one GPU."
    else:
        values |= {"model": "vit_tiny", "model_config": dict(SMALL_ENCODER)}
        why["model"] = "1.2 million parameters, with the fields below: an encoder that a CPU can train."
    values |= {"image_size": side, "patch_size": patch}
    why["image_size"] = f"The median short side of the images is {images.side} pixels" + (
        "." if side == sizes[0][0] == images.side else f", and {_why_side(side, sizes, images.side, device)}."
    )
    why["patch_size"] = f"{(side // patch) ** 2} patches an image. It must divide image_size."
    if device.is_gpu:
        values["objective"] = "moco"
        why["objective"] = "MoCo-v3."
    else:
        values |= {"objective": "simclr", "objective_config": dict(SMALL_HEADS)}
        why["objective"] = "SimCLR, the best of the three on small images in short runs (docs/results.md)."
    values |= {"budget": f"{EPOCHS} epochs", "schedule": "standard"}
    why["schedule"] = "Patches of four times the side until 40% of the budget, then twice: cheap steps first."
    _propose_steps(proposal, images, most=_gpu_batch(device) if device.is_gpu else 128)


def _why_side(side: int, sizes: tuple[tuple[int, int], ...], median: int, device: Device) -> str:
    if side > median:
        return f"{side} is the least that views are worth"
    if side < sizes[0][0]:
        return f"{side} is the largest of the usual sizes that does not enlarge them"
    return "224 is what ViTs are compared at" if device.is_gpu else f"{side} is what a CPU can train at"


def _gpu_batch(device: Device) -> int:
    return 256 if device.memory > 20e9 else 128 if device.memory > 10e9 else 64


def _propose_steps(proposal: Proposal, images: Images, most: int) -> None:
    """Batch and learning rate. A batch is a power of two, and an epoch has at least four."""
    values, why = proposal.values, proposal.why
    room = max(2, min(most, images.images // 4))
    values["batch_size"] = 2 ** (room.bit_length() - 1)
    why["batch_size"] = "Images of a step, over all processes."
    if values["batch_size"] < most:
        why["batch_size"] += f" With {images.images:,} images this makes four steps an epoch or more."
    settle_rate(proposal)
    values |= {"warmup": 0.1, "weight_decay": 0.1}
    why["warmup"] = "The learning rate rises over a tenth of the budget, and then falls along a cosine."


def settle_rate(proposal: Proposal) -> None:
    """Choose the learning rate for the batch."""
    values, why = proposal.values, proposal.why
    name, batch = values["objective"], values["batch_size"]
    base, continues = base_learning_rate(name), "init_from" in values
    rate = scale_learning_rate(name, base, batch, continues)
    if "model_config" in values:
        least, most = MEASURED_BATCHES
        beyond = "" if least <= batch <= most else " only; another rate may be better for this one"
        values["learning_rate"] = SMALL_RATE
        why["learning_rate"] = (
            f"Measured for such small encoders and short runs with batches of {least} to {most}{beyond}. `auto` would "
            f"be {rate:.2g}, the published rate of large encoders and long runs, scaled with the batch."
        )
    else:
        values["learning_rate"] = "auto"
        why["learning_rate"] = f"The published rate of the objective, scaled with the batch: {rate:.3g} here."


def settle_budget(proposal: Proposal, seconds: float, is_gpu: bool) -> float:
    """Choose the epochs that fit the time, given what the proposed ones would take. Return their seconds."""
    most = float(proposal.values["budget"].split()[0])
    epochs = min(most, HOURS[is_gpu] * 3600 / seconds * most)
    epochs = max(0.01, int(epochs) if epochs >= 1 else int(epochs * 100) / 100)
    proposal.values["budget"] = f"{epochs:g} epochs"
    return seconds * epochs / most


GROUPS = {
    "output_dir": "run",
    "data": "data",
    "init_from": "model",
    "objective": "objective",
    "budget": "budget and schedule",
    "batch_size": "optimisation",
    "eval_points": "evaluation",
}
"""The headings, each before this key."""


def write_text(proposal: Proposal, opening: str, path: str) -> str:
    """The recipe as a commented YAML file."""
    commands = {"views": "draws what the encoder will see", "plan": "predicts time and memory, and trains nothing"}
    commands["pretrain"] = "trains; the same command resumes an interrupted run"
    lines = [*_comment(opening), *(f"#   hf-accel {name} {path}: {what}" for name, what in commands.items())]
    lines += _comment(proposal.predicted)
    values = dict(proposal.values)
    if proposal.not_released:
        values = {key: value for name, value in values.items() for key, value in _with_hint(name, value)}
    for key, value in values.items():
        if key in GROUPS:
            lines += ["", f"# {GROUPS[key]}"]
        if key == "init_from" and value is None:
            lines += _comment(f"init_from: {RELEASED} would continue from released weights. {proposal.not_released}")
            continue
        lines += _comment(proposal.why.get(key, ""))
        lines += _entry(key, value)
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any) -> list[str]:
    """A key with its value in YAML: a mapping by lines, everything else in one."""
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 10**6}
    if isinstance(value, dict):
        return yaml.safe_dump({key: value}, **style).splitlines()
    return [f"{key}: {yaml.safe_dump(value, default_flow_style=True, **style).splitlines()[0]}"]


def _with_hint(name: str, value: Any) -> list[tuple[str, Any]]:
    """The place of `init_from`, before the model, where it is only named."""
    return [("init_from", None), (name, value)] if name == "model" else [(name, value)]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
