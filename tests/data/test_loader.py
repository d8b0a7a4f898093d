import logging
import multiprocessing.forkserver
import os
import pickle
import signal
import subprocess
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from hf_accel.data import load_sources, loader
from hf_accel.data.augment import AUGMENTATIONS, ViewConfig, make_views, view_boxes
from hf_accel.data.loader import StepBatches, TrainSampler, eval_loader, image_processor, resize_edge, train_loader
from hf_accel.data.sources import CorruptDataError, ImageSource
from hf_accel.utils.seeding import generator

MOCO = AUGMENTATIONS["moco"]
CROP_ONLY = ViewConfig(jitter=0, grayscale=0, blur=0)


def noise(seed, width, height, smooth=4):
    """Draw a picture of soft random blobs."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // smooth + 1, width // smooth + 1, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


def folder(path, count, sizes=((40, 30),), extension="png", broken=()) -> Any:
    """Return a source of files, read one by one, with labels 0 1 2 0 1 2 ..."""
    path.mkdir()
    files = [str(path / f"{number:03}.{extension}") for number in range(count)]
    for number, file in enumerate(files):
        noise(number, *sizes[number % len(sizes)]).save(file, quality=95)
        if number in broken:
            content = (path / file).read_bytes()
            (path / file).write_bytes(content[: len(content) // 2] if number % 2 else b"nothing")
    table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image(decode=False))
    return ImageSource("set", table, labels=torch.arange(count) % 3, class_names=["a", "b", "c"])


def view_size(step):
    return 16 + 4 * step


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key == "crops":
            assert all(torch.equal(a, b) for a, b in zip(value, other[key], strict=True))
        else:
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


# Order


def reference_order(num_images, per_step, seed, step):
    """Return the images of one step, in order, by running through the epochs from the start."""
    position = 0
    for epoch in range(1000):
        order = torch.randperm(num_images, generator=generator(seed, "order", epoch)).tolist()
        while len(order) >= per_step:
            if position == step:
                return order[:per_step]
            order, position = order[per_step:], position + 1
    raise AssertionError


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_sampler_against_a_loop(world, accumulation):
    batch, last = 4, 9
    ranks = [
        list(TrainSampler(53, batch, world, rank, accumulation, seed=5, first_step=2, last_step=last))
        for rank in range(world)
    ]
    sampler = TrainSampler(53, batch, world, 0, accumulation, seed=5, first_step=2, last_step=last)
    assert len(sampler) == len(ranks[0]) == (last - 2) * accumulation
    number = 0
    for step in range(2, last):
        expected = reference_order(53, batch * world * accumulation, 5, step)
        for micro_step in range(accumulation):
            for row in range(batch * world):
                item = ranks[row // batch][number][row % batch]
                assert item == (expected[micro_step * batch * world + row], step, micro_step, row)
            number += 1


def test_dataset_smaller_than_a_step_is_refused():
    with pytest.raises(ValueError, match=r"has 47 images and one step takes 48 .*at most 7 per process"):
        TrainSampler(47, 8, world_size=3, accumulation=2)
    TrainSampler(48, 8, world_size=3, accumulation=2)


# Training batches


def test_images_in_memory():
    pixels = torch.randint(0, 256, (20, 3, 9, 8), dtype=torch.uint8)
    sampler = TrainSampler(20, 4, 2, 1, last_step=4)
    batches = list(train_loader(ImageSource("set", pixels=pixels), sampler, MOCO, view_size, num_workers=3))
    assert len(batches) == 4
    for batch, items in zip(batches, sampler, strict=True):
        assert batch["index"].tolist() == [item.index for item in items]
        assert torch.equal(batch["images"], pixels[batch["index"]])
        assert (batch["step"], batch["micro_step"], batch["bad"]) == (items[0].step, 0, [])
        assert (batch["rows"], batch["global_batch"]) == (slice(4, 8), 8)


def test_a_gray_set_takes_one_channel():
    train, _ = load_sources("bundled")
    (batch,) = train_loader(train, TrainSampler(len(train), 6), AUGMENTATIONS["digits"], view_size)
    assert batch["images"].shape == (6, 1, 28, 28)
    views = make_views(batch, AUGMENTATIONS["digits"], 28, 0, 0)
    assert all(view.shape == (6, 3, 28, 28) for view in views)


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_crops_are_the_boxes_of_the_views(tmp_path, extension):
    source = folder(tmp_path / "set", 12, sizes=((40, 30), (25, 50)), extension=extension)
    sampler = TrainSampler(12, 3, 2, 1, seed=4, first_step=1, last_step=4)
    for batch, items in zip(train_loader(source, sampler, MOCO, view_size, seed=9), sampler, strict=True):
        size = view_size(batch["step"])
        for view, config in enumerate(MOCO):
            assert batch["crops"][view].shape == (3, 3, size, size) and batch["crops"][view].dtype == torch.uint8
            for position, item in enumerate(items):
                image = source.read(item.index)
                sides = torch.tensor([image.height]), torch.tensor([image.width])
                (box,) = view_boxes(
                    config, *sides, 9, item.step, 0, view, slice(item.row, item.row + 1), sampler.global_batch
                ).tolist()
                left, right = sorted((box[0], box[2]))
                crop = image.crop((left, box[1], right, box[3])).resize((size, size), PIL.Image.Resampling.BILINEAR)
                expected = np.asarray(crop).transpose(2, 0, 1)[:, :, :: -1 if box[0] > box[2] else 1]
                # Torch and Pillow round intermediate results differently.
                np.testing.assert_allclose(batch["crops"][view][position].int(), expected.astype(int), atol=1)


def test_own_sizes_of_views_hold_for_files_and_memory(tmp_path):
    files, memory = folder(tmp_path / "set", 12), folder(tmp_path / "copy", 12)
    memory.hold_in_memory()
    configs = (CROP_ONLY, replace(CROP_ONLY, size=10))
    made = []
    for source in (files, memory):
        (batch,) = train_loader(source, TrainSampler(12, 10), configs, view_size, seed=3)
        made.append(make_views(batch, configs, view_size(0), 3, 0))
    for one, other, size in zip(*made, (view_size(0), 10), strict=True):
        assert one.shape == other.shape == (10, 3, size, size)
        assert (one - other).abs().max() < 1.1 / 255


def test_images_shrink_as_far_as_all_their_crops_allow():
    mirrored_and_low, wide = [30.0, 0.0, 10.0, 40.0], [0.0, 0.0, 90.0, 50.0]
    assert loader._shrink(torch.tensor([mirrored_and_low, wide]), (5, 10)) == 4.0
    assert loader._shrink(torch.tensor([mirrored_and_low, wide]), (5, 20)) == 2.5


def test_large_jpegs_are_decoded_small(tmp_path, monkeypatch):
    source = folder(tmp_path / "set", 4, sizes=((640, 480),), extension="jpg")
    whole = ViewConfig(crop_scale=(0.5, 1.0))
    decoded = []
    decode = source.decode_pixels
    monkeypatch.setattr(source, "decode_pixels", lambda *a, **k: decoded.append(decode(*a, **k)) or decoded[-1])
    (batch,) = train_loader(source, TrainSampler(4, 4), (whole,), lambda step: 64)
    assert {image.shape[1:] for image in decoded} <= {(120, 160), (240, 320)} and len(decoded) == 4
    monkeypatch.setattr(loader, "_shrink", lambda *a: 1.0)
    (full,) = train_loader(source, TrainSampler(4, 4), (whole,), lambda step: 64)
    assert {image.shape[1:] for image in decoded[4:]} == {(480, 640)}
    difference = (batch["crops"][0].float() - full["crops"][0].float()).abs()
    # Edges lie on whole pixels of the small image, and these pictures change within a few pixels of the large one.
    assert difference.mean() < 6 and full["crops"][0].float().std() > 20


def test_workers_change_nothing(tmp_path):
    source = folder(tmp_path / "set", 101, sizes=((40, 30), (25, 50)), broken=(50,))
    sampler = TrainSampler(101, 10, accumulation=2, seed=1, first_step=1, last_step=7)
    state = torch.get_rng_state()
    alone = list(train_loader(source, sampler, MOCO, view_size, seed=2))
    helped = list(train_loader(source, sampler, MOCO, view_size, num_workers=2, seed=2))
    assert torch.equal(state, torch.get_rng_state())
    assert len(alone) == len(helped) == 12 and any(batch["bad"] for batch in alone)
    for one, other in zip(alone, helped, strict=True):
        assert_same(one, other)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system has no sigwaitinfo")
def test_workers_end_by_their_parents_sigterm_only(tmp_path):
    source, before = folder(tmp_path / "set", 40), set(multiprocessing.active_children())
    batches = train_loader(source, TrainSampler(40, 2, last_step=20), MOCO, view_size, num_workers=2)
    rest = iter(batches)
    seen = [next(rest), next(rest)]  # one by each worker: both have begun
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    assert len([*seen, *rest]) == 20 and all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(60)
        assert worker.exitcode == 0


def test_two_processes_see_what_one_sees(tmp_path):
    source = folder(tmp_path / "set", 24, sizes=((40, 30), (25, 50)))
    whole = list(train_loader(source, TrainSampler(24, 8, seed=1, last_step=3), MOCO, view_size, seed=1))
    ranks = [
        list(train_loader(source, TrainSampler(24, 4, 2, rank, seed=1, last_step=3), MOCO, view_size, seed=1))
        for rank in (0, 1)
    ]
    for step, batch in enumerate(whole):
        views = make_views(batch, MOCO, view_size(step), 1, step)
        halves = [
            make_views(part[step], MOCO, view_size(step), 1, step, 0, part[step]["rows"], part[step]["global_batch"])
            for part in ranks
        ]
        for view in range(2):
            assert torch.equal(batch["crops"][view], torch.cat([part[step]["crops"][view] for part in ranks]))
            torch.testing.assert_close(views[view], torch.cat([half[view] for half in halves]), atol=1e-6, rtol=0)


def test_micro_batches_of_a_step_come_one_by_one():
    taken, waits = [], []

    def batches():
        for number in range(7):
            taken.append(number)
            yield number

    iterator = batches()
    step = StepBatches(iterator, 3, waits.append)
    assert len(step) == 3 and not taken
    for number, batch in enumerate(step):
        assert batch == number and taken == [*range(number + 1)] and len(waits) == number + 1
    assert list(StepBatches(iterator, 3, waits.append)) == [3, 4, 5]
    assert list(StepBatches(iterator, 3, waits.append)) == [6] and min(waits) >= 0


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not list a process's open files")
def test_a_batch_of_workers_takes_one_open_file(tmp_path):
    source = folder(tmp_path / "set", 24)
    views = (CROP_ONLY, *(replace(CROP_ONLY, size=10) for _ in range(9)))
    batches = iter(train_loader(source, TrainSampler(24, 2, last_step=12), views, view_size, num_workers=1))
    held = [next(batches), next(batches)]
    before = open_files()
    held += [next(batches) for _ in range(8)]
    assert len(held[0]["crops"]) == 10 and open_files() - before <= 8 + 2  # two may have come ahead


def test_workers_hold_nothing_that_names_view_sizes(tmp_path):
    source = folder(tmp_path / "set", 12)

    class Trainer:
        """Cannot be pickled, like classes that are defined in a function."""

        def view_size(self, step):
            return 16 + 4 * step

    sampler = TrainSampler(12, 4, last_step=3)
    loader = train_loader(source, sampler, MOCO, Trainer().view_size, num_workers=1)
    in_a_worker = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))[0]
    batches = [in_a_worker.__getitems__(batch) for batch in loader.batch_sampler or ()]
    assert [batch["crops"][0].shape[-1] for batch in batches] == [16, 20, 24]
    for one, other in zip(batches, train_loader(source, sampler, MOCO, view_size), strict=True):
        assert_same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_change_nothing(tmp_path, method):
    source, before = folder(tmp_path / "set", 60), set(multiprocessing.active_children())
    sampler = TrainSampler(60, 4, last_step=12)
    loader = train_loader(source, sampler, MOCO, view_size, num_workers=1)
    loader.multiprocessing_context = method
    batches = iter(loader)
    found = [next(batches)]
    (worker,) = set(multiprocessing.active_children()) - before
    processes = [worker.pid]
    if method == "forkserver":  # it gets a signal to all processes of a run, too, and must survive it
        server: Any = multiprocessing.forkserver._forkserver
        processes.append(server._forkserver_pid)
    subprocess.run(["kill", "-TERM", *map(str, processes)], check=True)
    found += batches
    assert worker.is_alive() and len(found) == 12
    for one, other in zip(train_loader(source, sampler, MOCO, view_size), found, strict=True):
        assert_same(one, other)
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


# Corrupt images


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_replaced_by_the_next(tmp_path, caplog, workers):
    source = folder(tmp_path / "set", 250, broken=(6, 7))
    sampler = TrainSampler(250, 50, last_step=10)  # two epochs
    config = ViewConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)
    with caplog.at_level(logging.WARNING):
        batches = list(train_loader(source, sampler, (config,), view_size, num_workers=workers))
    assert sorted(source.bad) == [6, 7] and caplog.text.count("is skipped") == 2
    assert "006.png" in caplog.text and "007.png" in caplog.text
    skipped = sorted(entry[0] for batch in batches for entry in batch["bad"])
    assert skipped == [6, 6, 7, 7, 7, 7]  # 6 leads to 7, in both epochs
    for batch, items in zip(batches, sampler, strict=True):
        assert batch["index"].tolist() == [8 if item.index in (6, 7) else item.index for item in items]
        for position, item in enumerate(items):
            if item.index in (5, 6, 7, 8):
                size = view_size(item.step)
                stand_in = source.read(8 if item.index in (6, 7) else item.index)
                box = (5, 0, 35, 30)  # the central square
                expected = np.asarray(stand_in.crop(box).resize((size, size), PIL.Image.Resampling.BILINEAR))
                np.testing.assert_allclose(batch["crops"][0][position].permute(1, 2, 0).numpy(), expected, atol=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_images(tmp_path, workers):
    source = folder(tmp_path / "set", 100, broken=(3, 60))
    with pytest.raises(CorruptDataError, match=r"2 of 100 images .*Remove these files(.|\n)*003.png"):
        list(train_loader(source, TrainSampler(100, 50, last_step=2), MOCO, view_size, num_workers=workers))
    source.bad.clear()
    with pytest.raises(CorruptDataError, match="2 of 100"):
        list(eval_loader(source, 16, 10, num_workers=workers))


def test_corrupt_images_in_evaluation(tmp_path):
    source = folder(tmp_path / "set", 110, broken=(109,))
    batches = list(eval_loader(source, 16, 50))
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [*range(109), 0]
    assert batches[2]["labels"].tolist()[-1] == 0 and [entry[0] for entry in batches[2]["bad"]] == [109]
    assert torch.equal(batches[2]["pixel_values"][-1], batches[0]["pixel_values"][0])
    assert sorted(source.bad) == [109]


# Evaluation


@pytest.mark.parametrize("size", [16, 24, 64])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_evaluation_is_the_image_processor(tmp_path, size, extension):
    source = folder(tmp_path / "set", 9, sizes=((40, 30), (25, 50), (33, 33)), extension=extension)
    source.mean, source.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    processor = image_processor(source, size)
    processor.save_pretrained(tmp_path / "saved")
    processor = type(processor).from_pretrained(tmp_path / "saved")
    batches = list(eval_loader(source, size, batch_size=4))
    assert [len(batch["index"]) for batch in batches] == [4, 4, 1]
    mine = torch.cat([batch["pixel_values"] for batch in batches])
    images = [source.read(index) for index in range(9)]
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == source.labels.tolist()


def test_small_images_are_not_cropped(tmp_path):
    source = folder(tmp_path / "set", 5, sizes=((32, 32),))
    assert (resize_edge(source, 32), resize_edge(source, 48), resize_edge(source, 28)) == (32, 48, 32)
    assert resize_edge(source, 21) == 24
    one_by_one = torch.cat([batch["pixel_values"] for batch in eval_loader(source, 32, 2)])
    source.hold_in_memory()
    in_memory = torch.cat([batch["pixel_values"] for batch in eval_loader(source, 32, 2)])
    assert torch.equal(one_by_one, in_memory)
    expected = (source.pixels.numpy() / 255 - np.reshape(source.mean, (3, 1, 1))) / np.reshape(source.std, (3, 1, 1))
    np.testing.assert_allclose(in_memory.numpy(), expected, atol=1e-6)


def test_batches_without_labels_have_no_key_for_them(tmp_path):
    source = folder(tmp_path / "set", 3)
    source.labels = None
    (batch,) = eval_loader(source, 16, 4)
    assert "labels" not in batch
