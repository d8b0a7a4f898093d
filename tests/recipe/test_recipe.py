import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hf_accel.compression import Schedule
from hf_accel.evaluation import FineTuneConfig, LinearConfig
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import (
    RECIPES,
    EvaluateRecipe,
    PretrainRecipe,
    Recipe,
    RecipeError,
    describe_keys,
    load_recipe,
    tasks_that_read,
)
from hf_accel.recipe.checks import objective_settings
from hf_accel.recipe.keys import default_of
from hf_accel.recipe.loading import REMOVED_KEYS
from hf_accel.tasks.setup import continue_recipe
from hf_accel.utils.strict_yaml import load_yaml

FOLDER = Path(__file__).parents[2] / "recipes"
SCHEDULES = sorted((FOLDER / "schedules").glob("*.yaml"))
SHIPPED = sorted(set(FOLDER.rglob("*.yaml")) - set(SCHEDULES))


NEEDED = {task: [f"task={task}", "checkpoint=folder"] for task in ("evaluate", "embed", "explore", "export", "card")}
NEEDED |= {"pretrain": [], "search": ["task=search", "pilot=folder"], "cost": ["task=cost"], "pack": ["task=pack"]}
NEEDED |= {"views": ["task=views"]}
"""For each task, what must be said beside a recipe of pretraining."""


def load(*overrides: str) -> Recipe:
    """The quickstart's recipe with these keys, under the first task that reads the first of them."""
    key = overrides[0].partition("=")[0].partition(".")[0]
    task = next(iter(tasks_that_read(key)), "pretrain")
    return load_recipe("recipes/moco.yaml", [*NEEDED[task], *overrides])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_reads_and_comes_back_from_its_resolved_form(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=true", ["batch_size", "True"]),
        ("learning_rate=fast", ["learning_rate", "fast", "float"]),
        ("learning_rate=1e", ["learning_rate", "1e", "float"]),
        ("batch_size=1e3", ["batch_size", "1e3", "int"]),
        ("model=vit_tny", ["vit_tny", "vit_tiny"]),
        ("patch_size=5", ["patch_size=5", "image_size=28"]),
        ("model_config.patch_size=7", ["patch_size", "key of its own"]),
        ("schedule=[{until: 1.0, patch_size: 5}]", ["patch_size 5", "[4, 7, 14]"]),
        ("schedule=[{until: 0.5}]", ["1.0", "0.5"]),
        ("objective_config.temperature=hot", ["objective_config.temperature", "hot", "float"]),
        ("model_config.num_hidden_layers=two", ["model_config.num_hidden_layers", "two", "int"]),
        ("model_config.pooling=max", ["model_config.pooling", "max", "cls, mean"]),
        ("schedule=[{until: 1.0, local_patch_size: 7}]", ["local crops", "none"]),
        ("schedule=nowhere.yaml", ["nowhere.yaml"]),
        ("budget=-1", ["budget=-1:", "needs a budget"]),
        ("budget=0", ["budget=0:", "units"]),
        ("budget=much", ["budget='much'", "100 epochs"]),
        ("budget=100 apochs", ["budget='100 apochs'", "number of epochs"]),
        ("budget=5 parsecs", ["budget='5 parsecs'", "minutes or hours"]),
        ("budget=0 minutes", ["budget='0 minutes'", "above 0"]),
        ("budget=0.0 epochs", ["budget='0.0 epochs'", "above 0"]),
        ("task=pretain", ["pretain", "pretrain"]),
        ("task=evaluate", ["checkpoint"]),
        ("evaluations=[knn, liner]", ["liner", "did you mean 'linear'"]),
        ("evaluations=[]", ["evaluations=[]", "at least one"]),
        ("eval_seeds=[]", ["eval_seeds=[]", "at least one"]),
        ("search_token_dropout=[]", ["search_token_dropout=[]", "at least one"]),
        ("search_patch_size=[]", ["search_patch_size=[]", "at least one"]),
        ("search_symmetry=[]", ["search_symmetry=[]", "at least one"]),
        ('output_dir=""', ["output_dir=''", "leave it out"]),
        ('data=" "', ["data=' '", "leave it out"]),
        ('train_split=""', ["train_split=''", "leave it out"]),
        ('checkpoint=""', ["checkpoint=''"]),
        ("eval_seeds=[a]", ["eval_seeds='a'", "int"]),
        ("report_to=5", ["report_to=5", "str"]),
        ("linear_config.epoch=3", ["linear_config.epoch=3", "did you mean 'epochs'"]),
        ("linear_config.learning_rates=[0.1, low]", ["linear_config.learning_rates", "low", "float"]),
        ("linear_config.learning_rates=[0.1, -1.0]", ["linear_config", "[0.1, -1.0]", "above 0"]),
        ("finetune_config.layer_decy=0.5", ["finetune_config.layer_decy", "did you mean 'layer_decay'"]),
        ("finetune_config.epochs=ten", ["finetune_config.epochs", "ten", "int"]),
        ("finetune_config.layer_decay=2", ["finetune_config", "layer_decay=2.0", "at most 1"]),
        ("seed", ["key=value"]),
        ("seed=[1", ["seed=[1", "not valid YAML", "quotes"]),
        ("budget=.inf", ["budget=inf", "finite"]),
        ("learning_rate=.nan", ["learning_rate=nan", "finite"]),
        ("objective.temperature=3", ["objective.temperature=3", "'moco'", "no mapping"]),
        ("batch_size=1", ["batch_size=1", "moco", "at least 2"]),
        ("model_config.num_hidden_layers=0", ["num_hidden_layers", "at least 1"]),
        ("schedule=[{until: .nan}, {until: 1.0}]", ["must increase from above 0", "nan"]),
        ("schedule=recipes/simclr.yaml", ["schedule='recipes/simclr.yaml'", "'output_dir' is no key", "leave it out"]),
    ],
)
def test_a_bad_value_is_an_error_that_names_it_and_the_fix(override, words):
    with pytest.raises(RecipeError) as error:
        load(*override.split(" ") if "schedule=auto" in override else [override])
    assert all(word in str(error.value) for word in words), error.value


ABOVE_0 = "image_size patch_size batch_size gradient_accumulation_steps learning_rate knn_k search_memory"
ABOVE_0 += " knn_temperature logging_steps save_steps"


@pytest.mark.parametrize(
    ("keys", "last", "beyond"),
    [
        (ABOVE_0, None, ["0", "-1"]),
        ("weight_decay max_grad_norm", "0", ["-1"]),
        ("num_workers", "0", ["-1", "all"]),
        ("num_workers", "auto", ["1.5"]),
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
            load(f"{key}={last}")
        for value in beyond:
            with pytest.raises(RecipeError, match=rf"^{key}="):
                load(f"{key}={value}")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"binary\.yaml cannot be read: .*UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b: {c: 1, c: 2}", "b: [{c: 1}, {c: 1, d: 2, c: 3}]", '"a": 1\na: 2'])
def test_a_key_given_twice_is_refused_at_any_depth(text):
    with pytest.raises(yaml.YAMLError, match=r"the key '[ac]' is given twice"):
        load_yaml(text)
    assert load_yaml("a: &x {c: 1}\nb: {<<: *x, c: 2}") == {"a": {"c": 1}, "b": {"c": 2}}  # a merge is no second key


def test_a_key_given_twice_is_refused_wherever_yaml_is_read(tmp_path):
    recipe, schedule = tmp_path / "recipe.yaml", tmp_path / "schedule.yaml"
    recipe.write_text("budget: 1000\nseed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml.*'seed' is given twice"):
        load_recipe(recipe)
    schedule.write_text("[{until: 1.0, token_dropout: 0.5, token_dropout: 0.9}]")
    with pytest.raises(RecipeError, match=r"schedule=.*'token_dropout' is given twice"):
        load(f"schedule={schedule}")
    with pytest.raises(RecipeError, match=r"'num_hidden_layers' is given twice"):
        load("model_config={num_hidden_layers: 3, num_hidden_layers: 4}")


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "1.e-3", ".1e-2", "+1e-03"])
def test_numbers_in_exponent_form_are_numbers(number):
    assert load(f"learning_rate={number}").learning_rate == 1e-3
    assert load(f"objective_config.temperature={number}").objective_config == {
        **load("seed=0").objective_config,
        "temperature": 1e-3,
    }
    assert load(f"linear_config.learning_rates=[0.1, {number}]").linear_config == {"learning_rates": [0.1, 1e-3]}
    assert load(f"eval_points=[{number}, 1]").eval_points == [1e-3, 1.0]
    assert load(f"model_config.drop_path_rate={number}").encoder_config().drop_path_rate == 1e-3
    schedule = f"schedule=[{{until: {number}, token_dropout: {number}}}, {{until: 1.0}}]"
    first = load(schedule).compression_schedule().stages[0]
    assert (first.until, first.strategy.online.token_dropout) == (1e-3, 1e-3)


def test_budgets_in_exponent_form_and_names_that_look_like_it():
    assert [load(f"budget={text}").budget for text in ("1e5", "1.0e15", "1.0e+5")] == [1e5, 1e15, 1e5]
    assert load("output_dir=1e5").output_dir == "1e5"


def test_a_single_value_may_stand_where_a_list_belongs():
    assert load("report_to=wandb").report_to == ["wandb"] and load("report_to=none").report_to == ["none"]
    assert load("evaluations=linear").evaluations == ["linear"] and load("eval_seeds=3").eval_seeds == [3]


# Keys and tasks


def test_a_key_that_the_task_does_not_read_is_refused():
    with pytest.raises(RecipeError, match=r"^checkpoint='x': task=pretrain does not read .*evaluate, export, card"):
        load_recipe("recipes/moco.yaml", ["checkpoint=x"])
    with pytest.raises(RecipeError, match=r"^linear_config=\{'epochs': 3\}: task=pretrain does not read"):
        load_recipe("recipes/moco.yaml", ["linear_config.epochs=3"])
    defaults = {key: default_of(kind, key) for kind in RECIPES.values() for key in kind.types()}
    assert RECIPES.keys() == NEEDED.keys()
    for task, needed in NEEDED.items():
        for key, value in defaults.items():
            value = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n")
            if not RECIPES[task].reads(key):
                with pytest.raises(RecipeError, match=rf"^{key}=.*task={task} does not read"):
                    load_recipe("recipes/moco.yaml", [*needed, f"{key}={value}"])


def test_in_a_file_such_a_key_has_no_effect_and_is_not_recorded(tmp_path):
    text = Path("recipes/moco.yaml").read_text() + "\ncheckpoint: runs/other/final\nlinear_config: {epochs: 0}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    written = yaml.safe_load(recipe.to_yaml())
    assert "checkpoint" not in written and "linear_config" not in written
    assert written.keys() == {"task", *PretrainRecipe.types()}
    (tmp_path / "written.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "written.yaml").to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("task", ["evaluate", "cost"])
def test_what_a_task_does_not_read_cannot_stop_it(task, tmp_path):
    text = Path("recipes/moco.yaml").read_text().replace("batch_size: 256", "batch_size: 10")
    (tmp_path / "recipe.yaml").write_text(text + "\ngradient_accumulation_steps: 3\n")
    overrides = [*NEEDED[task], "image_size=30", "patch_size=5"]  # at which the schedule's patch 7 is none
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
    assert (recipe.image_size, recipe.patch_size) == (30, 5)
    assert not {"schedule", "batch_size", "gradient_accumulation_steps"} & recipe.used().keys()
    with pytest.raises(RecipeError, match=r"^(schedule|batch_size)="):
        load_recipe(tmp_path / "recipe.yaml", overrides[len(NEEDED[task]) :])


def test_overrides_win_and_whole_numbers_become_floats():
    recipe = load_recipe("recipes/moco.yaml", ["budget=7", "model_config.hidden_size=64", "mixed_precision=no"])
    assert recipe.budget == 7.0 and isinstance(recipe.budget, float)
    assert recipe.encoder_config().hidden_size == 64
    written = yaml.safe_load(Path("recipes/moco.yaml").read_text())["model_config"]
    assert recipe.encoder_config().num_hidden_layers == written["num_hidden_layers"]
    assert recipe.mixed_precision == "no"


def test_the_home_folder_in_a_file_is_meant():
    recipe = EvaluateRecipe(output_dir="~/runs/a", checkpoint="~/b")
    assert recipe.output_dir == str(Path.home() / "runs/a") and recipe.checkpoint == str(Path.home() / "b")


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_removed_key_is_refused_with_the_changelogs_line(key, tmp_path):
    line = f"`{key}` is gone. {REMOVED_KEYS[key]}"
    assert f"\n- {line}\n" in (FOLDER.parent / "CHANGELOG.md").read_text()
    (tmp_path / "recipe.yaml").write_text(f"budget: 100\n{key}: 1\n")
    for needed in NEEDED.values():  # in a file, too, whatever the task
        with pytest.raises(RecipeError, match=rf"^{key}=1: {re.escape(line)}$"):
            load_recipe(tmp_path / "recipe.yaml", needed)
    assert not tasks_that_read(key)


# What a resumed run may do with each key

RULES = {
    "fixed": """
        seed data data_config train_split validation_split image_column label_column model model_config image_size
        patch_size attn_implementation torch_compile objective objective_config budget schedule cost auto_share
        auto_draws search_criterion batch_size lr_schedule weight_decay weight_decay_end augmentation normalisation
        view_resolution
        gradient_accumulation_steps gradient_checkpointing pilot search_draws search_token_dropout search_patch_size
        search_symmetry streaming embedding_dtype init_from freeze_encoder
        continue_from
        layer_decay num_channels
    """,
    "correction": "learning_rate warmup max_grad_norm mixed_precision view_backend cache",
    "free": """
        task output_dir num_workers eval_points keep_points knn_k knn_temperature logging_steps report_to save_steps
        save_total_limit push_to_hub hub_model_id hub_private hub_optimizer license checkpoint evaluations
        eval_patch_sizes eval_seeds linear_config finetune_config export_format baseline search_memory
    """,
}
"""The whole partition. A new key needs a decision: does the result of a run depend on it?"""


def test_every_key_has_its_rule_for_a_resumed_run():
    rules = {key: rule for rule, keys in RULES.items() for key in keys.split()}
    for task, kind in RECIPES.items():
        own = {"search_criterion": "free"} if task == "search" else {}  # it chooses from the table that it has
        expected = {key: {**rules, **own}.get(key) for key in ("task", *kind.types())}
        assert {key: kind.resume_rule(key) for key in expected} == expected
    assert rules.keys() == {"task"} | {key for kind in RECIPES.values() for key in kind.types()}


def test_keys_of_other_tasks_and_free_keys_never_stop_a_resume(tmp_path):
    text = Path("recipes/moco.yaml").read_text() + f"\noutput_dir: {tmp_path}\n"
    text = text.replace("output_dir: runs/moco\n", "")
    (file := tmp_path / "file.yaml").write_text(text)
    (tmp_path / "recipe.yaml").write_text(load_recipe(file, ["mixed_precision=no"]).to_yaml())
    others = [kind for task, kind in RECIPES.items() if task != "pretrain"]
    gained = {key: default_of(kind, key) for kind in others for key in kind.types() if not PretrainRecipe.reads(key)}
    gained |= {"knn_k": 7, "eval_points": [1.0], "num_workers": 3}
    file.write_text(text + yaml.safe_dump(gained))
    assert len(gained) > 12 and continue_recipe(load_recipe(file)) == []
    with pytest.raises(RecipeError, match=r"^seed=7: .* holds a run with seed=0"):
        continue_recipe(load_recipe(file, ["seed=7"]))


@pytest.mark.parametrize("task", RECIPES)
def test_help_lists_the_keys_of_its_task_and_no_others(task):
    text = describe_keys(task)
    keys = text.partition("\nobjective_config of")[0].partition("\nlinear_config:")[0]
    assert set(re.findall(r"^  (\w+) \(.*\)$", keys, re.MULTILINE)) == RECIPES[task].types().keys()
    mappings = {f"objective_config of {name}": objective_settings(name) for name in OBJECTIVES}
    mappings |= {
        "linear_config": LinearConfig.__dataclass_fields__,
        "finetune_config": FineTuneConfig.__dataclass_fields__,
    }
    for name, settings in mappings.items():
        assert (f"\n{name}:" in text) == RECIPES[task].reads(name.partition(" ")[0]), name
        listed = text.partition(f"\n{name}:")[2]
        assert not listed or all(f"  {key} (" in listed for key in settings), name


def test_every_help_text_stands_alone():
    for kind in RECIPES.values():
        for key in fields(kind):
            assert len(key.metadata["help"].split()) >= 4, key.name
            assert "task=" not in key.metadata["help"], key.name


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_every_schedule_says_where_it_comes_from_and_fits_there(path):
    origin = yaml.safe_load(path.read_text())
    assert {"data", "model", "objective", "image_size", "command", "date"} <= origin.keys()
    Schedule.parse(str(path), origin["patch_size"]).validate(origin["image_size"], origin["patch_size"])
