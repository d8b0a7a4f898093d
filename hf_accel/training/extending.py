"""The finished run that training continues from, with a budget of its own: `continue_from`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import OPTIMIZER_NAME
from transformers.training_args import OptimizerNames
from transformers.utils import SAFE_WEIGHTS_NAME

from ..distributed.launch import engine_of
from ..models import AccelViTConfig
from ..objectives import ObjectiveForPreTraining
from ..run_folder import RunFolder, find_end, read_state, run_of
from ..utils.errors import SettingError, fail
from ..utils.seeding import generator
from .config import PretrainConfig

FREE = ("initializer_range", "default_patch_size", "_out_features", "_out_indices")
"""Fields of the encoder that its weights and their training do not depend on."""


@dataclass(frozen=True)
class EarlierRun:
    """What a run notes of the run that it continues. Its checkpoints hold this, so that run is read only once.

    Args:
        name: the last two parts of the path of the run or checkpoint.
        step: of the checkpoint that training starts from.
        units: of that run up to the step, and of all runs before it that it has itself continued.
        runs: the number of these runs.
        schedule: a schedule with the compression of its last step alone.
        separates_encoder: whether encoder and heads are in separate groups of its optimizer.
    """

    name: str
    step: int
    units: float
    runs: int
    schedule: list[dict[str, Any]] | None
    separates_encoder: bool


def read_earlier(args: PretrainConfig, model: ObjectiveForPreTraining) -> EarlierRun | None:
    """Read what a run notes of the run that `continue_from` names, from its own last checkpoint if it has one.

    Raises:
        SettingError: there is no finished run, or another objective or model was trained there.
    """
    if args.continue_from is None:
        return None
    folder = RunFolder(str(args.output_dir))
    own = folder.last_complete_checkpoint()
    if own or folder.is_complete():
        begun = (read_state(own) if own else folder.read_results()).get("continued_from")
        if begun is None:
            fail("output_dir", str(folder), "it holds a run that was started without continue_from; choose another one")
        return EarlierRun(**begun)
    checkpoint = find_end(args.continue_from)
    _check_model(checkpoint, model)
    state, path = read_state(checkpoint), Path(args.continue_from).resolve()
    before = state.get("continued_from") or {"units": 0.0, "runs": 0}
    stages = [stage for first, _, stage in state.get("plan", []) if first < state["step"]]
    return EarlierRun(
        name="/".join(path.parts[-2:]),
        step=state["step"],
        units=before["units"] + state["units"],
        runs=before["runs"] + 1,
        schedule=[{**stages[-1], "until": 1.0}] if stages else None,
        separates_encoder=state.get("separates_encoder", bool(model.config.init_from)),
    )


def take_normalisation(args: PretrainConfig, config: AccelViTConfig) -> bool:
    """Give the encoder the mean and deviation of the run that it continues, and return whether that run kept any."""
    folder = RunFolder(str(args.output_dir))
    if args.continue_from is None or folder.is_complete():
        return False
    earlier = AccelViTConfig.from_pretrained(folder.last_complete_checkpoint() or find_end(args.continue_from))
    if config.image_mean is not None or earlier.image_mean is None:
        return False
    config.image_mean, config.image_std = earlier.image_mean, earlier.image_std
    return True


def choose_draw_seed(seed: int, earlier: EarlierRun | None) -> int:
    """The seed of what training draws, such as the order of the images: another one than that of the earlier runs."""
    return generator(seed, "continued", earlier.runs).initial_seed() if earlier else seed


def _check_model(checkpoint: Path, model: ObjectiveForPreTraining) -> None:
    """Raise SettingError if a model is not made as that of a checkpoint, and name the setting that differs."""
    written = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    kind, remedy = written["architectures"][0], "; give it as there, or start without continue_from"
    if kind != type(model).__name__:
        fail("objective", model.name, f"{checkpoint} holds a {kind}{remedy}")
    names = [name for name in AccelViTConfig.__annotations__ if name not in FREE]
    earlier: dict[str, Any] = AccelViTConfig.from_pretrained(checkpoint).to_dict()
    now = model.config.to_dict()
    pairs = {name: (earlier.get(name), now.get(name)) for name in names}
    settings = written.get("objective_config") or {}
    pairs |= {f"objective_config.{name}": (settings[name], model.settings.get(name)) for name in settings}
    for name, (before, value) in pairs.items():
        if before != json.loads(json.dumps(value)):
            fail(name, value, f"{checkpoint} was trained with {before!r}{remedy}")


def load_earlier(trainer: Any) -> None:
    """Give a trainer that is ready for its first step weights and optimizer state. All processes must call it.

    Of the optimizer the state of each weight is taken. Settings such as learning rates are those of the new run.

    Raises:
        SettingError: the checkpoint belongs to another engine, or to another optimizer.
    """
    checkpoint, optimizer = find_end(trainer.args.continue_from), trainer.optimizer
    before, now = read_state(checkpoint).get("engine"), engine_of(trainer.accelerator)
    if before not in (None, now):
        raise SettingError(
            f"continue_from={trainer.args.continue_from!r}: {checkpoint} was saved by {before}, and this is {now}, "
            "which would lose the optimizer's state. Launch it as that run was launched"
        )
    _check_optimizer(run_of(checkpoint).read_recipe(), trainer)
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        if trainer.is_deepspeed_enabled:
            deepspeed_load_checkpoint(trainer.model_wrapped, str(checkpoint))
        elif trainer.is_fsdp_enabled:
            trainer._load_from_checkpoint(str(checkpoint), trainer.model_wrapped)
            trainer._load_optimizer_and_scheduler(str(checkpoint))
        else:
            trainer.objective.load_state_dict(load_file(checkpoint / SAFE_WEIGHTS_NAME))
            optimizer.load_state_dict(torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True))
    except ValueError as error:
        problem = f"the optimizer of {checkpoint} groups the weights in another way"
        raise SettingError(
            f"layer_decay={trainer.pace.layer_decay}, freeze_encoder={trainer.pace.freeze_encoder}: {problem} "
            f"({error}); give both as that run had them"
        ) from error
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _check_optimizer(record: dict[str, Any], trainer: Any) -> None:
    """Raise SettingError if the run with these settings had another kind of optimizer."""
    default = OptimizerNames(PretrainConfig.__dataclass_fields__["optim"].default).value  # of recipes, which name none
    now = {"optim": (trainer.args.optim.value, default), "optimizer": (trainer.own_optimizer, None)}
    for name, (value, usual) in now.items():
        if record.get(name, usual) != value:
            fail(name, value, f"the run of continue_from had {record.get(name, usual)!r}; take the same")


def describe_earlier(earlier: EarlierRun) -> str:
    """Say in a line what training continues from."""
    others = "" if earlier.runs == 1 else f" of {earlier.runs} runs"
    return f"Continuing from {earlier.name} at step {earlier.step:,}, after {earlier.units:,.0f} units{others}"


def note_earlier(earlier: EarlierRun | None) -> dict[str, Any] | None:
    """What checkpoints and results hold about the run that was continued."""
    return asdict(earlier) if earlier else None
