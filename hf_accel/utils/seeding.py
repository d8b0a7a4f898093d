"""Random draws as pure functions of what they are for.

No generator runs along with training: each draw seeds its own from (seed, step, purpose, ...). A resumed run, another
number of loader workers or a probe in between therefore change nothing. Draws are made for the whole global batch and
each process takes its rows, so that two processes draw what one process with the same global batch would.
"""

import hashlib

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator whose state is a pure function of `(seed, *key)`, e.g. `generator(seed, "crop", step)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def rows_generator(first_row: int, width: int, seed: int, *key: int | str) -> torch.Generator:
    """`generator(seed, *key)`, advanced past the first `first_row` rows of a `torch.rand(rows, width)`.

    A CPU generator's uniform floats are one sequence: rank r, asking for its `(b, width)` after `first_row = r * b`,
    gets exactly the rows r * b to (r + 1) * b of the global batch's draw.
    """
    source = generator(seed, *key)
    if first_row:
        torch.rand(first_row, width, generator=source)
    return source
