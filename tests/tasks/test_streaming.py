"""Test that a recipe trains on tar or Parquet files where they lie, resumes exactly, and does so in two processes."""

import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import set_seed

from hf_accel import AccelViTConfig, MoCoForPreTraining, PretrainConfig
from hf_accel.data import load_sources
from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.tasks.setup import load_images
from hf_accel.training.trainer import PretrainTrainer
from hf_accel.utils.errors import SettingError
from tests.data.test_shards import write_shards, write_tar
from tests.engine_runs import launch_with
from tests.tiny_runs import RECIPE, assert_same_weights, image_folder, launch, launch_until_stopped, losses, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


KINDS = ("tar", "parquet")
SETTINGS = "streaming=true", "cache=none"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The images of `image_folder` in tar files and in Parquet files of 25 images, a folder for each kind."""
    images, root = image_folder(tmp_path_factory.mktemp("images")), tmp_path_factory.mktemp("shards")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
    (root / "parquet").mkdir()
    for split in ("train", "validation"):
        files = sorted((images / split).rglob("*.png"), key=lambda file: file.name)
        for start in range(0, len(files), 25):
            part = files[start : start + 25]
            classes = ["abc".index(file.parent.name) for file in part]
            samples = {
                file.stem: {"png": file.read_bytes(), "cls": str(label).encode()}
                for file, label in zip(part, classes, strict=True)
            }
            write_tar(root / f"tar/{split}-{start // 25:02}.tar", samples)
            images_of_part = [{"bytes": file.read_bytes(), "path": file.name} for file in part]
            table = pa.table({"image": images_of_part, "label": classes}, features.arrow_schema)
            pq.write_table(table, root / f"parquet/{split}-{start // 25:02}.parquet", row_group_size=10)
    return root


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> dict[str, Path]:
    """The undisturbed run on the files of each kind."""
    root = tmp_path_factory.mktemp("whole")
    return {kind: launch(shards / kind, root / kind, *SETTINGS, "num_workers=0") for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_on_shards_is_the_undisturbed_one(kind, shards, whole, tmp_path, monkeypatch):
    true_step = PretrainTrainer.training_step

    def stopped_step(self, model, inputs, *args, **kwargs):
        if inputs["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, model, inputs, *args, **kwargs)

    data = shards / kind
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "training_step", stopped_step)
        output = launch_until_stopped(data, tmp_path / "run", *SETTINGS, "num_workers=0")
    launch(data, output, *SETTINGS, "num_workers=2")
    assert losses(output) == losses(whole[kind]) and read(whole[kind] / "results.json")["knn_top1"] > 0.5
    assert_same_weights(whole[kind], output)
    with pytest.raises(SystemExit, match=r"streaming=False: .* holds a run with streaming=True"):
        launch(data, output, "streaming=false", "cache=none")


@pytest.mark.slow
def test_two_processes_train_on_shards_as_one(shards, whole, tmp_path, monkeypatch, kind="parquet"):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipe, run = whole[kind].with_name(f"{kind}.yaml"), tmp_path / "run"
    launch_with("cpu_2proc", recipe, run, *SETTINGS, "num_workers=1", "mixed_precision=no")
    assert read(run / "results.json")["processes"] == 2 and read(whole[kind] / "results.json")["processes"] == 1
    assert len(losses(run)) == 8 and losses(run) == pytest.approx(losses(whole[kind]), rel=1e-4)


@pytest.mark.slow
def test_a_program_trains_on_shards_and_cannot_go_on_without(shards, tmp_path):
    def trainer(streaming: bool) -> PretrainTrainer:
        about: Any = {"schedule": None, "batch_size": 16, "report_to": [], "use_cpu": True}
        config = PretrainConfig(str(tmp_path / "run"), budget=16 * 4 * 3, **about)
        train, held = load_sources(str(shards / "parquet"), streaming=streaming)
        set_seed(0)
        tiny = {**RECIPE["model_config"], "image_size": 16, "patch_size": 4}
        return PretrainTrainer(
            MoCoForPreTraining(AccelViTConfig(**tiny), **RECIPE["objective_config"]), config, train, held
        )

    first = trainer(streaming=True)
    first.train()
    assert first.plan.num_steps == 3 and first.source.shards and read(tmp_path / "run/results.json")["knn_top1"] > 0
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["streaming"] is True
    with pytest.raises(SettingError, match=r"streaming=False: .* holds a run with streaming=True"):
        trainer(streaming=False).train(resume_from_checkpoint="auto")


def test_a_budget_in_epochs_needs_no_number_of_images(shards, tmp_path):
    train, _ = load_images(load_recipe("recipes/moco.yaml", ["streaming=true", f"data={shards / 'parquet'}"]))
    assert len(train) == 120 and train.shards and train.shards.lengths.tolist() == [10, 10, 5] * 4 + [10, 10]


def test_streaming_is_refused_where_it_has_no_meaning(tmp_path):
    write_shards(tmp_path / "tars")
    tables = tmp_path / "tables"
    tables.mkdir()
    for name in "abc":
        (tables / f"{name}.csv").write_text("a,b\n1,2\n")
    pq.write_table(pa.table({"a": [1]}), tables / "a.parquet")  # `datasets` goes by the majority.
    for words, message in {
        ("data=bundled",): r"streaming=True: it reads Parquet and tar files",
        (f"data={tmp_path / 'tars'}", "data_config=small"): r"^data_config='small': .* has no configurations",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_images(load_recipe("recipes/moco.yaml", ["streaming=true", *words]))
    for data in (tables, tables / "a.csv"):
        with pytest.raises(
            RecipeError, match=r"data='.*': streaming reads Parquet files, or \.tar .*, and there are none"
        ):
            load_images(load_recipe("recipes/moco.yaml", ["streaming=true", f"data={data}"]))


def test_a_recipe_streams_only_if_it_says_so(tmp_path):
    write_shards(tmp_path)
    words = ["validation_split=train[:2]", f"data={tmp_path}"]
    assert load_images(load_recipe("recipes/moco.yaml", ["streaming=true", *words]))[0].shards is not None
    assert load_images(load_recipe("recipes/moco.yaml", words))[0].shards is None
