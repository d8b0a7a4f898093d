import os
from dataclasses import asdict

import pytest
import torch
import yaml

from hf_accel.compression import Compression, CostTable
from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.run_folder import seal, write_json
from hf_accel.tasks.setup import (
    build_objective,
    check_trackers,
    continue_recipe,
    cost_function,
    images_of,
    output_of,
    training_arguments,
    use_all_cores,
)
from hf_accel.training.trainer import PretrainTrainer


@pytest.mark.parametrize(
    ("threads", "launched", "processes", "expected"),
    [
        (None, False, 1, 6),
        (None, False, 2, 3),
        ("1", True, 1, 6),
        ("1", False, 1, 5),
        ("4", True, 1, 5),
        (None, True, 9, 1),
    ],
    ids=["unset", "shared", "set by accelerate", "set by the user", "set by the user of accelerate", "more than cores"],
)
def test_a_bare_launch_uses_all_cores_and_a_choice_is_kept(monkeypatch, threads, launched, processes, expected):
    given = [5]  # what torch made of OMP_NUM_THREADS
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for name, value in (("OMP_NUM_THREADS", threads), ("ACCELERATE_MIXED_PRECISION", "no" if launched else None)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    use_all_cores(processes)
    assert given[-1] == expected


def test_a_batch_that_does_not_divide_is_named():
    recipe = load_recipe("recipes/moco.yaml", ["batch_size=36", "gradient_accumulation_steps=4", "mixed_precision=no"])
    assert training_arguments(recipe, 3).per_device_train_batch_size == 3
    with pytest.raises(RecipeError, match=r"batch_size=36.*multiple.* = 8"):
        training_arguments(recipe, 2)


def test_a_key_that_the_task_does_not_read_refuses_nothing():
    evaluate = ["task=evaluate", "checkpoint=random", "mixed_precision=no"]
    assert training_arguments(load_recipe("recipes/moco.yaml", evaluate), 3).per_device_train_batch_size == 85
    search = training_arguments(load_recipe("recipes/moco.yaml", ["task=search", "pilot=x", "mixed_precision=no"]), 1)
    assert search.report_to == []


def test_weight_decay_is_for_matrices():
    model = build_objective(load_recipe("recipes/moco.yaml"))
    decayed = set(PretrainTrainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        assert (name in decayed) == (parameter.ndim > 1), name
    assert "projector.0.weight" in decayed and "projector.1.weight" not in decayed  # a BatchNorm's


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


def test_trackers_that_are_not_there_are_named():
    def arguments(names: str):
        return training_arguments(load_recipe("recipes/moco.yaml", [f"report_to={names}", "mixed_precision=no"]), 1)

    check_trackers(arguments("[tensorboard]"))
    check_trackers(arguments("[none]"))
    with pytest.raises(RecipeError, match=r"report_to=\['tensorbord'\]: .*only .*tensorboard"):
        check_trackers(arguments("[tensorbord]"))
    with pytest.raises(RecipeError, match=r"report_to=\['swanlab'\]: .*swanlab"):
        check_trackers(arguments("[swanlab]"))


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


def begin(output, state: str, text: str) -> None:
    """A run with this recipe.yaml that was begun, has a checkpoint, or is complete."""
    (output / "recipe.yaml").write_text(text)
    if state != "begun":
        (output / "checkpoint-1").mkdir()
        seal(output / "checkpoint-1", {"step": 1})
    if state == "complete":
        write_json(output / "results.json", {"units": 1.0})


@pytest.mark.parametrize("state", ["begun", "saved", "complete"])
def test_what_may_change_of_a_run_and_when(state, tmp_path, no_launcher):
    def launched(*overrides: str):
        return load_recipe("recipes/moco.yaml", [f"output_dir={tmp_path}", *overrides])

    assert continue_recipe(launched("seed=5")) == []  # there is nothing yet
    begin(tmp_path, state, launched("mixed_precision=no").to_yaml())
    assert continue_recipe(launched("num_workers=3", "logging_steps=1")) == []
    remedy = "remove this one" if state == "begun" else "restore the key"
    for override in ("seed=1", "search_criterion=gain", "learning_rate=0.1", "mixed_precision=bf16"):
        if state == "saved" and override.startswith(("learning_rate", "mixed_precision")):
            (note,) = continue_recipe(launched(override))
            assert note.startswith(f"Continuing with {override.partition('=')[0]}=")
            continue
        with pytest.raises(RecipeError, match=rf"^{override.partition('=')[0]}=.*holds a run with.*{remedy}"):
            continue_recipe(launched(override))


def test_a_run_of_an_earlier_version_goes_on_in_its_precision(tmp_path, no_launcher, monkeypatch):
    recipe = load_recipe("recipes/moco.yaml", [f"output_dir={tmp_path}"])
    every_key = {**asdict(recipe), "mixed_precision": "no", "checkpoint": "runs/other/final", "of_old": 3}
    begin(tmp_path, "saved", yaml.safe_dump(every_key))
    monkeypatch.setattr("hf_accel.distributed.launch._has_bf16", lambda: True)
    assert recipe.mixed_precision == "auto" and continue_recipe(recipe) == []
    assert recipe.mixed_precision == "no" and yaml.safe_load(recipe.to_yaml())["mixed_precision"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # which is a correction, as the recipe's own word would be
    recipe = load_recipe("recipes/moco.yaml", [f"output_dir={tmp_path}"])
    assert continue_recipe(recipe) == ["Continuing with mixed_precision='bf16' (until here 'no')"]


@pytest.mark.parametrize(
    ("device", "precision", "expected"), [("cpu", "bf16", (64, torch.bfloat16)), ("cuda", "no", (128, None))]
)
def test_costs_are_measured_as_the_run_will_compute(device, precision, expected, tmp_path, monkeypatch):
    asked = []

    def measured(config, compressions, device, batch_size, dtype):
        asked.append((batch_size, dtype))
        return CostTable({compression: 1.0 for compression in compressions}, "test")

    monkeypatch.setattr("hf_accel.tasks.setup.measure_costs", measured)
    settings = ["cost=measured", f"output_dir={tmp_path}", f"mixed_precision={precision}"]
    settings += ["batch_size=256", "gradient_accumulation_steps=2"]
    costs = cost_function(load_recipe("recipes/moco.yaml", settings), torch.device(device))
    assert asked == [expected] and costs(Compression(7)) == 1.0


def test_label_column_none_turns_labels_off(capsys):
    settings = ["data=bundled", "budget=64", "label_column=none"]
    source, _ = images_of(load_recipe(None, settings))
    assert source.labels is None and "Labels: none" in capsys.readouterr().out
    images_of(load_recipe(None, settings[:2]))
    assert "Labels: the bundled digits, 10 classes (0, 1, 2, 3, 4, ...)\n" in capsys.readouterr().out


def test_columns_of_the_bundled_digits_are_refused():
    for key in ("image_column", "label_column"):
        with pytest.raises(RecipeError, match=f"{key}='x': the bundled digits have no columns"):
            images_of(load_recipe(None, ["data=bundled", "budget=64", f"{key}=x"]))


def test_a_batch_may_be_all_images_and_no_more():
    source, _ = images_of(load_recipe("recipes/moco.yaml", ["batch_size=4000"]))
    assert len(source) == 4000
    with pytest.raises(RecipeError, match=r"batch_size=4001: bundled/train has only 4000 images"):
        images_of(load_recipe("recipes/moco.yaml", ["batch_size=4001"]))
