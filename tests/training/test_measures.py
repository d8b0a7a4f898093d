"""What an evaluation in training measures, with labels and without, and the warning of a lost rank."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_accel import AccelViTConfig, AccelViTModel, PretrainTrainer
from hf_accel.data import AUGMENTATIONS, ImageSource, eval_loader, load_sources, make_views
from hf_accel.evaluation import alpha_req, extract_features, lidar, rank_me
from hf_accel.training import accuracy, evaluating, view_features
from hf_accel.training.accuracy import Samples, choose_samples, measure_encoder
from hf_accel.training.continuing import BestCallback
from hf_accel.training.view_features import encode_views
from tests.tiny_runs import assert_same_weights, image_folder
from tests.training.test_front_door import Tensors, config, moco
from tests.two_processes import run_two

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

ARGS: Any = SimpleNamespace(knn_k=5, knn_temperature=0.07, dataloader_num_workers=0, device="cpu")


@pytest.fixture(scope="module", name="encoder")
def make_encoder_once() -> AccelViTModel:
    return make_encoder()


def make_encoder() -> AccelViTModel:
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


def test_what_the_trainer_cannot_measure_is_refused(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path), Tensors())
    with pytest.raises(TypeError, match=r"predicts nothing.*evaluate\(\).*hf-accel embed"):
        trainer.predict(Tensors(30))
    with pytest.raises(TypeError, match="measures the eval_dataset that the trainer was made with"):
        trainer.evaluate(Tensors(30))


@pytest.mark.parametrize("validation", [None, images(30, False), images(30, True)])
def test_without_labels_a_sample_of_the_training_images_is_encoded(encoder, validation):
    source = images(60, False)
    found = measure_encoder(encoder, source, validation, ARGS)
    assert found == pytest.approx(
        {"rank_me": rank_me(features_of(encoder, source))} | {"alpha_req": found["alpha_req"]}
    )
    few = features_of(encoder, source)[torch.linspace(0, 59, 20).long()]
    assert measure_encoder(encoder, source, validation, ARGS, 20)["rank_me"] == pytest.approx(rank_me(few))


def test_a_collapsed_encoder_has_no_slope_and_ends_no_run(encoder):
    same = ImageSource("x", pixels=torch.full((40, 3, 8, 8), 9, dtype=torch.uint8))
    found = measure_encoder(encoder, same, None, ARGS)
    assert found["rank_me"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "width, images, evaluations, affordable, expected",
    [
        (192, 10**6, 5, 10**8, (2048, 1000)),  # so many images as the papers take, at most
        (192, 10**6, 5, 2_000_000, (2000, 800)),  # 0.5% of the images, and 1% for ten views, of which one gives two
        (192, 10**6, 10, 2_000_000, (1000, 400)),
        (192, 10**6, 5, 900_000, (900, 0)),  # too few for LiDAR
        (192, 10**6, 5, 75_000, (384, 0)),  # too few for a rank
        (192, 1500, 5, 10**8, (1500, 1000)),
        (192, 300, 5, 10**8, (300, 0)),
        (1280, 10**6, 5, 10**8, (2560, 2560)),
        (192, 10**6, 0, 10**8, (2048, 1000)),
    ],
)
def test_measures_without_labels_take_what_a_budget_pays(width, images, evaluations, affordable, expected):
    assert choose_samples(width, images, evaluations, affordable) == expected


@pytest.mark.parametrize("labels", [True, False])
def test_a_run_measures_what_its_budget_pays_for(tmp_path, monkeypatch, labels):
    asked = []
    monkeypatch.setattr(evaluating, "encode_views", lambda *args: asked.append(len(args[2])) or draw(args[2]))
    monkeypatch.setattr(accuracy, "LIDAR_SHARE", 0.5)
    monkeypatch.setattr(accuracy, "RANK_SHARE", 0.25)
    kwargs: Any = {"eval_points": [0.0, 0.5, 1.0], "budget": 3 * 720 * 4.0}  # of 720 images at each point
    trainer = PretrainTrainer(moco(), config(tmp_path, **kwargs), Tensors(), *([Tensors(30)] if labels else []))
    samples = trainer._choose_samples(trainer.objective.encoder)
    assert samples == (96, 72) and trainer.objective.config.hidden_size == 32
    assert trainer.measure_encoder(trainer.objective.encoder)["lidar"] == lidar(draw(range(72))) and asked == [72]
    monkeypatch.setattr(accuracy, "LIDAR_SHARE", 0.4)  # 57 images, and 64 are needed
    assert "lidar" not in trainer.measure_encoder(trainer.objective.encoder) and asked == [72]


def draw(rows) -> torch.Tensor:
    return torch.randn(len(rows), 10, 32, generator=torch.Generator().manual_seed(0))


def test_views_of_lidar_are_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(view_features, "BATCH", 7)
    trainer = PretrainTrainer(moco(), config(tmp_path, seed=3), Tensors())
    encoder, source = trainer.objective.encoder, trainer.source
    rows, before = [5, 9, *range(20, 40)], torch.get_rng_state()
    to_device: Any = trainer._prepare_inputs
    found = encode_views(encoder, source, rows, trainer.view_configs, trainer.args, to_device)
    assert torch.equal(torch.get_rng_state(), before) and found.shape == (22, 10, 32)
    assert torch.equal(found, encode_views(encoder, source, rows, trainer.view_configs, trainer.args, to_device))
    assert source.pixels is not None
    for number in range(5):
        drawn = make_views({"images": source.pixels[rows]}, trainer.view_configs, 16, 3, -1, number, None, None)
        for view, pixels in enumerate(drawn):
            normalised = (pixels - torch.tensor(source.mean)[:, None, None]) / torch.tensor(source.std)[:, None, None]
            with torch.no_grad():
                expected = encoder.eval()(normalised).pooler_output
            torch.testing.assert_close(found[:, 2 * number + view], expected, rtol=1e-4, atol=1e-5)
    assert found.var(1).min() > 0


VIEWS_IN_TWO = """
from types import SimpleNamespace
from tests.training.test_measures import AUGMENTATIONS, encode_views, images, make_encoder, view_features
view_features.BATCH = 5
args = SimpleNamespace(dataloader_num_workers=0, seed=0, device="cpu", autocast_dtype=None)
given = images(40, False), list(range(0, 40, 3)), AUGMENTATIONS["moco"], args, lambda batch: batch
results = encode_views(make_encoder(), *given)
"""


@pytest.mark.slow
def test_two_processes_share_the_views(tmp_path):
    alone: dict[str, Any] = {}
    exec(VIEWS_IN_TWO, alone)
    for found in run_two(VIEWS_IN_TWO, tmp_path):
        torch.testing.assert_close(found, alone["results"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_views_of_files_are_encoded_too(tmp_path, workers):
    image_folder(tmp_path / "images", side=lambda index: 16 + index % 3)
    source = load_sources(str(tmp_path / "images"), in_memory=False)[0]
    args: Any = SimpleNamespace(dataloader_num_workers=workers, seed=0, device="cpu", autocast_dtype=torch.bfloat16)
    rows = source.sample(20)
    found = encode_views(make_encoder(), source, rows, AUGMENTATIONS["moco"], args, lambda batch: batch)
    assert found.shape == (20, 10, 16) and found.isfinite().all() and 1 < lidar(found) <= 16


def stop_at(step: int) -> TrainerCallback:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == step

    return Stop()


@pytest.mark.slow
def test_lidar_changes_no_weight_and_survives_a_resume(tmp_path, monkeypatch):
    def run(name: str, images: int, stop: int = 99, resume: bool = False) -> Any:
        monkeypatch.setattr(evaluating, "choose_samples", lambda *_: Samples(64, images))
        args = config(tmp_path / name, budget=4 * 64.0, eval_points=[0.0, 0.5, 1.0], save_steps=1)
        PretrainTrainer(moco(), args, Tensors(), callbacks=[stop_at(stop)]).train(resume_from_checkpoint=resume)
        if stop < 4:
            return run(name, images, resume=True)
        history = json.loads((tmp_path / name / "log_history.json").read_text())["log_history"]
        values = [log["eval_lidar"] for log in history if "eval_lidar" in log]
        return values, json.loads((tmp_path / name / "results.json").read_text())["lidar"]

    values, last = run("with", 64)
    assert len(values) == 3 and last == values[-1] and all(1 < value <= 32 for value in values)
    assert len(set(values)) == 3
    assert run("without", 0) == ([], None)
    assert run("resumed", 64, stop=2) == (values, last)
    for name in ("without", "resumed"):
        assert_same_weights(tmp_path / "with", tmp_path / name)
    assert "LiDAR" in (tmp_path / "with/final/README.md").read_text()
    assert "LiDAR" not in (tmp_path / "without/final/README.md").read_text()


def test_measure_accuracy_warns_and_returns_what_it_did(tmp_path):
    trainer = PretrainTrainer(moco(), config(tmp_path), Tensors(), Tensors(30))
    new = trainer.measure_encoder(trainer.objective.encoder)
    with pytest.warns(FutureWarning, match=r"is deprecated .*: use measure_encoder\(\)") as warnings:
        old = trainer.measure_accuracy(trainer.objective.encoder)
    assert old == {"top1": new["knn_top1"], "top5": new["knn_top5"]} and warnings[0].filename == __file__


def warned(metric: str, values: list[float], caplog, monkeypatch) -> list[str]:
    """The warnings of a run from released weights whose evaluations measure these values."""
    monkeypatch.setattr(BestCallback, "keep", lambda self: None)
    trainer: Any = SimpleNamespace(is_in_train=True)
    callback, state = BestCallback(trainer), SimpleNamespace(log_history=[], global_step=0, is_world_process_zero=True)
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
