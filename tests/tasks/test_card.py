"""Runs that push to a Hub on loopback, over HTTP: what arrives there, what faults do, and the card that comes along."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_accel.report import add_run
from hf_accel.training import finish
from tests.hub.clients import ended, launch, python, start
from tests.hub.hub_server import Hub, Repository, free_port
from tests.tiny_runs import STEPS, WEIGHTS, assert_same_weights, image_folder, read
from tests.tiny_runs import launch as launch_here

MODEL = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
WHOLE = {".gitattributes", *MODEL, "curves.png", "schedule.png", "recipe.yaml", "results.json", "log_history.json"}
LAST = f"{STEPS} steps, 512 units"
DROPPED_FOR_GOOD = 10**6


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, images, tmp_path_factory) -> Path:
    """A private run as ann/run, whose first upload lost its connection in the middle."""
    hub.drop = 1
    output = tmp_path_factory.mktemp("pushed") / "run"
    assert f"Pushed to {hub.url}/ann/run" in launch(hub.url, images, output, "hub_private=true")
    return output


def of(hub: Hub, name: str = "ann/run") -> Repository:
    return hub.repositories[name]


def only_model_files(repository: Repository) -> set[str]:
    """Paths besides scripts of the model."""
    return {path for path in repository.files if not path.endswith(".py")}


# What arrives


@pytest.mark.slow
def test_a_run_is_pushed_while_it_trains_and_at_the_end(pushed, hub):
    repository = of(hub)
    assert repository.private
    assert hub.uploads[0] == "dropped" and "whole" in hub.uploads
    assert repository.commits[0] == "Step 2, 25% of the budget" and repository.commits[-1] == LAST
    assert only_model_files(repository) == WHOLE
    paths = {path for files in repository.history for path in files}
    assert not [path for path in paths if re.search("optimizer|scheduler|rng|trainer|training|state", path)]
    for name in (WEIGHTS, "config.json", "curves.png"):
        assert repository.files[name] == (pushed / "final" / name).read_bytes()
    assert json.loads(repository.files["results.json"])["knn_top1"] == read(pushed / "results.json")["knn_top1"]
    assert not list((pushed / ".hub").glob("checkpoint-*"))
    assert not [path for path in pushed.rglob("README.md") if path.parent.name != "final"]  # none of the Trainer's


@pytest.mark.slow
def test_nothing_pushed_tells_where_it_lay(pushed, hub, images):
    texts = {path: content for path, content in of(hub).files.items() if not path.endswith((".safetensors", ".png"))}
    for path, content in texts.items():
        for secret in (pushed.parent, images.parent, Path.home()):
            assert str(secret).encode() not in content, path
    assert yaml.safe_load(texts["recipe.yaml"])["data"] == f"…/{images.name}"


LOAD = """
import sys
import torch
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
trust = {"trust_remote_code": True}
assert AutoConfig.from_pretrained("ann/run", **trust).model_type == "accel_vit"
assert AutoImageProcessor.from_pretrained("ann/run", **trust).crop_size["height"] == 16
images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
with torch.no_grad():
    features, *same = [AutoModel.from_pretrained(of, **trust).eval()(images).pooler_output for of in ("ann/run", FINAL)]
    assert features.shape == (2, 32) and torch.equal(features, *same)
    assert AutoBackbone.from_pretrained("ann/run", **trust)(images).feature_maps[0].shape == (2, 32, 4, 4)
    classifier = AutoModelForImageClassification.from_pretrained("ann/run", num_labels=3, **trust)
    assert classifier(images).logits.shape == (2, 3)
    assert AutoModel.from_pretrained(FIRST, **trust).eval()(images).pooler_output.shape == (2, 32)
assert "hf_accel" not in sys.modules
"""


@pytest.mark.slow
def test_whoever_has_transformers_loads_what_the_run_saved(pushed, hub, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    for path, content in of(hub).history[0].items():
        (first / path).write_bytes(content)
    assert "**Training is under way**: 2 steps and 25% of the budget" in (first / "README.md").read_text()
    python(hub.url, f"FINAL = {str(pushed / 'final')!r}; FIRST = {str(first)!r}\n{LOAD}", tmp_path)


@pytest.mark.slow
def test_the_code_of_the_card_runs(pushed, hub, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", of(hub).files["README.md"].decode(), re.DOTALL)
    assert 'model_id = "ann/run"' in code and "patch_size=8" in code
    shapes = "\nprint(tuple(features.shape), tuple(cheaper.shape), torch.equal(features, cheaper))"
    assert python(hub.url, code + shapes, tmp_path).strip() == "(1, 32) (1, 32) False"


@pytest.mark.slow
def test_launched_again_it_pushes_what_is_new_and_only_that(pushed, hub, images):
    commits, uploads = list(of(hub).commits), len(hub.uploads)
    of(hub).files["notes.txt"] = b"of the owner"
    assert "holds all of it" in launch(hub.url, images, pushed)
    assert of(hub).commits == commits
    results = read(pushed / "results.json")
    question = {"evaluation": "linear", "checkpoint": "final", "weights": results["weights"], "data": str(images)}
    question |= {"patch_size": 4, "train_images": 120, "validation": "x/validation", "validation_images": 30}
    add_run(pushed, question, {"seed": 0, "top1": 0.625, "top5": 1.0})
    launch(hub.url, images, pushed, "license=mit")
    assert of(hub).commits == [*commits, LAST]
    assert len(hub.uploads) == uploads  # the weights are there already
    values = ModelCard(of(hub).files["README.md"].decode()).data.to_dict()
    assert values["license"] == "mit"
    names = [metric["name"] for metric in values["model-index"][0]["results"][0]["metrics"]]
    assert "linear probe top-1 accuracy, patches of 4 px" in names
    assert of(hub).files.pop("notes.txt") == b"of the owner"


# Faults


@pytest.mark.slow
def test_a_network_that_fails_costs_nothing_but_the_push(pushed, hub, images, tmp_path):
    hub.drop, output = DROPPED_FOR_GOOD, tmp_path / "cut"
    text = launch(hub.url, images, output, "hub_model_id=ann/cut", status=1)
    assert "Not pushed to ann/cut: Step 2, 25% of the budget (RuntimeError: Error while uploading" in text
    last = text.splitlines()[-1]
    assert last.startswith("PushFailed") and "launch the same command again to push" in last and str(output) in last
    assert of(hub, "ann/cut").commits == []
    assert_same_weights(pushed, output)
    assert not list((output / ".hub").glob("checkpoint-*"))
    hub.drop = 1
    assert "Pushed to" in launch(hub.url, images, output, "hub_model_id=ann/cut")
    assert of(hub, "ann/cut").commits == [LAST] and only_model_files(of(hub, "ann/cut")) == WHOLE


@pytest.mark.slow
def test_a_hub_that_is_down_at_the_start_is_found_later(images, tmp_path):
    port = free_port()
    process = start(f"http://127.0.0.1:{port}", images, tmp_path / "late")
    assert process.stdout
    heard = []
    for line in process.stdout:
        heard.append(line)
        if "The Hub cannot be reached now" in line:
            break
    assert process.poll() is None, heard
    with Hub(port) as hub:
        ended(process)
        assert only_model_files(of(hub, "ann/late")) == WHOLE and of(hub, "ann/late").commits[-1] == LAST


def wait_for_results(hub: Hub, process: subprocess.Popen, output: Path) -> None:
    """Wait until training is over, while the upload of the first checkpoint hangs."""
    assert hub.uploading.wait(200)
    while not (output / "results.json").exists():
        assert process.poll() is None, process.stdout and process.stdout.read()
        hub.hold.wait(0.05)
    assert of(hub).commits == [] and hub.uploads == []


@pytest.mark.slow
def test_steps_do_not_wait_for_an_upload(images, tmp_path):
    with Hub() as hub:
        hub.hold.clear()
        process = start(hub.url, images, tmp_path / "run")
        wait_for_results(hub, process, tmp_path / "run")
        hub.hold.set()
        ended(process)
        assert of(hub).commits == ["Step 2, 25% of the budget", LAST]


@pytest.mark.slow
def test_stopped_run_does_not_wait_for_an_upload(images, tmp_path):
    with Hub() as hub:
        hub.hold.clear()
        process = start(hub.url, images, tmp_path / "run")
        assert hub.uploading.wait(200)
        process.terminate()
        process.communicate(timeout=60)  # The upload hangs on.
        assert process.returncode == 143 and of(hub).commits == [] and hub.uploads == []
        hub.hold.set()


@pytest.mark.slow
def test_of_two_processes_one_pushes_and_neither_waits(images, tmp_path):
    with Hub() as hub:
        hub.hold.clear()
        process = start(hub.url, images, tmp_path / "run", two=True)
        wait_for_results(hub, process, tmp_path / "run")
        hub.drop = 1
        hub.hold.set()
        text, _ = process.communicate(timeout=300)  # its status says little: gloo may abort at exit
        assert text.count(f"Pushed to {hub.url}/ann/run") == 1, text
        assert hub.uploads[0] == "dropped" and of(hub).commits == ["Step 2, 25% of the budget", LAST]
        assert hub.creations == 2  # at the start and at the end, by the one
        assert only_model_files(of(hub)) == WHOLE
    assert read(tmp_path / "run" / "results.json")["processes"] == 2
    assert not list((tmp_path / "run" / ".hub").glob("checkpoint-*"))


REFUSED = """
import os, sys
from hf_accel.hub import Publication
from hf_accel.utils.errors import SettingError
from hf_accel.run import main
from huggingface_hub import constants

def refusal(**keys):
    try:
        Publication("runs/a", **keys).start()
    except SettingError as error:
        return str(error)
print(refusal(name="bob/model"))
print(refusal(name="ann/my model"))
print(refusal(name="ann/model", license="mine"))
print(refusal(name="ann/model", license="mit"))
os.environ["HF_TOKEN"] = "hf_bad"
try:
    main([RECIPE, "push_to_hub=true", "output_dir=bad", "license=mit"])
except SystemExit as error:
    print(error)
del os.environ["HF_TOKEN"]
print(refusal(name="ann/model"))
constants.HF_HUB_OFFLINE = True
print(refusal(name="ann/model"))
"""


@pytest.mark.slow
def test_what_the_hub_refuses_ends_a_run_before_it_begins_and_names_the_fix(hub, tmp_path):
    recipe = f"RECIPE = {str(Path('recipes/moco.yaml').resolve())!r}\n"
    printed = python(hub.url, recipe + REFUSED, tmp_path).splitlines()
    name, characters, license, good, bad, token, offline = printed
    assert "hub_model_id='bob/model': the Hub refuses: 403" in name and "user/name of your own" in name
    assert "hub_model_id='ann/my model'" in characters
    assert license.startswith("license='mine'") and "apache-2.0" in license
    assert good == "None"
    refused = "SettingError: push_to_hub=true, hub_model_id='bad' (the folder's name): the Hub refuses: 401: Invalid"
    assert bad.startswith(refused) and "is the token valid" in bad
    assert not list((tmp_path / "bad").glob("*"))
    assert "hf auth login" in token
    assert "HF_HUB_OFFLINE" in offline and "push_to_hub=false" in offline


STALE = """
from pathlib import Path
from hf_accel.hub import HubRepository
for files in ({"a.txt": b"1", "last-checkpoint/b.txt": b"2"}, {"a.txt": b"3"}):
    HubRepository("ann/stale", False, Path(".hub")).push(files, "push")
"""


@pytest.mark.slow
def test_a_push_removes_what_earlier_ones_left_and_nothing_else(hub, tmp_path):
    python(hub.url, STALE, tmp_path)
    repository = of(hub, "ann/stale")
    assert set(repository.history[0]) == {".gitattributes", "a.txt", "last-checkpoint/b.txt"}
    assert set(repository.files) == {".gitattributes", "a.txt"} and repository.files["a.txt"] == b"3"


@pytest.mark.slow
def test_from_the_optimizer_if_asked_for_others_resume(pushed, hub, images, tmp_path):
    launch(hub.url, images, tmp_path / "full", "hub_model_id=ann/full", "hub_optimizer=true", "save_steps=6")
    files = of(hub, "ann/full").files
    assert of(hub, "ann/full").commits == ["Step 6, 75% of the budget", LAST]
    state = {path.partition("/")[2]: content for path, content in files.items() if path.startswith("last-checkpoint/")}
    assert {"optimizer.pt", "run_state.json", "trainer_state.json"} <= state.keys()
    assert {path for path in files if "/" not in path and not path.endswith(".py")} == WHOLE
    folder = tmp_path / "other" / f"checkpoint-{json.loads(state['run_state.json'])['step']}"
    folder.mkdir(parents=True)
    for name, content in state.items():
        (folder / name).write_bytes(content)
    text = launch(hub.url, images, tmp_path / "other", "push_to_hub=false")
    assert "Resuming from" in text
    assert_same_weights(pushed, tmp_path / "other")


# task=card


@pytest.fixture
def titles(monkeypatch) -> list[str]:
    """Of the training curves that are drawn."""
    found, plot_curves = [], finish.plot_curves

    def plot(*args, title, **kwargs):
        found.append(title)
        plot_curves(*args, title=title, **kwargs)

    monkeypatch.setattr(finish, "plot_curves", plot)
    return found


@pytest.fixture
def no_push(tmp_path, images, own_cache_and_threads, titles) -> Path:
    return launch_here(images, tmp_path / "run", "eval_points=[0.0, 1.0]", "license=mit")


@pytest.mark.slow
def test_task_card_writes_it_anew_and_keeps_what_is_somebodys_own(no_push, images, tmp_path, titles):
    assert titles == [f"moco on {images.name}"]  # a figure, too, tells no path
    path = no_push / "final" / "README.md"
    first = path.read_text()
    assert "license: mit" in first and 'model_id = "."  #' in first and str(tmp_path) not in first
    (code,) = re.findall(r"```python\n(.*?)```", first, re.DOTALL)
    shapes = "\nprint(tuple(features.shape), tuple(cheaper.shape))"
    there = f"import os\nos.chdir({str(path.parent)!r})\n"  # "." is the folder of the encoder
    assert python("http://127.0.0.1:9", there + code + shapes, tmp_path).strip() == "(1, 32) (1, 32)"
    assert {"curves.png", "schedule.png"} <= {file.name for file in path.parent.iterdir()}
    path.unlink()
    card = ["task=card", f"checkpoint={no_push / 'final'}"]
    launch_here(images, tmp_path / "unused", *card)
    assert path.read_text() == first and not (tmp_path / "unused").exists()

    with pytest.raises(SystemExit, match=r"baseline=.*nothing.*no complete run"):
        launch_here(images, tmp_path / "unused", *card, f"baseline={tmp_path / 'nothing'}")
    shutil.copytree(no_push, tmp_path / "base")
    launch_here(images, tmp_path / "unused", *card, f"baseline={tmp_path / 'base'}", "hub_model_id=ann/run")
    text = path.read_text()
    assert "| base, to compare with (measured) | 512 | 8 | 128 |" in text and 'model_id = "ann/run"' in text
    launch_here(images, tmp_path / "unused", *card, "hub_model_id=ann/run")
    assert path.read_text() == text  # the comparison stays with the results

    path.write_text("my own words")
    with pytest.raises(SystemExit, match="somebody's own"):
        launch_here(images, tmp_path / "unused", *card)
    assert path.read_text() == "my own words"


def test_task_card_of_no_run_names_it(tmp_path, images):
    with pytest.raises(SystemExit, match=r"checkpoint=.*nothing.*no complete run"):
        launch_here(images, tmp_path / "unused", "task=card", f"checkpoint={tmp_path / 'nothing'}")
