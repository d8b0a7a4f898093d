"""`hf-accel plan`: what it prints, and that it leaves the folder of a run alone."""

import re
from pathlib import Path

import PIL.Image
import pytest
import yaml

from hf_accel import cli
from hf_accel.run_folder import RunFolder
from hf_accel.training.memory import OutOfMemory
from hf_accel.training.trainer import PretrainTrainer
from tests.tiny_runs import RECIPE, image_folder

pytestmark = pytest.mark.usefixtures("own_cache_and_threads")

STAGES = "schedule=[{until: 0.25, patch_size: 8, token_dropout: 0.5}, {until: 0.5, patch_size: 8}, {until: 1.0}]"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    path = folder / "recipe.yaml"
    data = image_folder(folder / "images")
    one = next(data.rglob("*.png"))
    PIL.Image.open(one).resize((20, 30)).save(one)  # Images of one size would be held in memory anyway.
    path.write_text(yaml.safe_dump({**RECIPE, "data": str(data), "output_dir": str(folder / "run")}))
    return path


def test_plan_shows_every_stage_and_trains_nothing(recipe, monkeypatch, capsys):
    monkeypatch.setattr(PretrainTrainer, "train", None)
    cli.main(["plan", str(recipe), STAGES, "push_to_hub=true", "report_to=[tensorboard]", "cache=ram"])
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["stage", "patch size", "token dropout", "tokens", "steps", "units", "time", "peak memory"]
    compressions = [row[1:4] for row in rows[1:4]]
    assert compressions == [["p8", "0.5", "3"], ["p8", "0", "5"], ["p4", "0", "17"]]
    assert [row[0].partition(" ")[0] for row in rows[1:]] == ["1", "2", "3", "whole"] and "(until 100%)" in rows[3][0]
    for column in (4, 5):
        numbers = [int(row[column].replace(",", "")) for row in rows[1:]]
        assert sum(numbers[:3]) == pytest.approx(numbers[3], abs=2) and min(numbers) > 0
    assert all(re.fullmatch(r"[\d.e-]+ (s|min|h)", row[6]) and row[7].endswith(" GB") for row in rows[1:])
    assert not (recipe.parent / "run").exists() and "schedule=auto" not in text
    assert "cache=ram: a run decodes all images once" in text


@pytest.mark.parametrize(("named", "steps"), [((), 8), (("schedule=standard",), 21)])
def test_plan_keeps_the_defaults_that_a_run_began_with(recipe, capsys, named, steps):
    run = RunFolder(recipe.parent / "begun")
    run.path.mkdir(exist_ok=True)
    run.recipe.write_text("schedule: null\n")
    values = {key: value for key, value in yaml.safe_load(recipe.read_text()).items() if key != "schedule"}
    (path := recipe.with_name("open.yaml")).write_text(yaml.safe_dump({**values, "output_dir": str(run.path)}))
    cli.main(["plan", str(path), *named])
    assert f"Budget: {steps} steps" in capsys.readouterr().out


def test_plan_works_beside_a_run_and_leaves_it_as_it_is(recipe, capsys):
    run = RunFolder(recipe.parent / "beside")
    run.path.mkdir()
    run.recipe.write_text("mixed_precision: bf16\nseed: 3\n")
    with run.lock():
        before = {path: path.read_bytes() for path in run.path.rglob("*")}
        cli.main(["plan", str(recipe), f"output_dir={run.path}", "cost=measured"])
        assert {path: path.read_bytes() for path in run.path.rglob("*")} == before
    assert "precision: bf16" in capsys.readouterr().out  # as the run was started


def test_plan_of_auto_shows_the_ladder_until_its_deadlines(recipe, capsys):
    cli.main(["plan", str(recipe), "schedule=auto", "budget=20000", "auto_share=0.5", "auto_draws=3", "cache=none"])
    text = capsys.readouterr().out
    assert "cache=" not in text
    assert "1 (until 80%)" in text and "2 (until 100%)" in text and "the deadlines only" in text and "up to 50%" in text


def test_plan_ends_with_one_line_where_it_cannot_be_made(recipe, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    with pytest.raises(SystemExit, match="did you mean 'batch_size'"):
        cli.main(["plan", str(recipe), "bacth_size=3"])
    monkeypatch.setattr("hf_accel.training.timing._Timer.take_step", fail)
    with pytest.raises(SystemExit, match=f"^{OutOfMemory.__name__}: cpu has too little memory for .*steps=2"):
        cli.main(["plan", str(recipe)])
