"""Convert state dicts to and from timm's VisionTransformer, by the rules of `conversion.py`."""

from collections.abc import Mapping
from typing import Any

import torch

from .configuration_accel_vit import AccelViTConfig
from .conversion import (
    State,
    check_tensors,
    expected_tensors,
    join_state,
    refuse,
    rename,
    split_state,
    with_learned_positions,
)

TIMM_NAMES = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layers.", "blocks."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("layernorm.", "norm."),
    ("attention.o_proj.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)
"""Parts of our names and of theirs, which are replaced in this order."""

TIMM_REASONS = {
    "norm_pre.": "a LayerNorm before the first layer (pre_norm)",
    "fc_norm.": "a LayerNorm after pooling (fc_norm)",
    "dist_token": "a distillation token",
    "attn_pool.": "attention pooling (global_pool='map')",
    "attn.q_norm.": "normalised queries and keys (qk_norm)",
}
"""What AccelViT does not have, by the tensors that show it."""


def _name_for_timm(encoder: Mapping[str, torch.Tensor]) -> State:
    """Our tensors under timm's names, with queries, keys and values fused and without positions of registers."""
    tensors = {}
    for name, tensor in encoder.items():
        if ".attention.q_proj." in name:
            parts = [encoder[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensors[_timm_name(name)] = torch.cat(parts)
        elif ".attention.o_proj." in name or ".attention." not in name:
            tensors[_timm_name(name)] = tensor
    return tensors


def _timm_name(name: str) -> str:
    for part in "qkv":
        name = name.replace(f"attention.{part}_proj.", "attn.qkv.")
    return rename(name, TIMM_NAMES)


def to_timm(
    config: AccelViTConfig, state: Mapping[str, torch.Tensor], patch_size: int | None = None
) -> tuple[dict[str, Any], State]:
    """Return the arguments of timm's `VisionTransformer` and its state dict, at `patch_size` (default: the base).

    A classifier becomes timm's head, and `pooling` becomes its `global_pool`.

    Raises:
        ValueError: an activation other than "gelu", an epsilon of LayerNorm other than timm's 1e-6; or a tensor is not
            accounted for.
    """
    other_eps = f"layer_norm_eps {config.layer_norm_eps} (its models have 1e-6)"
    reasons = {f"hidden_act {config.hidden_act!r}": config.hidden_act != "gelu"}
    refuse("timm", {**reasons, other_eps: config.layer_norm_eps != 1e-6})
    config, state = with_learned_positions(config, state, patch_size)
    encoder, head = split_state(config, state)
    tensors = _name_for_timm(encoder)
    cls = int(config.use_cls_token)
    prefix, patches = tensors["pos_embed"][:, :cls], tensors["pos_embed"][:, cls:]
    registers = patches.new_zeros(1, config.num_register_tokens, config.hidden_size)
    tensors["pos_embed"] = torch.cat([prefix, registers, patches], dim=1)
    tensors |= {name.replace("classifier.", "head."): tensor for name, tensor in head.items()}
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": config.num_labels if head else 0,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "class_token": config.use_cls_token,
        "reg_tokens": config.num_register_tokens,
        "global_pool": "token" if config.pooling == "cls" else "avg",
        "fc_norm": False,
    }
    if config.layerscale_value is not None:
        arguments["init_values"] = float(config.layerscale_value) or 1e-5  # timm treats 0 as no LayerScale
    return arguments, tensors


def from_timm(
    state: Mapping[str, torch.Tensor],
    num_attention_heads: int,
    global_pool: str = "token",
    no_embed_class: bool | None = None,
) -> tuple[AccelViTConfig, State]:
    """Convert from timm's `VisionTransformer` with GELU and an epsilon of 1e-6, as in `vit_*_patch*` and DINOv2.

    Everything else follows from the tensors: a head becomes the classifier, and registers take up their positions.

    Args:
        num_attention_heads: no tensor shows this number.
        global_pool: timm's setting, "token" or "avg".
        no_embed_class: timm's setting, with which prefix tokens have no position. With registers, None infers it from
            the number of positions. Otherwise None is timm's default, False.

    Raises:
        ValueError: something that AccelViT does not have, or a tensor is not accounted for.
    """
    for part, reason in TIMM_REASONS.items():
        names = [name for name in state if part in name]
        if names:
            raise ValueError(f"AccelViT cannot express {reason}: {', '.join(names)}")
    if global_pool not in ("token", "avg"):
        raise ValueError(f"global_pool={global_pool!r}: AccelViT pools as 'token' or 'avg'")
    try:
        kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"]
        mlp = state["blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        raise ValueError(f"this is no state dict of timm's VisionTransformer: {error.args[0]} is missing") from None
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    prefix = int("cls_token" in state) + registers
    no_embed_class = False if no_embed_class is None and not registers else no_embed_class
    grid, positioned = _find_timm_grid(positions.shape[1], prefix, no_embed_class)
    if kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(f"patch_embed.proj.weight {tuple(kernel.shape)}: AccelViT has square base patches")
    labels: dict[str, Any] = {"num_labels": len(state["head.weight"])} if "head.weight" in state else {}
    config = AccelViTConfig(
        hidden_size=kernel.shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_attention_heads=num_attention_heads,
        intermediate_size=mlp.shape[0],
        image_size=grid * kernel.shape[-1],
        patch_size=kernel.shape[-1],
        num_channels=kernel.shape[1],
        qkv_bias=any(name.endswith("attn.qkv.bias") for name in state),
        use_cls_token="cls_token" in state,
        num_register_tokens=registers,
        position_embedding_type="learned",
        pooling="cls" if global_pool == "token" else "mean",
        layerscale_value=next((float(x.mean()) for name, x in state.items() if name.endswith("ls1.gamma")), None),
        **labels,
    )
    return config, _rename_timm_tensors(config, state, positioned)


def _find_timm_grid(num_positions: int, num_prefix_tokens: int, no_embed_class: bool | None) -> tuple[int, bool]:
    """Return the patches along a side, and whether prefix tokens have positions."""
    found = []
    for prefix in {False: [num_prefix_tokens], True: [0], None: [num_prefix_tokens, 0]}[no_embed_class]:
        side = round(max(0, num_positions - prefix) ** 0.5)
        if side and side**2 + prefix == num_positions:
            found.append((side, prefix > 0))
    if len(set(found)) != 1:
        raise ValueError(
            f"{num_positions} positions and {num_prefix_tokens} prefix tokens: "
            + ("say no_embed_class=True or False, both fit" if found else "the grid of patches is not square")
        )
    return found[0]


def _rename_timm_tensors(config: AccelViTConfig, state: Mapping[str, torch.Tensor], positioned: bool) -> State:
    cls, registers = int(config.use_cls_token), config.num_register_tokens
    head = {name.replace("head.", "classifier."): x for name, x in state.items() if name.startswith("head.")}
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    positions = tensors["pos_embed"]
    if not positioned:
        empty = positions.new_zeros(1, cls + registers, positions.shape[-1])
        positions = torch.cat([empty, positions], dim=1)
    if registers:
        tensors["reg_token"] = tensors["reg_token"] + positions[:, cls : cls + registers]
    tensors["pos_embed"] = torch.cat([positions[:, :cls], positions[:, cls + registers :]], dim=1)
    ours = expected_tensors(config, bool(head))
    parts = {name: tensor for name, tensor in ours.items() if name.startswith("classifier.")}
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in ours.items() if name not in parts}
    check_tensors("timm's VisionTransformer", {**tensors, **head}, {**_name_for_timm(encoder), **parts})
    converted = {}
    for name in encoder:
        tensor, number = tensors[_timm_name(name)], [f".attention.{part}_proj." in name for part in "qkv"]
        converted[name] = tensor.chunk(3)[number.index(True)].clone() if any(number) else tensor
    return join_state(converted, head)
