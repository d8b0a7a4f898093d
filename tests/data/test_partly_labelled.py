"""A set in which some images have no label and some cannot be read: what each task does with it and reports."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from hf_accel.data import ImageSource
from hf_accel.evaluation import raw_pixel_features
from hf_accel.recipe import load_recipe
from hf_accel.report import describe_data
from hf_accel.tasks.evaluate import labelled_images
from hf_accel.training.accuracy import measure_knn
from tests.tiny_runs import SIZE, launch, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")
COLUMN = "label_column=label"


def table(count, broken=()):
    """Images of one colour for each class, of two sizes; every second one has no label."""
    rng, images = np.random.default_rng(0), []
    for index in range(count):
        side = SIZE + index % 3
        pixels = rng.normal(200 * np.eye(3)[index % 3], 20, (side, side, 3)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue()[: 60 if index in broken else None], "path": None})
    labels = ["abc"[index % 3] if index % 2 else None for index in range(count)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "set"
    train, test = table(210, broken=(7, 8)), table(60)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(path)  # pyright: ignore[reportCallIssue]
    return path


def test_knn_asks_and_answers_with_labelled_images_only():
    colours = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=torch.uint8)
    labels = torch.tensor([0, 1, -1] * 10)  # the third colour is never labelled
    pixels = colours[torch.arange(3).repeat(10)].view(30, 3, 1, 1).expand(-1, -1, 8, 8).contiguous()
    source = ImageSource("x", pixels=pixels, labels=labels, class_names=["a", "b"])
    args: Any = SimpleNamespace(knn_k=5, knn_temperature=0.07, dataloader_num_workers=0)
    encoder = SimpleNamespace(config=SimpleNamespace(image_size=8))
    accuracy = measure_knn(encoder, source, source, args, features=raw_pixel_features)
    assert accuracy["top1"] == 1


def test_task_evaluate_takes_labelled_images_only(folder, capsys):
    recipe = load_recipe(None, ["task=evaluate", "checkpoint=random", f"data={folder}", COLUMN])
    source, validation = labelled_images(recipe)
    assert (len(source), len(validation)) == (105, 30)
    assert source.labels is not None and source.labels.tolist() == [(2 * row + 1) % 3 for row in range(105)]
    assert "Labels: column label, 3 classes (a, b, c); 105 of 210 images" in capsys.readouterr().out


def test_unreadable_images_are_described_without_local_paths(tmp_path):
    pixels = torch.zeros(300, 3, 8, 8, dtype=torch.uint8)
    source, validation = (ImageSource(f"{tmp_path}/{split}", pixels=pixels) for split in ("train", "test"))
    source.report([(3, f"{tmp_path}/a/3.png", f"OSError: cannot open '{tmp_path}/a/3.png'")])
    validation.report([(4, f"{tmp_path}/test[4]", "truncated"), (5, "/elsewhere/5.png", "truncated")])
    data = describe_data(str(tmp_path), source, validation)
    assert (data["unreadable_images"], data["unreadable_validation_images"]) == (1, 2)
    assert [entry["image"] for entry in data["unreadable"]] == ["a/3.png", "test[4]", "…/5.png"]
    assert str(tmp_path) not in json.dumps(data) and data["unreadable"][1]["reason"] == "truncated"


def test_images_that_other_processes_could_not_read_are_added(monkeypatch):
    source = ImageSource("x", pixels=torch.zeros(300, 3, 8, 8, dtype=torch.uint8))
    source.report([(3, "3.png", "empty")])
    monkeypatch.setattr("hf_accel.data.sources.all_gather_objects", lambda bad: [{5: ("5.png", "empty")}, bad])
    source.gather_bad()
    assert sorted(source.bad) == [3, 5]


@pytest.mark.slow
def test_pretraining_and_every_evaluation(folder, tmp_path):
    output = launch(folder, tmp_path / "run", COLUMN, "eval_points=[0.0, 1.0]", "save_steps=7")
    results = read(output / "results.json")
    assert results["data"]["images"] == 210 and results["data"]["labelled_images"] == 105
    assert [entry["image"] for entry in results["data"]["unreadable"]] == ["train[7]", "train[8]"]
    assert results["knn_top1_raw_pixels"] > 0.9
    card = " ".join((output / "final" / "README.md").read_text().split())
    assert "Of the training images, 2 could not be read" in card
    task = ["task=evaluate", f"checkpoint={output / 'final'}", "evaluations=[knn, linear, logistic, finetune]"]
    evaluated = launch(folder, tmp_path / "evaluated", COLUMN, *task, "finetune_config={epochs: 1, batch_size: 32}")
    entries = read(evaluated / "results.json")["evaluations"]
    assert [entry["evaluation"] for entry in entries] == ["knn", "linear", "logistic", "finetune"]
    assert {(entry["train_images"], entry["validation_images"]) for entry in entries} == {(105, 30)}
    assert {entry["runs"][0]["unreadable_images"] for entry in entries} == {1}  # of those with a label


@pytest.mark.slow
def test_resumed_run_knows_what_could_not_be_read_before(folder, tmp_path):
    output = launch(folder, tmp_path / "run", COLUMN, "save_steps=7")
    (output / "results.json").unlink()
    shutil.rmtree(output / "checkpoint-8")
    path = output / "checkpoint-7" / "run_state.json"
    state = read(path)
    assert set(state["unreadable"]) <= {"7", "8"}
    path.write_text(json.dumps({**state, "unreadable": {"9": ["nine.png", "truncated"]}}))
    launch(folder, output, COLUMN, "save_steps=7")
    names = [entry["image"] for entry in read(output / "results.json")["data"]["unreadable"]]
    assert "nine.png" in names
