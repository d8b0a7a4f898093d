"""The card of a run: complete and valid with everything there is, and honest about what is missing."""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_accel.compression import Compression, forward_cost
from hf_accel.data import ImageSource, image_processor
from hf_accel.hub import Run, card_text, write_card
from hf_accel.hub.publish import name_repository
from hf_accel.models import AccelViTConfig, AccelViTModel, vit_tiny
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import PretrainRecipe
from hf_accel.report.evaluations import add_run, wilson_interval
from hf_accel.run_folder import RunFolder
from hf_accel.utils.redact import without_local_paths
from tests.commands import code_blocks
from tests.objectives.fourth_objective import SimSiamForPreTraining
from tests.tiny_runs import RECIPE

SCHEDULE = [{"until": 0.5, "patch_size": 8}, {"until": 1.0, "patch_size": 4, "token_dropout": 0.5}]
RESULTS: dict[str, Any] = {
    "weights": "c0ffee",
    "knn_top1": 0.8125,
    "knn_top5": 0.9,
    "knn_top1_random_init": 0.4,
    "knn_top1_raw_pixels": 0.5,
    "units": 480.0,
    "budget": 512.0,
    "steps": 15,
    "images_seen": 240,
    "seconds": {"total": 7200.0},
    "processes": 1,
    "seed": 0,
    "objective": "moco",
    "schedule": SCHEDULE,
    "units_per_image": [1.5, 2.5],
    "units_per_image_uncompressed": 4.0,
    "data": {
        "name": "ann/pets",
        "is_on_hub": True,
        "images": 120,
        "train_split": "train",
        "validation_images": 30,
        "validation_split": "validation",
        "classes": 3,
    },
    "environment": {
        "command": "python run.py recipes/moco.yaml output_dir=/home/ann/secret/run",
        "versions": {"python": "3.11", "torch": "2.13.0", "mlxtend": None},
        "commit": "c0ffee",
        "dirty": False,
        "hardware": {"cpu": "EPYC", "cpu_cores": 2, "gpus": []},
    },
}
WEIGHTS = "c0ffee"


def evaluation(name: str, patch_size: int, *top1: float, weights: str = WEIGHTS, **changes: Any) -> dict[str, Any]:
    """An entry of results.json, as task=evaluate writes it."""
    question = {
        "evaluation": name,
        "checkpoint": "runs/run/final",
        "weights": weights,
        "data": "ann/pets",
        "train_images": 120,
        "validation": "ann/pets/validation",
        "validation_images": 30,
        "patch_size": patch_size,
        "settings": {"k": 20, "temperature": 0.07} if name == "knn" else {},
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed, value in enumerate(top1):
            add_run(folder, question, {"seed": seed, "top1": value, "top5": 1.0})
        (entry,) = RunFolder(folder).read_results()["evaluations"]
    return entry


EVALUATIONS = [
    evaluation("knn", 8, 0.6),
    evaluation("knn", 4, 0.82),
    evaluation("linear", 4, 0.7, 0.8, 0.9),
    evaluation("linear", 4, 0.2, weights="0", checkpoint="random"),
    evaluation("linear", 4, 0.99, weights="1", checkpoint="runs/other/final"),
    evaluation("finetune", 4, 0.777, data="/home/ann/cats", validation="cats/test", train_images=9),
]


@pytest.fixture
def run() -> Run:
    recipe = PretrainRecipe(
        **{**RECIPE, "data": "ann/pets", "schedule": SCHEDULE, "output_dir": "/home/ann/secret/run"}
    )
    return Run("run", dataclasses.asdict(recipe), RESULTS, recipe.encoder_config(), 78_392, ("curves.png",))


def changed(run: Run, **results: Any) -> Run:
    return dataclasses.replace(run, results={**run.results, **results})


def without(run: Run, *keys: str) -> Run:
    return dataclasses.replace(run, results={key: run.results[key] for key in run.results.keys() - set(keys)})


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.split(f"## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Of the table in a section, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def interval(accuracy: float) -> str:
    return " to ".join(f"{100 * end:.1f}" for end in wilson_interval(accuracy, 30))


def test_the_metadata_are_complete_and_come_back(run):
    card = ModelCard(card_text(changed(run, evaluations=EVALUATIONS), "ann/run"))
    values = card.data.to_dict()
    assert values["library_name"] == "transformers" and values["pipeline_tag"] == "image-feature-extraction"
    assert (
        values["license"] == "apache-2.0" and values["datasets"] == ["ann/pets"] and values["metrics"] == ["accuracy"]
    )
    assert {"hf_accel", "self-supervised-learning", "moco", "vision-transformer"} <= set(values["tags"])
    name, results = model_index_to_eval_results(values["model-index"])
    found = {result.metric_name: (result.dataset_type, result.metric_type, result.metric_value) for result in results}
    top1 = {
        "kNN top-1 accuracy, patches of 4 px": ("ann/pets", "accuracy", 0.82),  # measured again after the run
        "kNN top-1 accuracy, patches of 8 px": ("ann/pets", "accuracy", 0.6),
        "linear probe top-1 accuracy, patches of 4 px, mean of 3 seeds": ("ann/pets", "accuracy", 0.8),
        "fine-tuning top-1 accuracy, patches of 4 px": ("cats", "accuracy", 0.777),
    }
    top5 = {name.replace("top-1", "top-5"): (*about, 1.0) for name, (*about, _) in top1.items()}
    assert name == "run" and found == top1 | top5


def test_the_accuracy_table_holds_every_evaluation_and_what_to_compare_with(run):
    text = section(card_text(changed(run, evaluations=EVALUATIONS), "ann/run"), "Accuracy")
    cost = f"{forward_cost(run.config, Compression(8)):.2f}"
    pets = "ann/pets, `validation`"
    assert rows(text) == [
        ["kNN", pets, "120", "4", "1.00", "82.0", interval(0.82), "100.0"],
        ["kNN", pets, "120", "8", cost, "60.0", interval(0.6), "100.0"],
        ["kNN, random initialisation", pets, "120", "4", "1.00", "40.0", "", ""],
        ["linear probe", pets, "120", "4", "1.00", "80.0 ± 10.0 (3 seeds)", interval(0.8), "100.0"],
        ["linear probe, random initialisation", pets, "120", "4", "1.00", "20.0", interval(0.2), "100.0"],
        ["fine-tuning", "cats, `test`", "9", "4", "1.00", "77.7", interval(0.777), "100.0"],
        ["kNN on raw pixels", pets, "120", "", "", "50.0", "", ""],
    ]


def test_unreadable_images_are_on_the_card(run):
    assert "could not be read" not in card_text(run, "ann/run")
    data = {**RESULTS["data"], "unreadable_images": 2, "unreadable_validation_images": 1}
    text = " ".join(section(card_text(changed(run, data=data), "ann/run"), "Training data").split())
    assert "Of the training images, 2 could not be read; another image was taken in place of each" in text
    assert "Of the images for the accuracy, 1 could not be read" in text


def test_turned_off_labels_are_no_column_on_the_card(run):
    plain = dataclasses.replace(run, recipe={**run.recipe, "label_column": "none"})
    assert "columns:" not in card_text(plain, "ann/run")
    plain = dataclasses.replace(run, recipe={**run.recipe, "image_column": "photo", "label_column": "none"})
    assert "(columns: photo)" in card_text(plain, "ann/run")


@pytest.mark.parametrize("path", ["/a/cats", "./cats", "~/cats", "../cats", "a/b/cats", "ann/cats"])
def test_images_of_this_machine_are_named_by_their_folder_alone(run, path):
    text = card_text(
        changed(run, evaluations=[evaluation("knn", 4, 0.82, data=path, validation="cats/test")]), "ann/run"
    )
    expected = "cats" if path != "ann/cats" else path  # of two names: a data set of the Hub
    assert {row[1] for row in rows(section(text, "Accuracy"))} == {"ann/pets, `validation`", f"{expected}, `test`"}


def test_evaluations_with_other_settings_are_rows_of_their_own(run):
    other = evaluation("knn", 4, 0.8, settings={"k": 5, "temperature": 0.07})
    text = section(card_text(changed(run, evaluations=[*EVALUATIONS, other]), "ann/run"), "Accuracy")
    named = [(row[0], row[3], row[5]) for row in rows(text) if row[0].startswith("kNN (")]
    assert named == [
        ("kNN (k=20)", "4", "82.0"),
        ("kNN (k=5)", "4", "80.0"),
        ("kNN (k=20)", "8", "60.0"),
        ("kNN (k=20), random initialisation", "4", "40.0"),
    ]


def test_the_budget_stands_against_the_uncompressed_run(run):
    text = section(card_text(run, "ann/run"), "Budget")
    this, computed = rows(text)
    assert this[1:] == ["480", "15", "240", "2.00 h", "81.2"]
    assert computed[1:] == ["480", "7", "112", "not measured", "not measured"]  # 480 / (16 images x 4 units) = 7.5
    assert "960 units, 2.00 times" in text
    baseline = {"name": "base", "units": 448.0, "steps": 7, "images_seen": 112, "seconds": {"total": 90}}
    baseline["knn_top1"] = 0.7
    measured = rows(section(card_text(changed(run, baseline=baseline), "ann/run"), "Budget"))[2]
    assert measured == ["base, to compare with (measured)", "448", "7", "112", "1.5 min", "70.0"]


def test_an_uncompressed_run_is_not_compared_with_itself(run):
    plain = changed(run, schedule=[{"until": 1.0}], units_per_image=[4.0])
    text = card_text(plain, "ann/run")
    assert len(rows(section(text, "Budget"))) == 1 and "No step was compressed" in text
    assert "on whole token sequences" in text and "shortened" not in section(text, "Schedule")


def test_the_schedule_is_told_stage_by_stage(run):
    text = section(card_text(run, "ann/run"), "Schedule")
    assert rows(text) == [
        ["0% to 50%", "8 px: 4 tokens", "8 px: 4 tokens", "1.5"],
        ["50% to 100%", "4 px, 50% of tokens dropped: 8 tokens", "4 px: 16 tokens", "2.5"],
    ]
    assert "schedule.png" not in text and "![" in section(card_text(run, "ann/run"), "Training curves")


def test_without_labels_nothing_is_claimed(run):
    assert "## Features" not in card_text(run, "ann/run")
    measured = section(card_text(changed(run, rank_me=41.23, alpha_req=1.5, ridge_top1=None), "ann/run"), "Features")
    assert "of 41.2 and an alpha-ReQ (slope of their spectrum) of 1.50." in measured and "ridge" not in measured
    assert "LiDAR" not in measured
    measured = section(card_text(changed(run, rank_me=41.23, lidar=12.34), "ann/run"), "Features")
    assert "across their views, was 12.3." in measured
    measured = section(card_text(changed(run, rank_me=41.23, ridge_top1=0.875), "ann/run"), "Features")
    assert "of 41.2. A linear classifier on them, by ridge regression, had a top-1 accuracy of 87.5%." in measured
    missing = ("knn_top1", "knn_top5", "knn_top1_random_init", "knn_top1_raw_pixels")
    text = card_text(changed(run, **dict.fromkeys(missing)), "ann/run")
    values = ModelCard(text).data.to_dict()
    assert "model-index" not in values and "metrics" not in values
    assert "No accuracy was measured: the images have no labels" in section(text, "Accuracy")
    assert "accuracies above" not in text and "good for.\n- The features" in section(text, "Limitations and risks")
    assert "good for. The accuracies above" in card_text(run, "ann/run")


def test_results_of_an_earlier_version_make_a_card_too(run):
    old = without(run, "units_per_image", "units_per_image_uncompressed", "data", "environment")
    text = card_text(old, "ann/run")
    assert len(rows(section(text, "Budget"))) == 1 and "No step was compressed" not in text
    assert rows(section(text, "Schedule"))[0] == ["0% to 50%", "8 px: 4 tokens", "8 px: 4 tokens", ""]
    assert "datasets" not in ModelCard(text).data.to_dict()


def test_a_run_in_training_says_so(run):
    so_far = dataclasses.replace(changed(run, units=128.0, steps=4), is_complete=False, figures=(), parameters=None)
    text = card_text(so_far, "ann/run")
    assert "**Training is under way**: 4 steps and 25% of the budget" in text and "![" not in text
    assert "under way" not in card_text(run, "ann/run")


def test_no_path_of_this_machine_is_told(run):
    secret = dataclasses.replace(run, recipe={**run.recipe, "data": "/home/ann/secret/cats", "pilot": "~/secret/pilot"})
    data = {**RESULTS["data"], "name": "cats", "is_on_hub": False}
    text = card_text(changed(secret, data=data, evaluations=EVALUATIONS), "ann/run")
    assert "/home" not in text and "secret" not in text and "~/" not in text
    assert "datasets" not in ModelCard(text).data.to_dict() and "`cats`, a data set that is not on the Hub" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["data"] == "…/cats" and recipe["output_dir"] == "…/run"
    assert {key: value for key, value in recipe.items() if key not in ("data", "output_dir", "pilot")} == {
        key: value for key, value in secret.recipe.items() if key not in ("data", "output_dir", "pilot")
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ann/My Data (1)", "…/My Data (1)"),
        ("~ann/images/", "…/images"),
        (r"C:\Users\ann\images", "…/images"),
        ("run.py data=/home/ann/x schedule=[a, /b/c.yaml]", "run.py data=…/x schedule=[a, …/c.yaml]"),
        ("runs/moco", "runs/moco"),
        ("../shared/data", "../shared/data"),
        ("see https://huggingface.co/ann/x and ann/x", "see https://huggingface.co/ann/x and ann/x"),
        ({"a": ["/b/c", 1, None]}, {"a": ["…/c", 1, None]}),
    ],
)
def test_local_paths_are_cut(value, expected):
    assert without_local_paths(value) == expected


@pytest.mark.parametrize(("objective", "key"), [("moco", "chen2021"), ("simclr", "chen2020"), ("dino", "caron2021")])
def test_what_is_built_on_is_cited(run, objective, key):
    text = section(card_text(changed(run, objective=objective), "ann/run"), "Citation")
    assert "lin2024" in text and "beyer2023" in text and key in text and text.count("@inproceedings") == 3


def test_a_preset_is_named_only_where_it_is_one(run):
    assert "2 layers of width 32, 2 heads (78,392 parameters)" in card_text(run, "ann/run")
    plain = dataclasses.replace(run, config=vit_tiny(pooling="mean"), parameters=5_526_720)
    assert "ViT-Ti (5.5 M parameters)" in card_text(plain, "ann/run")
    assert "12 layers of width 192, 6 heads" in card_text(
        dataclasses.replace(run, config=vit_tiny(num_attention_heads=6)), "ann/run"
    )


def test_a_card_that_somebody_took_over_is_left_alone(run, tmp_path):
    path = Path(tmp_path / "README.md")
    assert write_card(run, path, "ann/run") and write_card(run, path, "ann/run")
    own = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("<!-- Written by hf_accel"))
    path.write_text(own)
    assert not write_card(run, path, "ann/run") and path.read_text() == own


def test_card_asks_the_objective_about_itself(run, monkeypatch):
    new = changed(run, objective="simsiam")
    unknown = card_text(new, "ann/run")  # as where the file that registers it is not installed
    assert "trained with simsiam on" in unknown and section(unknown, "Citation").count("@") == 2
    assert "target" not in section(unknown, "Schedule")
    monkeypatch.setitem(OBJECTIVES, "simsiam", SimSiamForPreTraining)
    text = card_text(new, "ann/run")
    assert "trained with SimSiam on" in text and "chen2021exploring" in section(text, "Citation")
    assert "target" not in section(text, "Schedule") and "simsiam" in ModelCard(text).data.to_dict()["tags"]
    monkeypatch.setattr(SimSiamForPreTraining, "has_target_branch", True)
    assert "target branch" in section(card_text(new, "ann/run"), "Schedule")


def test_card_needs_no_key_that_only_recipes_have(run):
    keys = ("knn_k", "knn_temperature", "lr_schedule", "learning_rate", "warmup", "augmentation", "batch_size")
    plain = dataclasses.replace(run, recipe={key: run.recipe[key] for key in keys})
    text = card_text(plain, "ann/run")
    assert "datasets/ann/pets" in text and "trained with MoCo-v3" in text
    assert "license" not in ModelCard(text).data.to_dict()


@pytest.mark.usefixtures("own_cache_and_threads")
@pytest.mark.parametrize("channels", [3, 5])
def test_code_of_the_card_runs_in_its_folder(run, tmp_path, monkeypatch, channels):
    config = AccelViTConfig(**{**run.config.to_dict(), "num_channels": channels})
    AccelViTModel(config).save_pretrained(tmp_path)
    source = ImageSource("images", pixels=torch.zeros(1, channels, 16, 16, dtype=torch.uint8))
    source.mean, source.std = [0.5] * channels, [0.2] * channels
    image_processor(source, config.image_size).save_pretrained(tmp_path)
    (code,) = code_blocks(card_text(dataclasses.replace(run, config=config), None), "python")
    monkeypatch.chdir(tmp_path)
    exec(code, found := {})
    assert found["features"].shape == found["cheaper"].shape == (1, 32)


def test_card_names_no_folder_of_this_machine(run):
    (line,) = (line for line in card_text(run, None).splitlines() if line.startswith("model_id = "))
    assert line == 'model_id = "."  # run this in the folder of this file, or give its Hub id, once it is uploaded'
    assert name_repository(f"{line}\nmine", "ann/run") == 'model_id = "ann/run"\nmine'
    earlier = 'model_id = "run/final"  # the path to this folder, or its Hub id, once it is uploaded'
    assert name_repository(earlier, "ann/run") == 'model_id = "ann/run"'
    old = 'model_id = "/home/ann/run/final"  # this folder; its Hub id, once it is uploaded'
    assert name_repository(old, "ann/run") == 'model_id = "ann/run"'
    assert name_repository('model_id = "mine"', "ann/run") == 'model_id = "mine"'
