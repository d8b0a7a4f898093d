"""Collapse, told early and plainly from what a run logs."""

import logging
from collections.abc import Mapping

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

TOLERANCE = 0.02
"""How near to ln K or 0, relative to ln K, a loss or an entropy counts as being there."""

POINT = 0.02
"""`embedding_std` below this is a point; a random initialisation has ten times as much."""

FOR_LINES, FOR_PROGRESS = 5, 0.05
"""How long a symptom lasts before it is told: at least so many log lines in a row, over so much of progress."""

_PROTOTYPES = "a higher teacher_temperature reached later (teacher_temperature_warmup)"
_FREEZE = "a longer freeze_last_layer"
REMEDIES = {
    "uniform": f"a lower learning_rate, a lower teacher_temperature_start, {_FREEZE}",
    "one": f"a lower learning_rate, {_PROTOTYPES}, {_FREEZE}; and see that the centre moves (center_momentum below 1)",
    "point": "a lower learning_rate, a longer warmup, model_config.freeze_patch_projection=true",
}
"""What usually helps (arXiv 2104.14294, section 5.3, and its code's notes; arXiv 2104.02057, section 4.2)."""


def symptoms(logs: Mapping[str, float], uniform_loss: float | None = None) -> dict[str, str]:
    """What of a log line looks like collapse: a sentence for each kind of REMEDIES.

    Args:
        logs: with "loss", and with "embedding_std", "teacher_entropy" where the objective has them.
        uniform_loss: ln K of an objective with K prototypes; None for others.
    """
    found = {}
    if uniform_loss:
        share = {name: logs[name] / uniform_loss for name in ("loss", "teacher_entropy") if name in logs}
        pinned = [name for name, value in share.items() if abs(value - 1) < TOLERANCE]
        if pinned:
            named = " and ".join(name.replace("_", "'s ") for name in pinned)
            found["uniform"] = f"the {named} stay at ln(prototypes) = {uniform_loss:.2f}: all prototypes equally likely"
        if share.get("teacher_entropy", 1.0) < TOLERANCE:
            found["one"] = "the teacher's entropy stays at 0: one prototype takes every image"
    if logs.get("embedding_std", 1.0) < POINT:
        found["point"] = f"embedding_std stays at {logs['embedding_std']:.2g}: every image has the same embedding"
    return found


class CollapseMonitor(TrainerCallback):
    """Warns once of each kind of collapse that lasts.

    Args:
        uniform_loss: see `symptoms`.
    """

    def __init__(self, uniform_loss: float | None = None):
        self.uniform_loss = uniform_loss
        self.lines: dict[str, int] = {}
        self.since: dict[str, float] = {}
        self.told: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        found, progress = symptoms(logs, self.uniform_loss), float(logs["progress"])
        self.lines = {kind: self.lines.get(kind, 0) + 1 for kind in found}
        self.since = {kind: self.since.get(kind, progress) for kind in found}
        # The tolerance keeps a span of exactly that length from falling short by rounding.
        lasting = [
            kind
            for kind in found
            if self.lines[kind] >= FOR_LINES and progress - self.since[kind] >= FOR_PROGRESS - 1e-9
        ]
        new = [kind for kind in lasting if kind not in self.told]
        self.told |= set(new)
        if new and state.is_world_process_zero:
            what, remedy = "; ".join(found[kind] for kind in new), "; or ".join(REMEDIES[kind] for kind in new)
            logger.warning(
                "Collapse at step %d (progress %.2f): %s. If it does not recover, try in a new output_dir %s",
                state.global_step,
                progress,
                what,
                remedy,
            )
