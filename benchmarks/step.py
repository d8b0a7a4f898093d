"""How much of the machine does a step use? Step time, memory and MFU along a schedule, beside the same step of a peer.

Whole steps on views held in memory: forward, backward, AdamW, momentum update; eager, and compiled with `--compile`.
MFU counts the encoder's FLOPs alone, at three forwards for a branch with gradient, against the rate of a large matrix
product in the same precision, measured in the same run. `units` is what the budget says that the step costs, relative
to the uncompressed one, and `time` what it takes. Run it from the project's root:

    python -m benchmarks.step --model vit_small --precision bf16 --fill --compile
    python -m benchmarks.step --model vit_tiny --batch-size 4 --threads 1
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cost import STRATEGIES, check_strategies, parse_strategy
from benchmarks.launches import count_launches
from benchmarks.objectives import OurStep, both_steps, timed_step
from benchmarks.options import DTYPES, add_shared_options, parse, parser_of, settings_of
from benchmarks.peers import PEERS, Components, peer_components
from hf_accel.compression import Compression, Strategy, forward_cost
from hf_accel.compression.cost import forward_flops
from hf_accel.objectives import ObjectiveForPreTraining
from hf_accel.report import environment, format_table
from hf_accel.utils.writing import write_json

SCHEDULE = ("56", "32", "16:0.5")
"""Along a schedule at 224 px, before the uncompressed step."""


def matmul_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s of the best of ten large matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype or torch.float32) for _ in range(2))
    seconds = []
    for _ in range(11):
        _synchronize(device)
        start = time.perf_counter()
        _ = a @ b
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def largest_batch(args: argparse.Namespace, components: Components) -> int:
    """Images of the largest uncompressed step of ours that fits: a power of two, three quarters of one included."""

    def fits(batch_size: int) -> bool:
        trial = argparse.Namespace(**{**vars(args), "batch_size": batch_size})
        try:
            Runner("ours", trial, components)()
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    size = 16
    while fits(2 * size):
        size *= 2
    return size * 3 // 2 if fits(size * 3 // 2) else size


class Runner:
    """One side's step, ready to be timed; the other side's memory is given back."""

    def __init__(self, who: str, args: argparse.Namespace, components: Components, compiled: bool = False):
        self.args = args
        self.step, model = both_steps(args.objective, args, components)[who]
        if compiled and isinstance(model, ObjectiveForPreTraining):  # as a run compiles it
            model.compile_encoders(mode="reduce-overhead" if args.device.type == "cuda" else None)
        elif compiled:
            for encoder in [module for module in model.modules() if type(module).__name__ == "ViTModel"]:
                encoder.compile()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        shape = (args.batch_size, 3, args.image_size, args.image_size)
        self.views = [torch.randn(shape, device=args.device) for _ in range(2)]
        self.model: nn.Module = model

    def __call__(self, strategy: Strategy | None = None) -> float:
        """Seconds of one step."""
        if strategy is not None and isinstance(self.step, OurStep):
            self.step.strategy = strategy
        return timed_step(self.step, self.optimizer, self.views, self.args)


def measure(args: argparse.Namespace, components: Components, rate: float) -> list[dict[str, Any]]:
    """The peer's rows, then ours, uncompressed and along the schedule; ratios are to our own uncompressed step."""
    base = Strategy(Compression(args.patch_size))
    rows: list[dict[str, Any]] = []
    for mode in ("eager", "compiled") if args.compile else ("eager",):
        ours = Runner("ours", args, components, mode == "compiled")
        model: Any = ours.model
        units: Callable[[Strategy], float] = partial(
            model.units_per_image, forward_cost=partial(forward_cost, model.config)
        )
        flops = forward_flops(model.config, Compression(args.patch_size)) * args.batch_size
        seconds = {strategy: _median(partial(ours, strategy), args) for strategy in (base, *args.strategies)}
        peaks = {strategy: _peak(partial(ours, strategy), args) for strategy in seconds}
        compiled = mode == "compiled"
        launches = {s: count_launches(partial(ours, s), args.device, compiled) for s in seconds}
        del ours, model
        peer = Runner("peer", args, components, mode == "compiled")
        theirs = ("peer", base, _median(peer, args), _peak(peer, args), count_launches(peer, args.device, compiled))
        del peer
        for who, strategy, taken, memory, launched in [
            theirs,
            *(("ours", s, seconds[s], peaks[s], launches[s]) for s in seconds),
        ]:
            online, relative = strategy.online, units(strategy)
            row = {"who": who, "mode": mode, "units": relative / units(base), "time": taken / seconds[base]}
            row["strategy"] = f"{online.patch_size}" + (f":{online.token_dropout:g}" if online.token_dropout else "")
            row |= {"seconds": taken, "mfu": relative * flops / taken / rate, "peak_gb": memory, "launches": launched}
            rows.append(row)
    return rows


def _median(step: Callable[[], float], args: argparse.Namespace) -> float:
    step()  # compiles, allocates
    return statistics.median(step() for _ in range(args.repeats))


def _peak(step: Callable[[], float], args: argparse.Namespace) -> float | None:
    """GB that the device held at most during a step; None on a CPU."""
    if args.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(args.device)
    step()
    return torch.cuda.max_memory_allocated(args.device) / 1e9


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def format_rows(rows: list[dict[str, Any]], batch_size: int) -> str:
    header = ["who", "mode", "patch:dropout", "ms/step", "images/s", "units", "time", "MFU", "peak GB", "launches"]
    lines = []
    for row in rows:
        speed = [f"{1000 * row['seconds']:.1f}", f"{batch_size / row['seconds']:.1f}"]
        ratios = [f"{row['units']:.3f}", f"{row['time']:.3f}", f"{row['mfu']:.1%}"]
        memory = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
        launches = "" if row["launches"] is None else f"{row['launches']:,}"
        lines.append([row["who"], row["mode"], row["strategy"], *speed, *ratios, memory, launches])
    return format_table(header, lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("step", __doc__)
    option = partial(parser.add_argument, metavar="")
    option("--objective", choices=PEERS, default="moco", help=f"{', '.join(PEERS)} (default moco)")
    add_shared_options(parser, image_size=224, batch_size=16, repeats=10)
    option("--num-prototypes", type=int, default=65536, help="of DINO (default 65536, the recipes')")
    schedule = f"PATCH[:DROPOUT] each (default {' '.join(SCHEDULE)}; `benchmarks.cost` has {' '.join(STRATEGIES)})"
    option("--strategies", type=parse_strategy, nargs="+", help=schedule)
    parser.add_argument("--compile", action="store_true", help="compiled encoders, too")
    parser.add_argument("--fill", action="store_true", help="the largest batch that fits the GPU, not --batch-size")
    args = parse(parser, arguments)
    if args.fill and args.device.type != "cuda":
        parser.error("--fill finds what fits a GPU's memory; on a CPU give --batch-size")
    args.strategies = args.strategies or [parse_strategy(text) for text in SCHEDULE]
    check_strategies(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    peer, components = peer_components()
    if args.fill:
        args.batch_size = largest_batch(args, components)
    rate = matmul_rate(args.device, DTYPES[args.precision])
    rows = measure(args, components, rate)
    settings = {**settings_of(args, "objective", "num_prototypes"), "device": str(args.device), "matmul_rate": rate}
    print(f"{', '.join(f'{name} {value}' for name, value in settings.items())}\npeer: {peer}")
    print(format_rows(rows, args.batch_size))
    if args.output:
        write_json(args.output, {**settings, "peer": peer, "rows": rows, "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
