"""`init_from`: runs that continue from released weights, as whole tasks."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoImageProcessor, ViTConfig, ViTModel

import hf_accel.run as entry
from hf_accel import AccelViTModel
from hf_accel.data import image_source, load_sources
from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.tasks.setup import build_objective
from hf_accel.training.accuracy import measure_knn
from hf_accel.training.callbacks import ProgressCallback
from tests.checkpoints.test_starting import saved
from tests.tiny_runs import RECIPE, STEPS, assert_same_weights, image_folder, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
SIZES |= {"image_size": 16, "patch_size": 4}
OWN = {key: value for key, value in RECIPE.items() if key not in ("model", "model_config", "image_size", "patch_size")}


FROZEN = {"freeze_encoder": 0.7}
"""Beyond the step at which a test interrupts the run."""


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "released"
    saved(ViTModel(ViTConfig(**SIZES)), folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


def write_recipe(output: Path, released: Path, images: Path, **keys: Any) -> str:
    recipe = output.with_name(output.name + ".yaml")
    values = {**OWN, "init_from": str(released), "data": str(images), "output_dir": str(output), **keys}
    recipe.write_text(yaml.safe_dump(values))
    return str(recipe)


@pytest.mark.parametrize(("stated", "expected"), [("", "unknown"), ("license: [mit, 0bsd]", "other")])
def test_a_licence_that_is_not_one_word_never_becomes_the_default(released, images, tmp_path, stated, expected):
    shutil.copytree(released, tmp_path / "released")
    (tmp_path / "released" / "README.md").write_text(f"---\n{stated}\n---\n")
    recipe: Any = load_recipe(write_recipe(tmp_path / "run", tmp_path / "released", images))
    assert recipe.license == expected


def test_the_encoder_settles_what_a_recipe_leaves_open(released, images, tmp_path):
    recipe: Any = load_recipe(write_recipe(tmp_path / "run", released, images))
    assert (recipe.model, recipe.image_size, recipe.patch_size, recipe.license) == (None, 16, 4, "mit")
    config = build_objective(recipe).config
    assert config.to_dict() == recipe.encoder_config().to_dict() and config.hidden_size == 24
    assert not config.freeze_patch_projection and config.image_std == pytest.approx([0.4, 0.5, 0.6], abs=1e-6)
    settings = {"model_config": {"pooling": "mean", "freeze_patch_projection": True}, "attn_implementation": "eager"}
    other: Any = load_recipe(write_recipe(tmp_path / "run", released, images, **settings, image_size=24, license="bsd"))
    config: Any = build_objective(other).config
    assert (config.image_size, config.pooling, config.freeze_patch_projection) == (24, "mean", True)
    assert config._attn_implementation == "eager" and other.license == "bsd"
    again: Any = load_recipe(None, [f"{key}={value}" for key, value in {"init_from": released, "budget": 64}.items()])
    assert again.model_config == recipe.model_config


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "model": (
        {"model": "vit_small"},
        "model='vit_small': its hidden_size is 384, and that of init_from=.* is 24; leave",
    ),
    "field": ({"model_config": {"hidden_size": 48}}, "init_from=.*hidden_size=48: the checkpoint's weights"),
    "image size": ({"image_size": 18}, "init_from=.*patches of 4 pixels do not divide image_size=18"),
    "no encoder": ({"init_from": "nowhere/at/all"}, "init_from='nowhere/at/all': .*there is no such"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_recipe_that_contradicts_its_encoder_is_refused(released, images, tmp_path, case):
    keys, message = CONTRADICTIONS[case]
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path / "run", released, images, **keys))


@pytest.fixture(scope="module")
def whole(released, images, tmp_path_factory, own_cache_and_threads, blank_figures) -> Path:
    """A run that is left alone."""
    output = tmp_path_factory.mktemp("whole") / "run"
    entry.main([write_recipe(output, released, images, eval_points=[1.0], **FROZEN)])
    return output


def test_a_run_starts_at_the_encoder_and_its_normalisation(whole, released, images):
    processor: Any = AutoImageProcessor.from_pretrained(whole / "final", backend="pil")
    assert processor.image_mean == pytest.approx([0.1, 0.2, 0.3], abs=1e-6)
    recipe: Any = load_recipe(write_recipe(whole.with_name("other"), released, images))
    torch.manual_seed(0)
    encoder = build_objective(recipe).encoder
    parts: Any = [part and part.renormalised([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]) for part in load_sources(str(images))]
    log = read(whole / "log_history.json")["log_history"]
    start = next(entry["eval_knn_top1"] for entry in log if "eval_knn_top1" in entry)
    args: Any = type("Args", (), {"dataloader_num_workers": 0, "device": torch.device("cpu")})
    args.knn_k, args.knn_temperature = recipe.knn_k, recipe.knn_temperature
    assert start == measure_knn(encoder, parts[0], parts[1], args)["top1"]
    config: Any = AccelViTModel.from_pretrained(whole / "final").config
    assert config.init_from["kind"] == "vit" and config.image_mean == pytest.approx([0.1, 0.2, 0.3], abs=1e-6)


def test_views_are_normalised_as_the_encoder_was(released, images, monkeypatch, tmp_path):
    seen: list[Any] = []
    from hf_accel.training import trainer

    true = trainer.make_views
    monkeypatch.setattr(trainer, "make_views", lambda *args: (seen.append(args[-3:-1]), true(*args))[1])
    entry.main([write_recipe(tmp_path / "run", released, images, eval_points=[], budget=64.0)])
    assert seen and all(mean == pytest.approx((0.1, 0.2, 0.3), abs=1e-6) for mean, _ in seen)
    assert all(std == pytest.approx((0.4, 0.5, 0.6), abs=1e-6) for _, std in seen)
    source = image_source(load_sources(str(images))[0], "images")
    assert source.mean != seen[0][0]  # of the data alone


@pytest.mark.slow
def test_a_resume_is_exact_and_does_not_read_the_encoder_again(released, images, whole, tmp_path, monkeypatch):
    copy = shutil.copytree(released, tmp_path / "released")
    output, true_begin = tmp_path / "run", ProgressCallback.on_step_begin

    def begin(self, args, state, control, **kwargs):
        if state.global_step == STEPS // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_begin(self, args, state, control, **kwargs)

    recipe = write_recipe(output, copy, images, eval_points=[1.0], **FROZEN)
    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_begin", begin)
        with pytest.raises(SystemExit):
            entry.main([recipe])
    assert not (output / "results.json").exists()
    shutil.rmtree(copy)
    entry.main([recipe])
    assert_same_weights(whole, output)
    results = read(output / "results.json")
    assert results["knn_top1"] == read(whole / "results.json")["knn_top1"]
    with pytest.raises(SystemExit, match="model_config"):
        entry.main([recipe, "model_config.pooling=mean"])
