"""Convert state dicts to and from transformers' ViT and DINOv2; `conversion_timm.py` does so for timm.

Our side is an [`AccelViTModel`], or an [`AccelViTForImageClassification`] if the other side has the same classifier.
A tensor that is missing, unknown or of another shape is an error, and so is anything that the other side cannot
express. Converted models have the same features at `config.image_size`. At other sizes they differ: ViT (on request)
and DINOv2 interpolate positions bicubically, AccelViT bilinearly, and timm refuses or resamples. Settings that act in
training only (dropout, stochastic depth) are not converted.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from transformers import Dinov2Config, Dinov2WithRegistersConfig, ViTConfig, ViTMAEConfig
from transformers.utils import logging

from .configuration_accel_vit import AccelViTConfig
from .embeddings_accel_vit import AccelViTEmbeddings
from .modeling_accel_vit import AccelViTForImageClassification, AccelViTModel
from .shortening_accel_vit import resize_patch_kernel

logger = logging.get_logger(__name__)

State = dict[str, torch.Tensor]

Interpolation = Literal["bilinear", "bicubic", "antialiased bicubic"]

SHARED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "initializer_range",
    "num_channels",
    "qkv_bias",
    "id2label",
    "label2id",
)
"""Fields with the same name and meaning in AccelViTConfig, ViTConfig and Dinov2Config."""

KERNEL, POSITIONS = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"

DINOV2_NAMES = (("layers.", "encoder.layer."), ("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."))
"""Parts of our names and of theirs, which are replaced in this order."""


# What all conversions share


def check_tensors(what: str, state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    found = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"the tensors of {what} do not fit its configuration; {'; '.join(found)}")


def expected_tensors(config: AccelViTConfig, classifier: bool = False) -> State:
    """Our tensors by name, with their shapes and without memory."""
    with torch.device("meta"):
        return (AccelViTForImageClassification if classifier else AccelViTModel)(config).state_dict()


def split_state(config: AccelViTConfig, state: Mapping[str, torch.Tensor]) -> tuple[State, State]:
    """Check our state and split it into the encoder's tensors and "classifier.*" (empty without a classifier)."""
    classifier = any(name.startswith("encoder.") for name in state)
    check_tensors("the AccelViT", state, expected_tensors(config, classifier))
    head = {name: tensor for name, tensor in state.items() if name.startswith("classifier.")}
    return {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name not in head}, head


def join_state(encoder: State, head: Mapping[str, torch.Tensor]) -> State:
    """The inverse of `split_state`."""
    return {**{f"encoder.{name}": tensor for name, tensor in encoder.items()}, **head} if head else encoder


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


def refuse(target: str, reasons: Mapping[str, bool]) -> None:
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"{target} cannot express {' nor '.join(found)}; the formats accel_vit and onnx can")


def _read_side(name: str, value: Any) -> int:
    """The side of a square that transformers gives as one number or as (height, width)."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) > 1:
        raise ValueError(f"{name}={value!r}: AccelViT has square base patches and a square base image")
    return int(sides.pop())


def _shared_fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SHARED_FIELDS}


def _from_transformers(
    config: ViTConfig | ViTMAEConfig | Dinov2Config | Dinov2WithRegistersConfig, **fields: Any
) -> AccelViTConfig:
    sizes: dict[str, Any] = {name: _read_side(name, getattr(config, name)) for name in ("image_size", "patch_size")}
    return AccelViTConfig(**_shared_fields(config), **sizes, position_embedding_type="learned", **fields)


def _warn_of_pooling(config: AccelViTConfig, target: str) -> None:
    if config.pooling == "mean":
        logger.warning(
            f"pooling='mean': the pooler_output of {target} is its CLS token; the mean of the patch tokens is "
            "last_hidden_state[:, 1:].mean(1)"
        )


def with_learned_positions(
    config: AccelViTConfig,
    state: Mapping[str, torch.Tensor],
    patch_size: int | None = None,
    image_size: int | None = None,
    interpolation: Interpolation = "bilinear",
) -> tuple[AccelViTConfig, State]:
    """Convert an encoder to one patch size, with the kernel resized to it and its positions as a learned table.

    The features are those of the given encoder under `patch_size` (default: its base) at `image_size` (default:
    `config.image_size`). Other libraries have this form.

    Args:
        interpolation: what samples a learned table for another grid; AccelViT itself samples bilinearly.

    Raises:
        ValueError: a tensor is not accounted for, or `patch_size` does not divide the image size.
    """
    encoder, head = split_state(config, state)
    patch_size = config.patch_size if patch_size is None else patch_size
    changes = {"patch_size": patch_size, "default_patch_size": None, "position_embedding_type": "learned"}
    changes |= {"image_size": config.image_size if image_size is None else image_size}
    plain = AccelViTConfig.from_dict({**config.to_dict(), **changes})
    with torch.no_grad():
        patches = _sample_positions(config, encoder, plain.grid_size, interpolation)
        kernel = resize_patch_kernel(encoder[KERNEL], patch_size)
    prefix = torch.zeros(1, int(config.use_cls_token), config.hidden_size, dtype=patches.dtype)
    if POSITIONS in encoder:
        prefix = encoder[POSITIONS][:, : prefix.shape[1]].cpu()
    positions = torch.cat([prefix, patches.cpu()], dim=1).to(encoder[KERNEL].device)
    return plain, join_state({**encoder, KERNEL: kernel, POSITIONS: positions}, head)


def _sample_positions(config: AccelViTConfig, encoder: State, side: int, interpolation: Interpolation) -> torch.Tensor:
    """(1, side * side, hidden_size)."""
    if interpolation == "bilinear" or POSITIONS not in encoder or side == config.grid_size:
        embeddings = AccelViTEmbeddings(config).to(encoder[KERNEL].dtype)
        embeddings.load_state_dict(
            {name.removeprefix("embeddings."): x for name, x in encoder.items() if name.startswith("embeddings.")}
        )
        return embeddings.patch_positions(side, side, like=encoder[KERNEL].cpu())[None]
    table = encoder[POSITIONS][0, int(config.use_cls_token) :].unflatten(0, (config.grid_size, config.grid_size))
    antialias = interpolation == "antialiased bicubic"
    sampled = torch.nn.functional.interpolate(
        table.float().permute(2, 0, 1)[None], (side, side), mode="bicubic", antialias=antialias
    )
    return sampled.flatten(2).transpose(1, 2).to(table.dtype)


# transformers' ViT


def to_vit(
    config: AccelViTConfig, state: Mapping[str, torch.Tensor], patch_size: int | None = None
) -> tuple[ViTConfig, State]:
    """Convert to `ViTModel`, or with a classifier to `ViTForImageClassification`, at `patch_size` (default: the base).

    LayerScale is multiplied into the projections before it. The pooler becomes the identity: `pooler_output` is CLS.

    Raises:
        ValueError: registers, no CLS token, a classifier on the mean; or a tensor is not accounted for.
    """
    reasons = {"register tokens": config.num_register_tokens > 0, "a model without CLS token": not config.use_cls_token}
    classified = any(name.startswith("classifier.") for name in state)
    refuse("ViT", {**reasons, "a classifier on the mean": classified and config.pooling == "mean"})
    config, state = with_learned_positions(config, state, patch_size)
    encoder, head = split_state(config, state)
    for number in range(config.num_hidden_layers):
        for scale, linear in (("layer_scale1", "attention.o_proj"), ("layer_scale2", "mlp.fc2")):
            factor = encoder.pop(f"layers.{number}.{scale}.lambda1", None)
            if factor is not None:
                weight, bias = (f"layers.{number}.{linear}.{kind}" for kind in ("weight", "bias"))
                encoder[weight], encoder[bias] = encoder[weight] * factor[:, None], encoder[bias] * factor
    sizes: dict[str, Any] = {"image_size": config.image_size, "patch_size": config.patch_size}
    vit = ViTConfig(
        **_shared_fields(config),
        **sizes,
        intermediate_size=config.intermediate_size,
        encoder_stride=config.patch_size,
        pooler_act="linear",
    )
    if head:
        return vit, {**{f"vit.{name}": tensor for name, tensor in encoder.items()}, **head}
    _warn_of_pooling(config, "ViT")
    identity = torch.eye(config.hidden_size).to(encoder[KERNEL])
    return vit, {**encoder, "pooler.dense.weight": identity, "pooler.dense.bias": identity.new_zeros(len(identity))}


def from_vit(config: ViTConfig | ViTMAEConfig, state: Mapping[str, torch.Tensor]) -> tuple[AccelViTConfig, State]:
    """Convert from `ViTModel`, `ViTForImageClassification` or `ViTMAEModel`, the encoder of a masked autoencoder.

    The mask token and a pooler other than the identity are left out. Neither affects `last_hidden_state`, and
    `pooler_output` becomes CLS, which the classifier uses. A warning says so about the pooler.

    Raises:
        ValueError: patches or images that are not square, or a tensor is not accounted for.
    """
    accel = _from_transformers(config, intermediate_size=config.intermediate_size)
    prefix = "vit." if any(name.startswith("vit.") for name in state) else ""
    state = {name: tensor for name, tensor in state.items() if name != f"{prefix}embeddings.mask_token"}
    pooler = {name: state.pop(name) for name in [*state] if name.startswith(f"{prefix}pooler.dense.")}
    if pooler:
        eye = torch.eye(config.hidden_size)
        identity = {f"{prefix}pooler.dense.weight": eye, f"{prefix}pooler.dense.bias": eye.new_zeros(len(eye))}
        if getattr(config, "pooler_output_size", None) == config.hidden_size:
            check_tensors("ViT's pooler", pooler, identity)
        if getattr(config, "pooler_act", None) != "linear" or any(
            not torch.equal(identity[n].to(x), x) for n, x in pooler.items()
        ):
            logger.warning("pooler.dense.* is left out: AccelViT's pooler_output is the CLS token itself")
    ours = expected_tensors(accel, classifier=any(name.startswith("classifier.") for name in state))
    theirs = {name: name if "classifier." in name else prefix + name.removeprefix("encoder.") for name in ours}
    check_tensors("ViT", state, {theirs[name]: tensor for name, tensor in ours.items()})
    return accel, {name: state[theirs[name]] for name in ours}


# transformers' DINOv2


def to_dinov2(
    config: AccelViTConfig, state: Mapping[str, torch.Tensor], patch_size: int | None = None
) -> tuple[Dinov2Config, State]:
    """Convert to `Dinov2Model` without a mask token, at `patch_size` (default: the base); absent LayerScales become 1.

    Raises:
        ValueError: registers, no CLS token, a classifier, an MLP that is not a multiple of the width; or a tensor is
            not accounted for.
    """
    reasons = {
        "register tokens": config.num_register_tokens > 0,
        "a model without CLS token": not config.use_cls_token,
        "a classifier on pooler_output (its own is on CLS and mean)": any(n.startswith("classifier.") for n in state),
        f"intermediate_size {config.intermediate_size}, no multiple of hidden_size {config.hidden_size}": (
            config.intermediate_size % config.hidden_size > 0
        ),
    }
    refuse("DINOv2", reasons)
    config, encoder = with_learned_positions(config, state, patch_size)
    for number in range(config.num_hidden_layers):
        for scale in ("layer_scale1", "layer_scale2"):
            ones = torch.ones(config.hidden_size).to(encoder[KERNEL])
            encoder.setdefault(f"layers.{number}.{scale}.lambda1", ones)
    _warn_of_pooling(config, "DINOv2")
    scale = config.layerscale_value
    dinov2 = Dinov2Config(
        **_shared_fields(config),
        image_size=config.image_size,
        patch_size=config.patch_size,
        mlp_ratio=config.intermediate_size // config.hidden_size,
        layerscale_value=1.0 if scale is None else float(scale),
        use_mask_token=False,
    )
    return dinov2, {rename(name, DINOV2_NAMES): tensor for name, tensor in encoder.items()}


def from_dinov2(
    config: Dinov2Config | Dinov2WithRegistersConfig, state: Mapping[str, torch.Tensor]
) -> tuple[AccelViTConfig, State]:
    """Convert from `Dinov2Model` or `Dinov2WithRegistersModel`, without the mask token of their pretraining.

    Raises:
        ValueError: SwiGLU, patches or images that are not square, or a tensor is not accounted for.
    """
    if config.use_swiglu_ffn:
        raise ValueError("use_swiglu_ffn=True: AccelViT has a plain MLP; DINOv2's giant model cannot be converted")
    accel = _from_transformers(
        config,
        intermediate_size=int(config.hidden_size * config.mlp_ratio),
        layerscale_value=config.layerscale_value,
        num_register_tokens=getattr(config, "num_register_tokens", 0),
    )
    state = {name: tensor for name, tensor in state.items() if name != "embeddings.mask_token"}
    ours = expected_tensors(accel)
    check_tensors("DINOv2", state, {rename(name, DINOV2_NAMES): tensor for name, tensor in ours.items()})
    return accel, {name: state[rename(name, DINOV2_NAMES)] for name in ours}
