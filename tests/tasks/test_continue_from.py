"""`continue_from` in recipes: what the earlier run settles, and whole tasks."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import hf_accel.run as entry
from hf_accel import PretrainTrainer
from hf_accel.recipe import RecipeError, load_recipe
from tests.tiny_runs import RECIPE, STEPS, image_folder, launch, read
from tests.training.test_front_door import Tensors, config, moco

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

SETTINGS = (
    "learning_rate=0.003",
    "schedule=[{until: 1.0, patch_size: 8}]",
    "seed=5",
    "push_to_hub=false",
    "license=mit",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def earlier(images, tmp_path_factory, own_cache_and_threads, blank_figures) -> Path:
    return launch(images, tmp_path_factory.mktemp("earlier") / "run", *SETTINGS, "eval_points=[]", "save_steps=100")


def words(earlier: Path, output: Path, *overrides: str) -> list[str]:
    return [f"continue_from={earlier}", f"output_dir={output}", f"budget={RECIPE['budget']}", *overrides]


def test_the_earlier_run_settles_what_a_recipe_leaves_open(earlier, images, tmp_path):
    recipe: Any = load_recipe(None, words(earlier, tmp_path, "batch_size=8", "objective_config.temperature=0.3"))
    assert (recipe.model, recipe.image_size, recipe.patch_size) == (RECIPE["model"], 16, 4)
    assert recipe.model_config == RECIPE["model_config"] and recipe.data == str(images)
    assert recipe.objective_config == {**RECIPE["objective_config"], "temperature": 0.3}
    assert (recipe.learning_rate, recipe.seed, recipe.license, recipe.batch_size) == (0.003, 5, "mit", 8)
    own = (recipe.schedule, recipe.init_from, recipe.save_steps, recipe.logging_steps, recipe.report_to)
    assert own == ("standard", None, 0.1, 50, ["tensorboard"])
    cheaper: Any = load_recipe(None, [f"continue_from={earlier}", f"output_dir={tmp_path}", "budget=2 minutes"])
    assert cheaper.cost == "measured"


@pytest.mark.parametrize("frozen", [True, False])
def test_sizes_in_place_of_a_preset_are_continued_with(images, tmp_path, frozen):
    of_run = ("model=null", "eval_points=[]", "budget=64") + (
        () if frozen else ("model_config.freeze_patch_projection=false",)
    )
    begun = launch(images, tmp_path / "begun", *of_run)
    recipe: Any = load_recipe(None, words(begun, tmp_path / "new"))
    assert recipe.encoder_config().freeze_patch_projection is frozen
    assert recipe.model is None and recipe.encoder_config().hidden_size == RECIPE["model_config"]["hidden_size"]


def test_released_weights_beside_a_run_are_refused(earlier, tmp_path):
    with pytest.raises(
        RecipeError, match=r"init_from='encoder': continue_from=.* leave init_from out, or say init_from=n"
    ):
        load_recipe(None, words(earlier, tmp_path, "init_from=encoder"))
    recipe: Any = load_recipe(None, words(earlier, tmp_path, "init_from=null"))
    assert recipe.init_from is None


def test_a_run_that_is_not_there_or_not_finished_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"continue_from=.*neither the output_dir of a finished run"):
        load_recipe(None, words(tmp_path / "nowhere", tmp_path))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/recipe.yaml").write_text("task: pretrain\n")
    with pytest.raises(RecipeError, match="not finished: resume it with the same command"):
        load_recipe(None, words(tmp_path / "begun", tmp_path))


def test_another_model_is_refused_before_training(earlier, tmp_path):
    with pytest.raises(SystemExit, match=r"num_hidden_layers=1: .* was trained with 2"):
        entry.main(words(earlier, tmp_path / "new", "model_config.num_hidden_layers=1"))
    with pytest.raises(SystemExit, match="objective='simclr'"):
        entry.main(words(earlier, tmp_path / "new", "objective=simclr"))


@pytest.mark.slow
def test_the_command_continues_and_then_needs_no_earlier_run(earlier, images, tmp_path, capsys):
    copy = shutil.copytree(earlier, tmp_path / "run")
    command = words(copy, tmp_path / "new", "save_steps=100", "report_to=[]")
    entry.main(command)
    results, before = read(tmp_path / "new/results.json"), read(earlier / "results.json")
    assert results["steps"] > STEPS and results["continued_from"]["units"] == before["units"]
    assert [stage["patch_size"] for stage in results["schedule"]] == [8] and results["seed"] == 5
    assert f"Continuing from {tmp_path.name}/run at step {before['steps']}" in capsys.readouterr().out
    shutil.rmtree(copy)
    entry.main(command)
    assert "This run is complete" in capsys.readouterr().out
    (tmp_path / "new/results.json").unlink()  # as after an interruption at the last checkpoint
    entry.main(command)
    assert read(tmp_path / "new/results.json")["continued_from"] == results["continued_from"]
    with pytest.raises(SystemExit, match="continue_from"):
        entry.main(words(tmp_path / "new", tmp_path / "new"))


@pytest.mark.slow
def test_a_run_in_python_is_continued_by_a_recipe(images, tmp_path):
    args = config(tmp_path / "python", eval_points=[], warmup=0.3, save_total_limit=None)
    PretrainTrainer(moco(), args, Tensors()).train()
    recipe: Any = load_recipe(None, words(tmp_path / "python", tmp_path / "new", f"data={images}"))
    assert recipe.warmup == 0.3
    entry.main(words(tmp_path / "python", tmp_path / "new", f"data={images}", "report_to=[]"))
    assert read(tmp_path / "new/results.json")["continued_from"]["step"] == 6
