"""What follows for a recipe from the run that it continues."""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..utils.errors import fail
from .declarations import read_class
from .groups import HubKeys, LoggingKeys, SavingKeys, WorkerKeys

CONFIG_NAME = "config.json"
OWN = ("output_dir", "continue_from", "init_from", "budget", "cost", "schedule", "freeze_encoder")
"""The keys of training that a run has for itself. So it has those of workers, logging, saving and the Hub."""


def settle_continuation(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the values of a recipe that names `continue_from` by those of the run there.

    That run is read, except by a run that has a checkpoint: it goes on with what it has recorded.

    Raises:
        RecipeError: there is no finished run, or the recipe also names `init_from`.
    """
    from ..run_folder import RunFolder, find_end, run_of  # imports torch

    earlier = os.path.expanduser(values["continue_from"])
    if values.get("init_from"):
        problem = f"continue_from={earlier} brings all weights; leave init_from out, or say init_from=null"
        fail("init_from", values["init_from"], problem)
    folder = RunFolder(os.path.expanduser(values.get("output_dir", kind.__dataclass_fields__["output_dir"].default)))
    begun = folder.read_recipe()
    if begun.get("continue_from") == earlier and (folder.last_complete_checkpoint() or folder.is_complete()):
        recorded, end = begun, None
    else:
        end = find_end(earlier)
        recorded = run_of(end).read_recipe()
    own = {*OWN, *(key.name for group in (HubKeys, LoggingKeys, SavingKeys, WorkerKeys) for key in fields(group))}
    brought = {key: value for key, value in recorded.items() if key in kind.types() and key not in own - {"license"}}
    known = read_class("models/configuration_accel_vit.py", "AccelViTConfig").settings
    config = {name: value for name, value in brought.get("model_config", {}).items() if name in known}
    if brought.get("model") is None and end is not None:
        config = {**_read_frozen(end), **config}
    # An entry that is named says nothing about the others.
    brought["model_config"] = {**config, **values.get("model_config", {})}
    brought["objective_config"] = {**brought.get("objective_config", {}), **values.get("objective_config", {})}
    return {**brought, **values, **{key: brought[key] for key in ("model_config", "objective_config")}}


def _read_frozen(checkpoint: Path) -> dict[str, bool]:
    """Read whether the patch projection is frozen in a checkpoint, which an objective's default does not tell."""
    config = json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
    return {"freeze_patch_projection": config.get("freeze_patch_projection", False)}
