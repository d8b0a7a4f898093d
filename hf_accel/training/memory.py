"""Too little memory for a step, turned into one line that says which settings need less."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from ..objectives import ObjectiveForPreTraining
from ..utils.counts import count_of
from .config import PretrainConfig


class OutOfMemory(RuntimeError):
    """The device does not have the memory for a step."""


@contextmanager
def explained_memory(args: PretrainConfig, model: ObjectiveForPreTraining) -> Iterator[None]:
    """Turn torch's errors of missing memory, on GPUs and CPUs, into one that names settings which need less.

    Raises:
        OutOfMemory: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        raise OutOfMemory(advise(args, model)) from error


def advise(args: PretrainConfig, model: ObjectiveForPreTraining) -> str:
    """Say what to set so that a step needs less memory. `batch_size` stays, as it is a part of the result."""
    accumulation, processes = args.gradient_accumulation_steps, args.world_size
    images = args.batch_size // accumulation
    smaller = [
        parts
        for parts in range(2 * accumulation, args.batch_size + 1)
        if args.batch_size % (parts * processes) == 0 and args.batch_size // parts >= model.least_batch
    ]
    ways: list[str] = []
    if smaller:
        half = args.batch_size // smaller[0]
        fewer = f"; in {model.name} the loss of an image then depends on these {half} only"
        fewer = fewer if model.least_batch > 1 else ""
        ways.append(f"gradient_accumulation_steps={smaller[0]}, for micro-batches of {count_of(half, 'image')}{fewer}")
    if not args.activation_checkpointing:
        ways.append("gradient_checkpointing=true, which computes activations again instead of keeping them")
    ways = ways or ["a smaller model, smaller images or more compression"]
    return (
        f"{args.device} has too little memory for micro-batches of {count_of(images, 'image')}. Start again in "
        f"another output_dir with {'. Or with '.join(ways)}"
    )
