"""`continue_from`: a run that takes over weights and optimizer of a finished one, and spends a budget of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_accel import (
    AccelViTModel,
    DINOForPreTraining,
    MoCoForPreTraining,
    PretrainTrainer,
    SimCLRForPreTraining,
    vit_tiny,
)
from hf_accel.compression import Compression, Strategy
from hf_accel.training import trainer as trainer_module
from hf_accel.utils.errors import SettingError
from hf_accel.utils.progress import learning_rate_factor
from tests.tiny_runs import WEIGHTS, assert_same_weights
from tests.training.test_front_door import HEADS, SIZES, Tensors, config, moco

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

DINO: dict[str, Any] = {"num_prototypes": 12, "head_hidden_size": 16, "bottleneck_size": 8, "freeze_last_layer": 0.4}
STAGES = [{"until": 0.5, "patch_size": 4}, {"until": 1.0, "patch_size": 8, "token_dropout": 0.5}]
STEP = 16 * 4.0
"""Units of an uncompressed step of MoCo on 16 images."""
QUIET: dict[str, Any] = {"eval_points": [], "save_steps": 2, "view_backend": "eager"}
EARLIER: dict[str, Any] = {"budget": 8 * STEP, "schedule": STAGES, "learning_rate": 3e-3, **QUIET}


def make(kind: Any = MoCoForPreTraining, **settings: Any) -> Any:
    torch.manual_seed(7)  # other weights than those of the earlier run
    return kind(vit_tiny(**SIZES), **(settings or {MoCoForPreTraining: HEADS, DINOForPreTraining: DINO}[kind]))


def finish(folder: Path, model: Any) -> Path:
    PretrainTrainer(model, config(folder, **EARLIER, save_total_limit=None), Tensors()).train()
    return folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, own_cache_and_threads, blank_figures) -> Path:
    """A finished run."""
    return finish(tmp_path_factory.mktemp("earlier") / "moco", moco())


@pytest.fixture(scope="module")
def earlier_dino(tmp_path_factory, own_cache_and_threads, blank_figures) -> Path:
    return finish(tmp_path_factory.mktemp("earlier") / "dino", make(DINOForPreTraining))


class Steps(TrainerCallback):
    """Weights, optimizer state and learning rates at the start of each step."""

    def __init__(self):
        self.weights: list[dict[str, torch.Tensor]] = []
        self.moments: list[list[dict[str, torch.Tensor]]] = []
        self.rates: list[list[float]] = []

    def on_step_begin(self, args, state, control, model: Any = None, optimizer: Any = None, **kwargs):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = [optimizer.state.get(p, {}) for p in parameters]
        self.moments.append([{name: value.clone() for name, value in state.items()} for state in moments])

    def on_pre_optimizer_step(self, args, state, control, optimizer: Any = None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def extend(folder: Path, earlier: Path, model: Any = None, **settings: Any) -> tuple[PretrainTrainer, Steps]:
    steps = Steps()
    given = {"budget": 4 * STEP, "schedule": "standard", **QUIET, **settings, "continue_from": str(earlier)}
    return PretrainTrainer(model or make(), config(folder, **given), Tensors(), callbacks=[steps]), steps


def last_checkpoint(run: Path) -> Path:
    return run / f"checkpoint-{json.loads((run / 'results.json').read_text())['steps']}"


def assert_starts_at_end(folder: Path, earlier: Path, model: Any) -> None:
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    trainer, steps = extend(folder, earlier, model)
    trainer.train()
    stored = load_file(last_checkpoint(earlier) / WEIGHTS)
    assert steps.weights[0].keys() == stored.keys()
    assert all(torch.equal(steps.weights[0][name], value) for name, value in stored.items())
    saved = torch.load(last_checkpoint(earlier) / "optimizer.pt", weights_only=True)["state"]
    assert len(saved) == sum(bool(state) for state in steps.moments[0]) > 10
    for index, state in saved.items():
        assert state.keys() == steps.moments[0][index].keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, steps.moments[0][index][name]) for name, value in state.items())
    assert {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()} == before


def test_the_first_step_has_weights_and_optimizer_of_the_end(tmp_path, earlier):
    assert_starts_at_end(tmp_path, earlier, make())


@pytest.mark.slow
def test_dino_takes_over_its_teacher_and_centre(tmp_path, earlier_dino):
    assert load_file(last_checkpoint(earlier_dino) / WEIGHTS)["center"].any()
    assert_starts_at_end(tmp_path, earlier_dino, make(DINOForPreTraining))


@pytest.mark.slow
def test_the_learning_rate_is_the_new_one_and_warms_up_again(tmp_path, earlier):
    settings: dict[str, Any] = {"learning_rate": 7e-3, "warmup": 0.5, "lr_schedule": "poly", "weight_decay": 0.3}
    trainer, steps = extend(tmp_path, earlier, **settings)
    trainer.train()
    rates = [7e-3 * learning_rate_factor(step.progress, "poly", 0.5) for step in trainer.plan]
    assert rates[0] == 0.0 < rates[1] < max(rates) and [set(rate) for rate in steps.rates] == [{r} for r in rates]
    decays = [group["weight_decay"] for group in cast(Any, trainer.optimizer).param_groups]
    assert decays == [0.3, 0.0]


@pytest.mark.slow
def test_budget_and_schedule_are_those_of_the_new_run(tmp_path, earlier):
    old = json.loads((earlier / "results.json").read_text())
    for number, budget in enumerate((2 * STEP, 4 * STEP)):
        trainer, _ = extend(tmp_path / str(number), earlier, budget=budget)
        (stage,) = trainer.plan.schedule.stages
        assert (stage.strategy.online.patch_size, stage.strategy.online.token_dropout) == (8, 0.5)
        trainer.train()
        results = json.loads((tmp_path / str(number) / "results.json").read_text())
        assert results["budget"] == budget and 0.8 * budget < results["units"] <= budget
        assert results["total_units"] == results["units"] + old["units"]
        about = results["continued_from"]
        assert (about["units"], about["step"], about["runs"]) == (old["units"], old["steps"], 1)
        assert about["name"] == f"{earlier.parent.name}/{earlier.name}"
    trainer, _ = extend(tmp_path / "named", earlier, schedule=[{"until": 1.0, "patch_size": 4}])
    assert [stage.strategy.online.patch_size for stage in trainer.plan.schedule.stages] == [4]
    trainer, _ = extend(tmp_path / "none", earlier, schedule=None)
    assert [stage.strategy for stage in trainer.plan.schedule.stages] == [Strategy(Compression(4))]
    assert trainer.args.schedule is None


@pytest.mark.slow
def test_a_checkpoint_on_the_way_may_be_continued(tmp_path, earlier):
    trainer, steps = extend(tmp_path, earlier / "checkpoint-2")
    trainer.train()
    stored = load_file(earlier / "checkpoint-2" / WEIGHTS)
    assert all(torch.equal(steps.weights[0][name], value) for name, value in stored.items())
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["continued_from"]["step"], results["continued_from"]["units"]) == (2, 2 * STEP)
    assert [stage["patch_size"] for stage in results["schedule"]] == [4]  # that of this step, and not of the last one


@pytest.mark.slow
def test_results_card_and_log_say_what_was_continued(tmp_path, earlier, monkeypatch, capsys):
    values = iter([0.5, 0.6])
    monkeypatch.setattr(PretrainTrainer, "measure_encoder", lambda *_: {"knn_top1": next(values), "knn_top5": 1.0})
    trainer, _ = extend(tmp_path / "run", earlier, eval_points=[1.0])
    trainer.validation = trainer.source
    trainer.train()
    results, said = json.loads((tmp_path / "run/results.json").read_text()), capsys.readouterr().out
    assert (results["knn_top1_continued_from"], results["knn_top1_random_init"]) == (0.5, None)
    about = results["continued_from"]
    assert f"Continuing from {about['name']} at step {about['step']}" in said and "at the start 50.00%" in said
    card = (tmp_path / "run/final/README.md").read_text()
    assert f"continued the run `{about['name']}` from step {about['step']}" in card
    assert (
        f"took {results['total_units']:,.0f} units" in card
        and "was 50.0% before, and that of this model is 60.0%" in card
    )


def seen_by(monkeypatch, trainer: PretrainTrainer) -> tuple[list[list[int]], list[torch.Tensor], set[int]]:
    """The images of each step, the first view of the first one, and the seeds of the draws of tokens."""
    order, pixels, seeds = [], [], set()
    true_views, true_draw = trainer_module.make_views, trainer_module.Draw

    def views(inputs: Any, *args: Any):
        order.append(inputs["index"].tolist())
        made = true_views(inputs, *args)
        # What random draws have done to the images, whichever they are: the views of one and the same image.
        same = {**inputs, "images": inputs["images"][:1].repeat(len(inputs["images"]), 1, 1, 1) * 0 + 100}
        pixels.append(true_views(same, *args)[0])
        return made

    def draw(seed: int, *args: int):
        seeds.add(seed)
        return true_draw(seed, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "make_views", views)
        patch.setattr(trainer_module, "Draw", draw)
        trainer.train()
    return order, pixels, seeds


@pytest.mark.slow
def test_images_and_views_come_in_another_order(tmp_path, monkeypatch):
    def run(name: str, **settings: Any):
        args = config(
            tmp_path / name, **{**EARLIER, "save_steps": 1000, "budget": 3 * STEP, "schedule": None, **settings}
        )
        return seen_by(monkeypatch, PretrainTrainer(moco(), args, Tensors()))

    first, second = run("a"), run("b", continue_from=str(tmp_path / "a"))
    third, again = run("c", continue_from=str(tmp_path / "b")), run("d", continue_from=str(tmp_path / "a"))
    for one, other in ((first, second), (second, third), (first, third)):
        assert len(one[0]) == len(other[0]) == 3 and all(a != b for a, b in zip(one[0], other[0], strict=True))
        assert not torch.equal(one[1][0], other[1][0]) and not one[2] & other[2]
    assert second[0] == again[0] and second[2] == again[2]
    assert_same_weights(tmp_path / "b", tmp_path / "d")
    about = json.loads((tmp_path / "c/results.json").read_text())["continued_from"]
    units = [json.loads((tmp_path / name / "results.json").read_text())["units"] for name in "ab"]
    assert about["runs"] == 2 and about["units"] == sum(units)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 3


@pytest.mark.slow
def test_a_resume_is_exact_and_does_not_read_the_earlier_run(tmp_path, earlier):
    copy = shutil.copytree(earlier, tmp_path / "earlier")
    whole, _ = extend(tmp_path / "whole", copy)
    whole.train()
    assert whole.plan.num_steps > 4
    torn, _ = extend(tmp_path / "torn", copy)
    torn.add_callback(StopAt())
    torn.train()
    assert torn.stopped
    shutil.rmtree(copy)
    resumed, steps = extend(tmp_path / "torn", copy)
    resumed.train(resume_from_checkpoint="auto")
    assert len(steps.weights) == whole.plan.num_steps - 3
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "torn")]
    assert (
        results[0]["continued_from"] == results[1]["continued_from"]
        and results[0]["schedule"] == results[1]["schedule"]
    )
    complete, _ = extend(tmp_path / "torn", copy)
    complete.train(resume_from_checkpoint="auto")


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "objective": (lambda: make(SimCLRForPreTraining, **HEADS), {}, "objective='simclr': .* holds a MoCoForPreTraining"),
    "heads": (
        lambda: make(**HEADS | {"projection_size": 8}),
        {},
        r"objective_config\.projection_size=8: .* was trained with 16",
    ),
    "setting": (
        lambda: make(**HEADS, temperature=0.7),
        {},
        r"objective_config\.temperature=0\.7: .* was trained with 0\.2",
    ),
    "model": (
        lambda: MoCoForPreTraining(vit_tiny(**SIZES | {"num_hidden_layers": 3}), **HEADS),
        {},
        "num_hidden_layers=3: .* was trained with 2; give it as there",
    ),
    "patch size": (
        lambda: MoCoForPreTraining(vit_tiny(**SIZES | {"patch_size": 8}), **HEADS),
        {"schedule": [{"until": 1.0, "patch_size": 8}]},
        "patch_size=8: .* was trained with 4",
    ),
    "frozen": (
        lambda: MoCoForPreTraining(vit_tiny(**SIZES, freeze_patch_projection=True), **HEADS),
        {},
        "freeze_patch_projection=True: .* was trained with False",
    ),
    "optimizer": (make, {"optim": "sgd"}, "optim='sgd': the run of continue_from had 'adamw_torch_fused'"),
    "groups": (make, {"layer_decay": 0.5}, r"layer_decay=0\.5, .* groups the weights in another way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_agree_is_named(tmp_path, earlier, case):
    model, settings, message = REFUSED[case]
    with pytest.raises(SettingError, match=message):
        extend(tmp_path, earlier, model(), **settings)[0].train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_no_finished_run_is_refused(tmp_path, earlier):
    def refusal(path: Path, folder: Path = tmp_path / "new") -> str:
        with pytest.raises(SettingError) as error:
            extend(folder, path)[0].train()
        return str(error.value)

    assert "neither the output_dir of a finished run nor a checkpoint" in refusal(tmp_path / "nothing")
    assert "neither the output_dir" in refusal(earlier / "final")
    copy = shutil.copytree(earlier, tmp_path / "copy")
    weights = last_checkpoint(copy) / WEIGHTS
    weights.unlink()
    assert f"{weights} is missing" in refusal(copy)
    shutil.rmtree(last_checkpoint(copy))
    assert "was removed; init_from=" in refusal(copy)
    (copy / "results.json").unlink()
    assert "not finished: resume it with the same command, or name one of its checkpoints" in refusal(copy)
    assert "was started without continue_from" in refusal(earlier, shutil.copytree(earlier, tmp_path / "own"))


@pytest.mark.slow
def test_a_model_before_its_first_step_is_no_earlier_run(tmp_path):
    args = config(tmp_path / "a", **{**EARLIER, "budget": 2 * STEP, "schedule": None, "keep_points": [0.0]})
    PretrainTrainer(moco(), args, Tensors()).train()
    with pytest.raises(SettingError, match="saved before the first step"):
        extend(tmp_path / "b", tmp_path / "a/kept/checkpoint-0")
    args = replace(
        args, output_dir=str(tmp_path / "c"), continue_from=str(tmp_path / "a/checkpoint-2"), keep_points=[0.5]
    )
    PretrainTrainer(moco(), args, Tensors()).train()
    extend(tmp_path / "d", tmp_path / "c/kept/checkpoint-1")[0].train()


def test_an_engine_of_another_kind_is_refused(tmp_path, earlier, monkeypatch):
    monkeypatch.setattr("hf_accel.training.extending.engine_of", lambda _: "2 processes of DeepSpeed ZeRO-2")
    with pytest.raises(SettingError, match="saved by a single process or data parallel, and this is 2 processes"):
        extend(tmp_path, earlier)[0].train()


@pytest.mark.slow
def test_dino_repeats_no_ramp_of_a_start(tmp_path, earlier_dino):
    model = make(DINOForPreTraining)
    assert model.teacher_temperature(0.0) == 0.04 and model.frozen_parameters(0.1)
    trainer, steps = extend(tmp_path, earlier_dino, model)
    trainer.train()
    assert model.teacher_temperature(0.0) == model.teacher_temperature(1.0) == 0.07
    last = [name for name in steps.weights[0] if name.startswith("student_head.") and "prototypes" in name]
    assert last and any(not torch.equal(steps.weights[2][name], steps.weights[0][name]) for name in last)
    assert model.settings["teacher_temperature_start"] == 0.04


@pytest.mark.slow
def test_a_run_from_released_weights_goes_on_at_the_pace_of_layers(tmp_path):
    torch.manual_seed(1)
    AccelViTModel(vit_tiny(**SIZES)).save_pretrained(tmp_path / "released")
    quick: dict[str, Any] = {"budget": 3 * STEP, **QUIET, "layer_decay": 1.0, "freeze_encoder": 0.5}

    def start() -> Any:
        return MoCoForPreTraining.from_encoder(tmp_path / "released", HEADS)

    PretrainTrainer(start(), config(tmp_path / "a", **quick), Tensors()).train()
    even, _ = extend(tmp_path / "b", tmp_path / "a", start(), layer_decay=1.0)
    even.train()
    assert even.pace == (0.0, 1.0) and len(cast(Any, even.optimizer).param_groups) == 4
    with pytest.raises(SettingError, match=r"layer_decay=0\.75, .*groups the weights in another way"):
        extend(tmp_path / "c", tmp_path / "b", start())[0].train()
    quick |= {"layer_decay": 0.5}
    PretrainTrainer(start(), config(tmp_path / "d", **quick), Tensors()).train()
    other, steps = extend(tmp_path / "e", tmp_path / "d", start(), warmup=0.0)
    other.train()
    assert other.pace == (0.0, 0.75)
    top = max(steps.rates[0])
    assert sorted({round(rate / top, 6) for rate in steps.rates[0]}) == pytest.approx([0.75**3, 0.75**2, 0.75, 1.0])
