"""Whole tasks through the entry point, in this process, on small image folders: what works and how failures end."""

import errno
import logging
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import hf_accel.objectives.moco as moco
import hf_accel.run as entry
import hf_accel.run_folder
from hf_accel.compression import Compression, Strategy
from hf_accel.compression.cost import load_costs
from hf_accel.models import AccelViTModel
from hf_accel.objectives import ObjectiveForPreTraining
from hf_accel.recipe import PretrainRecipe, Recipe
from hf_accel.run_folder import RunFolder
from hf_accel.tasks import cost as cost_task
from hf_accel.training.callbacks import ProgressCallback
from hf_accel.training.finish import write_results
from hf_accel.training.trainer import PretrainTrainer
from tests.tiny_runs import (
    RECIPE,
    SIZE,
    STEPS,
    WEIGHTS,
    assert_same_weights,
    image_folder,
    launch,
    launch_until_stopped,
    losses,
    read,
)

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


def at_loss(monkeypatch, number: int, act: Callable[[torch.Tensor], Any]) -> None:
    """From now on the loss of step `number`, counted from 1, and of those after it goes through `act`."""
    calls, true_loss = [0], moco.contrastive_loss

    def loss(query, key, temperature):
        calls[0] += 1
        value = true_loss(query, key, temperature)
        return act(value) if calls[0] >= number else value

    monkeypatch.setattr(moco, "contrastive_loss", loss)


def stop_at(monkeypatch, number: int) -> None:
    at_loss(monkeypatch, number, lambda loss: (os.kill(os.getpid(), signal.SIGTERM), loss)[1])


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A run left alone."""
    return launch(folder, tmp_path_factory.mktemp("whole") / "run", "eval_points=[0.0, 1.0]")


# What works


def stop_in_evaluation(monkeypatch, step: int) -> list[int]:
    """A SIGTERM comes while a batch of the evaluation after this step is encoded; the sizes of such batches."""
    true_forward = AccelViTModel.forward

    def forward(self, *args, **kwargs):
        trainer = trainers[-1]
        if not self.training and trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
            batches.append(len(kwargs["pixel_values"]))
        return true_forward(self, *args, **kwargs)

    trainers, batches, true_init = [], [], PretrainTrainer.__init__

    def init(self, *args, **kwargs):
        true_init(self, *args, **kwargs)
        trainers.append(self)

    monkeypatch.setattr(AccelViTModel, "forward", forward)
    monkeypatch.setattr(PretrainTrainer, "__init__", init)
    return batches


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (0, 4)), STEPS])
def test_a_stop_in_an_evaluation_changes_nothing(whole, folder, tmp_path, monkeypatch, capsys, step):
    points = "eval_points=[0.0, 0.5, 1.0]"
    with monkeypatch.context() as patch:
        batches = stop_in_evaluation(patch, step)
        output = launch_until_stopped(folder, tmp_path / "run", points)
        assert f"Stopped at step {step} of {STEPS}; " in capsys.readouterr().out
        if step:
            launch_until_stopped(folder, output, points)  # in the same evaluation, which it begins with
            assert f"Stopped at step {step} of {STEPS}; " in capsys.readouterr().out
        assert len([size for size in batches if size > 1]) == (2 if step else 1), "no batch after the signal"
    assert not (output / "results.json").exists() and bool(list(output.glob("checkpoint-*"))) == bool(step)
    launch(folder, output, points)
    history = read(output / "log_history.json")["log_history"]
    evaluated = [log for log in history if "eval_knn_top1" in log]
    assert [log["step"] for log in evaluated] == [0, 4, STEPS]
    of_whole = [log for log in read(whole / "log_history.json")["log_history"] if "eval_knn_top1" in log]
    assert [evaluated[0], evaluated[-1]] == of_whole
    steps = [log["step"] for log in history if "train_runtime" not in log]
    assert steps == sorted(steps)
    assert losses(output) == losses(whole)
    assert_same_weights(whole, output)


def test_a_run_in_a_thread(whole, folder, tmp_path):
    handler, ended = signal.getsignal(signal.SIGTERM), []
    work = Thread(target=lambda: ended.append(launch(folder, tmp_path / "run", "eval_points=[0.0, 1.0]")))
    work.start()
    work.join()
    assert ended and signal.getsignal(signal.SIGTERM) is handler
    assert_same_weights(whole, tmp_path / "run")


def test_pretrain(whole):
    results = read(whole / "results.json")
    assert results["steps"] == STEPS and results["units"] == pytest.approx(results["budget"])
    for key in ("knn_top1", "knn_top1_random_init", "knn_top1_raw_pixels", "ridge_top1"):
        assert 0 <= results[key] <= 1, key
    assert 1 < results["rank_me"] <= 32 and results["alpha_req"] > 0
    assert len(losses(whole)) == STEPS and all(math.isfinite(loss) for loss in losses(whole))
    assert set(path.name for path in whole.glob("checkpoint-*")) == {"checkpoint-6", "checkpoint-8"}
    for name in ("modeling_accel_vit.py", "preprocessor_config.json"):  # so that each opens by itself
        assert {path.parent.name for path in whole.rglob(name)} == {"checkpoint-6", "checkpoint-8", "final"}


def test_curves_show_the_plan_that_was_followed(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("hf_accel.training.finish.plot_curves", lambda *_, **options: drawn.update(options))
    results: dict[str, Any] = {"data": {"name": "photos"}, "objective": "moco"}
    results |= dict.fromkeys(["knn_top1_raw_pixels", "knn_top1_random_init"])
    trainer: Any = SimpleNamespace(folder=RunFolder(tmp_path), plan=object(), state=SimpleNamespace(log_history=[]))
    trainer.objective = SimpleNamespace(config=SimpleNamespace(image_size=32), has_target_branch=False)
    trainer.publication = lambda: SimpleNamespace(complete_final=lambda _: True)
    write_results(trainer, results)
    assert drawn["plan"] is trainer.plan and drawn["image_size"] == 32
    assert drawn["has_target_branch"] is False


def test_the_last_steps_are_logged_also_where_they_fill_no_window(folder, tmp_path):
    output = launch(folder, tmp_path / "run", "logging_steps=3", "eval_points=[]")
    logs = [log for log in read(output / "log_history.json")["log_history"] if "loss" in log]
    assert [log["step"] for log in logs] == [3, 6, STEPS]
    assert logs[-1]["progress"] == pytest.approx(1) and logs[-1]["images_per_second"] > 0


def test_seconds_of_the_parts_make_those_of_the_run(whole):
    seconds = read(whole / "results.json")["seconds"]
    assert set(seconds) == {"total", "data", "forward_backward", "evaluation", "rest"}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])


def test_a_step_goes_along_the_mean_gradient_of_its_micro_batches(folder, tmp_path, monkeypatch):
    micro_batches, steps, true_loss = [], [], PretrainTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss: Any = true_loss(self, model, inputs, *args, **kwargs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        micro_batches.append((loss.item(), torch.autograd.grad(loss, trained, retain_graph=True)))
        return loss

    def before_step(callback, _):
        model = callback.trainer.objective
        steps.append([p.grad.clone() for p in model.parameters() if p.requires_grad])

    monkeypatch.setattr(PretrainTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(ProgressCallback, "before_step", before_step)
    output = launch(folder, tmp_path / "run", "gradient_accumulation_steps=4", "eval_points=[]")
    assert len(micro_batches) == 4 * STEPS and len(steps) == STEPS
    for step, (gradients, loss) in enumerate(zip(steps, losses(output), strict=True)):
        parts = micro_batches[4 * step : 4 * step + 4]
        assert loss == pytest.approx(sum(value for value, _ in parts) / 4, rel=1e-5)
        for number, gradient in enumerate(gradients):
            torch.testing.assert_close(gradient, sum(part[number] for _, part in parts) / 4)


def test_no_process_goes_on_before_a_checkpoint_is_complete(folder, tmp_path, monkeypatch):
    events, write_json = [], hf_accel.run_folder.write_json

    def noted(path, state):
        events.append(path.name)
        write_json(path, state)

    monkeypatch.setattr(hf_accel.run_folder, "write_json", noted)
    monkeypatch.setattr("hf_accel.distributed.barrier", lambda: events.append("barrier"))
    launch(folder, tmp_path / "run", "eval_points=[]")
    assert events == ["barrier", "run_state.json", "barrier"] * (STEPS // 2) + ["results.json", "barrier"]


def test_cost(tmp_path, capsys):
    output = launch("bundled", tmp_path / "cost", "task=cost")
    rows = read(output / "cost.json")["rows"]
    assert [(row["patch_size"], row["tokens"]) for row in rows[::10]] == [(4, 17), (8, 5)] and len(rows) == 20
    assert rows[0]["measured"] == rows[0]["analytic"] == 1 and all(row["measured"] > 0 for row in rows)
    with PIL.Image.open(output / "cost.png") as image:
        assert image.format == "PNG" and min(image.size) > 100
    assert len(capsys.readouterr().out.splitlines()) == 23


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16)])
def test_costs_are_reported_in_the_runs_own_precision(precision, dtype, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cost_task, "measure_costs", lambda *_, **options: asked.append(options) or sys.exit("enough"))
    with pytest.raises(SystemExit, match="enough"):
        cost_task.cost_report(PretrainRecipe(**RECIPE, output_dir=str(tmp_path), mixed_precision=precision))
    assert asked == [{"dtype": dtype}]


@pytest.mark.slow
def test_a_schedule_file_that_changed_is_not_continued_with(folder, tmp_path, monkeypatch):
    path = tmp_path / "schedule.yaml"
    path.write_text("[{until: 0.5, patch_size: 8}, {until: 1.0}]")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        output = launch_until_stopped(folder, tmp_path / "run", f"schedule={path}", "eval_points=[]")
    path.write_text("[{until: 0.75, patch_size: 8}, {until: 1.0}]")
    again = f"schedule={path}", "eval_points=[]"
    with pytest.raises(SystemExit, match=r"SettingError: schedule='.*schedule\.yaml': .* now has 0\.75; choose"):
        launch(folder, output, *again)
    recipe = RunFolder(output).recipe
    recorded = recipe.read_text()
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recorded), "schedule": str(path)}))  # as earlier versions did
    with pytest.raises(SystemExit, match=r"SettingError: schedule=.*: .*checkpoint-3 was trained along another plan"):
        launch(folder, output, *again)
    recipe.write_text(recorded)
    path.unlink()
    with pytest.raises(SystemExit, match=r"no file '.*schedule\.yaml'.* give the stages that .*recipe\.yaml holds"):
        launch(folder, output, *again)
    entry.main([str(recipe)])
    assert [stage["patch_size"] for stage in read(output / "results.json")["schedule"]] == [8, 4]


@pytest.mark.slow
def test_measured_costs_are_kept_and_used_again(folder, tmp_path, monkeypatch):
    schedule = "schedule=[{until: 0.5, patch_size: 8}, {until: 1.0, token_dropout: 0.5}]"
    true_step = PretrainTrainer.training_step

    def stopped_step(self, model, inputs, *args, **kwargs):
        if inputs["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "training_step", stopped_step)
        output = launch_until_stopped(folder, tmp_path / "run", "cost=measured", schedule)
    assert not (output / "results.json").exists()
    table: Any = load_costs(output / "cost_table.json")
    assert set(table.units) == {Strategy(Compression(4)), Strategy(Compression(8)), Strategy(Compression(4, 0.5))}
    (output / "cost_table.json").unlink()  # the checkpoint has it, too

    def again(*_, **__):
        raise AssertionError("measured twice")

    monkeypatch.setattr("hf_accel.training.step_costs.time_steps", again)
    launch(folder, output, "cost=measured", schedule)
    assert load_costs(output / "cost_table.json") == table
    logs = [log for log in read(output / "log_history.json")["log_history"] if "loss" in log]
    spent = 0.0
    for log in logs:
        spent += 16 * table.units[Strategy(Compression(log["patch_size"], log["token_dropout"]))]
        assert log["units"] == pytest.approx(spent)
    assert read(output / "results.json")["units"] == pytest.approx(spent) and spent <= RECIPE["budget"]
    assert {log["patch_size"] for log in logs} == {4, 8}


@pytest.mark.slow
def test_bf16(whole, folder, tmp_path, monkeypatch):
    output = launch(folder, tmp_path / "run", "mixed_precision=bf16")
    exact, rounded = losses(whole), losses(output)
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)
    weights = load_file(output / f"checkpoint-{STEPS}" / "model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    name = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(weights[name], weights[f"momentum_{name}"])

    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        launch_until_stopped(folder, tmp_path / "resumed", "mixed_precision=bf16")
    assert not (tmp_path / "resumed" / "results.json").exists()
    launch(folder, tmp_path / "resumed", "mixed_precision=bf16")
    assert_same_weights(output, tmp_path / "resumed", f"checkpoint-{STEPS}/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_once_for_each_branch_and_stage(backend, folder, tmp_path, monkeypatch):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    schedule = "schedule=[{until: 0.5, patch_size: 8, token_dropout: 0.5}, {until: 1.0}]"
    settings = ["model_config.num_hidden_layers=1", schedule]
    plain = launch(folder, tmp_path / "plain", *settings)
    compile_encoders = ObjectiveForPreTraining.compile_encoders

    def compiled(self, **options):
        compile_encoders(self, **{**options, "backend": backend})

    monkeypatch.setattr(ObjectiveForPreTraining, "compile_encoders", compiled)
    torch.compiler.reset()
    counters.clear()
    output = launch(folder, tmp_path / "run", "torch_compile=true", *settings)
    torch.compiler.reset()
    assert counters["stats"]["unique_graphs"] == 4 < STEPS  # one for each branch and stage
    assert not counters["graph_break"]
    logged = [line["compilations"] for line in read(output / "log_history.json")["log_history"] if "loss" in line]
    assert 2 <= logged[0] < logged[-1] == counters["stats"]["unique_graphs"]
    assert losses(output) == pytest.approx(losses(plain), rel=1e-3) and len(losses(output)) > STEPS


def test_images_without_labels_are_trained_on(tmp_path, capsys):
    images = image_folder(tmp_path / "flat", labels=False)
    output = launch(images, tmp_path / "run", "eval_points=[0.0, 0.5, 1.0]")
    results = read(output / "results.json")
    assert results["steps"] == STEPS and (output / "final" / "model.safetensors").exists()
    assert [results[key] for key in ("knn_top1", "knn_top1_random_init", "knn_top1_raw_pixels")] == [None] * 3
    assert (output / "curves.png").exists()
    history = [log for log in read(output / "log_history.json")["log_history"] if "eval_rank_me" in log]
    assert [log["step"] for log in history] == [0, 4, STEPS] and all(log["eval_alpha_req"] > 0 for log in history)
    assert history[-1]["eval_rank_me"] == results["rank_me"] > 1 and results["ridge_top1"] is None
    assert (
        results["alpha_req"] == history[-1]["eval_alpha_req"] and "RankMe" in (output / "final/README.md").read_text()
    )
    said = capsys.readouterr().out
    assert (
        "\nDevice: cpu; processes: 1; threads: " in said
        and f"Results in {output}; no accuracy" in said
        and "; RankMe " in said
    )


@pytest.mark.parametrize(
    "sizes", [pytest.param("one size, in memory", marks=pytest.mark.slow), "several sizes, from disk"]
)
def test_one_corrupt_file_is_named_once_and_skipped(sizes, tmp_path, caplog):
    several = "several" in sizes
    images = image_folder(tmp_path / "images", side=lambda index: SIZE + several * (index % 3))
    broken = images / "train" / "a" / "train003.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, logger="hf_accel"):
        output = launch(images, tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(told) == 1 and str(broken) in told[0]
    assert read(output / "results.json")["steps"] == STEPS


# What cannot work, and how it ends


def test_too_many_corrupt_files_stop_the_run(tmp_path):
    images = image_folder(tmp_path / "images")
    for index in (3, 6, 9):
        (images / "train" / "a" / f"train{index:03}.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"(?s)CorruptDataError: .*3 of 120 images cannot be read.*train003.png"):
        launch(images, tmp_path / "run")


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a file"])
def test_a_refused_command_leaves_no_folders_that_it_made(there, tmp_path):
    output = tmp_path / "runs/new"
    if there != "nothing":
        output.mkdir(parents=True)
    if there == "a file":
        (output / "notes.txt").touch()
    images = image_folder(tmp_path / "images", labels=False, count=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(images), "output_dir": str(output)}))
    for words in ([], ["task=evaluate", "checkpoint=/nowhere"], ["data=bundled", "budget=3"], ["data=/nowhere"]):
        with pytest.raises(SystemExit, match="SettingError: "):
            entry.main([str(recipe), *words])
        assert output.exists() == output.parent.exists() == (there != "nothing"), words
    assert not output.exists() or [path.name for path in output.iterdir()] == ["notes.txt"] * (there == "a file")


def test_a_training_set_smaller_than_the_batch(tmp_path):
    images = image_folder(tmp_path / "images", count=12)
    output = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"batch_size=16: .*train has only 12 images"):
        launch(images, output)
    assert not output.exists()
    launch(images, output, "batch_size=4", "budget=64")  # what failed has left nothing that stands in the way
    assert read(output / "results.json")["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "logging_steps"), [(math.nan, 1), (math.inf, 100)], ids=["on logging", "on saving"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    bad, logging_steps, whole, folder, tmp_path, monkeypatch
):
    settings = ["eval_points=[0.0, 1.0]", f"logging_steps={logging_steps}"]
    with monkeypatch.context() as patch:
        at_loss(patch, 6, lambda loss: loss * bad)
        with pytest.raises(SystemExit, match=r"TrainingDiverged: .*step 6 \(seed 0\).*checkpoint-4\. Try a lower"):
            launch(folder, tmp_path / "run", *settings)
    output = tmp_path / "run"
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not (output / "results.json").exists()
    launch(folder, output, *settings)
    assert_same_weights(whole, output)


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.slow) for part in ("optimizer.pt", "run_state.json")] + [WEIGHTS]
)
def test_a_full_disk_reaches_the_user_and_the_run_resumes(part, whole, folder, tmp_path, monkeypatch):
    def failing(save: Callable, position: int) -> Callable:
        def saving(*args, **kwargs):
            path = Path(args[position])
            if path.name == part and path.parent.name == "checkpoint-4":
                if part != "run_state.json":  # which is written all or nothing
                    path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return save(*args, **kwargs)

        return saving

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing(torch.save, 1))
        patch.setattr("transformers.modeling_utils.safe_save_file", failing(save_file, 1))
        patch.setattr(hf_accel.run_folder, "write_json", failing(hf_accel.run_folder.write_json, 0))
        message = r"WriteFailed: .*checkpoint-4 cannot be written .*No space left on device.*Last good .*-2\."
        with pytest.raises(SystemExit, match=message):
            launch(folder, output, "eval_points=[0.0, 1.0]")
    assert (output / "checkpoint-2" / "run_state.json").exists()
    launch(folder, output, "eval_points=[0.0, 1.0]")
    assert_same_weights(whole, output)


@pytest.mark.parametrize("task", ["evaluate", "card"])  # A card is written into the run of its checkpoint.
def test_a_full_disk_ends_any_task_in_a_line(task, tmp_path, monkeypatch):
    def full(recipe: Recipe) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "part"))

    def absent(recipe: Recipe) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "elsewhere")

    settings = [f"task={task}", f"checkpoint={tmp_path / 'run'}"]
    function = "hf_accel.{}.{}".format(*entry.TASKS[task])
    monkeypatch.setattr(function, full)
    with pytest.raises(SystemExit, match=r"WriteFailed: .*run cannot be written .*run/part.* Make room, and launch"):
        launch(tmp_path, tmp_path / "run", *settings)
    monkeypatch.setattr(function, absent)
    with pytest.raises(FileNotFoundError):
        launch(tmp_path, tmp_path / "run", *settings)


def test_a_run_of_another_engine_is_not_resumed_without_its_optimizer(whole, folder, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("results.json", "final", "recipe.yaml"))
    state = max(output.glob("checkpoint-*/run_state.json"))
    state.write_text(state.read_text().replace("a single process or data parallel", "2 processes of DeepSpeed ZeRO-3"))
    with pytest.raises(
        SystemExit, match=r"SettingError: .*checkpoint-8 was saved by 2 .* ZeRO-3, and this is a single"
    ):
        launch(folder, output, "eval_points=[0.0, 1.0]")


class NaNGradient(torch.autograd.Function):
    """The value as it is, with a gradient that is not."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * math.nan


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_the_last_good_checkpoint(whole, folder, tmp_path, monkeypatch):
    # the loss of step 6 is fine, its update is not: only step 7 has a loss that shows it
    output, settings = tmp_path / "run", ["eval_points=[0.0, 1.0]"]
    with monkeypatch.context() as patch:
        at_loss(patch, 6, NaNGradient.apply)
        with pytest.raises(SystemExit, match=r"TrainingDiverged: .*checkpoint-4"):
            launch(folder, output, *settings)
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    launch(folder, output, *settings)
    assert_same_weights(whole, output)


def test_interrupted_by_hand_it_says_so_and_what_was_never_begun_can_be_changed(folder, tmp_path, monkeypatch):
    def interrupt(loss):  # not by a signal, which a shell may have its background jobs ignore
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_loss(patch, 1, interrupt)
        with pytest.raises(SystemExit, match=r"Interrupted\. The same command goes on"):
            launch(folder, tmp_path / "run")
    for _ in range(2):
        with pytest.raises(
            SystemExit, match=r"seed=1: .* holds a run with seed=0, of which no checkpoint .* remove this"
        ):
            launch(folder, tmp_path / "run", "budget=4096", "seed=1")
    monkeypatch.setattr(PretrainTrainer, "_train", lambda *_: sys.exit("it trains"))
    with pytest.raises(SystemExit, match="it trains"):
        launch(folder, tmp_path / "run", "learning_rate=1e-5")
    assert RunFolder(tmp_path / "run").read_recipe()["learning_rate"] == 1e-5


def test_workers_that_fail_end_a_run_with_a_remedy(folder, tmp_path, monkeypatch):
    def fail(recipe):  # as torch's handler of SIGCHLD raises it, in the midst of anything
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    monkeypatch.setattr("hf_accel.tasks.pretrain.pretrain", fail)
    with pytest.raises(SystemExit, match=r"^WorkersFailed: .* Bus error.*docker run --shm-size=8g.*num_workers: 0.*$"):
        launch(folder, tmp_path / "run")


def test_a_second_launch_in_the_same_folder_is_refused(folder, tmp_path, monkeypatch):
    output = tmp_path / "run"
    output.mkdir()
    monkeypatch.setattr("hf_accel.run_folder.LOCK_PATIENCE", 0.1)
    with (
        RunFolder(output).lock(),
        pytest.raises(SystemExit, match=r"output_dir='.*run': another launch is at work there; wait for its end"),
    ):
        launch(folder, output)
    assert not (output / "recipe.yaml").exists()
    monkeypatch.setattr("hf_accel.training.trainer.choose_checkpoint", lambda *_: sys.exit("it has the folder"))
    for _ in range(2):  # however the one before ended
        with pytest.raises(SystemExit, match="it has the folder"):
            launch(folder, output)


def test_fp16_on_a_cpu_is_refused(folder, tmp_path):
    # accelerate ignores it there without a word: the run is one in fp32
    with pytest.raises(SystemExit, match=r"mixed_precision='fp16': .*bf16"):
        launch(folder, tmp_path / "run", "mixed_precision=fp16")
