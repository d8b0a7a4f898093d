"""Every setting of a `PretrainConfig` acts in the run: on its optimizer, its evaluation, its plan and its views."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from hf_accel import PretrainConfig, PretrainTrainer
from hf_accel.compression import Compression, forward_cost
from hf_accel.data import AUGMENTATIONS, eval_loader
from hf_accel.data.sources import IMAGENET_MEAN
from hf_accel.evaluation import extract_features
from hf_accel.run_folder import read_state
from hf_accel.training.step_costs import prepare_steps
from hf_accel.utils.pretrain_settings import PretrainSettings
from tests.training.test_front_door import Tensors, config, moco

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

STAGES = [{"until": 0.4, "patch_size": 8, "token_dropout": 0.5}, {"until": 1.0, "patch_size": 4}]
STEP = 16 * 4.0
"""Units of an uncompressed step of MoCo on 16 images."""
UNLIKE_DEFAULTS: dict[str, Any] = {
    **{"budget": 10 * STEP, "schedule": STAGES, "learning_rate": 3e-3, "warmup": 0.3},
    **{"weight_decay": 0.2, "weight_decay_end": 0.6, "knn_k": 3, "knn_temperature": 2.0},
    **{"eval_points": [0.5, 1.0], "keep_points": [0.3], "save_steps": 1000},
}


class Noise(Tensors):
    """Images that only a few of their neighbours tell the class of."""

    def __init__(self, count: int, seed: int):
        super().__init__(count)
        noise = torch.randint(0, 256, self.images.shape, generator=torch.Generator().manual_seed(seed))
        self.images = (self.images * 0.15 + noise * 0.85).to(torch.uint8)


class Watch(TrainerCallback):
    """Learning rate and weight decay of every parameter, at the moment of every optimizer step."""

    def __init__(self):
        self.steps: list[dict[int, tuple[float, float]]] = []
        self.updates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        groups = cast(Any, optimizer).param_groups
        self.steps.append({id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})


@pytest.fixture(scope="module", params=["cosine", "poly"])
def trained(request, tmp_path_factory, own_cache_and_threads, blank_figures):
    folder, watch = tmp_path_factory.mktemp(request.param), Watch()
    args = config(folder / "run", lr_schedule=request.param, **UNLIKE_DEFAULTS)
    model = moco()
    update = model.update_target
    model.update_target = lambda progress: (watch.updates.append(progress), update(progress))[1]
    trainer = PretrainTrainer(model, args, Noise(96, 1), Noise(60, 2), callbacks=[watch])
    trainer.train()
    return trainer, watch


def progress_of_steps(trainer: PretrainTrainer) -> list[float]:
    """A transcription: each step costs what its stage does, and the run ends when the budget pays for no more."""
    spent, budget, points = 0.0, 10 * STEP, []
    while True:
        online, target = (Compression(8, 0.5), Compression(8)) if spent / budget < 0.4 else (Compression(4),) * 2
        cost = 16 * sum(
            times * forward_cost(trainer.objective.config, branch) for times, branch in ((3, online), (1, target))
        )
        if spent + cost > budget:
            return points
        points.append(spent / budget)
        spent += cost


def test_rate_and_decay_of_the_optimizer_at_every_step(trained):
    trainer, watch = trained
    points = np.array(progress_of_steps(trainer))
    assert len(points) == len(watch.steps) > 15 and np.ptp(np.diff(points)) > 0.05  # steps of two lengths
    assert watch.updates == pytest.approx(points)
    rise = np.minimum(points / 0.3, 1)
    cosine = (1 + np.cos(np.pi * np.maximum(points - 0.3, 0) / 0.7)) / 2
    rates = 3e-3 * rise * (1 - points**2 if trainer.args.lr_schedule == "poly" else cosine)
    decays = 0.6 + (0.2 - 0.6) * (1 + np.cos(np.pi * points)) / 2
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sum(p.ndim > 1 for p in trainable.values()) > 5 < sum(p.ndim == 1 for p in trainable.values())
    for step, rate, decay in zip(watch.steps, rates, decays, strict=True):
        assert step.keys() == {id(p) for p in trainable.values()}
        for name, parameter in trainable.items():
            expected = (rate, decay if parameter.ndim > 1 else 0.0)
            assert step[id(parameter)] == pytest.approx(expected, abs=1e-12), name


def vote(bank, labels, queries, k: int, temperature: float) -> np.ndarray:
    predicted = []
    for query in queries:
        similarity = bank @ query
        nearest = np.argsort(-similarity)[:k]
        votes = np.bincount(labels[nearest], np.exp(similarity[nearest] / temperature), 3)
        predicted.append(votes.argmax())
    return np.array(predicted)


def test_accuracy_is_a_vote_of_knn_k_neighbours(trained):
    trainer, _ = trained
    pairs = []
    for images in (trainer.source, trainer.validation):
        features, labels = extract_features(
            trainer.objective.encoder, eval_loader(images, 16, 256, 0), torch.device("cpu")
        )
        pairs += [F.normalize(features.double(), dim=1).numpy(), labels.numpy()]
    bank, labels, queries, truth = pairs
    accuracy = {pair: (vote(bank, labels, queries, *pair) == truth).mean() for pair in ((3, 2.0), (20, 2.0))}
    results = json.loads((Path(trainer.args.output_dir) / "results.json").read_text())
    assert results["knn_top1"] == pytest.approx(accuracy[3, 2.0]) != accuracy[20, 2.0]


def test_evaluations_and_kept_checkpoints_are_at_their_points(trained):
    trainer, _ = trained
    share = [trainer.plan.share_done(entry["step"]) for entry in trainer.state.log_history if "eval_knn_top1" in entry]
    assert len(share) == 2 and 0.5 <= share[0] < 0.65 and share[1] == 1.0
    (kept,) = trainer.folder.kept.iterdir()
    assert 0.3 <= trainer.plan.share_done(read_state(kept)["step"]) < 0.45


def test_log_lines_hold_patches_and_tokens_of_both_branches(trained):
    log = next(entry for entry in trained[0].state.log_history if "loss" in entry)
    assert [log[key] for key in ("patch_size", "token_dropout", "tokens")] == [8, 0.5, 3]
    assert [log[f"target_{key}"] for key in ("patch_size", "token_dropout", "tokens")] == [8, 0.0, 5]


# What needs no training: what the Trainer has made of each setting


def made(folder: Path, **settings: Any) -> PretrainTrainer:
    return PretrainTrainer(moco(), config(folder, **{"budget": 10 * STEP, **settings}), Tensors(), Tensors(30))


def probes(trainer: PretrainTrainer) -> tuple[int, int]:
    """How many probes the budget pays for after the first one, and the draws of each."""
    controller = cast(Any, trainer.controller)
    return len(controller.points) - 1, controller.draws


AUTO: dict[str, Any] = {"schedule": "auto", "auto_share": 0.5, "auto_draws": 3, "budget": 30 * STEP}
ACTS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "budget": ({"budget": 7 * STEP}, lambda t: len(t.plan), 7),
    "batch_size": (
        {"batch_size": 32},
        lambda t: (len(t.plan), next(iter(t.get_train_dataloader()))["images"].shape[0]),
        (5, 32),
    ),
    "schedule": ({"schedule": STAGES}, lambda t: t.plan[0].strategy.online, Compression(8, 0.5)),
    "cost": ({"cost": "measured"}, lambda t: (t.plan_is_final, bool(prepare_steps(t, 0.0))), (False, True)),
    "auto_share": (AUTO | {"auto_share": 0.8}, probes, (5, 3)),
    "auto_draws": (AUTO | {"auto_draws": 4}, probes, (1, 4)),
    "search_criterion": (AUTO | {"search_criterion": "gain"}, lambda t: t.controller.criterion, "gain"),
    "augmentation": ({"augmentation": "digits"}, lambda t: t.view_configs, list(AUGMENTATIONS["digits"])),
    "normalisation": (
        {"normalisation": "data"},
        lambda t: (t.source.mean == IMAGENET_MEAN, t.objective.config.image_mean == [*t.source.mean]),
        (False, True),
    ),
    "view_resolution": (
        {"schedule": STAGES, "view_resolution": "full"},
        lambda t: (t.view_size(0), t.view_size(len(t.plan) - 1)),
        (16, 16),
    ),
}
IN_THE_RUN = {
    "lr_schedule",
    "view_backend",  # in test_views.py
    "cache",  # in test_caching.py
    "warmup",
    "continue_from",  # in test_extending.py
    "freeze_encoder",  # in test_continuing.py
    "layer_decay",  # in test_continuing.py
    "weight_decay_end",
    "eval_points",
    "keep_points",
    "knn_k",
    "knn_temperature",
}


def test_every_own_setting_has_a_test():
    assert (
        ACTS.keys() | IN_THE_RUN
        == set(PretrainSettings.__dataclass_fields__)
        <= set(PretrainConfig.__dataclass_fields__)
    )


@pytest.mark.parametrize("name", ACTS)
def test_trainer_is_made_by_its_settings(name, tmp_path):
    settings, observe, expected = ACTS[name]
    assert observe(made(tmp_path / "with", **settings)) == expected
    assert name in settings
