"""A warning of collapse, early and from what a run logs."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

FOR_LINES, FOR_PROGRESS = 5, 0.05
"""A symptom is reported once it has lasted for so many log lines in a row, over so much of progress."""


def read_metrics(metrics: Mapping[str, Any] | None, objective: str) -> dict[str, Any]:
    """Return the metrics of a step without their graph, which a sum over steps would keep.

    Raises:
        ValueError: one is no scalar.
    """
    found: dict[str, Any] = {}
    for name, value in (metrics or {}).items():
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                shape = tuple(value.shape)
                raise ValueError(
                    f"metrics[{name!r}] of {objective} has the shape {shape}; return a scalar, as its mean()"
                )
            value = value.detach().reshape(())
        found[name] = value
    return found


class CollapseMonitor(TrainerCallback):
    """Warns once of each kind of collapse that lasts.

    Args:
        symptoms: an objective's `collapse_symptoms`.
    """

    def __init__(self, symptoms: Callable[[Mapping[str, float]], dict[str, tuple[str, str]]]):
        self.symptoms = symptoms
        self.lines: dict[str, int] = {}
        self.since: dict[str, float] = {}
        self.reported: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        found, progress = self.symptoms(logs), float(logs["progress"])
        self.lines = {kind: self.lines.get(kind, 0) + 1 for kind in found}
        self.since = {kind: self.since.get(kind, progress) for kind in found}
        # The tolerance keeps a span of exactly that length from falling short by rounding.
        lasting = [
            kind
            for kind in found
            if self.lines[kind] >= FOR_LINES and progress - self.since[kind] >= FOR_PROGRESS - 1e-9
        ]
        new = [kind for kind in lasting if kind not in self.reported]
        self.reported |= set(new)
        if new and state.is_world_process_zero:
            what, remedy = "; ".join(found[kind][0] for kind in new), "; or ".join(found[kind][1] for kind in new)
            logger.warning(
                "Collapse at step %d (progress %.2f): %s. If it does not recover, try in a new output_dir %s",
                state.global_step,
                progress,
                what,
                remedy,
            )
