"""Test top-k accuracy against a sort, ties against a fair draw, and the Metric without network or files."""

import itertools

import numpy as np
import pytest
import torch

from hf_accel.evaluation.metrics import TopKAccuracy, topk_accuracy


@pytest.mark.parametrize("n", [1, 3, 5, 40])
def test_equals_a_sort(n) -> None:
    rng = np.random.default_rng(n)
    scores, labels = rng.normal(size=(200, 10)), rng.integers(0, 10, 200)
    expected = np.mean([label in np.argsort(-row)[:n] for row, label in zip(scores, labels, strict=True)])
    assert topk_accuracy(torch.from_numpy(scores), torch.from_numpy(labels), n) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ties_count_as_a_fair_draw(n) -> None:
    rng = np.random.default_rng(n)
    scores, labels = rng.integers(0, 3, (20, 5)).astype(float), rng.integers(0, 5, 20)
    hits = []
    for row, label in zip(scores, labels, strict=True):
        orders = [sorted(order, key=lambda c: -row[c]) for order in itertools.permutations(range(5))]
        hits.append(np.mean([label in order[:n] for order in orders]))
    assert topk_accuracy(torch.from_numpy(scores), torch.from_numpy(labels), n) == pytest.approx(np.mean(hits))


def test_unknown_classes_are_missed() -> None:
    assert topk_accuracy(torch.eye(4), torch.tensor([0, 1, 7, 3]), 1) == 0.75


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        (torch.zeros(0, 3), torch.zeros(0), "N > 0"),
        (torch.zeros(2, 3), torch.zeros(3), "scores must be"),
        (torch.tensor([[0.0, float("nan")]]), torch.tensor([0]), "NaN"),
        (torch.zeros(1, 3), torch.tensor([-1]), "negative"),
    ],
)
def test_bad_input_is_refused(scores, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        topk_accuracy(scores, labels, 1)


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray, np.ndarray.tolist])
def test_metric_in_batches_writes_no_files(tmp_path, monkeypatch, kind) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(cache))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(64, 9)).astype(np.float32), rng.integers(0, 9, 64)
    metric = TopKAccuracy()
    for start in range(0, 64, 25):
        rows = slice(start, start + 25)
        metric.add_batch(predictions=kind(scores[rows]), references=kind(labels[rows]))
    expected = {f"top{n}": topk_accuracy(torch.from_numpy(scores), torch.from_numpy(labels), n) for n in (1, 5)}
    assert metric.compute() == expected
    assert TopKAccuracy().compute(predictions=kind(scores), references=kind(labels)) == expected
    assert list(tmp_path.iterdir()) == []
