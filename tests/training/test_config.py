"""What `PretrainConfig` refuses, and how it takes text, tuples and copies."""

import pickle
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import HfArgumentParser

from hf_accel import PretrainConfig
from hf_accel.compression import Schedule
from hf_accel.utils.errors import SettingError


def config(**settings: Any) -> PretrainConfig:
    return PretrainConfig("runs/config", **{"budget": 600, "report_to": "none", "bf16": False, **settings})


STAGE = {"until": 1.0, "patch_size": 8}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("cost", "foo", "expected one of analytic, measured"),
        ("lr_schedule", "linear", "expected one of cosine, poly"),
        ("view_resolution", "half", "expected one of full, matched"),
        ("view_backend", "fast", "expected one of auto, eager, fused"),
        ("search_criterion", "foo", "expected one of ca_mse, gain"),
        ("budget", True, "expected float or str or null"),
        ("budget", [1], "expected float or str or null"),
        ("batch_size", "16", "expected int"),
        ("batch_size", 16.0, "expected int"),
        ("eval_points", "0.5", "expected float"),
        ("learning_rate", "fast", "expected float"),
        ("learning_rate", -1, "must be above 0"),
        ("weight_decay", -0.1, "must not be negative"),
        ("gradient_accumulation_steps", 0, "must be above 0"),
        ("seed", -1, "must be a whole number"),
        ("schedule", {}, "expected list or str or null"),
        ("schedule", "aut", "no file 'aut'; give a list of stages, the path of a YAML file, standard, auto"),
        ("schedule", [], "needs at least one stage"),
        ("schedule", [{"until": 1.0, "patch": 8}], "stage 1 of the schedule: unknown key 'patch'"),
        ("schedule", [{"until": 0.5, "patch_size": 8}], "the last stage must have"),
        ("fp16", True, "bf16 is true as well"),
    ],
)
def test_a_wrong_word_or_type_is_refused(name, value, problem):
    with pytest.raises(SettingError, match=rf"^{name}=.*{problem}"):
        config(**{name: value, **({"bf16": True} if name == "fp16" else {})})


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("load_best_model_at_end", True, "its last encoder"),
        ("metric_for_best_model", "knn", "its last encoder"),
        ("eval_steps", 10, "set eval_points"),
        ("eval_on_start", True, "with 0.0 in eval_points .* before the first step"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, "set lr_schedule"),
        ("data_seed", 3, "function of seed"),
        ("remove_unused_columns", True, "leave it out"),
        ("ignore_data_skip", False, "leave it out"),
        ("neftune_noise_alpha", 1.0, "leave it out"),
        ("label_smoothing_factor", 0.1, "never trained on"),
        ("label_names", ["label"], "found in each item"),
        ("per_device_eval_batch_size", 64, "eval_points"),
        ("include_for_metrics", ["loss"], "eval_points"),
        ("dataloader_prefetch_factor", 4, "dataloader_num_workers"),
        ("ddp_find_unused_parameters", True, "the trainer sets it"),
        ("ddp_broadcast_buffers", True, "the trainer sets it"),
        ("average_tokens_across_devices", False, "for text"),
        ("use_cache", True, "for text"),
        ("hub_revision", "tuned", "to the main branch"),
        ("hub_always_push", True, "replaced by a newer one"),
    ],
)
def test_an_argument_without_effect_is_refused(name, value, instead):
    with pytest.raises(SettingError, match=rf"^{name}=.*has no meaning here; .*{instead}"):
        config(**{name: value})


def test_a_refused_token_is_not_printed():
    with pytest.raises(SettingError, match=r"^hub_token='\.\.\.': has no meaning here; log in .*HF_TOKEN$"):
        config(hub_token="hf_secret")


def test_pushes_of_all_checkpoints_are_refused():
    with pytest.raises(SettingError, match=r"^hub_strategy='all_checkpoints': .* take every_save, checkpoint or end"):
        config(hub_strategy="all_checkpoints")
    assert replace(config(hub_strategy="checkpoint"), seed=1).hub_strategy == "checkpoint"


def test_a_precision_is_named_as_it_was_given(monkeypatch):
    monkeypatch.setattr("hf_accel.distributed.launch.on_cpu", lambda: True)
    with pytest.raises(SettingError, match=r"^fp16=True: a CPU has none"):
        config(fp16=True, bf16=None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SettingError, match=r"^bf16=False: accelerate was asked for fp16"):
        config(bf16=False)


def test_numbers_as_text_and_of_numpy_are_taken(tmp_path):
    made = config(learning_rate="1e-3", warmup="1e-1", batch_size=np.int64(32), weight_decay=np.float64(0.2))
    assert (made.learning_rate, made.warmup, made.batch_size, made.weight_decay) == (1e-3, 0.1, 32, 0.2)
    assert {type(made.batch_size), type(made.weight_decay)} == {int, float}
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: runs/config\nbudget: 4e5\nlearning_rate: 1e-3\nschedule: [{until: 1, patch_size: 8}]\n"
    )
    (read,) = HfArgumentParser(PretrainConfig).parse_yaml_file(path)  # pyright: ignore[reportArgumentType]
    assert (read.learning_rate, read.budget, read.schedule) == (1e-3, 4e5, [{"until": 1, "patch_size": 8}])


def test_tuples_are_taken_for_lists():
    made = config(eval_points=(0, 1.0), keep_points=0.5, schedule=(STAGE,))
    assert (made.eval_points, made.keep_points, made.schedule) == ([0.0, 1.0], [0.5], [STAGE])


def test_a_copy_may_change_the_batch():
    made = config(batch_size=256)
    assert replace(made, batch_size=128).per_device_train_batch_size == 128
    assert replace(made, gradient_accumulation_steps=2).per_device_train_batch_size == 128
    for copy in (pickle.loads(pickle.dumps(made)), deepcopy(made)):
        assert replace(copy, batch_size=64).per_device_train_batch_size == 64
    with pytest.raises(SettingError, match="per_device_train_batch_size=16: has no meaning"):
        replace(made, per_device_train_batch_size=16)


def test_a_schedule_file_is_checked_in_its_own_patches(tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text("patch_size: 7\nstages: [{until: 0.5, patch_size: 28}, {until: 1.0}]\n")
    assert config(schedule=str(path)).schedule == str(path)
    path.write_text("patch_size: 7\nstages: [{until: 0.5, patch: 28}, {until: 1.0}]\n")
    with pytest.raises(SettingError, match="stage 1 of the schedule: unknown key 'patch'"):
        config(schedule=str(path))
    path.write_text("stages: [")
    with pytest.raises(SettingError, match=r"schedule\.yaml is not valid YAML"):
        config(schedule=str(path))


def test_a_schedule_file_may_be_a_path_and_lie_at_home(tmp_path, monkeypatch):
    path = tmp_path / "schedule.yaml"
    path.write_text("[{until: 1.0, patch_size: 28}]")
    assert config(schedule=path).schedule == str(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Schedule.parse("~/schedule.yaml", 7) == Schedule.parse(str(path), 7)
    assert config(schedule="~/schedule.yaml").schedule == "~/schedule.yaml"


@pytest.mark.parametrize("text", ["null", "None", "none"])
def test_a_command_line_can_ask_for_no_compression(tmp_path, text):
    words = ["--output_dir", str(tmp_path), "--budget", "600", "--bf16", "False", "--schedule", text]
    (made,) = HfArgumentParser(PretrainConfig).parse_args_into_dataclasses(words)  # pyright: ignore
    assert made.schedule is None
