"""`task=export`: a checkpoint written in another library's format, read back, and kept only if its features agree."""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Dinov2Model, ViTForImageClassification, ViTMAEModel, ViTModel
from transformers.image_utils import PILImageResampling

from ..checkpoints import Checkpoint, accel_model, read_checkpoint
from ..distributed import say
from ..evaluation import weights_digest
from ..hub import CARD_NAME, Export, agreement, export_card
from ..models import AccelViTConfig, AccelViTForImageClassification, AccelViTModel
from ..models.conversion import State, to_dinov2, to_vit, with_learned_positions
from ..models.conversion_timm import from_timm, to_timm
from ..recipe import Recipe, RecipeError
from .setup import naming, output_of

TOLERANCE = 1e-5
"""Largest difference of any feature, relative to the largest feature."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

EXPORTER = "torch.onnx._internal.exporter._registration"
"""The logger of torch that names what its exporter leaves out."""

Features = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""Pixels (B, C, S, S) -> what is compared, by name."""


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
        names = " ".join(missing)
        raise RecipeError(f"export_format='onnx': not installed: {names}; pip install {names}")
    with naming(f"checkpoint={recipe.checkpoint!r}"):
        source = read_checkpoint(str(recipe.checkpoint), recipe.model_config.get("num_attention_heads"))
    patch_size = exported_patch_size(recipe, source.config)
    output_of(recipe)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / recipe.export_format
        folder.mkdir()
        with naming(f"export_format={recipe.export_format!r}"):
            read_back = WRITERS[recipe.export_format](source, patch_size, folder)
        if source.processor is not None:
            source.processor.save_pretrained(folder)
        names = ["last_hidden_state", "logits", *["pooler_output"] * shares_pooler(source, recipe.export_format)]
        difference = largest_difference(original_features(source, patch_size), read_back, source.config, names)
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
        )
        (folder / CARD_NAME).write_text(export_card(about), encoding="utf-8")
        folder.rename(target)
    processor = "with" if source.processor is not None else "without"
    left_out = f" Left out: {', '.join(source.left_out)}." if source.left_out else ""
    say(
        f"{recipe.checkpoint} ({source.kind}) as {recipe.export_format} at patch {patch_size}, {processor} image "
        f"processor: {target}.{left_out} Read back, its features {agreement(difference)}"
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


def original_features(source: Checkpoint, patch_size: int) -> Features:
    if isinstance(source.model, ViTMAEModel):  # which shuffles the tokens by a noise
        noise = torch.arange(source.config.grid_size**2)[None]
        return lambda pixels: features_of(source.model, noise=noise.expand(len(pixels), -1))(pixels)
    ours = isinstance(source.model, AccelViTModel | AccelViTForImageClassification)
    return features_of(source.model, **({"patch_size": patch_size} if ours else {}))


def shares_pooler(source: Checkpoint, export_format: str) -> bool:
    """Return whether both sides mean the same by `pooler_output`.

    ViT's comes from a layer that AccelViT lacks, and that of the other formats is never a mean.
    """
    return source.kind != "vit" and (source.config.pooling == "cls" or export_format not in ("vit", "dinov2"))


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


# Where it goes. Each function writes into a folder and returns the features of what it reads back.


def write_accel_vit(source: Checkpoint, patch_size: int, folder: Path) -> Features:
    model: Any = accel_model(source.config, source.state)
    model.save_pretrained(folder)
    return features_of(type(model).from_pretrained(folder), patch_size=patch_size)


def write_vit(source: Checkpoint, patch_size: int, folder: Path) -> Features:
    config, state = to_vit(source.config, source.state, patch_size)
    model: Any = (ViTForImageClassification if "classifier.weight" in state else ViTModel)(config)
    return write_theirs(model, state, folder)


def write_dinov2(source: Checkpoint, patch_size: int, folder: Path) -> Features:
    config, state = to_dinov2(source.config, source.state, patch_size)
    return write_theirs(Dinov2Model(config), state, folder)


def write_theirs(model: Any, state: State, folder: Path) -> Features:
    model.load_state_dict(state)
    model.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise RecipeError(f"{type(model).__name__} does not read back what it wrote: {report}")
    return features_of(loaded)


def write_timm(source: Checkpoint, patch_size: int, folder: Path) -> Features:
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


@contextmanager
def without_lines_on_torchvision() -> Iterator[None]:
    """Within it, torch's exporter does not say of each operation of torchvision that it is left out."""

    def is_of_use(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("torchvision is not installed. Skipping")

    logger = logging.getLogger(EXPORTER)
    logger.addFilter(is_of_use)
    try:
        yield
    finally:
        logger.removeFilter(is_of_use)


def write_onnx(source: Checkpoint, patch_size: int, folder: Path) -> Features:
    """Write `model.onnx`, which takes any number of images of the base size."""
    model = accel_model(*with_learned_positions(source.config, source.state, patch_size))
    size = (2, source.config.num_channels, source.config.image_size, source.config.image_size)
    names = ["logits"] if isinstance(model, AccelViTForImageClassification) else ["last_hidden_state", "pooler_output"]
    with warnings.catch_warnings(), without_lines_on_torchvision():
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


WRITERS: dict[str, Callable[[Checkpoint, int, Path], Features]] = {
    "accel_vit": write_accel_vit,
    "vit": write_vit,
    "dinov2": write_dinov2,
    "timm": write_timm,
    "onnx": write_onnx,
}
