"""Training on from a released encoder: what freezes, how fast each layer learns, and what is kept."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_accel import AccelViTModel, DINOForPreTraining, MoCoForPreTraining, PretrainTrainer, vit_tiny
from hf_accel.training import continuing
from hf_accel.utils.errors import SettingError
from hf_accel.utils.progress import learning_rate_factor, thaw_factor
from tests.tiny_runs import WEIGHTS
from tests.training.test_front_door import HEADS, SIZES, Tensors, config, moco
from tests.training.test_settings_act import STAGES, STEP, Watch

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

DINO: dict[str, Any] = {"num_prototypes": 12, "head_hidden_size": 16, "bottleneck_size": 8, "momentum": 0.5}
QUIET: dict[str, Any] = {"eval_points": [], "save_steps": 1000, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("released")
    AccelViTModel(vit_tiny(**SIZES)).save_pretrained(folder)
    return folder


def started(encoder: Path, kind: Any = MoCoForPreTraining, settings: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    return kind.from_encoder(encoder, HEADS | {"momentum": 0.5} if settings is None else settings)


class Weights(Watch):
    """Also the weights before each step."""

    def __init__(self):
        super().__init__()
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("kind, settings", [(MoCoForPreTraining, None), (DINOForPreTraining, DINO)])
def test_the_encoder_is_frozen_then_learns_by_layers(tmp_path, encoder, kind, settings):
    model, watch = started(encoder, kind, settings), Weights()
    pace: dict[str, Any] = {"freeze_encoder": 0.4, "layer_decay": 0.5, "warmup": 0.2, "weight_decay": 0.3}
    args = config(tmp_path, **QUIET, **pace, budget=12 * STEP, schedule=STAGES)
    trainer = PretrainTrainer(model, args, Tensors(), callbacks=[watch])
    trainer.train()
    points = [step.progress for step in trainer.plan]
    learner = model.student_encoder if kind is DINOForPreTraining else model.encoder
    of_encoder = {name for name, child in model.named_children() if isinstance(child, AccelViTModel)}
    depth = {"embeddings": 3, "layers.0": 2, "layers.1": 1, "layernorm": 0}
    first = next(number for number, point in enumerate(points) if point > 0.4)
    assert 3 < first < len(points) - 1
    for step, point in zip(watch.steps, points, strict=True):
        rate = 1e-2 * learning_rate_factor(point, "cosine", 0.2)
        for name, parameter in learner.named_parameters():
            layers = next(number for part, number in depth.items() if name.startswith(part))
            expected = rate * 0.5**layers * thaw_factor(point, 0.4, 0.2)
            assert step[id(parameter)][0] == pytest.approx(expected, abs=1e-12), name
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.partition(".")[0] not in of_encoder and "last" not in name:
                assert step[id(parameter)][0] == pytest.approx(rate, abs=1e-12), name
    for name, value in watch.weights[0].items():
        inside = name.partition(".")[0] in of_encoder
        assert not inside or torch.equal(watch.weights[first][name], value), name
    learnt = [name for name in watch.weights[0] if not torch.equal(watch.weights[first][name], watch.weights[0][name])]
    assert len(learnt) > 4
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, watch.weights[0][name])]
    assert any(name.partition(".")[0] in of_encoder for name in moved)


def test_thawing_is_a_function_of_progress():
    assert [thaw_factor(point, 0.4, 0.2) for point in (0.0, 0.4, 0.5, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [thaw_factor(point, 0.0, 0.2) for point in (0.0, 0.1)] == [1, 1]
    assert [thaw_factor(point, 0.4, 0.0) for point in (0.3, 0.4)] == [0, 1]


def test_defaults_of_a_start_and_of_random_weights(tmp_path, encoder):
    made = PretrainTrainer(started(encoder), config(tmp_path / "a"), Tensors())
    assert made.pace == (0.1, 0.75)
    chosen = config(tmp_path / "b", freeze_encoder=0.0, layer_decay=0.9)
    assert PretrainTrainer(started(encoder), chosen, Tensors()).pace == (0.0, 0.9)
    plain = PretrainTrainer(moco(), config(tmp_path / "c"), Tensors())
    assert plain.pace == (0.0, 1.0) and len(plain.create_optimizer().param_groups) == 2


def test_an_optimizer_of_a_program_keeps_its_groups(tmp_path, encoder):
    model = started(encoder)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    made = PretrainTrainer(model, config(tmp_path / "a"), Tensors(), optimizers=(optimizer, None))
    assert made.pace == (0.0, 1.0) and len(made.create_optimizer().param_groups) == 1
    with pytest.raises(SettingError, match=r"layer_decay=0\.5: the optimizer that was passed has its own groups"):
        args = config(tmp_path / "b", layer_decay=0.5)
        PretrainTrainer(model, args, Tensors(), optimizers=(optimizer, None))


@pytest.mark.parametrize("settings", [{"freeze_encoder": 1.0}, {"layer_decay": 0.0}, {"layer_decay": 1.5}])
def test_impossible_paces_are_refused(tmp_path, settings):
    (name,) = settings
    with pytest.raises(SettingError, match=f"{name}="):
        config(tmp_path, **settings)


CASES: dict[str, tuple[list[float], int, bool]] = {
    # accuracies at 0, 50 and 100%, which of them is the best, and whether a warning comes
    "better": ([0.5, 0.6, 0.7], 2, False),
    "worse": ([0.5, 0.4, 0.3], 0, True),
    "worse at last": ([0.5, 0.8, 0.495], 1, False),
    "equal": ([0.5, 0.5, 0.4], 0, True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_best_is_kept_and_a_fall_is_said_once(tmp_path, encoder, monkeypatch, caplog, capsys, case):
    accuracies, best, warns = CASES[case]
    values, digests = iter(accuracies), []

    def measure(self, model):
        digests.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"knn_top1": next(values), "knn_top5": 1.0}

    monkeypatch.setattr(PretrainTrainer, "measure_encoder", measure)
    args = config(tmp_path / "run", **QUIET | {"eval_points": [0.5, 1.0]}, freeze_encoder=0.0, budget=4 * STEP)
    trainer = PretrainTrainer(started(encoder), args, Tensors(), Tensors(30))
    with caplog.at_level(logging.WARNING, "hf_accel"):
        trainer.train()
    assert caplog.text.count("makes the encoder worse") == warns
    kept = load_file(tmp_path / "run/best" / WEIGHTS)
    assert kept.keys() == digests[best].keys() and all(torch.equal(kept[name], digests[best][name]) for name in kept)
    assert (tmp_path / "run/best/preprocessor_config.json").exists() and not (tmp_path / "run/.best").exists()
    results = json.loads((tmp_path / "run/results.json").read_text())
    chosen = {"measure": "knn_top1", "knn_top1": accuracies[best], "start": 0.5}
    assert results["best"] == {**chosen, "step": [0, 2, 4][best], "progress": [0.0, 0.5, 1.0][best]}
    assert (results["knn_top1_init_from"], results["knn_top1"]) == (0.5, accuracies[-1])
    assert results["knn_top1_random_init"] is None and results["init_from"]["name"] == "/".join(encoder.parts[-2:])
    assert ("best/ holds the best" in capsys.readouterr().out) == (best < 2)
    card = (tmp_path / "run/final/README.md").read_text()
    assert f"started from the weights of `{results['init_from']['name']}`" in card
    assert "was 50.0%, and that of this model is" in card and ("The best of the run" in card) == (best < 2)
    shutil.rmtree(tmp_path / "run")


def test_an_evaluation_outside_of_training_does_not_replace_the_best(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(PretrainTrainer, "measure_encoder", lambda self, model: {"rank_me": 3.0})
    (tmp_path / "run/best").mkdir(parents=True)
    (tmp_path / "run/best" / WEIGHTS).write_text("of a run that was interrupted")
    trainer = PretrainTrainer(started(encoder), config(tmp_path / "run", **QUIET, budget=2 * STEP), Tensors())
    assert trainer.evaluate() == {"eval_rank_me": 3.0}
    assert (tmp_path / "run/best" / WEIGHTS).read_text() == "of a run that was interrupted"


@pytest.mark.parametrize("ranks, best", [([20.0, 30.0, 25.0], 1), ([20.0, 15.0, 30.0], 2)])
def test_without_labels_the_best_is_chosen_by_rank(tmp_path, encoder, monkeypatch, capsys, ranks, best):
    values, drawn = iter(ranks), {}
    monkeypatch.setattr(PretrainTrainer, "measure_encoder", lambda self, model: {"rank_me": next(values)})
    monkeypatch.setattr("hf_accel.training.finish.plot_curves", lambda *_, **options: drawn.update(options))
    args = config(tmp_path / "run", **QUIET | {"eval_points": [0.5, 1.0]}, freeze_encoder=0.0, budget=4 * STEP)
    PretrainTrainer(started(encoder), args, Tensors()).train()
    results = json.loads((tmp_path / "run/results.json").read_text())
    chosen = {"measure": "rank_me", "rank_me": ranks[best], "start": 20.0}
    assert results["best"] == {**chosen, "step": [0, 2, 4][best], "progress": [0.0, 0.5, 1.0][best]}
    assert drawn["rank_me_start"] == 20.0
    said, card = capsys.readouterr().out, (tmp_path / "run/final/README.md").read_text()
    assert f"; RankMe {ranks[-1]:.1f} (at the start 20.0)" in said
    assert ("; best/ holds the best, RankMe 30.0 at 50% of the budget" in said) == (best == 1)
    assert f"Their RankMe on training images was 20.0, and that of this model is {ranks[-1]:.1f}." in card
    assert ("The best of the run, 30.0, was reached at 50% of the budget." in card) == (best == 1)


@pytest.mark.parametrize("stated, expected", [("mit", "mit"), (["mit", "0bsd"], "other"), (None, "unknown")])
def test_the_licence_of_a_start_is_not_replaced_by_the_default(tmp_path, encoder, stated, expected):
    model = started(encoder)
    model.config.init_from["license"] = stated
    trainer = PretrainTrainer(model, config(tmp_path, **QUIET, budget=12 * STEP, schedule=STAGES), Tensors())
    assert trainer.publication().license == expected and trainer.publication("isc").license == "isc"
    model.config.init_from = None
    assert trainer.publication().license == "apache-2.0"


def test_a_run_from_random_weights_keeps_no_best(tmp_path):
    args = config(tmp_path / "run", **QUIET | {"eval_points": [0.0, 1.0]}, budget=2 * STEP)
    PretrainTrainer(moco(), args, Tensors(), Tensors(30)).train()
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert not (tmp_path / "run/best").exists() and results["best"] is None and results["init_from"] is None
    assert results["knn_top1_random_init"] is not None and results["knn_top1_init_from"] is None


def test_another_metric_is_watched_by_one_entry(monkeypatch):
    assert continuing.watched_metric({"eval_rank": 3.0}) is None
    monkeypatch.setitem(continuing.WATCHED, "eval_rank", lambda start: 0.9 * start)
    assert continuing.watched_metric({"eval_rank": 3.0}) == "eval_rank"
    assert continuing.watched_metric({"eval_rank": 3.0, "eval_knn_top1": 0.5}) == "eval_knn_top1"
