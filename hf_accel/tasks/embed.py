"""`task=embed`: write the features of images to a Parquet file, for other programs."""

import os
import sys
import time

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import ImageSource, describe_labels
from ..distributed import barrier, is_main, say, world_size
from ..distributed.launch import check_launch
from ..evaluation import (
    EmbeddingTable,
    base_patch_size,
    count_input_channels,
    describe_input,
    encoding,
    open_encoder,
    takes_patch_size,
    weights_digest,
)
from ..recipe import Recipe
from ..run_folder import RunFolder
from ..utils.counts import count_of
from ..utils.errors import fail
from .setup import choose_workers, load_images, naming, output_of, start

SUMMARY = "{rows:,} embeddings in {path} ({size:,.1f} MB, {rate:,.0f} images a second); {bad:,} left out as unreadable"


def embed(recipe: Recipe) -> None:
    """Write `embeddings.parquet` for the images of a recipe, or go on where writing it was interrupted.

    Every process of the launch encodes a share of the images.
    """
    check_launch()
    folder = RunFolder(output_of(recipe))
    arguments = start(recipe)
    with folder.lock():
        with naming(f"checkpoint={recipe.checkpoint!r}"):
            channels = count_input_channels(str(recipe.checkpoint))
        source, _ = load_images(recipe, in_memory=False, num_channels=channels)
        say(f"Images: {len(source):,} of {source.title}\n{describe_labels(source, None)}")
        with naming(f"checkpoint={recipe.checkpoint!r}"):
            encoder, processor = open_encoder(str(recipe.checkpoint), source, recipe.image_size)
            table = _table(recipe, folder, source, encoder, processor)
            if table.is_complete():
                say(f"These images are embedded in {table.path}. Choose another output_dir to embed them again.")
            else:
                _write(recipe, table, source, encoder.to(arguments.device), processor, arguments.device)  # pyright: ignore
        barrier()  # A launcher ends all processes when one ends badly, and the main one may still write.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _table(
    recipe: Recipe, folder: RunFolder, source: ImageSource, encoder: PreTrainedModel, processor: object
) -> EmbeddingTable:
    """Open the table that is to be written. Raises ValueError if other embeddings are there."""
    about = {
        "checkpoint": recipe.checkpoint,
        "weights": weights_digest(encoder),
        "data": recipe.data,
        "images": source.name,
        "num_images": len(source),
        "image_column": recipe.image_column,
        "label_column": recipe.label_column,
        "input": describe_input(processor),
        "patch_size": _patch_size(recipe, encoder),
        "embedding_dtype": recipe.embedding_dtype,
    }
    with naming(f"output_dir={recipe.output_dir!r}"):
        return EmbeddingTable(folder.path, about, source, os.path.realpath(recipe.data), recipe.embedding_dtype)


def _patch_size(recipe: Recipe, encoder: PreTrainedModel) -> int | None:
    sizes, base = recipe.eval_patch_sizes, base_patch_size(encoder)
    if len(sizes) > 1:
        fail("eval_patch_sizes", sizes, "task=embed embeds at one patch size; name a single one")
    if sizes and sizes[0] != base and not takes_patch_size(encoder):
        own = f"one patch size, {base}" if base else "no patch size to choose"
        fail("eval_patch_sizes", sizes, f"the encoder has {own}; leave the key out")
    return sizes[0] if sizes else base


def _write(
    recipe: Recipe,
    table: EmbeddingTable,
    source: ImageSource,
    encoder: PreTrainedModel,
    processor: object,
    device: torch.device,
) -> None:
    patch_size = _patch_size(recipe, encoder) if takes_patch_size(encoder) else None
    parts = table.missing()
    barrier()  # All processes have seen the same parts before one of them writes.
    total = sum(len(table.images_of(number)) for number in parts)
    if total < len(source):
        say(f"Going on after {count_of(len(source) - total, 'embedded image')}")
    begun = time.perf_counter()
    with (
        encoding(encoder, device, patch_size) as encode,
        tqdm(desc="embedding", total=total, unit="image", leave=False, file=sys.stderr, disable=not is_main()) as bar,
    ):
        for done in table.write(parts, encode, encoder, processor, device, choose_workers(recipe)):
            bar.update(done * world_size())
    barrier()
    taken = time.perf_counter() - begun
    if is_main():
        bad = table.join()
        numbers = {"rows": len(source) - bad, "bad": bad, "rate": total / taken}
        say(SUMMARY.format(path=table.path, size=table.path.stat().st_size / 1e6, **numbers))
