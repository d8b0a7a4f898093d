"""What an evaluation in training measures, with labels and without, and the warning of a lost rank."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_accel import AccelViTConfig, AccelViTModel, PretrainTrainer
from hf_accel.data import ImageSource, eval_loader
from hf_accel.evaluation import alpha_req, extract_features, rank_me
from hf_accel.training import accuracy
from hf_accel.training.accuracy import measure_encoder
from hf_accel.training.continuing import BestCallback
from tests.training.test_front_door import Tensors, config, moco

ARGS: Any = SimpleNamespace(knn_k=5, knn_temperature=0.07, dataloader_num_workers=0, device="cpu")


@pytest.fixture(scope="module")
def encoder() -> AccelViTModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AccelViTModel(AccelViTConfig(**sizes, intermediate_size=16, image_size=8, patch_size=4))


def images(n: int, labelled: bool) -> ImageSource:
    pixels = torch.randint(0, 255, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    labels = torch.arange(n) % 3 if labelled else None
    return ImageSource("x", pixels=pixels, labels=labels, class_names=["a", "b", "c"] if labelled else None)


def features_of(encoder: AccelViTModel, source: ImageSource) -> torch.Tensor:
    return extract_features(encoder, eval_loader(source, 8, 16), "cpu")[0]


def test_labels_give_accuracies_beside_the_spectrum_of_the_bank(encoder, monkeypatch):
    source, validation = images(60, True), images(30, True)
    found = measure_encoder(encoder, source, validation, ARGS)
    bank = features_of(encoder, source)
    assert found.keys() == {"knn_top1", "knn_top5", "ridge_top1", "rank_me", "alpha_req"}
    assert found["rank_me"] == pytest.approx(rank_me(bank)) and found["alpha_req"] == pytest.approx(alpha_req(bank))
    assert measure_encoder(encoder, source, source, ARGS)["ridge_top1"] > found["ridge_top1"]  # which it has seen
    monkeypatch.setattr(accuracy, "SPECTRUM_ROWS", 20)
    few = bank[torch.linspace(0, 59, 20).long()]
    assert measure_encoder(encoder, source, validation, ARGS)["rank_me"] == pytest.approx(rank_me(few))


@pytest.mark.parametrize("validation", [None, images(30, False), images(30, True)])
def test_without_labels_a_sample_of_the_training_images_is_encoded(encoder, monkeypatch, validation):
    source = images(60, False)
    found = measure_encoder(encoder, source, validation, ARGS)
    assert found == pytest.approx(
        {"rank_me": rank_me(features_of(encoder, source))} | {"alpha_req": found["alpha_req"]}
    )
    monkeypatch.setattr(accuracy, "SAMPLE", 20)
    few = features_of(encoder, source)[torch.linspace(0, 59, 20).long()]
    assert measure_encoder(encoder, source, validation, ARGS)["rank_me"] == pytest.approx(rank_me(few))


def test_a_collapsed_encoder_has_no_slope_and_ends_no_run(encoder):
    same = ImageSource("x", pixels=torch.full((40, 3, 8, 8), 9, dtype=torch.uint8))
    found = measure_encoder(encoder, same, None, ARGS)
    assert found["rank_me"] == pytest.approx(1, abs=0.01)


def test_measure_accuracy_warns_and_returns_what_it_did(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path), Tensors(), Tensors(30))
    new = trainer.measure_encoder(trainer.objective.encoder)
    with pytest.warns(FutureWarning, match=r"is deprecated .*: use measure_encoder\(\)") as warnings:
        old = trainer.measure_accuracy(trainer.objective.encoder)
    assert old == {"top1": new["knn_top1"], "top5": new["knn_top5"]} and warnings[0].filename == __file__


def warned(metric: str, values: list[float], caplog, monkeypatch) -> list[str]:
    """The warnings of a run from released weights whose evaluations measure these values."""
    monkeypatch.setattr(BestCallback, "keep", lambda self: None)
    callback, state = BestCallback(None), SimpleNamespace(log_history=[], global_step=0, is_world_process_zero=True)
    caplog.clear()
    for step, value in enumerate(values):
        metrics = {"eval_knn_top5": 0.5, metric: value}
        state.log_history.append({"step": 10 * step, **metrics})
        state.global_step = 10 * step
        callback.on_evaluate(None, state, None, metrics=metrics)
    return [record.getMessage() for record in caplog.records]


def test_a_rank_that_falls_by_a_tenth_is_reported_once(caplog, monkeypatch):
    (message,) = warned("eval_rank_me", [50.0, 48.0, 44.9, 30.0], caplog, monkeypatch)
    assert message.startswith("rank_me is 44.9 at step 20, and was 50 with the weights")
    assert not warned("eval_rank_me", [50.0, 45.1, 60.0, 52.0], caplog, monkeypatch)
