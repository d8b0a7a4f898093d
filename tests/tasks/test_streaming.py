"""Test that a recipe trains on tar files where they lie, and resumes exactly."""

import os
import signal
from pathlib import Path

import pytest

from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.tasks.setup import load_images
from hf_accel.training.trainer import PretrainTrainer
from tests.data.test_shards import write_shards, write_tar
from tests.tiny_runs import assert_same_weights, image_folder, launch, launch_until_stopped, losses, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """The images of `image_folder` in tar files of 25 images."""
    images, root = image_folder(tmp_path_factory.mktemp("images")), tmp_path_factory.mktemp("tars")
    for split in ("train", "validation"):
        files = sorted((images / split).rglob("*.png"), key=lambda file: file.name)
        for start in range(0, len(files), 25):
            samples = {
                file.stem: {"png": file.read_bytes(), "cls": str("abc".index(file.parent.name)).encode()}
                for file in files[start : start + 25]
            }
            write_tar(root / f"{split}-{start // 25:02}.tar", samples)
    return root


@pytest.mark.slow
def test_a_resumed_run_on_tar_files_is_the_undisturbed_one(tars, tmp_path, monkeypatch):
    true_step = PretrainTrainer.training_step

    def stopped_step(self, model, inputs, *args, **kwargs):
        if inputs["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, model, inputs, *args, **kwargs)

    whole = launch(tars, tmp_path / "whole", "streaming=true", "cache=none", "num_workers=0")
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "training_step", stopped_step)
        output = launch_until_stopped(tars, tmp_path / "run", "streaming=true", "cache=none", "num_workers=0")
    launch(tars, output, "streaming=true", "cache=none", "num_workers=2")
    assert losses(output) == losses(whole) and read(whole / "results.json")["knn_top1"] > 0.5
    assert_same_weights(whole, output)
    with pytest.raises(SystemExit, match=r"streaming=False: .* holds a run with streaming=True"):
        launch(tars, output, "streaming=false", "cache=none")


def test_streaming_is_refused_where_it_has_no_meaning(tmp_path):
    for words in (["data=bundled"], [f"data={tmp_path}", "data_config=small"]):
        with pytest.raises(RecipeError, match="streaming=True: it reads tar files"):
            load_images(load_recipe("recipes/moco.yaml", ["streaming=true", *words]))
    with pytest.raises(
        RecipeError, match=r"data='.*': streaming reads \.tar files in the layout of webdataset, and there"
    ):
        load_images(load_recipe("recipes/moco.yaml", ["streaming=true", f"data={tmp_path}"]))


def test_a_recipe_streams_only_if_it_says_so(tmp_path):
    write_shards(tmp_path)
    words = ["validation_split=train[:2]", f"data={tmp_path}"]
    assert load_images(load_recipe("recipes/moco.yaml", ["streaming=true", *words]))[0].shards is not None
    assert load_images(load_recipe("recipes/moco.yaml", words))[0].shards is None
