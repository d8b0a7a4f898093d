"""Copy tensors to the device without making the host wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return many small CPU tensors on `device`, with one asynchronous copy for each dtype.

    A plain `.to(device)` waits until the device has done all its earlier work, so that a step with a hundred of them
    leaves the device idle a hundred times. If `device` is the CPU, the tensors themselves are returned.
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
