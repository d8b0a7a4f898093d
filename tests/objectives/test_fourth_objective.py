"""A fourth objective takes a class and its registration, and what the package knows of objectives holds for it."""

import logging
from pathlib import Path

import pytest
from transformers import AutoModel, ViTModel
from transformers.utils import logging as library_logging

import hf_accel.run as entry
from hf_accel.cli import main
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import RecipeError, describe_keys, load_recipe
from tests.objectives.fourth_objective import SimSiamForPreTraining
from tests.tiny_runs import assert_same_weights, image_folder, launch, losses, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

CHOSEN = (
    "objective=simsiam",
    "objective_config={projector_hidden_size: 32, projection_size: 16, predictor_hidden_size: 8}",
    "schedule=[{until: 0.5, patch_size: 8}, {until: 1.0, patch_size: 4}]",
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    OBJECTIVES["simsiam"] = SimSiamForPreTraining
    yield
    del OBJECTIVES["simsiam"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, registered, own_cache_and_threads, blank_figures) -> Path:
    return launch(folder, tmp_path_factory.mktemp("fourth") / "run", *CHOSEN)


@pytest.mark.slow
def test_it_trains_and_resumes_exactly(whole, folder, tmp_path, monkeypatch):
    seen = losses(whole)
    assert len(seen) > 6 and seen[-1] < seen[0] and read(whole / "results.json")["objective"] == "simsiam"
    steps = []

    def interrupt(self, progress):
        steps.append(progress)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="Interrupted"):
        patch.setattr(SimSiamForPreTraining, "update_target", interrupt)
        launch(folder, tmp_path / "run", *CHOSEN)
    assert (tmp_path / "run" / "checkpoint-4").exists() and not (tmp_path / "run" / "results.json").exists()
    launch(folder, tmp_path / "run", *CHOSEN)
    assert losses(tmp_path / "run") == seen
    assert_same_weights(tmp_path / "run", whole)


def test_its_card_says_what_it_says_of_itself(whole):
    text = (whole / "final" / "README.md").read_text()
    assert "SimSiam" in text and SimSiamForPreTraining.citation in text
    assert "target" not in text.partition("```")[0].lower() and "momentum" not in text.lower()


def test_its_checkpoints_open_and_export(whole, tmp_path, caplog):
    library_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        (checkpoint, *_) = whole.glob("checkpoint-*")
        opened = AutoModel.from_pretrained(checkpoint)
    library_logging.disable_propagation()
    assert not caplog.records and type(opened).__name__ == "AccelViTModel"
    entry.main(["task=export", f"checkpoint={whole / 'final'}", "export_format=vit", f"output_dir={tmp_path}"])
    exported = next(path.parent for path in tmp_path.rglob("config.json"))
    assert ViTModel.from_pretrained(exported).config.hidden_size == 32


def test_its_settings_are_checked_and_listed(capsys):
    with pytest.raises(
        RecipeError, match=r"projection_siz=3: simsiam has no such setting; did you mean 'projection_size'"
    ):
        load_recipe("recipes/moco.yaml", [CHOSEN[0], "objective_config={projection_siz: 3}"])
    with pytest.raises(RecipeError, match=r"objective_config\.projection_size='wide': expected int"):
        load_recipe("recipes/moco.yaml", [CHOSEN[0], "objective_config={projection_size: wide}"])
    with pytest.raises(RecipeError, match="simsiam needs at least 2 images"):
        load_recipe("recipes/moco.yaml", [*CHOSEN[:2], "batch_size=1"])
    text = describe_keys().partition("objective_config of simsiam:")[2]
    assert "predictor_hidden_size (int; default 512)" in text and "width of the predictor" in text
    main(["list"])
    assert "moco, simclr, dino, simsiam" in capsys.readouterr().out
