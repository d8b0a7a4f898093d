"""Are our training steps as fast as a peer's? Seconds a step beside the same step built from lightly's components.

Uncompressed steps on views held in memory: forward, backward, AdamW, momentum update. The peer's encoder is
transformers' `ViTModel` of the same size and encodes view after view. Where lightly (a benchmark extra, which needs
torchvision) cannot be imported, plain torch modules and the originals' equations stand in for its heads and losses. Run
it from the project's root:

    python -m benchmarks.objectives --model vit_small --batch-size 16 --threads 1
"""

import argparse
import copy
import importlib
import statistics
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from benchmarks.cost import DTYPES, Stopwatch
from hf_accel.compression import Compression, Strategy
from hf_accel.models import PRESETS, AccelViTConfig
from hf_accel.objectives import OBJECTIVES, Draw, ObjectiveForPreTraining
from hf_accel.report import environment, write_json

SIZE, TEMPERATURE, MOMENTUM = 256, 0.2, 0.99
SEED = 0


class PlainComponents:
    """What lightly would give, by plain torch."""

    def head(self, widths: Sequence[int], last_norm: bool) -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        layers.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
        if last_norm:
            layers.append(nn.BatchNorm1d(widths[-1], affine=False))
        return nn.Sequential(*layers)

    def nt_xent(self, temperature: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """SLIP's four blocks of similarities, the diagonal of two of them masked."""

        def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a, b = nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1)
            labels = torch.arange(len(a), device=a.device)
            itself = nn.functional.one_hot(labels, len(a)) * 1e9
            halves = []
            for one, other in ((a, b), (b, a)):
                logits = torch.cat([one @ other.T / temperature, one @ one.T / temperature - itself], dim=1)
                halves.append(nn.functional.cross_entropy(logits, labels))
            return (halves[0] + halves[1]) / 2

        return loss

    @torch.no_grad()
    def update_momentum(self, model: nn.Module, target: nn.Module, momentum: float) -> None:
        for online, kept in zip(model.parameters(), target.parameters(), strict=True):
            kept.mul_(momentum).add_(online, alpha=1 - momentum)


class LightlyComponents:
    def __init__(self):
        self.heads: Any = importlib.import_module("lightly.models.modules.heads")
        self.loss: Any = importlib.import_module("lightly.loss")
        self.utils: Any = importlib.import_module("lightly.models.utils")

    def head(self, widths: Sequence[int], last_norm: bool) -> nn.Module:
        hidden = [(before, after, nn.BatchNorm1d(after), nn.ReLU()) for before, after in pairwise(widths[:-1])]
        norm = nn.BatchNorm1d(widths[-1], affine=False) if last_norm else None
        return self.heads.ProjectionHead([*hidden, (widths[-2], widths[-1], norm, None)])

    def nt_xent(self, temperature: float) -> nn.Module:
        return self.loss.NTXentLoss(temperature)

    def update_momentum(self, model: nn.Module, target: nn.Module, momentum: float) -> None:
        self.utils.update_momentum(model, target, momentum)


Components = PlainComponents | LightlyComponents


def peer_components() -> tuple[str, Components]:
    """lightly's with their version, or the plain ones with the reason."""
    try:
        components = LightlyComponents()
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises RuntimeError
        return f"plain transcription, for lightly cannot be imported: {error}", PlainComponents()
    return f"lightly {importlib.import_module('lightly').__version__}", components


class Peer(nn.Module):
    """An objective as a user of the peer would write it."""

    def __init__(self, config: AccelViTConfig, components: Components):
        super().__init__()
        self.components = components
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        same = {name: getattr(config, name) for name in (*sizes, "image_size", "patch_size", "layer_norm_eps")}
        self.encoder = ViTModel(ViTConfig(**same), add_pooling_layer=False)
        if config.freeze_patch_projection:
            self.encoder.embeddings.patch_embeddings.requires_grad_(False)

    def features(self, encoder: nn.Module, view: torch.Tensor) -> torch.Tensor:
        return encoder(view).last_hidden_state[:, 0]

    @abstractmethod
    def loss(self, views: list[torch.Tensor]) -> torch.Tensor: ...

    def update_target(self) -> None:
        """After the optimizer step."""


class PeerSimCLR(Peer):
    def __init__(self, config: AccelViTConfig, width: int, components: Components):
        super().__init__(config, components)
        self.projector = components.head([config.hidden_size, width, width, SIZE], last_norm=False)
        self.nt_xent = components.nt_xent(TEMPERATURE)

    def loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        first, second = (self.projector(self.features(self.encoder, view)) for view in views)
        return self.nt_xent(first, second)


class PeerMoCo(Peer):
    """MoCo-v3, one direction; its loss is the original's (lightly has none for keys of the same batch)."""

    def __init__(self, config: AccelViTConfig, width: int, components: Components):
        super().__init__(config, components)
        self.projector = components.head([config.hidden_size, width, width, SIZE], last_norm=True)
        self.predictor = components.head([SIZE, width, SIZE], last_norm=True)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        query = self.predictor(self.projector(self.features(self.encoder, views[0])))
        with torch.no_grad():
            key = self.momentum_projector(self.features(self.momentum_encoder, views[1]))
        query, key = nn.functional.normalize(query, dim=1), nn.functional.normalize(key, dim=1)
        labels = torch.arange(len(query), device=query.device)
        return nn.functional.cross_entropy(query @ key.T / TEMPERATURE, labels) * (2 * TEMPERATURE)

    def update_target(self) -> None:
        self.components.update_momentum(self.encoder, self.momentum_encoder, MOMENTUM)
        self.components.update_momentum(self.projector, self.momentum_projector, MOMENTUM)


PEERS: dict[str, type[PeerSimCLR] | type[PeerMoCo]] = {"moco": PeerMoCo, "simclr": PeerSimCLR}


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


def both_steps(name: str, args: argparse.Namespace, components: Components) -> dict[str, tuple[Any, nn.Module]]:
    """(what computes loss and update, the module that holds the parameters), ours and the peer's."""
    torch.manual_seed(SEED)
    defaults = OBJECTIVES[name].encoder_defaults
    config = PRESETS[args.model](image_size=args.image_size, patch_size=args.patch_size, **defaults)
    objective: Any = OBJECTIVES[name]
    width = args.projector_hidden_size
    ours = objective(config, projector_hidden_size=width, projection_size=SIZE, temperature=TEMPERATURE).train()
    peer = PEERS[name](config, width, components).train()
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


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| objective | ours, ms | peer, ms | ours / peer | of the rounds |", "|---|---:|---:|---:|---|"]
    for row in rows:
        low, high = row["ratio_range"]
        times = f"{row['ours_ms']:.1f} | {row['peer_ms']:.1f}"
        lines.append(f"| {row['objective']} | {times} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.objectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = partial(parser.add_argument, metavar="")
    option("--objectives", nargs="+", choices=PEERS, default=list(PEERS), help=f"of {' '.join(PEERS)} (default all)")
    option("--model", choices=PRESETS, default="vit_tiny", help=f"{', '.join(PRESETS)} (default vit_tiny)")
    option("--image-size", type=int, default=224, help="pixels of a view's side (default 224)")
    option("--patch-size", type=int, default=16, help="default 16")
    option("--batch-size", type=int, default=16, help="images a step (default 16)")
    option("--repeats", type=int, default=10, help="timed rounds, after one that is not (default 10)")
    option(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if any)"
    )
    option("--precision", choices=DTYPES, default="fp32", help="fp32, or bf16 by autocast (default fp32)")
    option("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU (default: torch's)")
    clock = "wall, or process: CPU seconds of this process, on a machine that others use too (default wall)"
    option("--clock", choices=("wall", "process"), default="wall", help=clock)
    option("--projector-hidden-size", type=int, default=4096, help="width of the heads (default 4096, the recipes')")
    option("--output", type=Path, help="JSON to write")
    args = parser.parse_args(arguments)
    args.device = torch.device(args.device)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    peer, components = peer_components()
    rows = [measure(name, args, components) for name in args.objectives]
    names = ("model", "image_size", "patch_size", "batch_size", "repeats", "precision", "threads", "clock")
    settings = {name: getattr(args, name) for name in (*names, "projector_hidden_size")}
    print(f"{', '.join(f'{name} {value}' for name, value in settings.items())}, {args.device}\npeer: {peer}")
    print(format_table(rows))
    if args.output:
        report = {**settings, "device": str(args.device), "peer": peer, "rows": rows, "environment": environment()}
        write_json(args.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
