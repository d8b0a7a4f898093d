"""What a run does on a GPU beside its steps: views on a stream of their own, and a look at who waits for whom."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class GpuSteps:
    """Makes the views of a step while the steps before are still running, and counts the steps that wait for the host.

    The host launches the views of a step before the GPU has done the step before it. On one stream they would wait for
    that step, although they depend on nothing in it.

    Args:
        device: the GPU.
        cuda: what has the functions of `torch.cuda`.
    """

    AHEAD = 1
    """Micro-batches for which the GPU may lag behind the host: the views of each are in memory."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self.cuda, self.device, self.stream = cuda, device, cuda.Stream(device)
        self.stream.wait_stream(cuda.current_stream(device))  # Images may be kept on the device.
        self.launched = deque[Any]()
        self.backward: Any = None
        self.steps = self.idle = 0

    def begin_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Look at the step before, and return an iterator of batches; those from a cache on the device are made there.

        A GPU that has already done the backward pass, when the host has just launched the optimizer's step, is idle:
        fewer launches make such steps faster, and less work for the GPU does not. To ask an event waits for nothing.
        """
        if self.backward is not None:
            self.steps, self.idle, self.backward = self.steps + 1, self.idle + self.backward.query(), None
        return self._load(batches)

    def _load(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.cuda.stream(self.stream):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def with_views(self, trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replace a micro-batch of the loader by its views, for which the main stream waits.

        The host waits until the GPU is at most AHEAD micro-batches behind. Otherwise the views of all that it has
        launched would be in memory.
        """
        main = self.cuda.current_stream(self.device)
        self.launched.append(self._mark(main))
        if len(self.launched) > self.AHEAD:
            self.launched.popleft().synchronize()
        with self.cuda.stream(self.stream):
            views = trainer.views_of(trainer._prepare_inputs(inputs), trainer.view_size(inputs["step"]))
        main.wait_stream(self.stream)
        for view in views:
            view.record_stream(main)  # Otherwise later views could take its memory while this step still reads it.
        return {"step": inputs["step"], "micro_step": inputs["micro_step"], "views": views}

    def end_backward(self) -> None:
        """Mark what has been launched so far."""
        self.backward = self._mark(self.cuda.current_stream(self.device))

    def _mark(self, stream: Any) -> Any:
        event = self.cuda.Event()
        event.record(stream)
        return event

    def take_idle_fraction(self) -> float:
        """The fraction of the steps since the last call for which the GPU was idle."""
        fraction, self.steps, self.idle = self.idle / max(self.steps, 1), 0, 0
        return fraction
