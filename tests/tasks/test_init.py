"""`hf-accel init`: what it finds in a folder, the recipe that it writes, and what it refuses."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from hf_accel import AccelViTConfig, cli
from hf_accel.checkpoints import Start
from hf_accel.data import survey as surveying
from hf_accel.recipe import load_recipe
from hf_accel.recipe.proposal import Device, Images, propose, settle_budget, write_text
from hf_accel.tasks import init as init_task
from hf_accel.training.memory import OutOfMemory
from hf_accel.training.timing import StepTime
from tests.tiny_runs import image_folder, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

GPU, CPU = Device("NVIDIA H200", 140 * 10**9, True), Device("2 CPU cores", 8 * 10**9, False)


def photo(path: Path, seed: int, size: tuple[int, int] = (90, 70), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def odd(tmp_path) -> Path:
    """Two classes, two copies, a truncated and an empty file, gray and transparent images, and a text."""
    root = tmp_path / "photos"
    for index in range(40):
        photo(root / "ab"[index % 2] / f"{index:02}.jpg", index, (90 + index, 70 + index))
    photo(root / "a" / "gray.png", 50, mode="L")
    photo(root / "b" / "seen through.png", 51, mode="RGBA")
    shutil.copy(root / "a" / "00.jpg", root / "b" / "copy.jpg")
    shutil.copy(root / "a" / "00.jpg", root / "a" / "other copy.jpg")
    (root / "a" / "cut.jpg").write_bytes((root / "a" / "02.jpg").read_bytes()[:1500])
    (root / "b" / "empty.jpg").touch()
    (root / "b" / "another empty.jpg").touch()
    (root / "notes.txt").write_text("words")
    return root


@pytest.fixture
def timed(monkeypatch) -> list[dict[str, Any]]:
    """In place of the timing: 2 s for each epoch that is proposed. Returns the values that were to be timed."""
    seen: list[dict[str, Any]] = []

    def time(proposal, images):
        seen.append(proposal.for_timing())
        return 2.0 * float(proposal.values["budget"].split()[0]), 3 * 10**9

    monkeypatch.setattr(init_task, "_time", time)
    return seen


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_report_names_what_is_odd(odd, place, timed, capsys):
    cli.main(["init", str(odd)])
    said = capsys.readouterr().out
    report = {line.partition(":")[0]: line.partition(":")[2].strip() for line in said.splitlines() if ":" in line}
    assert report["Images"].startswith(f"47 in {odd}: ") and "to measure accuracy on" in report["Images"]
    assert report["Sizes"] == "short side 70 to 109 pixels, median 88"
    assert report["Formats"] == "JPEG (42), PNG (2)"
    assert report["Channels"] == "RGB (42), RGB with transparency (1), gray (1)"
    assert "2 classes (a, b)" in report["Labels"]
    assert report["Unreadable"].startswith("3: a/cut.jpg (") and "b/empty.jpg" in report["Unreadable"]
    assert "A run stops if more than 1% are unreadable" in report["Unreadable"]
    assert report["Duplicates"].startswith("2 images equal another one to the byte: ")
    assert {name for name in ("a/00.jpg", "b/copy.jpg", "a/other copy.jpg") if name in report["Duplicates"]} == {
        *("a/00.jpg", "b/copy.jpg", "a/other copy.jpg")
    }
    assert said.rstrip().splitlines()[-3:] == [
        "  hf-accel views recipe.yaml      # see the views that it learns from, in runs/photos",
        "  hf-accel plan recipe.yaml       # see stages, time and memory",
        "  hf-accel pretrain recipe.yaml   # train",
    ]


def test_a_large_set_is_looked_at_for_a_while(odd, place, timed, capsys, monkeypatch):
    monkeypatch.setattr(surveying, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(surveying, "COMPARE_SECONDS", 0.0)
    monkeypatch.setattr(surveying, "CHUNK", 20)
    cli.main(["init", str(odd)])
    said = capsys.readouterr().out
    assert "(of 20 that were opened)" in said and "none (of 1 that were compared)" in said


def test_the_recipe_of_a_cpu_fits_and_loads(odd, place, timed):
    cli.main(["init", str(odd)])
    text, recipe = (place / "recipe.yaml").read_text(), load_recipe("recipe.yaml")
    assert (recipe.data, recipe.output_dir, recipe.objective) == (str(odd), "runs/photos", "simclr")
    assert (recipe.image_size, recipe.patch_size, recipe.model, recipe.init_from) == (64, 8, "vit_tiny", None)
    assert recipe.learning_rate == 1e-3 and recipe.batch_size == 8 and recipe.schedule == "standard"
    assert recipe.budget == "100 epochs"  # 200 s, and ten minutes may be spent
    assert "# Predicted: about 3 min, and 3.00 GB of memory at most" in text
    assert "# init_from: facebook/dinov2-small would continue" in text and "takes a CPU minutes" in text
    assert timed[0]["data"] == str(odd) and max(map(len, text.splitlines())) <= 120 + len(str(odd))


@pytest.mark.parametrize(("images", "batch"), [(16, 4), (255, 32), (256, 64), (5000, 128)])
def test_the_rate_of_a_small_encoder_names_its_batches(images, batch):
    proposal = propose("data", "runs/data", Images(images, 64, 0), CPU)
    reason = proposal.why["learning_rate"]
    assert proposal.values["batch_size"] == batch and "Measured for" in reason and "batches of 64 to 256" in reason
    assert ("64 to 256 only; another rate may be better" in reason) == (batch < 64)


@pytest.mark.parametrize(("seconds", "epochs", "taken"), [(1e2, 100, 1e2), (6e3, 10, 6e2), (6e6, 0.01, 6e2)])
def test_the_budget_of_a_cpu_fits_ten_minutes(seconds, epochs, taken):
    proposal = propose("data", "runs/data", Images(5000, 64, 0), CPU)
    assert settle_budget(proposal, seconds, is_gpu=False) == pytest.approx(taken)
    assert proposal.values["budget"] == f"{epochs:g} epochs"


def test_a_gpu_gets_released_weights_for_photographs(odd, place, timed, monkeypatch, capsys):
    monkeypatch.setattr(init_task, "find_device", lambda: GPU)
    for index in range(60):
        photo(odd / "a" / f"large{index}.jpg", 100 + index, (300, 240))
    cli.main(["init", str(odd), "--output", "gpu.yaml"])
    values = yaml.safe_load((place / "gpu.yaml").read_text())
    assert values["init_from"] == "facebook/dinov2-small" and values["image_size"] == 224
    assert values["learning_rate"] == "auto" and not values.keys() & {"model", "model_config", "patch_size"}
    assert values["budget"] == "50 epochs" and values["objective"] == "moco"
    # Nothing is downloaded: random weights of the same sizes are timed.
    assert "init_from" not in timed[0] and (timed[0]["model"], timed[0]["patch_size"]) == ("vit_small", 14)
    config = AccelViTConfig(patch_size=14, image_size=224, init_from={"name": "x", "is_on_hub": True, "license": None})
    monkeypatch.setattr("hf_accel.checkpoints.read_start", lambda *_, **__: Start(config, {}, ""))
    recipe = load_recipe("gpu.yaml")
    assert recipe.used()["learning_rate"] == 1.5e-4 * recipe.batch_size / 256
    assert "NVIDIA H200, 140 GB" in capsys.readouterr().out


UNFIT = {
    "small": (Images(5000, 64, 0), GPU, "median short side of these images is 64", ("vit_small", 64, 8, 256)),
    "many": (Images(500_000, 400, 0), GPU, "500,000 images also suffice", ("vit_small", 224, 16, 256)),
    "channels": (Images(5000, 400, 0, 5), GPU, "these have 5 channels", ("vit_small", 224, 16, 256)),
    "cpu": (Images(5000, 400, 3), CPU, "takes a CPU minutes", ("vit_tiny", 64, 8, 128)),
    "tiny": (Images(5000, 20, 3), CPU, "takes a CPU minutes", ("vit_tiny", 32, 4, 128)),
    "memory": (Images(5000, 100, 0), GPU._replace(memory=8 * 10**9), "is 100", ("vit_small", 96, 8, 64)),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_reason_is_given_where_released_weights_do_not_fit(case):
    images, device, reason, expected = UNFIT[case]
    proposal = propose("data", "runs/data", images, device)
    text = write_text(proposal, "Opening.", "recipe.yaml")
    words = " ".join(text.replace("#", " ").split())
    assert "init_from" not in proposal.values and reason in words
    assert tuple(proposal.values[key] for key in ("model", "image_size", "patch_size", "batch_size")) == expected
    assert proposal.values.get("num_channels", 3) == images.channels
    assert yaml.safe_load(text) == proposal.values


def test_a_batch_that_does_not_fit_is_halved(odd, place, monkeypatch):
    for index in range(200):
        photo(odd / "a" / f"more{index}.png", 100 + index, (40, 40))
    tried = []

    def time(proposal, images):
        tried.append(proposal.values["batch_size"])
        if len(tried) == 1:
            raise OutOfMemory("too little memory")
        return 1.0, 10**9

    monkeypatch.setattr(init_task, "_time", time)
    cli.main(["init", str(odd)])
    assert tried == [32, 16] and load_recipe("recipe.yaml").batch_size == 16


def test_a_recipe_is_written_where_no_step_can_be_taken(odd, place, capsys):
    """More images than a run allows cannot be read."""
    for index in range(20):
        (odd / "a" / f"broken{index}.jpg").write_bytes(b"no image")
    cli.main(["init", str(odd)])
    said, text = capsys.readouterr().out, (place / "recipe.yaml").read_text()
    assert load_recipe("recipe.yaml").budget == "20 epochs" and "Steps were not timed." in text
    assert "Time and memory could not be predicted: " in said and "images cannot be read" in said
    assert re.search(r"replace them by good copies: \d+: \S+: .+", said) and "For example" not in said


def test_nothing_is_overwritten(odd, place, timed, monkeypatch):
    (place / "recipe.yaml").write_text("mine")
    monkeypatch.setattr(init_task, "survey", lambda *_: pytest.fail("it is said at once"))
    with pytest.raises(SystemExit, match=r"--output='recipe.yaml': it exists, .* name another file with --output FILE"):
        cli.main(["init", str(odd)])
    assert (place / "recipe.yaml").read_text() == "mine" and not timed


def test_another_run_gets_another_folder(odd, place, timed):
    (place / "runs" / "photos").mkdir(parents=True)
    cli.main(["init", str(odd), "--output", "other.yaml"])
    assert load_recipe("other.yaml").output_dir == "runs/photos-2"


@pytest.mark.parametrize(("inside", "given"), [("", "."), ("a", ".."), ("", "{}"), ("a", "{}")])
def test_runs_lie_outside_of_the_images(inside, given, odd, tmp_path, timed, monkeypatch, capsys):
    monkeypatch.chdir(odd / inside)
    cli.main(["init", given.format(odd), "--output", str(tmp_path / "recipe.yaml")])
    recipe, up = load_recipe(str(tmp_path / "recipe.yaml")), "../../" if inside else "../"
    assert (recipe.data, recipe.output_dir) == (str(odd), f"{up}runs/photos")
    assert Path(recipe.output_dir).resolve() == tmp_path / "runs" / "photos"
    assert f"learns from, in {up}runs/photos\n" in capsys.readouterr().out


def test_a_linked_folder_is_the_one_that_it_leads_to(odd, place, monkeypatch):
    (place / "link").symlink_to(odd)
    assert init_task.runs_folder(place / "link") == Path("runs")
    monkeypatch.chdir(place / "link")
    assert init_task.runs_folder(place / "link") == Path("../runs")


def folder_of(root: Path, kind: str) -> Path:
    if kind != "missing":
        root.mkdir()
    if kind == "texts":
        (root / "notes.txt").write_text("words")
    if kind == "heic":
        (root / "photo.heic").write_bytes(b"x")
    if kind == "broken":
        for name in "ab":
            (root / f"{name}.jpg").write_bytes(b"no image")
    if kind == "one":
        photo(root / "a.jpg", 0)
    return root


REFUSED = {
    "missing": "no such file or folder",
    "empty": "it is empty",
    "texts": "it holds no images, and neither do the folders in it",
    "heic": "no image that can be loaded. photo.heic is left out, as Pillow does not open .heic files",
    "broken": "none of 2 images can be read; the first one, ",
    "one": "it holds one image",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_without_images_is_refused_in_a_line(kind, tmp_path, place):
    with pytest.raises(SystemExit) as ended:
        cli.main(["init", str(folder_of(tmp_path / "photos", kind))])
    message = str(ended.value)
    assert message.startswith("SettingError: FOLDER=") and REFUSED[kind] in message and "\n" not in message
    assert not (place / "recipe.yaml").exists()


def test_a_place_without_write_access_is_refused(odd, place, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(SystemExit, match="nothing can be written in"):
        cli.main(["init", str(odd)])
    with pytest.raises(SystemExit, match="there is no folder nowhere"):
        cli.main(["init", str(odd), "--output", "nowhere/recipe.yaml"])


def test_the_device_is_described(monkeypatch):
    assert init_task.find_device().name.endswith("CPU cores") and not init_task.find_device().is_gpu
    monkeypatch.setattr(init_task, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    about = type("Properties", (), {"total_memory": 140 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    assert init_task.find_device() == GPU


def test_images_of_five_channels_are_read_as_they_are(tmp_path, place, timed, capsys):
    folder = tmp_path / "fields"
    folder.mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 2**16, (40, 40, 5), dtype=np.uint16)
        np.save(folder / f"{index}.npy", pixels)
    cli.main(["init", str(folder)])
    assert load_recipe("recipe.yaml").num_channels == 5
    assert "5 channels of 16 bits (8)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recipe_plans_and_trains(tmp_path, place, capsys):
    """The whole way, with the steps that are timed, at the least size."""
    images = image_folder(tmp_path / "images")
    cli.main(["init", str(images)])
    small = ["model_config.num_hidden_layers=1", "objective_config.projector_hidden_size=32", "report_to=[]"]
    small += ["image_size=16", "patch_size=4", "eval_points=[1.0]"]
    cli.main(["plan", "recipe.yaml", *small])
    assert "whole run" in capsys.readouterr().out
    cli.main(["pretrain", "recipe.yaml", *small, "budget=0.5 epochs"])
    assert read(place / "runs" / "images" / "results.json")["steps"] > 1


@pytest.mark.slow
def test_steps_are_timed_as_those_of_the_run(odd, place, monkeypatch):
    """With stored images where the run stores its own, though not all of them."""
    seen: list[Any] = []
    for name in ("a/cut.jpg", "b/empty.jpg", "b/another empty.jpg"):
        (odd / name).unlink()

    def time_steps(trainer, strategies):
        seen.append((trainer.source.stored is not None, len(trainer.source)))
        return dict.fromkeys(strategies, STEP)

    monkeypatch.setattr(init_task, "time_steps", time_steps)
    monkeypatch.setattr(init_task, "STORED", 20)
    cli.main(["init", str(odd)])
    assert seen == [(True, 20)]
    assert "and 1.50 GB of memory at most" in (place / "recipe.yaml").read_text()


STEP = StepTime(0.01, 1_500_000_000)
