"""Does a training step cost what the budget says? Seconds per image under ten strategies, beside the analytic cost.

Times whole MoCo-v3 steps (one direction, heads of the ImageNet recipes): two views made from uint8 images by
`make_views`, forward, backward, AdamW, momentum update. Run it from the project's root:

    python -m benchmarks.cost --model vit_small --batch-size 8 --threads 1
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.options import DTYPES, add_shared_options, parse, parser_of, settings_of
from hf_accel.compression import Compression, Strategy, check_compression, forward_cost
from hf_accel.data import AUGMENTATIONS, make_views
from hf_accel.models.configuration_accel_vit import PRESETS
from hf_accel.objectives import Draw, MoCoForPreTraining
from hf_accel.report import environment, format_table
from hf_accel.utils.writing import write_json

STRATEGIES = ("16:0.25", "16:0.5", "16:0.75", "20", "24", "30", "48", "20:0.5", "24:0.5", "30:0.5")
"""Token dropout, patch scaling, both; 26 to 170 tokens at 240 px."""

AIM, AIM_TOKENS = 0.15, 49
PARTS = ("data", "encoder", "heads", "optimizer")
SEGMENTS = ("data", "encoder", "heads", "encoder", "heads", "encoder", "optimizer")
"""What a step does, in order: views; query's encoder and heads; key's; loss; backward of the heads, of the encoder."""

SEED = 0


@dataclass(frozen=True)
class Case:
    """A row of the table: a strategy, and the side of its views in pixels."""

    strategy: Strategy
    view_size: int


class Stopwatch:
    """Times of `mark`s, in seconds; on a GPU those of its own time line, read once all work is done."""

    def __init__(self, args: argparse.Namespace):
        self.device: torch.device = args.device
        self.clock = time.process_time if args.clock == "process" else time.perf_counter
        self.marks: list[Any] = []
        self.synchronize()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(self.clock())

    def seconds(self) -> list[float]:
        """Between one mark and the next."""
        self.synchronize()
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in pairs]


def parse_strategy(text: str) -> Strategy:
    """`PATCH[:DROPOUT]`, the paper's default: patch scaling of both branches, token dropout of the online one."""
    patch_size, _, dropout = text.partition(":")
    try:
        return Strategy(Compression(int(patch_size), float(dropout or 0)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no strategy PATCH[:DROPOUT]: {error}") from None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("cost", __doc__)
    add_shared_options(parser, image_size=240, batch_size=16, repeats=5)
    add_strategies(parser)
    args = parse(parser, arguments)
    check_strategies(parser, args)
    return args


def add_strategies(parser: argparse.ArgumentParser) -> None:
    text = f"PATCH[:DROPOUT] each (default {' '.join(STRATEGIES)})"
    parser.add_argument("--strategies", type=parse_strategy, nargs="+", metavar="", help=text)


def check_strategies(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Those of the command line, or the default ones, as far as the image size allows them."""
    args.strategies = args.strategies or [parse_strategy(text) for text in STRATEGIES]
    for strategy in args.strategies:
        try:
            check_compression(strategy.online, args.image_size, args.patch_size)
        except ValueError as error:
            parser.error(f"--strategies: {error}")


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Uncompressed, then each strategy, then those of larger patches on matched views: base patch pixels a patch."""
    size, base = args.image_size, args.patch_size
    cases = [Case(strategy, size) for strategy in (Strategy(Compression(base)), *args.strategies)]
    larger = [strategy for strategy in args.strategies if strategy.online.patch_size > base]
    return cases + [Case(strategy, size // strategy.online.patch_size * base) for strategy in larger]


class Step:
    """One optimizer step of MoCo-v3 on random uint8 images, a little larger than the views, timed by its parts."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        torch.manual_seed(SEED)
        config = PRESETS[args.model](
            image_size=args.image_size, patch_size=args.patch_size, **MoCoForPreTraining.encoder_defaults
        )
        self.model = MoCoForPreTraining(config, projector_hidden_size=args.projector_hidden_size).train()
        self.model.to(args.device)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=True)  # the Trainer's default
        self.view_configs = self.model.view_configs(AUGMENTATIONS["moco"])
        side = round(args.image_size / 0.875)
        self.images = torch.randint(256, (args.batch_size, 3, side, side), dtype=torch.uint8)
        if args.device.type == "cuda":
            self.images = self.images.pin_memory()  # as a run's loader does
        self.count = 0
        self.watch = Stopwatch(args)
        self.model.projector.register_forward_pre_hook(self._at_projector)
        for module in (self.model.momentum_encoder, self.model.momentum_projector):
            module.register_forward_pre_hook(lambda *_: self.watch.mark())

    def _at_projector(self, module: torch.nn.Module, features: tuple[torch.Tensor]) -> None:
        self.watch.mark()
        features[0].register_hook(lambda gradient: self.watch.mark())

    def __call__(self, case: Case) -> dict[str, float]:
        """Seconds of each of PARTS."""
        self.count += 1
        args, progress = self.args, 0.5
        watch = self.watch = Stopwatch(args)
        watch.mark()
        batch = {"images": self.images.to(args.device, non_blocking=True)}
        views = make_views(batch, self.view_configs, case.view_size, SEED, self.count)
        watch.mark()
        with self.autocast():
            output = self.model(views, case.strategy, Draw(SEED, self.count), progress)
        output.loss.backward()
        watch.mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_target(progress)
        watch.mark()
        seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for part, taken in zip(SEGMENTS, watch.seconds(), strict=True):
            seconds[part] += taken
        return seconds

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.args.precision]
        return torch.autocast(self.args.device.type, dtype, enabled=dtype is not None)


Seconds = dict[Case, list[dict[str, float]]]
"""Of each case, of each timed round, of each of PARTS."""


def measure(step: Callable[[Case], dict[str, float]], cases: list[Case], repeats: int) -> Seconds:
    """Case after case, round after round; every other round goes backwards, so that a drift falls on all alike."""
    seconds: Seconds = {case: [] for case in cases}
    for repeat in range(repeats + 1):
        for case in cases if repeat % 2 else reversed(cases):
            parts = step(case)
            if repeat:
                seconds[case].append(parts)
    return seconds


def table_rows(args: argparse.Namespace, model: MoCoForPreTraining, seconds: Seconds) -> list[dict[str, Any]]:
    """One row a case, uncompressed first. Ratios are medians of those to the uncompressed step of the same round."""
    config, base = model.config, next(iter(seconds))
    units = partial(model.units_per_image, forward_cost=partial(forward_cost, config))
    rows = []
    for case, rounds in seconds.items():
        online, target = case.strategy.online, case.strategy.target_branch
        ratios = [sum(mine.values()) / sum(its.values()) for mine, its in zip(rounds, seconds[base], strict=True)]
        encoder = [mine["encoder"] / its["encoder"] for mine, its in zip(rounds, seconds[base], strict=True)]
        analytic = units(case.strategy) / units(base.strategy)
        row: dict[str, Any] = {
            "patch_size": online.patch_size,
            "token_dropout": online.token_dropout,
            "view_size": case.view_size,
            "tokens": online.kept_tokens(config.image_size) + config.num_prefix_tokens,
            "target_tokens": target.kept_tokens(config.image_size) + config.num_prefix_tokens,
            "analytic": analytic,
            "measured": statistics.median(ratios),
            "measured_range": [min(ratios), max(ratios)],
            "measured_over_analytic": statistics.median(ratios) / analytic,
            "encoder_over_analytic": statistics.median(encoder) / analytic,
            "ms_per_image": 1000 * statistics.median(sum(parts.values()) for parts in rounds) / args.batch_size,
        }
        for part in PARTS:
            row[f"{part}_ms_per_image"] = 1000 * statistics.median(parts[part] for parts in rounds) / args.batch_size
        rows.append(row)
    return rows


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "patch": lambda row: f"{row['patch_size']}",
    "dropout": lambda row: f"{row['token_dropout']:g}",
    "view px": lambda row: f"{row['view_size']}",
    "tokens": lambda row: f"{row['tokens']}",
    "analytic": lambda row: f"{row['analytic']:.3f}",
    "measured": lambda row: f"{row['measured']:.3f}",
    "m/a": lambda row: f"{row['measured_over_analytic']:.2f}",
    "m/a encoder": lambda row: f"{row['encoder_over_analytic']:.2f}",
    "ms/image": lambda row: f"{row['ms_per_image']:.2f}",
    **{part: lambda row, part=part: f"{row[part + '_ms_per_image']:.2f}" for part in PARTS},
}


def aim_line(rows: list[dict[str, Any]], key: str, what: str) -> str:
    """How many of the compressed rows that are long enough are as close to the analytic cost as aimed at."""
    ratios = [row[key] for row in rows[1:] if row["tokens"] >= AIM_TOKENS]
    if not ratios:
        return f"{what}: no row has {AIM_TOKENS} tokens"
    met, worst = sum(abs(ratio - 1) <= AIM for ratio in ratios), max(ratios, key=lambda ratio: abs(ratio - 1))
    aim = f"within {AIM:.0%} of analytic, of those with at least {AIM_TOKENS} tokens"
    return f"{what}: {met} of {len(ratios)} rows {aim}; worst {worst:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    step, started = Step(args), time.perf_counter()
    seconds = measure(step, cases_of(args), args.repeats)
    rows = table_rows(args, step.model, seconds)
    seconds_taken = time.perf_counter() - started
    print(
        f"{args.model} at {args.image_size} px, batch {args.batch_size}, {args.precision}, {args.device}, "
        f"{args.threads} threads, {args.clock} clock, {args.repeats} rounds in {seconds_taken:.0f} s"
    )
    print(format_table(list(COLUMNS), [[show(row) for show in COLUMNS.values()] for row in rows]))
    print(aim_line(rows, "measured_over_analytic", "whole step"))
    print(aim_line(rows, "encoder_over_analytic", "encoder alone"))
    if args.output:
        write_json(
            args.output, {**settings_of(args), "device": str(args.device), "rows": rows, "environment": environment()}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
