"""Test that a dataset can be packed by a recipe, and that the same recipe then trains on the packed images."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from hf_accel.recipe import PackRecipe, RecipeError, load_recipe
from hf_accel.tasks import pack as task
from hf_accel.tasks.pack import pack
from hf_accel.tasks.setup import images_of
from tests.tiny_runs import launch, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """120 smooth JPEG images of three classes to train on, and 30 to validate; every fifth is small."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 120), ("validation", 30)):
        for index in range(count):
            folder, size = root / split / "abc"[index % 3], (20, 16) if index % 5 == 0 else (60, 50 + index % 20)
            folder.mkdir(parents=True, exist_ok=True)
            few = rng.normal(60 * np.eye(3)[index % 3] + 100, 30, (3, 3, 3)).clip(0, 255).astype(np.uint8)
            image = PIL.Image.fromarray(few).resize(size, PIL.Image.Resampling.BICUBIC)
            image.save(folder / f"{index:03}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory) -> Path:
    return launch(photos, tmp_path_factory.mktemp("packed") / "out", "task=pack", "num_workers=1")


def recipe_of(data: Path, output: Path, *overrides: str) -> Any:
    return load_recipe(None, ["task=pack", f"data={data}", f"output_dir={output}", "image_size=16", *overrides])


def test_packed_images_are_those_of_the_recipe(photos, packed):
    before, after = (cast(Any, images_of)(recipe_of(data, Path("out"))) for data in (photos, packed))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.labels, other.labels) and one.class_names == other.class_names
        for index in range(len(one)):
            image, found = one.read(index), other.read(index)
            assert min(found.size) <= 22  # 16 / sqrt(0.54), for MoCo's crops
            expected = np.asarray(image.resize(found.size, PIL.Image.Resampling.BICUBIC)).astype(float)
            assert np.abs(np.asarray(found) - expected).mean() < (4 if min(image.size) > 22 else 1e-9)
    record, readme = read(packed / "pack.json"), (packed / "README.md").read_text()
    assert record["images"] == {"train": 120, "validation": 30} and record["shrunk"] == 120
    assert (record["short_side"], record["jpeg_quality"]) == (22, 90) and record["data"] == str(photos)
    assert record["bytes"] == sum(file.stat().st_size for file in (packed / "data").iterdir())
    assert record["original_bytes"] == sum(file.stat().st_size for file in photos.rglob("*.jpg"))
    assert "120 train images and 30 validation images" in readme and "22 pixels: 120" in readme
    assert yaml.safe_load(readme.split("---")[1])["configs"][0]["data_files"][1]["path"] == "data/validation-*.parquet"


@pytest.mark.slow
def test_a_recipe_trains_on_packed_images(packed, tmp_path):
    output = launch(packed, tmp_path / "run")
    results = read(output / "results.json")
    assert results["units"] > 0 and results["knn_top1"] > 0.5


def test_a_packed_dataset_is_not_overwritten(photos, packed, tmp_path, capsys):
    before = {file: file.read_bytes() for file in packed.rglob("*.*")}
    launch(photos, packed, "task=pack", "num_workers=0")
    assert f"This dataset is packed: train with data={packed}." in capsys.readouterr().out
    for words, problem in (
        (
            ["image_size=20"],
            f"image_size=20: {packed} holds images packed with image_size=16; choose another output_dir",
        ),
        (["task=pretrain"], "it holds the recipe.yaml of task=pack; choose another output_dir"),
    ):
        with pytest.raises(SystemExit, match=problem):
            launch(photos, packed, *(words if "task" in words[0] else ["task=pack", *words]))
    assert before == {file: file.read_bytes() for file in packed.rglob("*.*")}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(RecipeError, match=r"it holds other files \(notes.txt\); choose an empty folder"):
        pack(recipe_of(photos, tmp_path / "other"))


def test_packing_goes_on_and_says_so(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_accel.data.packing.SHARD_BYTES", 1)
    recipe, calls = recipe_of(photos, tmp_path / "out", "num_workers=0"), []
    true_save = task.PackedFolder._save

    def save(self, **totals):
        true_save(self, **totals)
        calls.append(len(self.shards))
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(task.PackedFolder, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        pack(recipe)
    with pytest.raises(RecipeError, match="holds images packed with seed=0"):
        pack(replace(recipe, seed=1))
    pack(replace(recipe, num_workers=1))
    assert "Going on after 1 complete shard with 64 images" in capsys.readouterr().out
    assert calls == [1, 2, 3, 3] and read(tmp_path / "out/pack.json")["images"]["train"] == 120


DINO: dict[str, Any] = {"objective": "dino", "objective_config": {"num_local_crops": 2}}
SIDES: dict[str, tuple[dict[str, Any], int]] = {
    "image_size": ({"image_size": 32}, 44),
    "augmentation": ({"augmentation": "digits"}, 20),
    "objective": (DINO, 203),  # Its local crops have 96 pixels.
    "objective_config": ({"objective": "dino", "objective_config": {"num_local_crops": 2, "local_crop_size": 32}}, 68),
}


@pytest.mark.parametrize("key", SIDES)
def test_a_key_of_the_views_chooses_the_short_side(key):
    values, side = SIDES[key]
    assert task._short_side(replace(recipe_of(Path("photos"), Path("out")), **values)) == side != 22


def test_every_key_of_packing_is_tested(monkeypatch):
    shared = {
        "data",
        "data_config",
        "train_split",
        "validation_split",
        "image_column",
        "label_column",
        "seed",
        "streaming",
    }
    assert PackRecipe.types().keys() == {*SIDES, *shared, "output_dir", "num_workers"}
    calls: list[Any] = []
    monkeypatch.setattr("hf_accel.tasks.setup.load_sources", lambda *words: calls.append(words) or (None, None))
    recipe = recipe_of(Path("photos"), Path("out"), "train_split=a", "validation_split=b", "image_column=c", "seed=3")
    task.load_images(replace(recipe, label_column="d", data_config="e", streaming=False), in_memory=False)
    assert calls == [("photos", "a", "b", "c", "d", 3, "e", False, False, False, 3)]


def test_processes_of_a_launch_and_digits_are_refused(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="data='bundled': the digits come with the package"):
        pack(load_recipe(None, ["task=pack", f"output_dir={tmp_path}"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="task=pack runs in one process"):
        pack(recipe_of(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize("objective_config", ["{projection_size: -1}", "{momentum: 7}"])
def test_wrong_settings_of_the_objective_are_named(objective_config, photos, tmp_path):
    with pytest.raises(RecipeError, match="objective_config="):
        pack(recipe_of(photos, tmp_path / "out", f"objective_config={objective_config}"))
    assert not (tmp_path / "out/pack.json").exists()
