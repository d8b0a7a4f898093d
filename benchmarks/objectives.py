"""Are our training steps as fast as a peer's? Seconds a step beside the same step built from lightly's components.

Uncompressed steps on two views held in memory: forward, backward, AdamW, momentum update (DINO without its gradient
clipping). The peer's encoder is transformers' `ViTModel` of the same size and encodes view after view. Where lightly
(`pip install -e .[benchmark]`; it needs torchvision) cannot be imported, plain torch modules and the originals'
equations stand in for its heads and losses. Run it from the project's root:

    python -m benchmarks.objectives --model vit_small --batch-size 16 --threads 1
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import peers
from benchmarks.cost import Stopwatch
from benchmarks.options import DTYPES, add_shared_options, parse, parser_of, settings_of
from benchmarks.peers import PEERS, Components, peer_components
from hf_accel.compression import Compression, Strategy
from hf_accel.models import PRESETS
from hf_accel.objectives import OBJECTIVES, Draw, ObjectiveForPreTraining
from hf_accel.report import environment, format_table
from hf_accel.utils.writing import write_json

SEED = 0


class OurStep:
    """Loss and target update of an objective of ours, uncompressed."""

    def __init__(self, model: ObjectiveForPreTraining):
        self.model, self.count = model, 0
        self.strategy = Strategy(Compression(model.config.patch_size))

    def loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        self.count += 1
        return self.model(views, self.strategy, Draw(SEED, self.count), 0.5).loss

    def update_target(self) -> None:
        self.model.update_target(0.5)


def our_settings(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that make our objective the peer's."""
    if name == "dino":
        return {
            "num_prototypes": args.num_prototypes,
            "head_hidden_size": args.projector_hidden_size,
            "bottleneck_size": peers.SIZE,
            "student_temperature": peers.STUDENT_TEMPERATURE,
            "teacher_temperature": peers.TEACHER_TEMPERATURE,
            "center_momentum": peers.CENTER_MOMENTUM,
        }
    return {
        "projector_hidden_size": args.projector_hidden_size,
        "projection_size": peers.SIZE,
        "temperature": peers.TEMPERATURE,
    }


def both_steps(name: str, args: argparse.Namespace, components: Components) -> dict[str, tuple[Any, nn.Module]]:
    """(what computes loss and update, the module that holds the parameters), ours and the peer's."""
    torch.manual_seed(SEED)
    defaults = OBJECTIVES[name].encoder_defaults
    config = PRESETS[args.model](image_size=args.image_size, patch_size=args.patch_size, **defaults)
    objective: Any = OBJECTIVES[name]
    ours = objective(config, **our_settings(name, args)).train()
    peer = PEERS[name](ours.encoder, args, components).train()
    for model in (ours, peer):
        model.to(args.device)
    return {"ours": (OurStep(ours), ours), "peer": (peer, peer)}


def timed_step(step: Any, optimizer: torch.optim.Optimizer, views: list[torch.Tensor], args: argparse.Namespace):
    """Seconds."""
    dtype = DTYPES[args.precision]
    watch = Stopwatch(args)
    watch.mark()
    with torch.autocast(args.device.type, dtype, enabled=dtype is not None):
        loss = step.loss(views)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    step.update_target()
    watch.mark()
    return watch.seconds()[0]


def measure(name: str, args: argparse.Namespace, components: Components) -> dict[str, Any]:
    """A row: the two steps in turn, round after round, and who begins alternates; ratios are of the same round."""
    steps = both_steps(name, args, components)
    optimizers = {
        who: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        for who, (_, model) in steps.items()
    }
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    views = [torch.randn(shape, device=args.device) for _ in range(2)]
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for repeat in range(args.repeats + 1):
        for who in list(steps)[:: 1 if repeat % 2 else -1]:
            taken = timed_step(steps[who][0], optimizers[who], views, args)
            if repeat:
                seconds[who].append(taken)
    ratios = [mine / its for mine, its in zip(seconds["ours"], seconds["peer"], strict=True)]
    return {
        "objective": name,
        **{f"{who}_ms": 1000 * statistics.median(times) for who, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        low, high = row["ratio_range"]
        times = [f"{row['ours_ms']:.1f}", f"{row['peer_ms']:.1f}", f"{row['ratio']:.3f}"]
        lines.append([row["objective"], *times, f"{low:.3f} to {high:.3f}"])
    return format_table(["objective", "ours, ms", "peer, ms", "ours / peer", "of the rounds"], lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("objectives", __doc__)
    option = partial(parser.add_argument, metavar="")
    option("--objectives", nargs="+", choices=PEERS, default=list(PEERS), help=f"of {' '.join(PEERS)} (default all)")
    add_shared_options(parser, image_size=224, batch_size=16, repeats=10)
    option("--num-prototypes", type=int, default=65536, help="of DINO (default 65536, the recipes')")
    return parse(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    peer, components = peer_components()
    rows = [measure(name, args, components) for name in args.objectives]
    settings = settings_of(args, "num_prototypes")
    print(f"{', '.join(f'{name} {value}' for name, value in settings.items())}, {args.device}\npeer: {peer}")
    print(format_rows(rows))
    if args.output:
        report = {**settings, "device": str(args.device), "peer": peer, "rows": rows, "environment": environment()}
        write_json(args.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
