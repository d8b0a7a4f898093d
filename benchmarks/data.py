"""How fast do JPEG files become two views? MoCo-v3's pair, by this project and by what else there is.

Every row starts from the same JPEG files in memory. The rows `ours` cut crops out of each file as it is decoded, as a
loader's worker does, and then make the views of the whole batch. The rows `ours cached` cut crops out of images that
were decoded and stored before. Peers decode every file at its full size, albumentations by OpenCV, the others by
Pillow. `kornia` takes images of one size, which are resized first. Libraries that are not installed are skipped.
Without --data the files are synthetic pictures of 500 x 375 pixels. Run it from the project's root:

    python -m benchmarks.data --data images.parquet --size 224 --batch-size 64 --threads 1 --output data.json
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from benchmarks.view_peers import PEERS, images_for
from benchmarks.views import MEAN, STD, Views, parse_views, report, seconds_of, view_parser
from hf_accel.data import AUGMENTATIONS, FusedViews, ImageSource, TrainSampler, make_views
from hf_accel.data.cache import storage_side, store_images
from hf_accel.data.loader import TrainImages
from hf_accel.data.tables import load_tables, select_undecoded

CONFIGS = AUGMENTATIONS["moco"]
NAMES = ("ours eager", "ours fused", "ours cached eager", "ours cached fused", *PEERS)


def synthetic_files(count: int, seed: int = 0) -> list[bytes]:
    """Photograph-like JPEG files of 500 x 375 pixels: soft blobs with a little noise."""
    files, rng = [], np.random.default_rng(seed)
    for _ in range(count):
        small = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        large = np.asarray(small.resize((500, 375), PIL.Image.Resampling.BICUBIC)) + rng.normal(0, 6, (375, 500, 3))
        PIL.Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=92)
        files.append(file.getvalue())
    return files


def read_files(data: str | None, count: int) -> list[bytes]:
    """The first `count` JPEG files of a dataset, repeated if it has fewer, or synthetic ones."""
    if data is None:
        return synthetic_files(count)
    table = select_undecoded(next(iter(load_tables(data, None).values())), "image")
    records = [table[index]["image"] for index in range(min(count, len(table)))]
    files = [record["bytes"] or Path(record["path"]).read_bytes() for record in records]
    return [files[index % len(files)] for index in range(count)]


def decode_by_pillow(file: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(file)).convert("RGB")


def decode_by_opencv(file: bytes) -> np.ndarray:
    import cv2  # pyright: ignore[reportMissingImports]

    cv2.setNumThreads(torch.get_num_threads())
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def ours(files: list[bytes], args: argparse.Namespace, cached: bool, fused: bool) -> Views:
    """The views of one batch, from files or from stored images."""
    table: Any = [{"image": {"bytes": file, "path": None}} for file in files]
    source = ImageSource("files", table)
    if cached:
        source.stored = store_images(source, storage_side(CONFIGS, args.size), args.device)
    images, render = TrainImages(source, CONFIGS, 0, len(files)), FusedViews(args.dtype) if fused else None
    (items,) = TrainSampler(len(files), len(files))

    def views() -> list[Tensor]:
        batch = images.__getitems__((args.size, items))
        if not cached:
            batch["crops"] = [crop.to(args.device) for crop in batch["crops"]]
        return make_views(batch, CONFIGS, args.size, 0, 0, mean=MEAN, std=STD, render=render)

    return views


def peer(name: str, files: list[bytes], args: argparse.Namespace) -> Views:
    """The views of one batch by another library, which decodes the files every time. Raises ImportError."""
    make, side = PEERS[name](args.size, args.device), round(args.size / 0.875)
    if name == "albumentations":
        return lambda: make([decode_by_opencv(file) for file in files])
    if name == "pillow":
        return lambda: make([decode_by_pillow(file) for file in files])

    def views() -> Any:
        images = [decode_by_pillow(file) for file in files]
        if name == "kornia":
            images = [image.resize((side, side), PIL.Image.Resampling.BILINEAR) for image in images]
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        return make(images_for(name, torch.stack(pixels), args.device) if name == "kornia" else pixels)

    return views


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, those of this project first."""
    files = read_files(args.data, args.batch_size)
    sides: dict[str, Views] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        start = time.perf_counter()
        try:
            own = {"cached": "cached" in name, "fused": "fused" in name}
            views = peer(name, files, args) if name in PEERS else ours(files, args, **own)
            start = time.perf_counter()
            views()
        except Exception as error:  # Whatever an import or a compiler says: the row tells it.
            rows[name] = {"skipped": str(error).strip().partition("\n")[0]}
            continue
        sides[name] = views
        rows[name] = {"compile_seconds": time.perf_counter() - start} if "fused" in name else {}
    clock: Callable[[], float] = time.process_time if args.clock == "process" else time.perf_counter
    for name, seconds in seconds_of(sides, args.device, args.repeats, clock).items():
        rows[name] |= {"images_per_second": args.batch_size / seconds, "seconds": seconds}
    return [{"name": name, **row} for name, row in rows.items()]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = view_parser("data", __doc__)
    parser.add_argument("--data", metavar="", help="parquet file or folder of JPEG images (default: synthetic ones)")
    clock = "wall, or process: CPU seconds of this process, on a machine that others use too (default wall)"
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", metavar="", help=clock)
    args = parse_views(parser, arguments)
    if args.clock == "process" and args.device.type == "cuda":
        parser.error("--clock process does not see a GPU's time; use --clock wall")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    report(args, measure(args), "data", "clock")
    return 0


if __name__ == "__main__":
    sys.exit(main())
