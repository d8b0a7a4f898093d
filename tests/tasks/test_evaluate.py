"""`task=evaluate` through the entry point: any encoders in a table, nothing twice, nothing lost, what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    MobileViTConfig,
    MobileViTModel,
    PoolFormerConfig,
    PoolFormerModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTMAEConfig,
    ViTMAEModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import hf_accel.tasks.evaluate as evaluate_task
from hf_accel import AccelViTConfig, AccelViTModel
from hf_accel.evaluation import load_encoder, weights_digest
from hf_accel.recipe import EvaluateRecipe
from tests.tasks.test_tasks import stop_at
from tests.tiny_runs import RECIPE, SIZE, STEPS, WEIGHTS, image_folder, launch, launch_until_stopped, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
}
TASK = ["task=evaluate", "linear_config.epochs=20", "finetune_config.epochs=2", "finetune_config.batch_size=30"]
TAKEN = evaluate_task.EVALUATIONS
ALL = "evaluations=[knn, linear, logistic, finetune]"


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A pretraining run."""
    return launch(folder, tmp_path_factory.mktemp("whole") / "run", "eval_points=[1.0]", "keep_points=[0.0]")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    """An encoder of another library, of another image size and normalisation, with its processor beside it."""
    path = tmp_path_factory.mktemp("encoders") / "dinov2"
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(path)
    sizes: dict[str, Any] = {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}
    BitImageProcessorPil(**sizes, image_mean=[0.5] * 3, image_std=[0.2] * 3).save_pretrained(path)
    return path


def entries(output: Path) -> list[dict]:
    return read(output / "results.json")["evaluations"]


@pytest.mark.slow
def test_any_encoders_in_one_table(whole, dinov2, folder, tmp_path, capsys):
    output = tmp_path / "evaluated"
    for checkpoint in (whole / "final", dinov2, "random"):
        launch(folder, output, *TASK, ALL, "eval_seeds=[0, 1]", f"checkpoint={checkpoint}")
    table = capsys.readouterr().out.split("30 images:\n")[-1].splitlines()
    assert len(table) == 2 + 12 and len(entries(output)) == 12
    for checkpoint in (whole / "final", dinov2, "random"):
        assert sum(line.startswith(f"| {checkpoint} ") for line in table) == 4
    for entry in entries(output):
        assert entry["seeds"] == ([None] if entry["evaluation"] == "knn" else [0, 1])
        assert entry["data"] == str(folder) and (entry["train_images"], entry["validation_images"]) == (120, 30)
        assert entry["input"]["image_size"] == (20 if entry["checkpoint"] == str(dinov2) else SIZE)
        low, high = entry["top1_ci95"]
        assert 0 <= low <= entry["top1"] <= high <= 1 and entry["patch_size"] == 4
        for run in entry["runs"]:
            assert run["environment"]["versions"]["torch"] and run["seconds"] > 0 and run["date"].startswith("20")
            assert run["top1"] <= run["top5"] == 1
    by_kind = {(entry["checkpoint"], entry["evaluation"]): entry for entry in entries(output)}
    for checkpoint in (str(whole / "final"), str(dinov2)):  # colours are easy, even for features at random
        assert by_kind[checkpoint, "linear"]["top1"] > 0.9 and by_kind[checkpoint, "logistic"]["top1"] > 0.9
    assert by_kind[str(dinov2), "linear"]["runs"][0]["learning_rate"] in evaluate_task.LinearConfig().learning_rates
    assert by_kind[str(whole / "final"), "knn"]["top1"] == read(whole / "results.json")["knn_top1"]
    start = load_encoder(str(whole / "kept" / "checkpoint-0"))  # what the run started from is what random means
    assert by_kind["random", "knn"]["weights"] == weights_digest(start)
    for entry in entries(output):
        if entry["evaluation"] == "finetune":
            saved = [output / run["folder"] for run in entry["runs"]]
            assert saved[0] != saved[1] and all((path / "preprocessor_config.json").exists() for path in saved)
            assert read(saved[0] / "config.json")["id2label"] == {"0": "a", "1": "b", "2": "c"}


def test_an_encoder_sees_images_as_its_own_processor_makes_them(dinov2, folder, tmp_path, monkeypatch):
    seen, extract = [], evaluate_task.extract_features

    def recording(model, loader, *rest):
        seen.append(next(iter(loader))["pixel_values"])
        return extract(model, loader, *rest)

    monkeypatch.setattr(evaluate_task, "extract_features", recording)
    launch(folder, tmp_path / "run", *TASK, f"checkpoint={dinov2}", "label_column=label")
    assert seen[0].shape[1:] == (3, 20, 20)  # not the recipe's 16
    pixels = seen[0] * 0.2 + 0.5  # not ImageNet's mean and std, which the images have
    assert pixels.min() >= 0 and pixels.max() <= 1 and pixels.std() > 0.05


def test_the_same_command_goes_on_where_it_stopped(whole, folder, tmp_path, monkeypatch, capsys):
    overrides = [*TASK, "evaluations=[knn, linear]", "eval_seeds=[0, 1, 2]", f"checkpoint={whole / 'final'}"]
    output, probe, asked = tmp_path / "run", evaluate_task.linear_probe, []

    def interrupted(*args):
        asked.append(args[5])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return probe(*args)

    monkeypatch.setattr(evaluate_task, "linear_probe", interrupted)
    with pytest.raises(SystemExit, match="Interrupted"):
        launch(folder, output, *overrides)
    assert [entry["seeds"] for entry in entries(output)] == [[None], [0]]
    launch(folder, output, *overrides)
    assert asked == [0, 1, 1, 2] and [entry["seeds"] for entry in entries(output)] == [[None], [0, 1, 2]]
    assert "knn of" in capsys.readouterr().out
    launch(folder, output, *overrides)
    assert len(asked) == 4 and capsys.readouterr().out.count("found in") == 4
    launch(folder, output, *overrides, "linear_config.epochs=21", "eval_seeds=[0]")  # another question
    assert asked[4:] == [0] and len(entries(output)) == 3


def test_patch_sizes(whole, folder, tmp_path, capsys):
    overrides = [*TASK, "evaluations=[knn, logistic]", f"checkpoint={whole / 'final'}", "eval_patch_sizes=[4, 8]"]
    output = launch(folder, tmp_path / "run", *overrides)
    found = [(entry["evaluation"], entry["patch_size"]) for entry in entries(output)]
    assert found == [("knn", 4), ("logistic", 4), ("knn", 8), ("logistic", 8)]
    assert "at patch 8: top-1" in capsys.readouterr().out


def test_one_command_compares_encoders_of_every_kind(whole, dinov2, folder, tmp_path, capsys, monkeypatch):
    """What has one patch size is taken at it, once; the table names what was skipped, and why."""
    names = ("knn", "linear", "finetune")
    quick = {name: (settings, lambda *_: {"top1": 0.5, "top5": 1.0}) for name, (settings, _) in TAKEN.items()}
    monkeypatch.setattr(evaluate_task, "EVALUATIONS", quick)
    command = [*TASK, f"evaluations=[{', '.join(names)}]", "eval_patch_sizes=[4, 8]"]
    for checkpoint, skipped in (
        (whole / "final", {"finetune": "fine-tuning is at the base patch size, 4"}),
        (dinov2, dict.fromkeys(names, "the encoder has one patch size, 4")),
    ):
        launch(folder, tmp_path / "run", *command, f"checkpoint={checkpoint}")
        rows = [line for line in capsys.readouterr().out.splitlines() if " skipped " in line]
        assert len(rows) == len(skipped)
        for row, (name, reason) in zip(rows, skipped.items(), strict=True):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert cells[:3] == [str(checkpoint), name, "8"] and cells[-1].endswith(reason)
    taken = [(entry["checkpoint"], entry["evaluation"], entry["patch_size"]) for entry in entries(tmp_path / "run")]
    ours = [("knn", 4), ("linear", 4), ("finetune", 4), ("knn", 8), ("linear", 8)]
    assert taken == [(str(whole / "final"), *row) for row in ours] + [(str(dinov2), name, 4) for name in names]


@pytest.mark.parametrize(
    ("sizes", "patched", "chosen", "skipped"),
    [
        ([], True, [("knn", 4), ("finetune", 4)], []),
        ([8], True, [("knn", 8), ("finetune", 4)], [("finetune", 8)]),
        ([8, 8, 4], True, [("knn", 8), ("knn", 4), ("finetune", 4)], [("finetune", 8)]),
        ([], False, [("knn", None), ("finetune", None)], []),
        ([4, 8], False, [("knn", None), ("finetune", None)], [(n, s) for s in (4, 8) for n in ("knn", "finetune")]),
    ],
)
def test_combinations(sizes, patched, chosen, skipped):
    names = ["knn", "finetune"]
    recipe = EvaluateRecipe(checkpoint="x", evaluations=names, eval_patch_sizes=sizes)
    encoder: Any = AccelViTModel(AccelViTConfig(**{**SIZES, "image_size": SIZE}, intermediate_size=32))
    if not patched:
        encoder = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"))
    taken, left = evaluate_task.combinations(recipe, encoder)
    assert taken == chosen and [row[:2] for row in left] == skipped


def test_hierarchical_encoders_have_no_patch_size():
    """Their configs have a field of this name, which says how their first layer is built, or nothing."""
    stages: Any = {"depths": [1] * 4, "hidden_sizes": [8] * 4}
    mobile: Any = {"hidden_sizes": [16] * 3, "neck_hidden_sizes": [8] * 7}
    for encoder in (
        PoolFormerModel(PoolFormerConfig(**stages)),
        ConvNextModel(ConvNextConfig(**stages)),
        MobileViTModel(MobileViTConfig(image_size=32, patch_size=2, **mobile)),
    ):
        recipe = EvaluateRecipe(checkpoint="x", evaluations=["knn"], eval_patch_sizes=[16])
        reason = "the encoder has no patch size to choose"
        assert evaluate_task.combinations(recipe, encoder) == ([("knn", None)], [("knn", 16, reason)])


@pytest.mark.slow
def test_evaluations_in_the_folder_of_a_run_that_goes_on(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        launch_until_stopped(folder, output)
    checkpoint = output / "checkpoint-2"
    launch(folder, output, *TASK, f"checkpoint={checkpoint}")
    assert len(entries(output)) == 1 and "units" not in read(output / "results.json")
    capsys.readouterr()
    launch(folder, output)
    assert "Resuming from" in capsys.readouterr().out
    results = read(output / "results.json")
    assert results["steps"] == STEPS and results["evaluations"][0]["checkpoint"] == str(checkpoint)
    launch(folder, output, *TASK, f"checkpoint={output / 'final'}")
    assert read(output / "results.json")["steps"] == STEPS and len(entries(output)) == 2
    launch(folder, output)
    assert "complete" in capsys.readouterr().out


def refused(data: Path, output: Path, words: str, *overrides: str) -> None:
    with pytest.raises(SystemExit, match=words):
        launch(data, output, *TASK, *overrides)


def test_images_that_cannot_be_evaluated_on(whole, tmp_path):
    final = f"checkpoint={whole / 'final'}"
    refused(
        Path("bundled"),
        tmp_path / "0",
        r"train_split='train\[:100\]': the bundled digits",
        final,
        "train_split=train[:100]",
    )
    unlabelled = image_folder(tmp_path / "flat", labels=False, count=20)
    refused(unlabelled, tmp_path / "1", "task=evaluate needs labels", final)
    data = image_folder(tmp_path / "classes", count=30)
    one_class = r"\(split train\[:10\]\) has only the class 'a'.*shuffled"
    refused(data, tmp_path / "2", one_class, final, "train_split=train[:10]")
    large = [final, "evaluations=[knn,finetune]", "finetune_config.batch_size=64"]
    refused(data, tmp_path / "4", r"finetune_config.batch_size=64: .*has only 30 labelled images; set a lower", *large)
    assert not (tmp_path / "4/results.json").exists()
    lacking = r"train\[:20\]\) lacks 1 class of .*validation.* \(c\)"
    refused(data, tmp_path / "3", lacking, final, "train_split=train[:20]")


def test_checkpoints_that_cannot_be_evaluated(dinov2, folder, tmp_path):
    def saved(name: str, model: PreTrainedModel) -> str:
        model.save_pretrained(tmp_path / name)
        return f"checkpoint={tmp_path / name}"

    refused(
        folder,
        tmp_path / "1",
        r"SettingError: checkpoint='.*/nowhere': there is no such file or folder",
        "checkpoint=/nowhere",
    )
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = saved("text", BertModel(BertConfig(**sizes, intermediate_size=32, vocab_size=20)))
    refused(folder, tmp_path / "2", "SettingError: checkpoint=.*BertModel takes input_ids, not images", text)


def test_what_cannot_be_fine_tuned_is_skipped_with_the_reason(folder, tmp_path, capsys):
    sizes = {**SIZES, "intermediate_size": 32, "image_size": SIZE}
    poolformer = PoolFormerModel(PoolFormerConfig(depths=[1] * 4, hidden_sizes=[8] * 4))
    for kind, model, reason in (
        ("mae", ViTMAEModel(ViTMAEConfig(**sizes)), "no image classification model of type 'vit_mae'"),
        ("poolformer", poolformer, "no numbered layers; set finetune_config.layer_decay=1.0"),
    ):
        model.save_pretrained(tmp_path / kind)
        for names, rows in (("[finetune]", ["finetune"]), ("[finetune, knn]", ["knn", "finetune"])):
            output = tmp_path / f"{kind}-{names}"
            launch(folder, output, *TASK, f"evaluations={names}", f"checkpoint={tmp_path / kind}")
            table = capsys.readouterr().out.split("30 images:\n")[-1].strip().splitlines()[2:]
            assert [line.split("|")[2].strip() for line in table] == rows
            assert "skipped" in table[-1] and reason in table[-1]


def test_fine_tuning_under_an_engine_that_shards_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused(
        folder, tmp_path / "run", "under DeepSpeed or FSDP: .*ddp.yaml", "checkpoint=random", "evaluations=[finetune]"
    )


@pytest.mark.slow
def test_two_processes_evaluate_as_one(whole, folder, tmp_path):
    # without mixup, whose partners are of the same process, and without stochastic depth fine-tuning is the same, too
    plain = [f"finetune_config.{key}=0.0" for key in ("mixup", "cutmix", "drop_path_rate")]
    overrides = [*TASK, *plain, ALL, f"checkpoint={whole / 'final'}", "finetune_config.learning_rate=1.0e-3"]
    one = launch(folder, tmp_path / "one", *overrides)
    recipe, two = tmp_path / "two.yaml", tmp_path / "two"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(folder), "output_dir": str(two)}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"]
    command += ["hf_accel/run.py", str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (two / "results.json").exists() and len(entries(two)) == 4, done.stdout + done.stderr
    for got, expected in zip(entries(two), entries(one), strict=True):
        (run,) = got["runs"]
        assert run["processes"] == 2 and run["top1"] == pytest.approx(expected["runs"][0]["top1"], abs=1e-6), got
    got, expected = (load_file(path / entries(path)[-1]["runs"][0]["folder"] / WEIGHTS) for path in (two, one))
    for name, value in expected.items():
        if not name.endswith("k_proj.bias"):  # no loss depends on it: rounding alone moves it
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
