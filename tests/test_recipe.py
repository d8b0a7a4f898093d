from pathlib import Path

import pytest
import yaml

from hf_accel.compression import Schedule
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import EVALUATION_CONFIGS, Recipe, RecipeError, describe_keys, load_recipe, objective_settings

FOLDER = Path(__file__).parents[1] / "recipes"
SCHEDULES = sorted((FOLDER / "schedules").glob("*.yaml"))
RECIPES = sorted(set(FOLDER.rglob("*.yaml")) - set(SCHEDULES))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_and_comes_back_from_its_resolved_form(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("bacth_size=3", ["bacth_size", "batch_size"]),
        ("batch_size=many", ["batch_size", "many", "int"]),
        ("batch_size=true", ["batch_size", "True"]),
        ("learning_rate=1e-3", ["learning_rate", "1.0e-3"]),
        ("model=vit_tny", ["vit_tny", "vit_tiny"]),
        ("objective=mocko", ["mocko", "moco"]),
        ("patch_size=5", ["patch_size=5", "image_size=28"]),
        ("model_config.hiden_size=3", ["hiden_size", "hidden_size"]),
        ("model_config.patch_size=7", ["patch_size", "key of its own"]),
        ("schedule=[{until: 1.0, patch_size: 5}]", ["patch_size 5", "[4, 7, 14]"]),
        ("schedule=[{until: 0.5}]", ["1.0", "0.5"]),
        ("objective_config.temprature=0.1", ["temprature", "temperature"]),
        ("objective_config.temperature=hot", ["objective_config.temperature", "hot", "float"]),
        ("objective_config.temperature=1e-1", ["objective_config.temperature", "1.0e-3"]),
        ("schedule=[{until: 1.0, local_patch_size: 7}]", ["local crops", "none"]),
        ("schedule=nowhere.yaml", ["nowhere.yaml"]),
        ("budget=-1", ["budget", "negative"]),
        ("budget=0", ["budget", "units"]),
        ("save_total_limit=1", ["save_total_limit", "2"]),
        ("task=pretain", ["pretain", "pretrain"]),
        ("task=evaluate", ["checkpoint"]),
        ("evaluations=[knn, liner]", ["liner", "did you mean 'linear'"]),
        ("evaluations=[]", ["evaluations=[]", "at least one"]),
        ("eval_patch_sizes=[0]", ["eval_patch_sizes=[0]", "from 1"]),
        ("eval_seeds=[a]", ["eval_seeds=['a']", "whole numbers"]),
        ("linear_config.epoch=3", ["linear_config.epoch=3", "did you mean 'epochs'"]),
        ("linear_config.learning_rates=[0.1, 1e-2]", ["linear_config.learning_rates", "1e-2", "float"]),
        ("linear_config.learning_rates=[0.1, -1.0]", ["linear_config", "[0.1, -1.0]", "above 0"]),
        ("finetune_config.layer_decy=0.5", ["finetune_config.layer_decy", "did you mean 'layer_decay'"]),
        ("finetune_config.epochs=ten", ["finetune_config.epochs", "ten", "int"]),
        ("finetune_config.layer_decay=2", ["finetune_config", "layer_decay=2.0", "at most 1"]),
        ("seed", ["key=value"]),
        ("seed=[1", ["seed=[1", "not valid YAML", "quotes"]),
        ("seed=-1", ["seed=-1", "from 0"]),
        ("eval_seeds=[4294967296]", ["eval_seeds=[4294967296]", "whole numbers"]),
        ("budget=.inf", ["budget=inf", "finite"]),
        ("learning_rate=.nan", ["learning_rate=nan", "finite"]),
        ("objective.temperature=3", ["objective.temperature=3", "'moco'", "no mapping"]),
        ("batch_size=1", ["batch_size=1", "moco", "at least 2"]),
        ("model_config.num_hidden_layers=0", ["num_hidden_layers", "at least 1"]),
        ("schedule=recipes/simclr.yaml", ["schedule='recipes/simclr.yaml'", "stages=None"]),
        ("eval_points=[2]", ["eval_points"]),
    ],
)
def test_a_bad_value_is_an_error_that_names_it_and_the_fix(override, words):
    with pytest.raises(RecipeError) as error:
        load_recipe("recipes/moco.yaml", [override])
    assert all(word in str(error.value) for word in words), error.value


ABOVE_0 = (
    "image_size patch_size batch_size gradient_accumulation_steps learning_rate knn_k search_horizon search_memory"
)
ABOVE_0 += " knn_temperature logging_steps save_steps"


@pytest.mark.parametrize(
    ("keys", "last", "beyond"),
    [
        (ABOVE_0, None, ["0", "-1"]),
        ("weight_decay max_grad_norm num_workers", "0", ["-1"]),
        ("seed", "0", ["-1"]),
        ("seed", "4294967295", ["4294967296"]),
        ("warmup", "0", ["-0.01"]),
        ("warmup", "1", ["1.01"]),
        ("search_draws auto_draws", "3", ["2"]),
        ("auto_share", "0.999", ["1"]),
        ("auto_share", "0.001", ["0"]),
        ("save_total_limit", "2", ["1"]),
        ("eval_points keep_points", "[0, 1]", ["[-0.01]", "[1.01]", "[a]"]),
        ("eval_seeds", "[0, 4294967295]", ["[-1]", "[4294967296]", "[1.5]"]),
        ("eval_patch_sizes", "[1]", ["[0]"]),
    ],
)
def test_the_last_good_value_and_the_first_bad_one(keys, last, beyond):
    for key in keys.split():
        if last is not None:
            load_recipe("recipes/moco.yaml", [f"{key}={last}"])
        for value in beyond:
            with pytest.raises(RecipeError, match=rf"^{key}="):
                load_recipe("recipes/moco.yaml", [f"{key}={value}"])


def test_what_auto_cannot_do_is_refused_where_it_is_followed():
    auto = ["schedule=auto", "auto_share=0.5"]
    with pytest.raises(RecipeError, match=r"search_metric='adam'.* compares plain gradients"):
        load_recipe("recipes/moco.yaml", [*auto, "search_metric=adam"])
    load_recipe("recipes/moco.yaml", [*auto, "search_metric=adam", "task=search", "pilot=runs/moco"])
    with pytest.raises(RecipeError, match=r"view_resolution='matched'.* known beforehand"):
        load_recipe("recipes/moco.yaml", [*auto, "view_resolution=matched"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_overrides_win_and_whole_numbers_become_floats():
    recipe = load_recipe("recipes/moco.yaml", ["budget=7", "model_config.hidden_size=64", "mixed_precision=no"])
    assert recipe.budget == 7.0 and isinstance(recipe.budget, float)
    assert recipe.encoder_config().hidden_size == 64
    written = yaml.safe_load(Path("recipes/moco.yaml").read_text())["model_config"]
    assert recipe.encoder_config().num_hidden_layers == written["num_hidden_layers"]
    assert recipe.mixed_precision == "no"


def test_the_home_folder_in_a_file_is_meant():
    recipe = Recipe(budget=1.0, output_dir="~/runs/a", checkpoint="~/b")
    assert recipe.output_dir == str(Path.home() / "runs/a") and recipe.checkpoint == str(Path.home() / "b")


def test_help_lists_every_key():
    text = describe_keys()
    assert all(f"  {key} (" in text for key in Recipe.__dataclass_fields__)
    for name in OBJECTIVES:
        settings = text.split(f"objective_config of {name}:")[1]
        assert all(f"  {key} (" in settings for key in objective_settings(name)), name
    for name, kind in EVALUATION_CONFIGS.items():
        settings = text.split(f"\n{name}:")[1]
        assert all(f"  {key} (" in settings and f"  {key}: " in settings for key in kind.__dataclass_fields__), name


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_every_schedule_says_where_it_comes_from_and_fits_there(path):
    origin = yaml.safe_load(path.read_text())
    assert {"data", "model", "objective", "image_size", "command", "date"} <= origin.keys()
    Schedule.parse(str(path), origin["patch_size"]).validate(origin["image_size"], origin["patch_size"])
