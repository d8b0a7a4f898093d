"""`task=pack`: write a dataset once to Parquet shards, with images shrunk to what the recipe's crops need."""

import os
import time
from typing import Any

import torch

from ..data import AUGMENTATIONS, ImageSource, count_workers
from ..data.cache import storage_side
from ..data.packing import JPEG_QUALITY, ROWS, PackedFolder
from ..distributed import say
from ..models import AccelViTConfig
from ..objectives import OBJECTIVES
from ..recipe import Recipe, RecipeError
from ..run_folder import RunFolder
from ..utils.counts import count_of
from ..utils.errors import fail
from ..utils.writing import write_text
from .setup import load_images, naming, output_of

README = """---
configs:
- config_name: default
  data_files:
{files}
---

# {name}

{images}, packed by `hf-accel pack` from `{data}`.

- Shards of Parquet: {shards}, which take {size}. The files of the images took {original}.
- Images with a short side above {short_side} pixels: {shrunk:,}. They were shrunk to it, and saved as JPEG of quality
  {jpeg_quality}. Random crops for views of {image_size} pixels need no more. Images longer than 4 to 1 became smaller.
- Images that have the bytes of their files: {kept:,}.
- Images that could not be read and were left out: {unreadable:,}.

`pack.json` holds the settings, and for each shard the images that were left out. To train on these images, name this
folder as the `data` of a recipe.
"""

SUMMARY = (
    "Packed {images}: {size} in place of {original}, {shrunk:,} shrunk to a short side of {short_side} pixels, "
    "{unreadable:,} left out as unreadable ({rate:,.0f} images a second). Train with data={folder}"
)


def pack(recipe: Recipe) -> None:
    """Pack the training and validation images of a recipe, or go on where packing them was interrupted."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError("task=pack runs in one process, for which num_workers processes decode: launch it with one")
    if recipe.data == "bundled":
        fail("data", recipe.data, "the digits come with the package; name images to pack, e.g. data=photos")
    folder = RunFolder(output_of(recipe))
    with folder.lock():
        _refuse_other(recipe, folder)
        if (folder.path / "data").exists():
            say(f"This dataset is packed: train with data={folder}. Choose another output_dir to pack it again.")
            return
        write_text(folder.recipe, recipe.to_yaml())
        source, validation = load_images(recipe, in_memory=False)
        for split in filter(None, (source, validation)):
            if split.deep:
                fail("data", recipe.data, f"{split.name} has 16 bits, and packed images have 8; train on it as it is")
        _pack(recipe, folder, {"train": source} | ({"validation": validation} if validation else {}))


def _refuse_other(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse a folder with other files, or with images that were packed under other settings."""
    begun = folder.read_recipe()
    if not begun and (found := sorted(path.name for path in folder.path.iterdir() if path.name[0] != ".")):
        fail("output_dir", str(folder), f"it holds other files ({found[0]}); choose an empty folder or a new one")
    task = begun.get("task", recipe.task)
    if task != recipe.task:
        fail("output_dir", str(folder), f"it holds the recipe.yaml of task={task}; choose another output_dir")
    for key, value in recipe.used().items():
        if recipe.resume_rule(key) != "free" and begun.get(key, value) != value:
            problem = f"{folder} holds images packed with {key}={begun[key]!r}; choose another output_dir"
            fail(key, value, problem)


def _short_side(recipe: Recipe) -> int:
    """Return the short side in pixels that the views of the recipe's objective need."""
    size = recipe.image_size
    with naming(f"objective_config={recipe.objective_config!r}"), torch.device("meta"):
        objective = OBJECTIVES[recipe.objective](
            AccelViTConfig(image_size=size, patch_size=size), **recipe.objective_config
        )
    return storage_side(objective.view_configs(AUGMENTATIONS[recipe.augmentation]), size)


def _pack(recipe: Recipe, folder: RunFolder, splits: dict[str, ImageSource]) -> None:
    about = {"short_side": _short_side(recipe), "jpeg_quality": JPEG_QUALITY, **recipe.used()}
    about["images"] = {split: len(source) for split, source in splits.items()}
    with naming(f"data={recipe.data!r}"):
        packed = PackedFolder(folder.path, about)
    before, start = packed.total("images"), time.perf_counter()
    if packed.shards:
        say(f"Going on after {count_of(len(packed.shards), 'complete shard')} with {count_of(before, 'image')}")
    workers = count_workers(ROWS * about["short_side"] ** 2) if recipe.num_workers == "auto" else recipe.num_workers
    for split, source in splits.items():
        packed.add(split, source, about["short_side"], os.path.realpath(recipe.data), workers)
    taken, images = time.perf_counter() - start, packed.total("images")
    numbers = _numbers(folder, packed, about)
    write_text(folder.path / "README.md", README.format(**numbers))
    packed.finish()
    say(SUMMARY.format(**numbers, rate=(images - before) / taken, folder=folder))


def _numbers(folder: RunFolder, packed: PackedFolder, about: dict[str, Any]) -> dict[str, Any]:
    """Return what README.md says. Its header tells `datasets` which files each split has."""
    splits = about["images"]
    images = {split: sum(shard["images"] for shard in packed.shards if shard["split"] == split) for split in splits}
    return {
        **about,
        "files": "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in splits),
        "name": folder.path.resolve().name,
        "images": " and ".join(count_of(count, f"{split} image") for split, count in images.items()),
        "shards": len(packed.shards),
        "size": f"{packed.total('bytes') / 1e6:,.1f} MB",
        "original": f"{packed.total('original_bytes') / 1e6:,.1f} MB",
        "shrunk": packed.total("shrunk"),
        "kept": packed.total("images") - packed.total("shrunk"),
        "unreadable": sum(len(shard["unreadable"]) for shard in packed.shards),
    }
