"""`learning_rate: auto` (None in Python): the objective's published rate, scaled with the batch."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import ViTConfig, ViTModel

import hf_accel.run as entry
from hf_accel import DINOForPreTraining, MoCoForPreTraining, PretrainTrainer, SimCLRForPreTraining, vit_tiny
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.training.console import describe_run
from hf_accel.training.record import describe_settings
from hf_accel.utils.errors import SettingError
from tests.checkpoints.test_starting import saved
from tests.objectives.fourth_objective import SimSiamForPreTraining
from tests.tiny_runs import RECIPE, STEPS, assert_same_weights, image_folder, launch, read
from tests.training.test_front_door import HEADS, SIZES, Tensors, config

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

PUBLISHED: dict[str, tuple[Any, int, float]] = {
    # moco-v3, CONFIG.md: --lr=1.5e-4 with 4,096 images; main_moco.py: init_lr = args.lr * args.batch_size / 256
    "moco": (MoCoForPreTraining, 4096, 2.4e-3),
    # SLIP, README.md: SimCLR ViT-Base with 8 nodes (batch size 4096), --lr 3.2e-3
    "simclr": (SimCLRForPreTraining, 4096, 3.2e-3),
    # DINO, main_dino.py: lr 0.0005 * (batch_size_per_gpu * world_size) / 256., of ViT-S/16 with 1,024 images
    "dino": (DINOForPreTraining, 1024, 2e-3),
}
"""For each objective a batch that its authors trained with, and the highest learning rate that they had."""

AUTO = "learning_rate=auto"


def small(kind: Any) -> Any:
    return kind(vit_tiny(**SIZES), **({} if kind is DINOForPreTraining else HEADS))


@pytest.mark.parametrize("name", PUBLISHED)
def test_auto_is_the_published_learning_rate(name, tmp_path):
    kind, batch, rate = PUBLISHED[name]
    overrides = ["budget=1 epoch", f"objective={name}", AUTO]
    recipe = load_recipe(None, [*overrides, f"batch_size={batch}"])
    assert recipe.used()["learning_rate"] == pytest.approx(rate, rel=1e-12)
    trainer = PretrainTrainer(small(kind), config(tmp_path, learning_rate=None, batch_size=32), Tensors())
    assert trainer.args.learning_rate == pytest.approx(rate * 32 / batch, rel=1e-12)
    named = PretrainTrainer(small(kind), config(tmp_path, learning_rate=0.5, batch_size=32), Tensors())
    assert named.args.learning_rate == 0.5


def test_every_objective_of_the_package_is_compared():
    assert set(PUBLISHED) == {name for name in OBJECTIVES if name != "simsiam"}


def test_auto_counts_the_images_of_a_whole_step(tmp_path):
    args = config(tmp_path, learning_rate=None, batch_size=32, gradient_accumulation_steps=4)
    assert PretrainTrainer(small(MoCoForPreTraining), args, Tensors()).args.learning_rate == 1.5e-4 * 32 / 256
    recipe = load_recipe(None, ["budget=1", AUTO, "batch_size=32", "gradient_accumulation_steps=4"])
    assert recipe.used()["learning_rate"] == 1.5e-4 * 32 / 256


def test_a_config_with_auto_serves_two_trainers(tmp_path):
    args = config(tmp_path, learning_rate=None)
    rates = [PretrainTrainer(small(PUBLISHED[name][0]), args, Tensors()).args.learning_rate for name in PUBLISHED]
    assert rates == [rate * 16 / batch for _, batch, rate in PUBLISHED.values()] and args.learning_rate is None


def test_the_default_learning_rate_stays(tmp_path):
    assert load_recipe(None, ["budget=1", "objective=dino"]).used()["learning_rate"] == 1.5e-4
    trainer = PretrainTrainer(small(DINOForPreTraining), config(tmp_path, batch_size=32), Tensors())
    assert trainer.args.learning_rate == 1.5e-4
    assert not [line for line in describe_run(trainer) if line.startswith("Rate:")]


def test_an_objective_without_a_rule_refuses_auto(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "simsiam", SimSiamForPreTraining)
    message = "learning_rate='auto': simsiam has no base_learning_rate: give a number, or set it in its class"
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, ["budget=1", "objective=simsiam", AUTO])
    model = SimSiamForPreTraining(vit_tiny(**SIZES), projector_hidden_size=32, projection_size=16)
    with pytest.raises(SettingError, match=message):
        PretrainTrainer(model, config(tmp_path, learning_rate=None), Tensors())


@pytest.mark.parametrize("value", ["automatic", "fast", "[auto]", "0.0"])
def test_other_learning_rates_than_numbers_and_auto_are_refused(value):
    with pytest.raises(RecipeError, match=r"learning_rate=.*(expected float or auto|above 0)"):
        load_recipe(None, ["budget=1", f"learning_rate={value}"])


def test_released_weights_are_continued_at_most_at_the_rate_of_moco(tmp_path):
    saved(ViTModel(ViTConfig(**SIZES)), tmp_path / "released")
    for name, (kind, _, _) in PUBLISHED.items():
        values = ["budget=1", f"objective={name}", AUTO, "batch_size=32", f"init_from={tmp_path / 'released'}"]
        assert load_recipe(None, values).used()["learning_rate"] == 1.5e-4 * 32 / 256
        model = kind.from_encoder(tmp_path / "released")
        trainer = PretrainTrainer(model, config(tmp_path, learning_rate=None, batch_size=32), Tensors())
        assert trainer.args.learning_rate == 1.5e-4 * 32 / 256


def test_a_run_that_is_continued_keeps_the_rate_of_released_weights():
    """Its record names the weights in the encoder's configuration."""
    values = ["budget=1", "objective=dino", AUTO, "batch_size=32", "model_config.init_from={name: released}"]
    assert load_recipe(None, values).used()["learning_rate"] == 1.5e-4 * 32 / 256


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


def test_a_run_says_and_records_the_number(images, tmp_path, capsys):
    """Opening lines, log, results and record. The card takes it from the record."""
    output, rate = launch(images, tmp_path / "run", AUTO, "warmup=0"), 1.5e-4 * 16 / 256
    said = f"Rate:   {rate:g}, that is 0.00015 for 256 images, scaled to 16 (learning_rate=auto)"
    assert said in capsys.readouterr().out.splitlines()
    assert yaml.safe_load((output / "recipe.yaml").read_text())["learning_rate"] == rate
    assert read(output / "results.json")["learning_rate"] == rate
    first = next(line for line in read(output / "log_history.json")["log_history"] if "loss" in line)
    assert first["learning_rate"] == rate
    assert "9.375e-06" in (output / "final" / "README.md").read_text().replace("9.375e-6", "9.375e-06")


def test_the_record_of_a_run_in_python_holds_the_number(tmp_path):
    trainer = PretrainTrainer(small(MoCoForPreTraining), config(tmp_path, learning_rate=None), Tensors())
    assert describe_settings(trainer)["learning_rate"] == 1.5e-4 * 16 / 256


@pytest.mark.slow
@pytest.mark.parametrize("resumed_with", [AUTO, f"learning_rate={1.5e-4 * 16 / 256}"])
def test_a_run_with_auto_resumes_with_the_same_rate(images, tmp_path, monkeypatch, capsys, resumed_with):
    whole, steps = launch(images, tmp_path / "whole", AUTO), []
    true_update = MoCoForPreTraining.update_target

    def interrupt(self, progress):
        steps.append(progress)
        if len(steps) == STEPS // 2 + 1:
            raise KeyboardInterrupt
        true_update(self, progress)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="Interrupted"):
        patch.setattr(MoCoForPreTraining, "update_target", interrupt)
        launch(images, tmp_path / "run", AUTO)
    capsys.readouterr()
    launch(images, tmp_path / "run", resumed_with)
    said = capsys.readouterr().out
    assert "Resuming from" in said and "Continuing with learning_rate" not in said
    assert_same_weights(tmp_path / "run", whole)
    assert read(tmp_path / "run" / "results.json")["learning_rate"] == 1.5e-4 * 16 / 256


def test_the_plan_of_a_run_says_the_number(images, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(images), "output_dir": str(tmp_path / "run")}))
    entry.start([str(recipe), AUTO, "objective=simclr"], "plan")
    assert "Rate:   1.25e-05, that is 0.0002 for 256 images, scaled to 16" in capsys.readouterr().out
