"""`task=export`: a checkpoint written in another library's format, read back, and kept only if its features agree."""

import importlib.util
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Model,
    ViTForImageClassification,
    ViTModel,
)
from transformers.image_utils import PILImageResampling
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.utils.hub import cached_file

from ..distributed import say
from ..evaluation import load_processor, refuse_run_folder, weights_digest
from ..hub import CARD_NAME, Export, agreement, export_card, stated_licence
from ..models import AccelViTConfig, AccelViTForImageClassification, AccelViTModel
from ..models.conversion import State, from_dinov2, from_vit, to_dinov2, to_vit, with_learned_positions
from ..models.conversion_timm import from_timm, to_timm
from ..recipe import Recipe, RecipeError
from ..utils.weight_files import opening, read_tensors
from .setup import naming, output_of

TOLERANCE = 1e-5
"""Largest difference of any feature, relative to the largest feature."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16}
TIMM_ARCHITECTURE = r"vit_(tiny|small|base|large)_patch\d+(_reg\d+_dinov2|_dinov2|_\d+)(\..*)?"
"""timm's plain ViTs. For others, neither the weights nor config.json state activations and epsilons."""

Features = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""Pixels (B, C, S, S) -> what is compared, by name."""


@dataclass
class Source:
    """The checkpoint to export: its tensors as AccelViT has them, and a model that computes the true features."""

    kind: str
    config: AccelViTConfig
    state: State
    model: nn.Module
    processor: Any = None
    licence: dict[str, str | list[str]] = field(default_factory=dict)

    def features(self, patch_size: int) -> Features:
        ours = isinstance(self.model, AccelViTModel | AccelViTForImageClassification)
        return features_of(self.model, **({"patch_size": patch_size} if ours else {}))

    def shares_pooler(self, export_format: str) -> bool:
        """Return whether both sides mean the same by `pooler_output`.

        ViT's comes from a layer that AccelViT lacks, and that of the other formats is never a mean.
        """
        return self.kind != "vit" and (self.config.pooling == "cls" or export_format not in ("vit", "dinov2"))


def export(recipe: Recipe) -> None:
    """Write `checkpoint` as `output_dir/export_format/`.

    Raises:
        RecipeError: the source is not understood, cannot be expressed in the format, or comes back with other features.
    """
    target = Path(recipe.output_dir) / recipe.export_format
    if target.exists():
        raise RecipeError(f"output_dir={recipe.output_dir!r}: {target} exists already; remove it, or choose another")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if recipe.export_format == "onnx" and missing:
        raise RecipeError(f"export_format='onnx': {', '.join(missing)} not installed; pip install 'hf-accel[onnx]'")
    source = read_source(recipe)
    patch_size = exported_patch_size(recipe, source.config)
    output_of(recipe)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / recipe.export_format
        folder.mkdir()
        with naming(f"export_format={recipe.export_format!r}"):
            read_back = WRITERS[recipe.export_format](source, patch_size, folder)
        if source.processor is not None:
            source.processor.save_pretrained(folder)
        names = ["last_hidden_state", "logits", *["pooler_output"] * source.shares_pooler(recipe.export_format)]
        difference = largest_difference(source.features(patch_size), read_back, source.config, names)
        if not difference <= TOLERANCE:
            raise RecipeError(
                f"export_format={recipe.export_format!r}: the features of what was written differ by {difference:.1e} "
                f"(relative; at most {TOLERANCE:.0e}), so nothing was kept"
            )
        about = Export(
            export_format=recipe.export_format,
            checkpoint=str(recipe.checkpoint),
            weights=weights_digest(source.model),
            date=datetime.now(timezone.utc).date().isoformat(),
            kind=source.kind,
            licence=source.licence,
            config=source.config,
            patch_size=patch_size,
            classifies="classifier.weight" in source.state,
            has_processor=source.processor is not None,
            difference=difference,
            folder=target.resolve(),
        )
        (folder / CARD_NAME).write_text(export_card(about), encoding="utf-8")
        folder.rename(target)
    processor = "with" if source.processor is not None else "without"
    say(
        f"{recipe.checkpoint} ({source.kind}) as {recipe.export_format} at patch {patch_size}, {processor} image "
        f"processor: {target}. Read back, its features {agreement(difference)}"
    )


def exported_patch_size(recipe: Recipe, config: AccelViTConfig) -> int:
    """Return the patch size of the export. All formats except for accel_vit have a single one."""
    sizes = recipe.eval_patch_sizes
    default = config.default_patch_size or config.patch_size
    if recipe.export_format == "accel_vit":
        if sizes:
            raise RecipeError(f"eval_patch_sizes={sizes!r}: accel_vit keeps every patch size; leave the key out")
        return default
    if len(sizes) > 1:
        raise RecipeError(f"eval_patch_sizes={sizes!r}: {recipe.export_format} has one patch size; name a single one")
    return sizes[0] if sizes else default


# Verification


def features_of(model: nn.Module, **options: Any) -> Features:
    def features(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return dict(model.eval()(pixels, **options))

    return features


def largest_difference(one: Features, other: Features, config: AccelViTConfig, names: list[str]) -> float:
    """Return the largest difference of the features in `names`, relative to the largest feature, on random images."""
    differences = []
    for batch_size in (3, 1):
        size = (batch_size, config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(size, generator=torch.Generator().manual_seed(batch_size))
        expected, got = one(pixels), other(pixels)
        for name in expected.keys() & set(names):
            differences.append((got[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-12))
    return float(torch.stack(differences).max())  # NaN if any is


# Where a checkpoint comes from


def read_source(recipe: Recipe) -> Source:
    """Read an encoder, classifier or training checkpoint of ours, or a ViT or DINOv2 of transformers or timm."""
    checkpoint, config = str(recipe.checkpoint), {}
    folder = weights = checkpoint
    with naming(f"checkpoint={checkpoint!r}"):
        if Path(checkpoint).is_file():
            folder = str(Path(checkpoint).parent)
        else:
            refuse_run_folder(checkpoint)
            with opening(checkpoint):
                config = json.loads(Path(cast(str, cached_file(checkpoint, "config.json"))).read_text())
                weights = cached_file(checkpoint, "model.safetensors") if "architecture" in config else None
        source = timm_source(recipe, Path(weights), config) if weights else transformers_source(checkpoint, config)
        source.licence = stated_licence(folder, config)
        return source


def transformers_source(checkpoint: str, config: dict[str, Any]) -> Source:
    kind = config.get("model_type")
    if kind not in ("accel_vit", "vit", "dinov2"):
        raise ValueError(f"its model_type is {kind!r}; there are accel_vit, vit, dinov2 and timm's ViTs")
    classifies = any(name.endswith("ForImageClassification") for name in config.get("architectures") or [])
    load: Any = (AutoModelForImageClassification if classifies else AutoModel).from_pretrained
    # no foreign code, for which transformers would otherwise ask on a terminal; mismatches are reported below
    options: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True}
    with opening(checkpoint):
        model, report = load(checkpoint, **options)
        if kind == "vit" and {name.rpartition(".")[0] for name in report["missing_keys"]} == {"pooler.dense"}:
            model, report = load(checkpoint, **options, add_pooling_layer=False)
    left_over = [] if kind == "accel_vit" else report["unexpected_keys"]  # a training checkpoint has heads and targets
    if bad := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"]), *left_over]):
        raise ValueError(f"tensors are missing, unknown or of another shape: {', '.join(bad)}")
    state = model.state_dict()
    ours, state = {"vit": from_vit, "dinov2": from_dinov2}.get(kind, lambda *pair: pair)(model.config, state)
    return Source(kind, ours, state, model, load_processor(checkpoint))


def timm_source(recipe: Recipe, weights: Path, config: dict[str, Any]) -> Source:
    """Convert timm's tensors. timm is not needed, so the features to compare with are those of the converted model."""
    state = read_tensors(weights)
    arguments = config.get("model_args", {})
    heads = recipe.model_config.get("num_attention_heads") or arguments.get("num_heads")
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
    return Source("timm", ours, state, accel_model(ours, state), timm_processor(config))


def timm_processor(config: dict[str, Any]) -> BitImageProcessorPil | None:
    """Build the image processor of a timm configuration, if the configuration describes its images."""
    values = config.get("pretrained_cfg", config)
    if not {"input_size", "mean", "std"} <= values.keys():
        return None
    side = values["input_size"][-1]
    return BitImageProcessorPil(
        size={"shortest_edge": int(side / values.get("crop_pct", 1.0) + 1e-6)},  # timm rounds down
        crop_size={"height": side, "width": side},
        resample=PILImageResampling[values.get("interpolation", "bicubic").upper()].value,
        image_mean=list(values["mean"]),
        image_std=list(values["std"]),
    )


# Where it goes. Each function writes into a folder and returns the features of what it reads back.


def accel_model(config: AccelViTConfig, state: State) -> AccelViTModel | AccelViTForImageClassification:
    classifies = any(name.startswith("classifier.") for name in state)
    model: Any = (AccelViTForImageClassification if classifies else AccelViTModel)(config)
    model.load_state_dict(state)
    return model.eval()


def write_accel_vit(source: Source, patch_size: int, folder: Path) -> Features:
    model: Any = accel_model(source.config, source.state)
    model.save_pretrained(folder)
    return features_of(type(model).from_pretrained(folder), patch_size=patch_size)


def write_vit(source: Source, patch_size: int, folder: Path) -> Features:
    config, state = to_vit(source.config, source.state, patch_size)
    model: Any = (ViTForImageClassification if "classifier.weight" in state else ViTModel)(config)
    return write_theirs(model, state, folder)


def write_dinov2(source: Source, patch_size: int, folder: Path) -> Features:
    config, state = to_dinov2(source.config, source.state, patch_size)
    return write_theirs(Dinov2Model(config), state, folder)


def write_theirs(model: Any, state: State, folder: Path) -> Features:
    model.load_state_dict(state)
    model.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise RecipeError(f"{type(model).__name__} does not read back what it wrote: {report}")
    return features_of(loaded)


def write_timm(source: Source, patch_size: int, folder: Path) -> Features:
    """`timm.create_model("local-dir:FOLDER", pretrained=True)` opens it. Read back by the inverse conversion."""
    arguments, state = to_timm(source.config, source.state, patch_size)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    side = arguments["img_size"]
    values = {
        "input_size": [arguments["in_chans"], side, side],
        "num_classes": arguments["num_classes"],
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    processor = source.processor
    if processor is not None:
        edge = (processor.size or {}).get("shortest_edge")
        values |= {
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "crop_pct": side / edge if edge else 1.0,
            "interpolation": PILImageResampling(processor.resample).name.lower(),
        }
    config = {
        "architecture": "vit_base_patch16_224",  # the model_args make it ours
        "num_classes": arguments["num_classes"],
        "num_features": arguments["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": values,
    }
    if arguments["num_classes"]:
        config["label_names"] = list(cast(dict, source.config.id2label).values())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    written = load_file(folder / "model.safetensors")
    return features_of(accel_model(*from_timm(written, arguments["num_heads"], arguments["global_pool"])))


def write_onnx(source: Source, patch_size: int, folder: Path) -> Features:
    """Write `model.onnx`, which takes any number of images of the base size."""
    model = accel_model(*with_learned_positions(source.config, source.state, patch_size))
    size = (2, source.config.num_channels, source.config.image_size, source.config.image_size)
    names = ["logits"] if isinstance(model, AccelViTForImageClassification) else ["last_hidden_state", "pooler_output"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own calls of torch
        torch.onnx.export(
            model,
            (torch.zeros(size),),
            folder / "model.onnx",
            input_names=["pixel_values"],
            output_names=names,
            dynamic_shapes=({0: "batch"},),
            external_data=sum(tensor.nbytes for tensor in source.state.values()) > 1.5e9,  # protobuf ends at 2 GB
            dynamo=True,
            verbose=False,
        )
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda pixels: {
        name: torch.from_numpy(array)
        for name, array in zip(names, session.run(names, {"pixel_values": pixels.numpy()}), strict=True)
    }


WRITERS: dict[str, Callable[[Source, int, Path], Features]] = {
    "accel_vit": write_accel_vit,
    "vit": write_vit,
    "dinov2": write_dinov2,
    "timm": write_timm,
    "onnx": write_onnx,
}
