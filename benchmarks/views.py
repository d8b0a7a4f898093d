"""How fast are two views made? MoCo-v3's pair from images in memory, by this project and by what else there is.

Every row crops, colours, blurs and normalises the same uint8 images. Those of `kornia` and of this project take the
whole batch on the device, the others one image after another on the CPU, as a loader's worker does. Launches are those
of both views of a batch, and megabytes what their kernels read and write. Libraries that are not installed are skipped.
Run it from the project's root:

    python -m benchmarks.views --size 224 --batch-size 64 --threads 1 --output views.json
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.launches import KernelCount
from benchmarks.options import parser_of
from benchmarks.view_peers import PEERS, images_for
from hf_accel.data import AUGMENTATIONS, FusedViews, augment, crops, fused, make_views
from hf_accel.report import environment, format_table
from hf_accel.utils.writing import write_json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Views = Callable[[], Any]


def count_eager(views: Views, least: int) -> tuple[int, int]:
    """Launches and bytes of what `views` runs eagerly."""
    with KernelCount(least) as count:
        views()
    return count.launches, count.bytes


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The whole batch at once, also on a CPU, where it is otherwise made in parts that fit into the cache."""
    cache: dict[str, Any] = {"CACHE_BYTES": 2**62}
    product: dict[str, Any] = {"LARGEST_PRODUCT": 2**62}
    whole: dict[str, Any] = {**product, "IN_RUNS": False}
    with patch.multiple(augment, **cache), patch.multiple(crops, **product), patch.multiple(fused, **whole):
        yield


def count_fused(render: FusedViews, views: Views) -> tuple[int, int]:
    """Launches and bytes of the compiled chain, as inductor counts them."""
    from torch._inductor import metrics
    from torch._logging._internal import getArtifactLogger

    counted, inside = dict[Any, tuple[int, int]](), [0, 0]

    def count(stage: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        metrics.reset()
        output = stage(*arguments)
        key = (stage, *(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(arguments)))
        if key not in counted:
            counted[key] = metrics.generated_kernel_count, metrics.num_bytes_accessed
        inside[0] += counted[key][0]
        inside[1] += counted[key][1]
        return output

    stages: dict[str, Any] = {
        name: partial(count, getattr(render, name)) for name in ("mix_colours", "blur_down", "finish")
    }
    # Inductor counts bytes where it is to log them, and only when it compiles.
    logger = getArtifactLogger("torch._inductor.compile_fx", "inductor_metrics")
    level, propagated = logger.level, logger.propagate
    logger.setLevel("INFO")
    logger.propagate = False
    torch.compiler.reset()
    try:
        with (
            cast(Any, torch.compiler.config).patch(force_disable_caches=True),
            warnings.catch_warnings(),
            patch.multiple(render, **stages),
        ):
            warnings.simplefilter("ignore")
            views()
    finally:
        logger.setLevel(level)
        logger.propagate = propagated
    return inside[0], inside[1]


def seconds_of(
    sides: dict[str, Views], device: torch.device, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median seconds of each; they take turns, so that a slow moment of the machine affects all of them."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, views in sides.items():
            _synchronize(device)
            start = clock()
            views()
            _synchronize(device)
            taken[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in taken.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way to make the views, in the order in which they are listed above."""
    side = round(args.size / 0.875)
    shape = (args.batch_size, 3, side, side)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    render, batch = FusedViews(args.dtype), {"images": pixels.to(args.device)}

    def ours(render: FusedViews | None) -> Any:
        return make_views(batch, AUGMENTATIONS["moco"], args.size, 0, 0, mean=MEAN, std=STD, render=render)

    sides: dict[str, Views] = {"ours eager": partial(ours, None)}
    rows: dict[str, dict[str, Any]] = {"ours eager": {}}
    start = time.perf_counter()
    try:
        ours(render)
    except Exception as error:  # Whatever a compiler says: the row tells it.
        rows["ours fused"] = {"skipped": f"torch.compile: {str(error).strip().splitlines()[0]}"}
    else:
        sides["ours fused"] = partial(ours, render)
        rows["ours fused"] = {"compile_seconds": time.perf_counter() - start}
    for name, make in PEERS.items():
        try:
            sides[name] = partial(make(args.size, args.device), images_for(name, pixels, args.device))
            sides[name]()
            rows[name] = {}
        except ImportError as error:
            rows[name] = {"skipped": str(error)}
    seconds = seconds_of(sides, args.device, args.repeats)
    for name, row in rows.items():
        if name in seconds:
            row |= {"images_per_second": args.batch_size / seconds[name], "seconds": seconds[name]}
    counts, least = {}, args.batch_size * args.size**2
    with as_on_a_gpu():
        for name in {"ours eager", "kornia"} & sides.keys():
            counts[name] = count_eager(sides[name], least)
        if "ours fused" in sides:
            counts["ours fused"] = count_fused(render, sides["ours fused"])
    for name, (launches, moved) in counts.items():
        rows[name] |= {"launches": launches, "megabytes_per_image": moved / 1e6 / args.batch_size}
    return [{"name": name, **row} for name, row in rows.items()]


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    first = rows[0]["images_per_second"]
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["name"], "", "", "", "", row["skipped"]])
            continue
        counts = [f"{row[key]:,.0f}" if key in row else "" for key in ("launches", "megabytes_per_image")]
        speed = [f"{row['images_per_second']:,.1f}", f"{row['images_per_second'] / first:.2f}"]
        compiled = f"compiled in {row['compile_seconds']:.0f} s" if "compile_seconds" in row else ""
        lines.append([row["name"], *speed, *counts, compiled])
    return format_table(["views by", "images/s", "over eager", "launches", "MB/image", ""], lines)


def view_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of the benchmarks that make views."""
    parser = parser_of(prog, description)
    parser.add_argument("--size", type=int, default=224, metavar="", help="pixels of a view (default 224)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="", help="images (default 64)")
    parser.add_argument("--repeats", type=int, default=7, metavar="", help="timed rounds (default 7)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(device), metavar="", help="cpu or cuda")
    threads = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, metavar="", help="of torch (default: torch's)")
    parser.add_argument("--output", type=Path, metavar="", help="JSON to write")
    return parser


def parse_views(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    return args


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    return parse_views(view_parser("views", __doc__), arguments)


def report(args: argparse.Namespace, rows: list[dict[str, Any]], *settings: str) -> None:
    """Print the table, and write the JSON if it is asked for. `settings` are recorded beside those of all."""
    names = ("size", "batch_size", "repeats", "device", "threads", *settings)
    found = {"rows": rows, "environment": environment(), "settings": {name: str(getattr(args, name)) for name in names}}
    print(table_of(rows))
    if args.output:
        write_json(args.output, found)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    report(args, measure(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
