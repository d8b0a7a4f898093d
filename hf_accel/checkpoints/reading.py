"""Read a checkpoint of ours, of transformers or of timm as an AccelViT."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification
from transformers.utils.hub import cached_file

from ..models import AccelViTConfig, AccelViTForImageClassification, AccelViTModel
from ..models.conversion import State, from_dinov2, from_vit
from ..models.conversion_timm import from_timm
from ..utils.weight_files import opening, read_tensors
from .licence import stated_licence
from .processor import load_processor, timm_processor

TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16}
TIMM_ARCHITECTURE = r"vit_(tiny|small|base|large)_patch\d+(_reg\d+_dinov2|_dinov2|_\d+)(\..*)?"
"""timm's plain ViTs. For others, neither the weights nor config.json state activations and epsilons."""

CONVERSIONS: dict[str, Any] = {
    "accel_vit": lambda config, state: (config, state),
    "vit": from_vit,
    "vit_mae": from_vit,
    "dinov2": from_dinov2,
    "dinov2_with_registers": from_dinov2,
}
"""By the model_type of transformers, what makes ours of a configuration and a state dict."""

ROTARY = (
    "DINOv3 cannot be read: it rotates queries and keys by their positions in every layer, and AccelViT adds positions "
    "once, to the patches. Name a DINOv2, DINO or ViT"
)

NOT_ENCODER = re.compile(r"(?:^|.*\.)(?:classifier|decoder|pooler|mask_token|head)(?=\.|$)")
"""Parts of checkpoints beside the encoder: matches their names up to the end of the part's own."""


@dataclass
class Checkpoint:
    """A checkpoint that was read.

    Args:
        kind: its model_type, or "timm".
        config, state: the model as AccelViT has it, with a classifier if it has one.
        model: what computes the true features.
        processor: its image processor, or None.
        left_out: the parts that `state` leaves out.
        origin: what `stated_licence` takes.
    """

    kind: str
    config: AccelViTConfig
    state: State
    model: nn.Module
    processor: Any = None
    left_out: list[str] = field(default_factory=list)
    origin: tuple[str, dict[str, Any]] = ("", {})

    @cached_property
    def licence(self) -> dict[str, str | list[str]] | None:
        """What its card states about its licence. Only who asks for it needs the card."""
        return stated_licence(*self.origin)


def refuse_run_folder(checkpoint: str) -> None:
    """Raise ValueError for a folder that is not a checkpoint, whether or not it contains one."""
    folder = Path(checkpoint)
    if folder.is_dir() and not (folder / "config.json").is_file():
        final = folder / "final"
        fix = f"the encoder of this run is {final}" if final.is_dir() else "name the folder of an encoder"
        raise ValueError(f"it cannot be opened: there is no config.json in it; {fix}")


def turn_masking_off(model: nn.Module) -> None:
    """Turn off the masking of an encoder that drops patches at random even in eval mode, such as ViT-MAE."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "mask_ratio", None):
        config.mask_ratio = 0.0


def read_checkpoint(checkpoint: str, num_attention_heads: int | None = None, encoder_only: bool = False) -> Checkpoint:
    """Read an encoder, classifier or training checkpoint of ours, or a ViT, ViT-MAE or DINOv2 of transformers or timm.

    Args:
        checkpoint: a folder or Hub id, or a file of timm's weights.
        num_attention_heads: of timm's weights, if nothing beside them states it.
        encoder_only: leave classifiers out.

    Raises:
        ValueError: it cannot be opened, is of another kind, or a tensor is not accounted for.
    """
    config: dict[str, Any] = {}
    folder = weights = checkpoint
    if Path(checkpoint).is_file():
        folder = str(Path(checkpoint).parent)
    else:
        refuse_run_folder(checkpoint)
        with opening(checkpoint):
            config = json.loads(Path(cast(str, cached_file(checkpoint, "config.json"))).read_text())
            weights = cached_file(checkpoint, "model.safetensors") if "architecture" in config else None
    if "dinov3" in f"{config.get('model_type')} {config.get('architecture')}":
        raise ValueError(ROTARY)
    if weights:
        read = read_timm(Path(weights), config, num_attention_heads)
    else:
        read = read_transformers(checkpoint, config, encoder_only)
    read.origin = folder, config
    return read


def read_transformers(checkpoint: str, config: dict[str, Any], encoder_only: bool) -> Checkpoint:
    kind = str(config.get("model_type"))
    if kind not in CONVERSIONS:
        raise ValueError(f"its model_type is {kind!r}; there are {', '.join(CONVERSIONS)} and timm's ViTs")
    architectures = config.get("architectures") or []
    classifies = any(name.endswith("ForImageClassification") for name in architectures) and not encoder_only
    load: Any = (AutoModelForImageClassification if classifies else AutoModel).from_pretrained
    # no foreign code, for which transformers would otherwise ask on a terminal; mismatches are reported below
    options: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True}
    with opening(checkpoint):
        model, report = load(checkpoint, **options)
        if kind == "vit" and {name.rpartition(".")[0] for name in report["missing_keys"]} == {"pooler.dense"}:
            model, report = load(checkpoint, **options, add_pooling_layer=False)
    unexpected = list(report["unexpected_keys"])
    left_over = [] if kind == "accel_vit" else unexpected  # a training checkpoint has heads and targets
    if encoder_only or kind == "vit_mae":
        left_over = [name for name in left_over if not NOT_ENCODER.match(name)]
    if bad := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"]), *left_over]):
        raise ValueError(f"tensors are missing, unknown or of another shape: {', '.join(bad)}")
    turn_masking_off(model)
    state = model.state_dict()
    ours, converted = CONVERSIONS[kind](model.config, state)
    parts = [found[0] for name in [*unexpected, *state] if (found := NOT_ENCODER.match(name))]
    left_out = sorted({part for part in parts if part != "classifier" or not classifies})
    if kind == "accel_vit" and any(name.endswith("ForPreTraining") for name in architectures):
        left_out.append(f"the heads and other branches of {architectures[0]}")
    return Checkpoint(kind, ours, converted, model, load_processor(checkpoint), left_out=left_out)


def read_timm(weights: Path, config: dict[str, Any], num_attention_heads: int | None) -> Checkpoint:
    """Convert timm's tensors. timm is not needed, so the features to compare with are those of the converted model."""
    state = read_tensors(weights)
    arguments = config.get("model_args", {})
    heads = num_attention_heads or arguments.get("num_heads")
    matched = re.fullmatch(TIMM_ARCHITECTURE, config.get("architecture", ""))
    if config and not matched:
        raise ValueError(
            f"architecture {config['architecture']!r} may have other activations or norms than AccelViT; there are "
            "vit_{tiny,small,base,large}_patchP_SIZE, ..._dinov2 and ..._regN_dinov2"
        )
    if not heads and not matched:
        raise ValueError("the weights do not state the number of heads: give model_config.num_attention_heads=")
    ours, state = from_timm(
        {name: tensor.float() for name, tensor in state.items()},
        heads or TIMM_HEADS[cast(re.Match, matched)[1]],
        arguments.get("global_pool") or config.get("global_pool") or "token",
        arguments.get("no_embed_class"),
    )
    return Checkpoint("timm", ours, state, accel_model(ours, state), timm_processor(config))


def accel_model(config: AccelViTConfig, state: State) -> AccelViTModel | AccelViTForImageClassification:
    classifies = any(name.startswith("classifier.") for name in state)
    model: Any = (AccelViTForImageClassification if classifies else AccelViTModel)(config)
    model.load_state_dict(state)
    return model.eval()
