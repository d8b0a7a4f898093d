"""What a run takes over from the checkpoint that it goes on from, besides weights and optimizer."""

import json
from pathlib import Path
from typing import Any

from ..distributed.launch import engine_of
from ..recipe import RecipeError
from ..run_folder import read_state


def take_over(trainer: Any, checkpoint: Path) -> int:
    """Give the Trainer the counters and the plan of a checkpoint, and an evaluation that a stop has left out.

    Returns:
        The step that is next.

    Raises:
        RecipeError: the checkpoint is of another engine, or was trained along another plan.
    """
    state, now = read_state(checkpoint), engine_of(trainer.accelerator)
    if state.get("engine", now) != now:
        raise RecipeError(
            f"{checkpoint} was saved by {state['engine']}, and this is {now}, which would lose the optimizer's state. "
            "Launch the run as it was started, or start again in another output_dir"
        )
    trainer.seconds, trainer.cpu_seconds = state["seconds"], state.get("cpu_seconds", 0.0)
    trainer.source.bad |= {int(index): tuple(what) for index, what in state.get("unreadable", {}).items()}
    trainer.args.eval_on_start |= state.get("evaluation_due", False)
    if trainer.controller:
        try:
            trainer.controller.restore(state["controller"])
        except ValueError as error:
            raise RecipeError(f"schedule='auto': {checkpoint}: {error}") from None
        trainer.plan.restore(state["plan"], trainer.recipe.patch_size)
        trainer.args.max_steps = trainer.plan.num_steps
    elif "plan" in state and state["plan"] != json.loads(json.dumps(trainer.plan.state())):
        raise RecipeError(
            f"schedule={trainer.recipe.schedule!r}: {checkpoint} was trained along another plan; "
            "restore the schedule's file (or the measured costs) to continue, or choose another output_dir"
        )
    return state["step"]
