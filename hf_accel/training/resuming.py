"""The checkpoint that a run resumes from, and what it takes over from it besides weights and optimizer."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..compression import CostTable
from ..compression.cost import TABLE_NAME, StepCosts, load_costs
from ..distributed import barrier, broadcast_object, is_main, say
from ..distributed.launch import engine_of
from ..run_folder import RUN_STATE_NAME, RunFolder, find_damage, read_state
from ..utils.errors import SettingError, fail
from .config import Derived
from .finish import restore_final
from .record import are_other_images


def choose_checkpoint(folder: RunFolder, resume: Any) -> Path | None:
    """Return the checkpoint to resume from, the same on all processes, or None to start a run.

    Args:
        resume: see `PretrainTrainer.train`. With "auto", a run that is complete has nothing to resume from.

    Raises:
        SettingError: the folder holds a run that was not to be resumed, or no complete checkpoint.
    """
    if isinstance(resume, str | PathLike) and resume != "auto":
        path = Path(resume)
        if path.is_dir() and not (path / RUN_STATE_NAME).exists() and not path.name.startswith(PREFIX_CHECKPOINT_DIR):
            what = "it holds an encoder and is" if (path / CONFIG_NAME).is_file() else "it is"
            remedy = "name a folder checkpoint-N of its run, or give True for the last one in output_dir"
            fail("resume_from_checkpoint", str(path), f"{what} no training checkpoint; {remedy}")
        if wrong := find_damage(path):
            fail("resume_from_checkpoint", str(path), f"it cannot be resumed from: {wrong}")
        return path
    if folder.is_complete() and resume == "auto":
        return None
    found = _last_checkpoint(folder)
    if not resume and (found or folder.is_complete()):
        fail(
            "output_dir",
            str(folder),
            "it holds a run; resume it with train(resume_from_checkpoint=True), or choose another folder",
        )
    if folder.is_complete():
        fail(
            "output_dir", str(folder), "its run is complete: results.json is there; choose another folder for a new one"
        )
    if resume and resume != "auto" and found is None:
        fail("resume_from_checkpoint", resume, f"{folder} holds no complete checkpoint; leave it out to start")
    return found


def _last_checkpoint(folder: RunFolder) -> Path | None:
    """Return the newest complete checkpoint, and say why newer ones are passed over."""
    found = None
    for path in folder.checkpoints() if is_main() else []:
        wrong = find_damage(path)
        if wrong is None:
            found = path
            break
        say(f"Not resumed from {path}: {wrong}")
    return broadcast_object(found)


def find_costs(checkpoint: Path) -> CostTable | StepCosts:
    """Load the measured costs of a checkpoint outside the folder of its run.

    Raises:
        SettingError: it has none.
    """
    path = checkpoint / TABLE_NAME
    if not path.exists():
        fail("cost", "measured", f"{path} is missing: restore it from another checkpoint of the run, or start again")
    return load_costs(path)


def take_over(trainer: Any, checkpoint: Path) -> int:
    """Give the Trainer the counters and the plan of a checkpoint, and an evaluation that a stop has left out.

    Returns:
        The step that is next.

    Raises:
        SettingError: the checkpoint is of another engine, or was trained along another plan.
    """
    state, now = read_state(checkpoint), engine_of(trainer.accelerator)
    if state.get("engine", now) != now:
        raise SettingError(
            f"{checkpoint} was saved by {state['engine']}, and this is {now}, which would lose the optimizer's state. "
            "Launch the run as it was started, or start again in another output_dir"
        )
    if state.get("images", len(trainer.source)) != len(trainer.source):
        raise SettingError(
            f"{checkpoint} was trained on {state['images']} images, and now there are {len(trainer.source)}: restore "
            "them to resume, or choose another output_dir"
        )
    if are_other_images(state.get("colours") or trainer.colours, trainer.colours):
        say(
            f"Warning: {checkpoint} was trained on images of other colours than those that are there now. If they are "
            "not the same images, stop, and restore them or choose another output_dir"
        )
    trainer.seconds, trainer.cpu_seconds = state["seconds"], state.get("cpu_seconds", 0.0)
    trainer.source.bad |= {int(index): tuple(what) for index, what in state.get("unreadable", {}).items()}
    trainer.view_backend = state.get("view_backend", "eager")
    trainer.cache = state.get("cache", "none")
    trainer.args.eval_on_start = Derived(trainer.args.eval_on_start or state.get("evaluation_due", False))
    if trainer.controller:
        try:
            trainer.controller.restore(state["controller"])
        except ValueError as error:
            raise SettingError(f"schedule='auto': {checkpoint}: {error}") from None
        trainer.plan.restore(state["plan"], trainer.objective.config.patch_size)
        trainer.args.max_steps = Derived(trainer.plan.num_steps)
    elif "plan" in state and state["plan"] != json.loads(json.dumps(trainer.plan.state())):
        raise SettingError(
            f"schedule={trainer.args.schedule!r}: {checkpoint} was trained along another plan; "
            "restore the schedule's file (or the measured costs) to continue, or choose another output_dir"
        )
    return state["step"]


def load_complete(trainer: Any) -> TrainOutput:
    """Give the Trainer the weights and the log of the complete run in its folder, and push the run if that is wanted.

    Where the last checkpoint was removed, only the encoder has the weights of the run.
    """
    folder, objective = trainer.folder, trainer.objective
    say(f"This run is complete: {folder.results}. Choose another output_dir for a new one.")
    if is_main():
        restore_final(folder, trainer.publication())
    barrier()  # The others may need its encoder.
    steps = folder.read_results()["steps"]
    weights = folder.checkpoint(steps) / SAFE_WEIGHTS_NAME
    if weights.is_file():
        objective.load_state_dict(load_file(weights))
    else:
        objective.encoder.load_state_dict(type(objective.encoder).from_pretrained(folder.final).state_dict())
    log: list[dict[str, Any]] = []
    if folder.log_history.is_file():
        log = json.loads(folder.log_history.read_text())["log_history"]
    trainer.stopped, trainer.state.global_step, trainer.state.log_history = False, steps, log
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    barrier()
    metrics = next((entry for entry in reversed(log) if "train_loss" in entry), {})
    return TrainOutput(steps, metrics.get("train_loss", float("nan")), metrics)
