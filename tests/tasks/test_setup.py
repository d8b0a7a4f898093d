from dataclasses import asdict

import pytest
import yaml

from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.run_folder import RunFolder
from hf_accel.tasks.embed import embed
from hf_accel.tasks.evaluate import evaluate
from hf_accel.tasks.pretrain import pretrain
from hf_accel.tasks.search import search
from hf_accel.tasks.setup import (
    EARLIER_DEFAULTS,
    build_objective,
    continue_recipe,
    images_of,
    output_of,
    pretrain_config,
)
from hf_accel.utils.errors import SettingError


def test_a_batch_that_does_not_divide_is_named(monkeypatch):
    recipe = load_recipe("recipes/moco.yaml", ["batch_size=36", "gradient_accumulation_steps=4", "mixed_precision=no"])
    assert pretrain_config(recipe).per_device_train_batch_size == 9
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(RecipeError, match=r"batch_size=36.*multiple.* = 8"):
        pretrain_config(recipe)


@pytest.mark.parametrize(
    ("task", "overrides"),
    [(pretrain, []), (embed, ["checkpoint=x"]), (evaluate, ["checkpoint=x"]), (search, ["pilot=PILOT"])],
)
def test_a_refused_launch_leaves_no_output_dir(monkeypatch, tmp_path, task, overrides):
    monkeypatch.setenv("WORLD_SIZE", "8")
    for name in ("RANK", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if task is search:
        monkeypatch.setattr("hf_accel.tasks.search.kept_checkpoints", lambda pilot: [])
    output = tmp_path / "run"
    settings = [f"task={task.__name__}", f"output_dir={output}", "data=bundled", *overrides]
    with pytest.raises(SettingError, match=r"^WORLD_SIZE=8 is set in the environment.*unset it"):
        task(load_recipe("recipes/moco.yaml", settings))
    assert not output.exists()


@pytest.mark.parametrize("inside", ["runs/photos", "."])
def test_an_output_dir_among_the_images_is_refused(monkeypatch, tmp_path, inside):
    photos = tmp_path / "photos"
    photos.mkdir()
    monkeypatch.chdir(photos)
    with pytest.raises(
        SettingError, match=r"^output_dir=.*: it lies in data=\., where its figures would be read as images"
    ):
        output_of(load_recipe(None, ["data=.", "budget=9", f"output_dir={inside}"]))
    assert not [*photos.iterdir()]
    assert output_of(load_recipe(None, ["data=.", "budget=9", "output_dir=../photos_runs"])).is_dir()
    assert output_of(load_recipe(None, ["task=cost", "output_dir=runs"])).is_dir()  # which reads no images


def test_a_search_has_no_trackers():
    recipe = load_recipe("recipes/moco.yaml", ["task=search", "pilot=x", "mixed_precision=no"])
    assert pretrain_config(recipe).report_to == []


def test_a_run_keeps_the_defaults_that_it_began_with(tmp_path):
    settings = ["data=bundled", "budget=64", f"output_dir={tmp_path}", "mixed_precision=no"]
    new = load_recipe(None, settings)
    assert continue_recipe(new) == [] and (new.schedule, new.view_resolution, new.cache) == (
        "standard",
        "matched",
        "auto",
    )
    earlier = {key: value for key, value in EARLIER_DEFAULTS.items() if new.reads(key)}
    RunFolder(tmp_path).recipe.write_text(yaml.safe_dump({**new.used(), **earlier}))
    again = load_recipe(None, settings)
    assert continue_recipe(again) == [] and {key: getattr(again, key) for key in earlier} == earlier
    with pytest.raises(RecipeError, match=r"^schedule='standard': .* holds a run with schedule=None"):
        continue_recipe(load_recipe(None, [*settings, "schedule=standard"]))


def test_a_run_records_the_stages_of_a_schedule_file(tmp_path):
    run, path = RunFolder(tmp_path / "run"), tmp_path / "stages.yaml"
    settings = ["data=bundled", "budget=64", "mixed_precision=no", f"output_dir={run}", f"schedule={path}"]
    path.write_text("{patch_size: 8, stages: [{until: 0.5, patch_size: 28, token_dropout: 0.5}, {until: 1.0}]}")
    sizes = ["image_size=28", "patch_size=4"]
    first = load_recipe(None, [*settings, *sizes])
    whole = {"target_patch_size": 14, "target_token_dropout": 0.0}
    assert first.schedule[0] == {"until": 0.5, "patch_size": 14, "token_dropout": 0.5, **whole}
    assert pretrain_config(first).schedule == first.used()["schedule"] == first.schedule
    run.path.mkdir()
    run.recipe.write_text(first.to_yaml())
    again = load_recipe(None, [*settings, *sizes])
    path.write_text("[{until: 0.6, patch_size: 14, token_dropout: 0.5}, {until: 1.0}]")
    assert continue_recipe(again) == []  # The file was read when the recipe was.
    with pytest.raises(RecipeError, match=rf"^schedule='{path}': {run} .*: stage 1 had until=0.5 and now has 0.6,"):
        continue_recipe(load_recipe(None, [*settings, *sizes]))
    path.unlink()
    with pytest.raises(
        RecipeError, match=rf"no file '{path}'; .* run in {run}, give the stages that {run.recipe} holds"
    ):
        load_recipe(None, [*settings, *sizes])
    assert load_recipe(run.recipe) == first and continue_recipe(load_recipe(run.recipe)) == []
    run.recipe.unlink()
    with pytest.raises(RecipeError, match=r"or null for no compression$"):
        load_recipe(None, [*settings, *sizes])


DINO = ["objective=dino", "objective_config={num_prototypes: 8, head_hidden_size: 8, bottleneck_size: 8}"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective_config.temperature=0"], "temperature=0.0 must be at least 1e-06"),
        (["objective_config.momentum=2"], "momentum=2.0 must be at least 0 and at most 1"),
        (["objective_config.projection_size=-1"], "projection_size=-1 must be at least 1"),
        ([*DINO, "objective_config.center_momentum=-1"], "center_momentum=-1.0"),
        (
            [*DINO, "objective_config.local_crop_scale=[0.4, 0.05]"],
            r"local_crop_scale=\[0.4, 0.05\] .*smaller one first",
        ),
        (["attn_implementation=flash"], "attn_implementation='flash': .*sdpa"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_an_objective_cannot_be_made_of_is_named(overrides, words):
    with pytest.raises(RecipeError, match=words):
        build_objective(load_recipe("recipes/moco.yaml", overrides))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"output_dir='.*file/run': nothing can be written there"):
        output_of(load_recipe("recipes/moco.yaml", [f"output_dir={tmp_path / 'file' / 'run'}"]))
    output = output_of(load_recipe("recipes/moco.yaml", [f"output_dir={tmp_path / 'a' / 'b'}"]))
    assert output.is_dir() and not list(output.iterdir())


@pytest.fixture
def no_launcher(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def launched(tmp_path, no_launcher):
    """Makes a recipe for the folder of a run that has a checkpoint and was started in fp32."""

    def load(*overrides: str):
        return load_recipe("recipes/moco.yaml", [f"output_dir={tmp_path}", *overrides])

    assert continue_recipe(load("seed=5")) == []  # there is nothing yet
    every_key = {**asdict(load()), "mixed_precision": "no", "checkpoint": "runs/other/final", "of_old": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(every_key))
    (tmp_path / "checkpoint-1").mkdir()
    RunFolder.seal(tmp_path / "checkpoint-1", {"step": 1})
    return load


def test_what_may_change_of_a_run_is_what_its_keys_declare(launched):
    assert continue_recipe(launched("num_workers=3", "logging_steps=1")) == []
    for override in ("learning_rate=0.1", "mixed_precision=bf16"):
        (note,) = continue_recipe(launched(override))
        assert note.startswith(f"Continuing with {override.partition('=')[0]}=")
    for override in ("seed=1", "search_criterion=gain"):
        with pytest.raises(RecipeError, match=rf"^{override.partition('=')[0]}=.*holds a run with"):
            continue_recipe(launched(override))


def test_a_run_keeps_the_defaults_it_was_started_with(launched, tmp_path):
    started = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**started, "view_resolution": "full", "cache": "none"}))
    recipe = launched()
    assert recipe.view_resolution == "matched" and recipe.cache == "auto"
    assert continue_recipe(recipe) == [] and (recipe.view_resolution, recipe.cache) == ("full", "none")
    with pytest.raises(RecipeError, match=r"^view_resolution='matched'.*holds a run with view_resolution='full'"):
        continue_recipe(launched("view_resolution=matched"))


def test_a_run_goes_on_in_its_precision(launched, monkeypatch):
    recipe = launched()
    monkeypatch.setattr("hf_accel.distributed.launch.has_bf16", lambda: True)
    assert recipe.mixed_precision == "auto" and continue_recipe(recipe) == []
    assert recipe.mixed_precision == "no" and yaml.safe_load(recipe.to_yaml())["mixed_precision"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # which is a correction, as the recipe's own word would be
    assert continue_recipe(launched()) == ["Continuing with mixed_precision='bf16' (until here 'no')"]


def test_label_column_none_turns_labels_off(capsys):
    settings = ["data=bundled", "budget=64", "label_column=none"]
    source, _ = images_of(load_recipe(None, settings))
    assert source.labels is None and "Labels: none" in capsys.readouterr().out
    images_of(load_recipe(None, settings[:2]))
    assert "Labels: the bundled digits, 10 classes (0, 1, 2, 3, 4, ...)\n" in capsys.readouterr().out


def test_an_error_about_data_names_it_once(tmp_path):
    (tmp_path / "z.zip").touch()
    for name, problem in (
        ("z.zip", "a single file must be .parquet or .arrow"),
        ("no/such/path", "no such file or folder"),
    ):
        data = str(tmp_path / name)
        for streaming in ("false", "true") if "zip" not in name else ("false",):
            with pytest.raises(RecipeError) as refused:
                images_of(load_recipe(None, [f"data={data}", "budget=64", f"streaming={streaming}"]))
            assert str(refused.value) == f"data={data!r}: {problem}"


def test_columns_of_the_bundled_digits_are_refused():
    for key in ("image_column", "label_column"):
        with pytest.raises(RecipeError, match=f"{key}='x': the bundled digits have no columns"):
            images_of(load_recipe(None, ["data=bundled", "budget=64", f"{key}=x"]))
