"""From the host to the device, without the host waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors, many and small, on `device`: packed into one copy for each dtype, and the host does not wait.

    A plain `.to(device)` waits until the device has done all that it was given before: a step with a hundred of them
    leaves the device idle a hundred times. On a CPU these are the tensors themselves.
    """
    if device.type == "cpu":
        return list(tensors)
    sent: dict[int, Tensor] = {}
    for dtype in {tensor.dtype: None for tensor in tensors}:
        mine = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        packed = torch.cat([tensors[index].flatten() for index in mine]).pin_memory().to(device, non_blocking=True)
        pieces = packed.split([tensors[index].numel() for index in mine])
        sent |= {index: piece.view(tensors[index].shape) for index, piece in zip(mine, pieces, strict=True)}
    return [sent[index] for index in range(len(tensors))]
