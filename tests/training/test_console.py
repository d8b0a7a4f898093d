"""What a person sees of a run on a terminal and without one, and what trackers get."""

import io
import logging
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.utils import logging as transformers_logging

from hf_accel.compression import Compression, Plan, Schedule, Strategy
from hf_accel.training import PretrainConfig
from hf_accel.training.console import ConsoleCallback, describe_logs, in_words, quiet
from tests.tiny_runs import image_folder, launch

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

LOGS = {"loss": 0.5, "learning_rate": 1e-3, "tokens": 17, "images_per_second": 1234.6, "progress": 0.25, "units": 4.0}
LOGS |= {"data_wait_fraction": 0.3, "views_fraction": 0.4}
DENSE, CHEAP = Strategy(Compression(4)), Strategy(Compression(8))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def callback(tmp_path, first: Strategy = CHEAP) -> Any:
    """Of a run of 4 steps of 1 unit and 3 of 4."""
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    schedule = Schedule.parse([{"until": 0.25, **first.to_dict()}, {"until": 1.0, **DENSE.to_dict()}], 4)
    plan = Plan(16.0, schedule, 1, lambda strategy: 4.0 if strategy == DENSE else 1.0)
    handler, folder = SimpleNamespace(callbacks=[]), SimpleNamespace(recipe=tmp_path / "recipe.yaml")
    return ConsoleCallback(SimpleNamespace(plan=plan, callback_handler=handler, folder=folder))


def state(step: int, main: bool = True) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, is_world_process_zero=main)


def test_the_bar_counts_units_from_a_resumed_step_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    console, args = callback(tmp_path), SimpleNamespace(disable_tqdm=False)
    console.on_train_begin(args, state(2), None)
    bar = console.bar
    assert (bar.total, bar.initial, bar.n) == (16, 2, 2)
    for step, units in ((4, 4), (5, 8)):
        console.on_step_end(args, state(step), None)
        assert bar.n == units
    console.trainer.plan.revise(5, Schedule.constant(CHEAP), charge=0.5)
    console.on_step_end(args, state(6), None)
    assert (bar.n, bar.total) == (9.5, 15.5)
    console.close()
    assert bar.disable and console.bar is None


@pytest.mark.parametrize(
    "stream, disabled, main", [(io.StringIO, False, True), (Terminal, True, True), (Terminal, False, False)]
)
def test_no_bar_without_a_terminal_or_where_not_asked_for(stream, disabled, main, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    console, args = callback(tmp_path), SimpleNamespace(disable_tqdm=disabled)
    console.on_train_begin(args, state(0, main), None)
    console.on_step_end(args, state(1, main), None)
    assert console.bar is None and sys.stderr.getvalue() == ""  # pyright: ignore


def test_log_lines_are_aligned_and_hold_what_one_watches(tmp_path, capsys):
    early, late = describe_logs(LOGS, 7, 590), describe_logs({**LOGS, "loss": -3.25, "progress": 1.0}, 590, 590)
    assert early == "step   7/590   25%  loss  0.5000  lr 1.00e-03  tokens   17    1,235 images/s  bound by views"
    assert late and len(early) == len(late)
    evaluated = {"eval_knn_top1": 0.4567, "eval_knn_top5": 0.9, "progress": 0.5}
    assert describe_logs(evaluated, 295, 590) == "step 295/590   50%  kNN   45.67%"
    evaluated |= {"eval_ridge_top1": 0.5, "eval_rank_me": 41.23, "eval_alpha_req": 1.5}
    assert describe_logs(evaluated, 295, 590) == "step 295/590   50%  kNN   45.67%  linear  50.00%  RankMe   41.2"
    assert describe_logs({"eval_rank_me": 9.0}, 295, 590) == "step 295/590    0%  RankMe    9.0"
    assert describe_logs({"train_runtime": 3.0, "progress": 1.0}, 590, 590) is None
    console = callback(tmp_path)
    console.on_log(None, state(1), None, logs=LOGS)
    console.on_log(None, state(1, main=False), None, logs=LOGS)
    assert capsys.readouterr().out.count("loss") == 1
    console.on_log(None, state(7), None, logs={**LOGS, "progress": 0.94})  # of the budget, less than a step is left
    assert capsys.readouterr().out.startswith("step 7/7  100%")


def test_a_schedule_in_words_names_unusual_targets_only():
    schedule = Schedule.parse([{"until": 0.5, "patch_size": 8, "token_dropout": 0.5}, {"until": 1.0}], 4)
    assert in_words(schedule) == "patch 8, dropout 0.5 until 50%; patch 4, dropout 0 until 100%"
    unusual = Schedule.constant(Strategy(Compression(8), Compression(4)))
    assert "target patch 4" in in_words(unusual)
    assert in_words(unusual, has_target_branch=False) == "patch 8, dropout 0 until 100%"
    many = Schedule.parse([{"until": step / 10, "token_dropout": 1 - step / 10} for step in range(1, 11)], 4)
    assert "; (7 more); " in in_words(many) and in_words(many).endswith("dropout 0 until 100%")


def test_quiet_hides_chatter_and_restores_everything(capsys, monkeypatch):
    logger, child = logging.getLogger("DeepSpeed"), logging.getLogger("accelerate.accelerator")
    for chatty in (logger, child):  # In place of DeepSpeed's own handler, which keeps the stdout of its first import.
        monkeypatch.setattr(chatty, "handlers", [logging.StreamHandler(sys.stdout)])
    before = (logger.level, list(logger.filters), child.getEffectiveLevel())
    with pytest.raises(RuntimeError), quiet():
        logger.setLevel(logging.INFO)  # as DeepSpeed does when it is imported
        logger.warning("chatter")
        child.warning("chatter")
        logger.error("a real error")
        list(transformers_logging.tqdm([1], desc="Writing model shards"))
        warnings.warn_explicit("known", FutureWarning, "x.py", 1, module="torch.distributed.fsdp")
        raise RuntimeError
    said = capsys.readouterr()
    assert said.out == "a real error\n" and said.err == ""
    assert before == (logger.level, list(logger.filters), child.getEffectiveLevel())
    list(transformers_logging.tqdm([1], desc="Writing model shards"))
    assert "Writing" in capsys.readouterr().err


def test_trackers_get_no_argument_that_a_run_does_not_use(tmp_path):
    config = PretrainConfig(str(tmp_path), budget=64)
    for record in (config.to_dict(), config.to_sanitized_dict()):
        unused = ("num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size")
        assert not {*unused, "eval_strategy", "train_batch_size"} & record.keys()
        assert record["budget"] == 64 and record["batch_size"] == 256


def test_the_console_and_trackers_of_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("hf_accel.training.timing.TIMED_STEPS", 3)  # after one step of warm-up
    folder = image_folder(tmp_path / "data")
    output = launch(folder, tmp_path / "run", "report_to=[tensorboard]", "model_config.num_hidden_layers=1")
    out, err = capfd.readouterr()
    *lines, accuracy, views, learnt = out.splitlines()
    assert accuracy.startswith("kNN accuracy") and views.startswith("See its views: ")
    assert learnt.startswith("See what it has learnt: ")
    (predicted,) = [lines.pop(number) for number, line in enumerate(lines) if line.startswith("About ")]
    assert predicted.endswith("for the remaining 4 steps")
    assert [line[:7] for line in lines[:6]] == ["Images:", "Labels:", "Model: ", "Device:", "Stages:", "Budget:"]
    assert lines[5] == "Budget: 8 steps of 16 images, 512 of 512 units" and "{" not in out and err == ""
    assert [line[:8] for line in lines[6:]] == [f"step {min(step, 8)}/8" for step in range(1, 10)]
    events = EventAccumulator(str(next(output.glob("runs/*"))), {"tensors": 0, "scalars": 0}).Reload()
    assert [event.value for event in events.Scalars("train/units")][:8] == [64.0 * step for step in range(1, 9)]
    (recipe,) = events.Tensors("recipe/text_summary")
    text = recipe.tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text.removeprefix("```yaml").removesuffix("```"))["budget"] == 512
