"""The cost of a forward pass in units. One unit is a forward pass of the base encoder on one uncompressed image.

Analytic costs are FLOPs of the encoder at that sequence length, the same on every machine. Measured ones are timed on
this device and kept in a table: those of forward passes, or those of whole training steps.
"""

import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..models import AccelViTConfig, AccelViTModel
from ..utils.writing import write_json
from .strategy import Compression, Strategy, possible_patch_sizes

TABLE_NAME = "cost_table.json"


class ForwardCost(Protocol):
    """Units of one forward under a compression: `CostTable` is one, `partial(forward_cost, config)` another."""

    def __call__(self, compression: Compression, image_size: int | None = None, /) -> float: ...


def forward_flops(config: AccelViTConfig, compression: Compression, image_size: int | None = None) -> int:
    """Count the floating-point operations of one encoder forward on one square image of `image_size` pixels.

    Only matrix products count, which are over 99%: patch projection of the kept patches, attention, MLP. A
    multiply-add is two operations.
    """
    size = image_size or config.image_size
    patches = compression.kept_tokens(size)
    tokens, hidden = patches + config.num_prefix_tokens, config.hidden_size
    projection = patches * config.num_channels * compression.patch_size**2 * hidden
    attention = 4 * tokens * hidden**2 + 2 * tokens**2 * hidden
    mlp = 2 * tokens * hidden * config.intermediate_size
    return 2 * (projection + config.num_hidden_layers * (attention + mlp))


def forward_cost(config: AccelViTConfig, compression: Compression, image_size: int | None = None) -> float:
    """Return the analytic cost of a forward in units. `image_size` (pixels) defaults to the config's."""
    unit = forward_flops(config, Compression(config.patch_size))
    return forward_flops(config, compression, image_size) / unit


@dataclass(frozen=True)
class CostTable:
    """Measured costs of forward passes in units, and the device that they were measured on."""

    costs: dict[Compression, float]
    device: str

    def __call__(self, compression: Compression, image_size: int | None = None, /) -> float:
        if image_size is not None:
            raise ValueError(f"no costs of {image_size} px crops were measured: use cost=analytic")
        try:
            return self.costs[compression]
        except KeyError:
            raise KeyError(
                f"no measured cost for {compression}; the table holds {[str(c) for c in self.costs]}. Remove "
                f"{TABLE_NAME} to have it measured again, or use cost=analytic"
            ) from None

    def save(self, path: Path) -> None:
        entries = [{**compression.to_dict(), "units": units} for compression, units in self.costs.items()]
        write_json(path, {"device": self.device, "costs": entries})

    @classmethod
    def load(cls, path: Path) -> "CostTable":
        stored: dict[str, Any] = json.loads(path.read_text())
        costs = {Compression.from_dict(entry): entry["units"] for entry in stored["costs"]}
        return cls(costs, stored["device"])


@dataclass(frozen=True)
class StepCosts:
    """Measured costs of whole training steps, in units an image, and the device that they were measured on.

    They are proportional to seconds, and the uncompressed step costs its analytic units.

    Args:
        units: units an image under each strategy.
        seconds_per_unit: for the whole batch of a step on all processes.
        device: that the steps were timed on.
        view_backend: how the timed steps made their views.
        budget_requested: the run's budget as it was given, where that is a time.
        budget: the same in units.
        probe_overhead: units an image that a draw of a probe takes beyond the steps under its strategies.
    """

    units: dict[Strategy, float]
    seconds_per_unit: float
    device: str
    view_backend: str = "eager"
    budget_requested: str | None = None
    budget: float | None = None
    probe_overhead: float = 0.0

    def __call__(self, strategy: Strategy) -> float:
        return self.units[strategy]

    def save(self, path: Path) -> None:
        rows = [{**strategy.to_dict(), "units_per_image": units} for strategy, units in self.units.items()]
        write_json(path, {**vars(self), "units": rows})

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "StepCosts":
        units = {Strategy.from_dict(row): row["units_per_image"] for row in record["units"]}
        return cls(**{**record, "units": units})


def load_costs(path: Path) -> CostTable | StepCosts:
    """Load the measured costs of a run. Those of earlier versions are a `CostTable`, of forward passes."""
    record = json.loads(path.read_text())
    return CostTable.load(path) if "costs" in record else StepCosts.from_dict(record)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@torch.no_grad()
def measure_costs(
    config: AccelViTConfig,
    compressions: Iterable[Compression],
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    repeats: int = 7,
    dtype: torch.dtype | None = None,
) -> CostTable:
    """Time forwards of `batch_size` images at the config's image size, relative to the uncompressed one.

    The compressions are timed in turn, in `repeats` rounds after a warm-up round, so that a slow moment of the machine
    affects all of them. The median of each is taken. With `dtype` (bf16, fp16) they run under autocast. The random
    state does not change.
    """
    device, base = torch.device(device), Compression(config.patch_size)
    seconds: dict[Compression, list[float]] = {compression: [] for compression in (base, *compressions)}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model: Any = AccelViTModel(config).eval()
        model.to(device)
        images = torch.randn(batch_size, config.num_channels, config.image_size, config.image_size, device=device)
        for repeat in range(repeats + 1):
            for compression, taken in seconds.items():
                _synchronize(device)
                start = time.perf_counter()
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    model(images, **compression.to_dict())
                _synchronize(device)
                if repeat:
                    taken.append(time.perf_counter() - start)
    unit = statistics.median(seconds[base])
    return CostTable({c: statistics.median(times) / unit for c, times in seconds.items()}, device_name(device))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_cost_grid(config: AccelViTConfig) -> list[Compression]:
    """Build the grid of the paper's figure of sample costs: token dropout 0 to 0.9 for every possible patch size."""
    sizes = possible_patch_sizes(config.image_size, config.patch_size)
    return [Compression(patch_size, tenth / 10) for patch_size in sizes for tenth in range(10)]


def build_cost_rows(config: AccelViTConfig, table: CostTable) -> list[dict[str, Any]]:
    """Build one row for each compression of `table`: tokens, analytic and measured cost."""
    return [
        {
            **compression.to_dict(),
            "tokens": compression.kept_tokens(config.image_size) + config.num_prefix_tokens,
            "analytic": forward_cost(config, compression),
            "measured": measured,
        }
        for compression, measured in sorted(table.costs.items())
    ]
