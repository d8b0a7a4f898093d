"""`task=explore`: a page of pictures that show what an encoder has learnt about images, with labels or without."""

import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compression.strategy import possible_patch_sizes
from ..data import ImageSource
from ..data.labels import UNLABELLED
from ..data.pictures import show_channels
from ..distributed import say
from ..distributed.launch import on_cpu
from ..evaluation import (
    count_input_channels,
    extract_features,
    input_of,
    open_encoder,
    processed_loader,
    takes_patch_size,
)
from ..evaluation.patches import attention_is_trained, color_patches, look_at_patches
from ..recipe import Recipe, RecipeError
from ..report.exploration import (
    NUMBERED,
    Explored,
    Section,
    draw_attention,
    draw_duplicates,
    draw_map,
    draw_neighbours,
    draw_outliers,
    draw_patches,
)
from ..report.fonts import REMEDY
from ..report.pages import escape, write_page
from ..run_folder import RunFolder
from ..utils.counts import count_of
from ..utils.seeding import generator
from .setup import EVALUATED_BATCH, choose_workers, load_images, naming, output_of

MOST, LEAST = 20_000, 10
"""Images that are compared at most, so that memory and time stay bounded, and at least."""

ROUNDING = 1e-6
"""How little features differ, relative to the largest number in them, if they are all the same but for rounding."""

LOOKED_AT = 7
"""Images whose patches are shown."""


def explore(recipe: Recipe) -> None:
    """Write `explore.md`, the same as `explore.html`, and their figures into `output_dir`.

    Raises:
        RecipeError: several processes, no encoder, or too few images.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError("task=explore runs in one process: launch it with one")
    output = output_of(recipe)
    source = choose_images(recipe)
    device = torch.device("cpu" if on_cpu() else "cuda")
    with naming(f"checkpoint={recipe.checkpoint!r}"):
        encoder, processor = open_encoder(str(recipe.checkpoint), source, recipe.image_size)
        encoder.to(device)  # pyright: ignore[reportArgumentType]
        size = input_of(processor)[0]
        sizes = choose_patch_sizes(recipe, encoder, size)
        loader = processed_loader(source, processor, EVALUATED_BATCH, choose_workers(recipe))
        say(f"Features of {len(source):,} images of {source.title}, {size} px wide")
        features, labels = extract_features(encoder, label_batches(loader), device, sizes[0])
    images = keep_readable(recipe, source, features, labels)
    sections = [draw_neighbours(images, output), *look_closely(images, source, encoder, processor, sizes, output)]
    sections += [draw(images, output) for draw in (draw_map, draw_duplicates, draw_outliers)]
    if images.describe_numbers():
        say(f"{NUMBERED}, and the page names them. {REMEDY}")
    page = RunFolder(output).explore
    title = f"What {name_encoder(recipe)} has learnt"
    write_page(describe(recipe, title, encoder, images, sizes, size, sections), page, title)
    say(f"Pictures of what the encoder has learnt: {page.with_suffix('.html')}")


def choose_images(recipe: Recipe) -> ImageSource:
    """Return the training images, of which MOST are drawn if there are more."""
    with naming(f"checkpoint={recipe.checkpoint!r}"):
        channels = count_input_channels(str(recipe.checkpoint))
    source, _ = load_images(recipe, in_memory=False, num_channels=channels)
    if len(source) > MOST:
        source = source.take(torch.randperm(len(source), generator=generator(recipe.seed, "explored"))[:MOST].sort()[0])
    return source


def choose_patch_sizes(recipe: Recipe, encoder: PreTrainedModel, size: int) -> list[int | None]:
    """Return the patch sizes to look at, the first of which is that of the features; None is the encoder's only one.

    Raises:
        ValueError: patch sizes are asked for, and the encoder has one.
    """
    if not takes_patch_size(encoder):
        if recipe.eval_patch_sizes:
            raise ValueError(
                f"eval_patch_sizes={recipe.eval_patch_sizes}: the encoder has one patch size; leave it out"
            )
        return [None]
    base: Any = encoder.config.patch_size
    larger = [possible for possible in possible_patch_sizes(size, base) if possible > base]
    return recipe.eval_patch_sizes or [base, *larger[:1]]


def label_batches(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the batches, with labels that say that there are none where they have none."""
    for batch in loader:
        yield {"labels": torch.full((len(batch["pixel_values"]),), UNLABELLED), **batch}


def keep_readable(recipe: Recipe, source: ImageSource, features: Tensor, labels: Tensor) -> Explored:
    """Describe the images without those that could not be read, for which the features are those of another image.

    Raises:
        RecipeError: fewer than LEAST are left, or their features are not finite or all the same.
    """
    rows = torch.arange(len(source))
    places = rows if source.rows is None else source.rows
    if source.bad:
        rows = rows[~torch.isin(places, torch.tensor(list(source.bad)))]
    if len(rows) < LEAST:
        found = count_of(len(rows), "readable image")
        raise RecipeError(f"data={recipe.data!r}: it has {found}, and a page needs {LEAST}")

    features, of = features[rows], f"checkpoint={str(recipe.checkpoint)!r}: the features of the images"
    if not features.isfinite().all():
        raise RecipeError(f"{of} hold NaN or infinity; choose a checkpoint from before training diverged")
    if (features - features.mean(0)).abs().max() <= ROUNDING * features.abs().max():
        raise RecipeError(
            f"{of} are all the same, so there is nothing to compare; choose an encoder that has not "
            "collapsed, or images that differ"
        )

    def name(row: int) -> str:
        file = Path(source.open(int(rows[row])).info.get("name", f"image {int(places[rows[row]])}"))
        return str(file.relative_to(recipe.data) if file.is_relative_to(recipe.data) else file)

    known = None if (labels[rows] == UNLABELLED).all() else labels[rows]
    return Explored(
        features, known, source.class_names or [], lambda row: cast(Any, source.read(int(rows[row]))), name, recipe.seed
    )


def look_closely(
    images: Explored,
    source: ImageSource,
    encoder: PreTrainedModel,
    processor: Any,
    sizes: Sequence[int | None],
    output: Path,
) -> list[Section]:
    """Draw the patches of a few images, and the attention of the CLS token if the features come from it."""
    _, mean, std = input_of(processor)
    shown = images.draw_samples(LOOKED_AT)
    pixels = processor(images=[images.photo(row) for row in shown], return_tensors="pt")["pixel_values"]
    pictures = [show_channels(image * np.array(std) + np.array(mean)) for image in pixels.permute(0, 2, 3, 1).numpy()]
    maps = {size: look_at_patches(encoder, pixels.to(encoder.device), size) for size in sizes}
    found = {size: patches for size, patches in maps.items() if patches is not None}
    if not found:
        return []
    colors = [image.numpy() for image in color_patches([patches.features for patches in found.values()])]
    labels = [f"patches of {size} px" if size else "patches" for size in found]
    sections = [draw_patches(pictures, dict(zip(labels, colors, strict=True)), output)]
    attention = next(iter(found.values())).attention
    if attention is not None and attention_is_trained(encoder):
        sections.append(draw_attention(pictures, attention, output))
    return sections


def name_encoder(recipe: Recipe) -> str:
    """Return a name for the encoder: that of the run where `checkpoint` is the final/ of one."""
    path = Path(str(recipe.checkpoint))
    return path.resolve().parent.name if path.name == "final" else path.name


def describe(
    recipe: Recipe,
    title: str,
    encoder: PreTrainedModel,
    images: Explored,
    sizes: Sequence[int | None],
    size: int,
    sections: Sequence[Section],
) -> str:
    """Build the Markdown of the page."""
    parameters = sum(weights.numel() for weights in encoder.parameters())
    patches = f", patches of {sizes[0]} px" if sizes[0] else ""
    lines = [
        f"# {escape(title)}",
        f"Encoder: `{recipe.checkpoint}` ({type(encoder).__name__}, {parameters / 1e6:.1f} M parameters, features of "
        f"{images.features.shape[1]} numbers from images of {size} px{patches}). Images: {len(images.features):,} of "
        f"`{recipe.data}`, seed {recipe.seed}. {date.today()}.",
    ]
    if (views := RunFolder(recipe.output_dir).views).exists():
        lines.append(f"The views of its training: [{views.name}]({views.name}).")
    if numbers := images.describe_numbers():
        lines.append(numbers)
    for section in sections:
        lines += [f"## {section.heading}", f"![{section.heading}]({section.figure})", section.text]
    return "\n\n".join(lines) + "\n"
