"""What follows for a recipe from the encoder that training starts from."""

import os
from collections.abc import Mapping
from typing import Any

from ..utils.errors import fail

BROUGHT = ("model_config", "num_channels", "image_size", "patch_size")
"""The keys that an encoder settles, as far as a recipe does not name them."""

SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size")


def settle_start(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the values of a recipe that names `init_from`, by the encoder there.

    The encoder is read, except by a run that has a checkpoint: it goes on with what it has recorded.

    Raises:
        RecipeError: no encoder can be read there, or the recipe contradicts it.
    """
    from ..run_folder import RunFolder  # imports torch

    checkpoint, given = os.path.expanduser(values["init_from"]), values.get("model_config", {})
    folder = RunFolder(os.path.expanduser(values.get("output_dir", kind.__dataclass_fields__["output_dir"].default)))
    begun = folder.read_recipe()
    if begun.get("init_from") == checkpoint and (folder.last_complete_checkpoint() or folder.is_complete()):
        brought = {key: begun[key] for key in (*BROUGHT, "license") if key in begun}
        brought["model_config"] = {**brought["model_config"], **given}
    else:
        brought = _read(checkpoint, values)
    if "license" not in kind.types():
        brought.pop("license", None)
    return {**brought, **values, "model": None, "model_config": brought["model_config"]}


def _read(checkpoint: str, values: Mapping[str, Any]) -> dict[str, Any]:
    from ..checkpoints import licence_of_trained, read_start
    from ..models import PRESETS, AccelViTConfig
    from ..models.configuration_accel_vit import changed_fields

    named = {key: values[key] for key in ("image_size", "patch_size") if key in values}
    try:
        config = read_start(checkpoint, **named, **values.get("model_config", {})).config
    except ValueError as error:
        fail("init_from", checkpoint, str(error))
    if values.get("num_channels", config.num_channels) != config.num_channels:
        problem = f"the encoder of init_from={checkpoint} takes images of {config.num_channels}; leave it out"
        fail("num_channels", values["num_channels"], f"{problem}, or leave init_from out")
    preset = PRESETS[values["model"]]() if values.get("model") in PRESETS else config
    for size in SIZES:
        if getattr(config, size) != getattr(preset, size):
            other = f"that of init_from={checkpoint} is {getattr(config, size)}"
            problem = f"its {size} is {getattr(preset, size)}, and {other}"
            fail("model", values["model"], f"{problem}; leave model out, or say model=null")
    fields = {name: value for name, value in changed_fields(config).items() if name in AccelViTConfig.__annotations__}
    return {
        # An objective has a default of its own for the projection, which is for random weights.
        "model_config": {**fields, "freeze_patch_projection": config.freeze_patch_projection},
        "num_channels": config.num_channels,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "license": licence_of_trained((config.init_from or {})["license"]),
    }
