"""Pretraining from Python, as README and docs show it."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoModel, HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.utils import logging as library_logging

from hf_accel import (
    Compression,
    MoCoForPreTraining,
    PretrainConfig,
    PretrainTrainer,
    Schedule,
    SimCLRForPreTraining,
    Strategy,
    estimate_gradient_errors,
    vit_small,
    vit_tiny,
)
from hf_accel.compression.schedule import Stage
from hf_accel.hub.repository import PushFailed, PushRefused
from hf_accel.recipe import PretrainRecipe
from hf_accel.run_folder import RunFolder
from hf_accel.tasks.setup import pretrain_config
from hf_accel.training.console import describe_run
from hf_accel.training.record import describe_settings
from hf_accel.training.saving import TrainingDiverged
from tests.tiny_runs import WEIGHTS, assert_same_weights, image_folder

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    **{"image_size": 16, "patch_size": 4},
}
HEADS: dict[str, Any] = {"projector_hidden_size": 32, "projection_size": 16}
QUICK: dict[str, Any] = {
    **{"batch_size": 16, "logging_steps": 1, "report_to": "none", "save_steps": 3, "bf16": False, "eval_points": [1.0]},
    "schedule": None,
}


def moco() -> MoCoForPreTraining:
    torch.manual_seed(0)
    return MoCoForPreTraining(vit_tiny(**SIZES), **HEADS)


def config(folder: Path, **settings: Any) -> PretrainConfig:
    return PretrainConfig(str(folder), **{"budget": "1 epoch", **QUICK, **settings})


class Tensors(Dataset):
    """uint8 tensors with labels, in tuples."""

    def __init__(self, count: int = 96):
        colours = torch.eye(3, dtype=torch.uint8)[torch.arange(count) % 3] * 150
        noise = torch.randint(0, 100, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        self.images = colours[:, :, None, None] + noise.to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index], index % 3


def test_the_script_of_the_readme(tmp_path, monkeypatch):
    """Every line of it, with sizes and data overridden."""
    folder = image_folder(tmp_path / "photos")
    text = (Path(__file__).parents[2] / "README.md").read_text()
    script = next(block for block in text.split("```") if block.startswith("python") and "PretrainTrainer" in block)
    pushed: list[dict[str, Any]] = []
    monkeypatch.setattr(
        PretrainTrainer, "push_to_hub", lambda self, *_, **__: pushed.append(self.folder.read_results())
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", loading(folder))
    monkeypatch.setattr(
        "hf_accel.training.config.PretrainConfig.__init__", with_defaults(QUICK | {"auto_share": 0.9, "auto_draws": 3})
    )
    script = (
        script.removeprefix("python").replace('"100 epochs"', '"6 epochs"').replace("vit_small())", "small(), **HEADS)")
    )
    exec(compile(script, "README.md", "exec"), {"small": lambda: vit_small(**SIZES), "HEADS": HEADS})
    assert len(pushed) == 1 and pushed[0]["knn_top1"] is None and pushed[0]["units"] > 0
    encoder = AutoModel.from_pretrained(tmp_path / "runs/photos/final")
    assert encoder.config.hidden_size == 32


def loading(folder: Path):
    load = datasets.load_dataset
    return lambda kind, data_dir, split: load(kind, data_dir=str(folder), split=split)


def with_defaults(settings: dict[str, Any]):
    made = PretrainConfig.__init__
    return lambda self, *args, **given: made(self, *args, **{**settings, **given})


def test_a_torch_dataset_of_uint8_tensors(tmp_path):
    schedule = Schedule((Stage(0.5, Strategy(Compression(8))), Stage(1.0, Strategy(Compression(4)))))
    args = config(tmp_path / "run", schedule=schedule, eval_points=[0.0, 1.0])
    trainer = PretrainTrainer(moco(), args, Tensors(), eval_dataset=Tensors(30))
    trainer.train()
    assert replace(args, batch_size=32).batch_size == 32  # A run leaves nothing in its settings that a copy refuses.
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"knn_top1", "knn_top1_random_init", "knn_top1_raw_pixels", "units", "budget", "weights"} <= set(results)
    assert results["knn_top1"] > 0.5 and results["budget"] == 96 * 4 and results["seconds"]["total"] > 0
    assert [stage["patch_size"] for stage in results["schedule"]] == [8, 4]
    trainer.save_model(str(tmp_path / "encoder"))
    encoder = AutoModel.from_pretrained(tmp_path / "encoder")
    for name, value in trainer.objective.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    assert AutoImageProcessor.from_pretrained(tmp_path / "encoder").crop_size["height"] == 16
    assert (tmp_path / "encoder" / "modeling_accel_vit.py").exists()


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_train_refuses_a_run_and_resumes_it_exactly(tmp_path):
    PretrainTrainer(moco(), config(tmp_path / "whole"), Tensors(), Tensors(30)).train()
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(), Tensors(30), callbacks=[StopAt(5)])
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()

    def again(images: int = 96, name: str = "run", **settings: Any) -> PretrainTrainer:
        return PretrainTrainer(moco(), config(tmp_path / name, **settings), Tensors(images), Tensors(30))

    with pytest.raises(ValueError, match="it holds a run; resume it with"):
        again().train()
    changes: list[tuple[dict[str, Any], str]] = [({"seed": 1}, "seed=0"), ({"augmentation": "digits"}, "augmentation=")]
    for changed, begun in changes:
        with pytest.raises(ValueError, match=rf"^{next(iter(changed))}=.* holds a run with {begun}"):
            again(**changed).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="was trained on 96 images, and now there are 80: restore them"):
        again(images=80).train(resume_from_checkpoint=True)
    other = again(name="other")
    with pytest.raises(ValueError, match=r"checkpoint-2': it cannot be resumed from: there is no such folder$"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert other.state.global_step == 6 and other._first_step == 3
    again(knn_k=3, logging_steps=2, eval_points=[0.5]).train(resume_from_checkpoint=True)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(ValueError, match="its run is complete"):
        again().train(resume_from_checkpoint=True)


def test_a_folder_that_is_no_checkpoint_is_not_called_an_interrupted_one(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors())
    for name, what in (
        ("final", "it holds an encoder and is no"),
        ("best", "it holds an encoder and is no"),
        ("", "it is no"),
    ):
        folder = trainer.folder.path / name
        if name:
            trainer.save_model(str(folder))
        for given in (folder, str(folder)):
            with pytest.raises(
                ValueError, match=rf"='{folder}': {what} training checkpoint; name a folder checkpoint-N"
            ):
                trainer.train(resume_from_checkpoint=given)
    (tmp_path / "run/checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"it was interrupted while it was saved"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))


@pytest.mark.slow
def test_a_run_that_diverged_before_its_first_checkpoint_restarts_with_a_lower_rate(tmp_path, capsys):
    def trainer(rate: float) -> PretrainTrainer:
        return PretrainTrainer(moco(), config(tmp_path / "run", learning_rate=rate, warmup=0.0), Tensors())

    with pytest.raises(TrainingDiverged, match=r"Last good checkpoint: none yet\. Try a lower learning_rate"):
        trainer(1e30).train()
    again = trainer(1e-3)
    with pytest.raises(ValueError, match="holds no complete checkpoint; leave it out to start"):
        again.train(resume_from_checkpoint=True)
    again.train()
    assert (
        "\nStarting from the beginning with learning_rate=0.001, as no checkpoint was saved with 1"
        in capsys.readouterr().out
    )
    assert again.folder.is_complete() and again.folder.read_recipe()["learning_rate"] == 1e-3


def test_a_resumed_run_repeats_no_warning_of_transformers(tmp_path, caplog):
    often = config(tmp_path, save_steps=0.4)  # The checkpoint's state has the steps that this makes.
    with pytest.raises(KeyboardInterrupt):
        PretrainTrainer(moco(), often, Tensors(), callbacks=[StopAt(5)]).train()
    library_logging.enable_propagation()
    try:
        PretrainTrainer(moco(), often, Tensors()).train(resume_from_checkpoint=True)
    finally:
        library_logging.disable_propagation()
    assert not [record for record in caplog.records if record.name.startswith("transformers")]


def test_callbacks_see_every_step_and_the_rate_of_each_group(tmp_path):
    model, rates, seen = moco(), [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append("step")

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.extend(["log"] if logs and "loss" in logs else [])

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in cast(Any, trainer.optimizer).param_groups])

    heads = [*model.projector.parameters(), *model.predictor.parameters()]
    body = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": body, "lr": 1e-3}, {"params": heads, "lr": 4e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
    args = config(tmp_path / "run", learning_rate=1e-3, warmup=0.5, weight_decay=0.0)
    trainer = PretrainTrainer(model, args, Tensors(), callbacks=[Watch()], optimizers=(optimizer, None))
    trainer.train()
    assert len(rates) == seen.count("step") == seen.count("log") == 6 and len({rate[0] for rate in rates}) > 3
    assert all(rate[1] == pytest.approx(4 * rate[0]) for rate in rates)


def test_push_before_the_end_and_too_small_sets_are_refused(tmp_path, monkeypatch):
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors())
    with pytest.raises(ValueError, match=r"its run is not finished; call train\(\) first"):
        trainer.push_to_hub()
    monkeypatch.setattr(PretrainTrainer, "is_world_process_zero", lambda self: False)
    trainer.push_to_hub()  # Other processes may come here before the main one has written the last files.
    trainer.create_model_card()
    with pytest.raises(ValueError, match=r"batch_size=16: .*has only 12 images"):
        PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(12))
    with pytest.raises(ValueError, match=r"batch_size=16: .*has only 1 image$"):
        PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(1))


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("num_train_epochs", 5, "budget='N epochs'"),
        ("max_steps", 100, "set budget"),
        ("lr_scheduler_type", "cosine", "lr_schedule"),
        ("warmup_steps", 10, "warmup"),
        ("per_device_train_batch_size", 4, "batch_size"),
        ("auto_find_batch_size", True, "gradient_accumulation_steps"),
        ("eval_strategy", "steps", "eval_points"),
    ],
)
def test_arguments_without_meaning_are_refused(tmp_path, name, value, instead):
    with pytest.raises(ValueError, match=rf"{name}=.*has no meaning here; .*{instead}"):
        config(tmp_path, **{name: value})


def test_impossible_settings_name_themselves(tmp_path):
    cases = {"budget": None, "warmup": 2.0, "augmentation": "mocco", "save_total_limit": 1, "knn_k": 0}
    cases["save_only_model"] = True
    for name, value in cases.items():
        with pytest.raises(ValueError, match=f"^{name}="):
            config(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="budget='10 years': must be a number of units or, as '100 epochs'"):
        config(tmp_path, budget="10 years")


def test_the_command_line_of_transformers_parses_it(tmp_path):
    parser: Any = HfArgumentParser(PretrainConfig)  # pyright: ignore[reportArgumentType]
    words = ["--output_dir", str(tmp_path), "--budget", "2 epochs", "--eval_points", "0", "1", "--bf16", "False"]
    (args,) = parser.parse_args_into_dataclasses([*words, "--schedule", "auto", "--weight_decay_end", "0.4"])
    assert args.budget == "2 epochs" and args.eval_points == [0.0, 1.0] and args.schedule == "auto"
    assert args.weight_decay_end == 0.4 and args.batch_size == 256 and isinstance(args, TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--budget", "4e5"])
    assert args.budget == 4e5


def test_defaults_are_those_of_recipes():
    of_recipe, of_class = pretrain_config(PretrainRecipe(budget=1.0)).to_dict(), PretrainConfig(budget=1.0).to_dict()
    differ = {key for key in of_class if of_recipe[key] != of_class[key]}
    assert differ <= {"logging_dir", "run_name", "dataloader_num_workers"}  # the last is "auto" in recipes


def test_gradient_errors_of_a_model(tmp_path):
    model, data = moco(), Tensors()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cheap, base = Strategy(Compression(8)), Strategy(Compression(4))
    errors = estimate_gradient_errors(model, config(tmp_path), data, [base, cheap], draws=4)
    assert errors[base].bias2 == 0 and errors[cheap].bias2 != 0 == errors[base].ca_variance - errors[base].variance
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(estimate_gradient_errors(model, config(tmp_path), data, draws=3)) == 2 * 4  # patches of 4 and 8


def test_images_of_several_sizes_and_simclr(tmp_path):
    images = [PIL.Image.fromarray(np.full((20 + i % 5, 24, 3), i, np.uint8)) for i in range(40)]
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))
    model = SimCLRForPreTraining(vit_tiny(**SIZES), **HEADS)
    PretrainTrainer(model, config(tmp_path / "run"), table).train()
    assert (tmp_path / "run" / "final" / WEIGHTS).exists()


def test_settings_are_compared_once_the_lock_is_free(tmp_path, monkeypatch):
    lock = RunFolder.lock

    @contextmanager
    def waited(folder):  # Another launch has begun with this folder, and then the lock is free.
        with lock(folder):
            folder.recipe.write_text("{task: pretrain, seed: 1}")
            yield

    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors())
    monkeypatch.setattr(RunFolder, "lock", waited)
    with pytest.raises(ValueError, match=r"seed=0: .* holds a run with seed=1"):
        trainer.train(resume_from_checkpoint="auto")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_pinned_memory_can_be_turned_off(tmp_path, monkeypatch):
    trainer, pinned = PretrainTrainer(moco(), config(tmp_path), Tensors()), []
    loader = Mock(side_effect=lambda *_, pin_memory: pinned.append(pin_memory) or Mock())
    monkeypatch.setattr("hf_accel.training.trainer.train_loader", loader)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    for trainer.args.dataloader_pin_memory in (True, False):
        trainer.get_train_dataloader()
    assert pinned == [True, False]


def test_weight_decay_that_begins_at_0_is_for_matrices(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path, weight_decay=0.0, weight_decay_end=0.4), Tensors())
    groups = trainer.create_optimizer().param_groups
    assert [{p.ndim > 1 for p in group["params"]} for group in groups] == [{True}, {False}]
    assert [group["weight_decay_factor"] for group in groups] == [1.0, 0.0]


class Ask(TrainerCallback):
    """Asks for a stop at an event, as EarlyStoppingCallback does."""

    def __init__(self, event: str, what: str = "should_training_stop"):
        setattr(self, event, self.ask)
        self.what = what

    def ask(self, args, state, control, **kwargs):
        if state.global_step == 4:
            setattr(control, self.what, True)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_step_begin", "should_epoch_stop"])
def test_a_run_that_a_callback_stops_is_not_finished(tmp_path, capsys, event):
    """The budget pays for 6 steps."""
    ask = Ask("on_step_end", event) if event.startswith("should") else Ask(event)
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors())
    trainer.add_callback(ask)
    trainer.train()
    step = 5 if event == "on_step_begin" else 4
    assert trainer.stopped and trainer.state.global_step == step and not trainer.folder.is_complete()
    assert (
        f"A callback stopped training at step {step} of 6. The run is not finished: train(" in capsys.readouterr().out
    )
    assert not trainer.folder.final.exists()
    assert trainer.folder.last_complete_checkpoint() == trainer.folder.checkpoint(step)
    if event == "on_log":
        again = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors())
        again.train(resume_from_checkpoint=True)
        PretrainTrainer(moco(), config(tmp_path / "whole"), Tensors()).train()
        assert_same_weights(tmp_path / "run", tmp_path / "whole")
        assert [e["step"] for e in again.state.log_history if "loss" in e] == [1, 2, 3, 4, 5, 6]


def test_auto_returns_a_complete_run_with_its_weights(tmp_path, capsys):
    """As a job does that a queue starts again."""
    first: Any = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors())
    wanted = first.train(resume_from_checkpoint="auto")
    written = first.folder.results.stat().st_mtime_ns
    capsys.readouterr()

    def again(**settings: Any) -> Any:
        torch.manual_seed(1)
        model = MoCoForPreTraining(vit_tiny(**SIZES), **HEADS)
        trainer: Any = PretrainTrainer(model, config(tmp_path / "run", **settings), Tensors())
        assert trainer.train(resume_from_checkpoint="auto").global_step == 6
        return trainer

    shutil.rmtree(first.folder.final)
    second = again()
    assert "This run is complete: " in capsys.readouterr().out and (first.folder.final / WEIGHTS).exists()
    for name, value in first.objective.state_dict().items():
        assert torch.equal(second.objective.state_dict()[name], value), name
    assert second.train(resume_from_checkpoint="auto").training_loss == pytest.approx(wanted.training_loss)
    shutil.rmtree(first.folder.checkpoint(6))
    third = again()
    for name, value in first.objective.encoder.state_dict().items():
        assert torch.equal(third.objective.encoder.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"augmentation='digits': .* holds a run with augmentation='moco'"):
        again(augmentation="digits")
    assert first.folder.results.stat().st_mtime_ns == written


def test_a_trainer_evaluates_before_training(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(), Tensors(30))
    before = trainer.evaluate()
    assert 0.0 <= before["eval_knn_top1"] <= 1.0 and before["eval_rank_me"] > 0
    assert trainer.results()["steps"] == 0 and not trainer.folder.recipe.exists()


@pytest.mark.slow
def test_a_trainer_evaluates_around_training_and_counts_only_what_lies_within(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(), Tensors(30))
    trainer.evaluate()
    trainer.seconds["evaluation"] = trainer.seconds["total"] = trainer.cpu_seconds = 1e6
    trainer.train()
    seconds = trainer.folder.read_results()["seconds"]
    assert seconds["rest"] >= 0 and seconds["total"] < 1e6 > trainer.cpu_seconds
    again = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(), Tensors(30))
    again.train(resume_from_checkpoint="auto")
    assert again.evaluate() == trainer.evaluate()


OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adam_epsilon": ({}, {"adam_epsilon": 1.0}),
    "optim_args": ({"optim": "rmsprop"}, {"optim": "rmsprop", "optim_args": "momentum=0.5"}),
    "tf32": ({}, {"tf32": False}),
}


@pytest.mark.parametrize("key", OPTIMIZERS)
def test_settings_of_the_optimizer_are_recorded(tmp_path, key):
    first, second = OPTIMIZERS[key]
    recorded = describe_settings(PretrainTrainer(moco(), config(tmp_path, **first), Tensors()))
    now = describe_settings(PretrainTrainer(moco(), config(tmp_path, **second), Tensors()))
    assert [name for name in now if now[name] != recorded[name]] == [key]
    run = RunFolder(tmp_path)
    run.recipe.write_text(yaml.safe_dump(recorded))
    run.results.write_text('{"units": 1.0}')
    with pytest.raises(ValueError, match=f"^{key}=.*which is complete"):
        PretrainTrainer(moco(), config(tmp_path, **second), Tensors()).train(resume_from_checkpoint="auto")


def test_a_program_records_the_stages_of_a_schedule_file(tmp_path):
    path, run = tmp_path / "stages.yaml", RunFolder(tmp_path / "run")
    path.write_text("[{until: 0.5, patch_size: 8}, {until: 1.0}]")
    trainer = PretrainTrainer(moco(), config(run.path, schedule=str(path)), Tensors())
    recorded = describe_settings(trainer)
    assert recorded["schedule"] == trainer.schedule.to_list() and len(recorded["schedule"]) == 2
    run.recipe.write_text(yaml.safe_dump(recorded))
    path.write_text("[{until: 0.75, patch_size: 8}, {until: 1.0}]")
    with pytest.raises(ValueError, match=rf"^schedule='{path}': .*stage 1 had until=0.5 and now has 0.75"):
        PretrainTrainer(moco(), config(run.path, schedule=str(path)), Tensors()).train(resume_from_checkpoint="auto")
    path.unlink()
    with pytest.raises(ValueError, match=rf"^schedule='{path}': .*give the stages that {run.recipe} holds$"):
        config(run.path, schedule=str(path))


def test_a_programs_own_optimizer_is_recorded(tmp_path):
    def recorded(factor: float = 1.0, kind: Any = torch.optim.AdamW, **settings: Any) -> Any:
        model, args = moco(), config(tmp_path, learning_rate=1e-3 * factor)
        optimizer = kind(model.parameters(), lr=2e-3 * factor, **settings)
        trainer = PretrainTrainer(model, args, Tensors(), optimizers=(optimizer, None))
        found = describe_settings(trainer)["optimizer"]
        assert yaml.safe_load(yaml.safe_dump(found)) == found
        return found

    first = recorded()
    assert first["class"] == "AdamW" and first["groups"][0]["lr_factor"] == 2 and "params" not in first["groups"][0]
    assert recorded() == recorded(factor=0.5) == first
    others = [recorded(eps=1.0), recorded(betas=(0.5, 0.9)), recorded(kind=torch.optim.NAdam)]
    assert first not in others and len({str(one) for one in others}) == 3
    made = PretrainTrainer(moco(), config(tmp_path), Tensors(), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1}))
    assert describe_settings(made)["optimizer"] == {"class": "SGD", "lr": 1}


def test_a_run_recorded_without_the_newer_settings_resumes(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(), callbacks=[StopAt(5)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    recorded = trainer.folder.read_recipe()
    for key in ("adam_epsilon", "optim_args", "optim_target_modules", "tf32", "optimizer"):
        del recorded[key]
    trainer.folder.recipe.write_text(yaml.safe_dump(recorded))
    again = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors())
    again.train(resume_from_checkpoint=True)
    assert again._first_step == 3 and again.folder.is_complete()


def test_a_push_that_fails_names_the_call_that_repeats_it(tmp_path, monkeypatch):
    """No token, as in a fresh environment."""
    monkeypatch.setattr("hf_accel.hub.publish.get_token", lambda: None)
    monkeypatch.setattr("hf_accel.hub.publish.constants.HF_HUB_OFFLINE", False)
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors())
    trainer.train()
    with pytest.raises(PushFailed) as raised:
        trainer.push_to_hub()
    named = "hub_model_id='run' (the folder's name): "
    no_token = f"{named}there is no token; log in by `hf auth login`, or set HF_TOKEN"
    assert str(raised.value).startswith(f"push_to_hub(), {no_token}")
    with pytest.raises(PushRefused) as asked:
        replace(trainer.publication(), by_call=False).check()
    assert str(asked.value) == f"push_to_hub=True, {no_token}"
    monkeypatch.setattr("hf_accel.hub.publish.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushRefused) as offline:
        trainer.publication().check()
    assert str(offline.value) == f"push_to_hub(), {named}HF_HUB_OFFLINE is set; unset it"
    assert str(raised.value).endswith("call trainer.push_to_hub() to push")


@pytest.mark.parametrize(("points", "reason"), [([], "eval_points asks"), ([1.0], "no labels, or no held-out images")])
def test_a_run_without_accuracy_says_why(tmp_path, capsys, points, reason):
    args, held = config(tmp_path, eval_points=points), None if points else Tensors(30)
    PretrainTrainer(moco(), args, Tensors(), held).train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Results in")]
    assert f"no accuracy: {reason}" in line


def test_results_of_a_run_are_measured_at_its_end(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path, eval_points=[0.0, 0.5]), Tensors(), Tensors(30))
    trainer.train()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [results[name] for name in ("knn_top1", "knn_top5", "rank_me")] == [None] * 3
    assert results["knn_top1_random_init"] is not None
    trainer.state.global_step -= 1  # a card that is pushed on the way shows the latest measurement
    assert (
        trainer.results()["knn_top1"]
        == [log["eval_knn_top1"] for log in trainer.state.log_history if "eval_knn_top1" in log][-1]
    )


def test_the_steps_of_an_automatic_schedule_are_an_upper_limit(tmp_path, capsys):
    args: dict[str, Any] = {"budget": "6 epochs", "auto_share": 0.9, "auto_draws": 3}
    for schedule, said in (("auto", "Budget: at most "), (None, "Budget: 36 ")):
        trainer = PretrainTrainer(moco(), config(tmp_path, schedule=schedule, **args), Tensors())
        assert [line for line in describe_run(trainer) if line.startswith(said)], schedule


def test_a_target_branch_is_described_where_there_is_one(tmp_path):
    stages = [{"until": 1.0, "patch_size": 8, "target_patch_size": 4}]
    for model, described in ((moco(), True), (SimCLRForPreTraining(vit_tiny(**SIZES), **HEADS), False)):
        (line,) = (
            line
            for line in describe_run(PretrainTrainer(model, config(tmp_path, schedule=stages), Tensors()))
            if line.startswith("Stages:")
        )
        assert ("target" in line) == described


def test_strategies_and_stages_of_other_types_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"strategies: .* Strategy, and not Compression\(patch_size=8"):
        estimate_gradient_errors(moco(), config(tmp_path), Tensors(), cast(Any, [Compression(8)]))
    with pytest.raises(
        TypeError, match=r"stages: .* Stage, and not {'until': 1.0}; Schedule.parse reads lists of these"
    ):
        Schedule(cast(Any, [{"until": 1.0}]))
    with pytest.raises(TypeError, match=r"strategy: .* Strategy, and not Compression"):
        Stage(1.0, cast(Any, Compression(8)))
    for name in ("online", "target", "local"):
        with pytest.raises(TypeError, match=rf"{name}: .* Compression, and not 8"):
            Strategy(**{"online": Compression(8), name: cast(Any, 8)})


class Others(Tensors):
    """As many other images."""

    def __init__(self, count: int = 96, shift: int = 40):
        super().__init__(count)
        self.images = self.images.roll(1, dims=0) if shift else self.images + 1


@pytest.mark.parametrize(("shift", "warned"), [(40, True), (0, False)], ids=["other images", "another decoder"])
def test_a_resume_on_other_images_warns(tmp_path, capsys, shift, warned):
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(), callbacks=[StopAt(5)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    PretrainTrainer(moco(), config(tmp_path / "run"), Others(shift=shift)).train(resume_from_checkpoint=True)
    assert ("was trained on images of other colours than" in capsys.readouterr().out) == warned


@pytest.mark.slow
def test_a_checkpoint_without_colours_resumes_in_silence(tmp_path, capsys):
    """Those of earlier versions."""
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), Tensors(), callbacks=[StopAt(5)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    path = trainer.folder.checkpoint(3) / "run_state.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "colours"}))
    again = PretrainTrainer(moco(), config(tmp_path / "run"), Others())
    again.train(resume_from_checkpoint=True)
    assert again._first_step == 3 and "colours" not in capsys.readouterr().out


def test_results_name_the_dataset_of_a_program(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), torch.utils.data.Subset(Tensors(), range(90)))
    assert trainer.describe_data()["name"] == "a dataset made in Python (Subset of Tensors)"
    photos = datasets.load_dataset("imagefolder", data_dir=str(image_folder(tmp_path / "photos")), split="train")
    trainer = PretrainTrainer(moco(), config(tmp_path / "run"), photos)
    assert trainer.describe_data()["name"] == "a dataset made in Python (imagefolder, split train)"
