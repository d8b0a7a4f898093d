"""Test weighted kNN against a loop over queries and neighbours, in blocks, in half precision, and on bad input."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_accel.distributed.stopping import Stopped, request_stop
from hf_accel.evaluation import knn
from hf_accel.evaluation.knn import knn_accuracy, knn_predict


def votes_by_loop(bank, bank_labels, queries, k, temperature, num_classes) -> np.ndarray:
    votes = np.zeros((len(queries), num_classes))
    for row, query in enumerate(queries):
        similarities = [float(query @ b / np.linalg.norm(query) / np.linalg.norm(b)) for b in bank]
        nearest = sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]
        for i in nearest:
            votes[row, bank_labels[i]] += math.exp(similarities[i] / temperature)
    return votes


def draw(n: int, q: int, width: int = 12, num_classes: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    bank, queries = rng.normal(size=(n, width)) * rng.uniform(0.1, 9, (n, 1)), rng.normal(size=(q, width))
    return bank, rng.integers(0, num_classes, n), queries


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (83, 1.0)])
@pytest.mark.parametrize("blocks", [(1024, 16384), (7, 10), (1, 1), (33, 84)])
def test_equals_a_loop_in_any_blocks(monkeypatch, k, temperature, blocks) -> None:
    monkeypatch.setattr(knn, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(knn, "BANK_BLOCK", blocks[1])
    bank, labels, queries = draw(83, 33, seed=k)
    tensors = torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(queries)
    votes = knn_predict(*tensors, k, temperature, 7)
    np.testing.assert_allclose(votes.numpy(), votes_by_loop(bank, labels, queries, k, temperature, 7), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_fp32(dtype) -> None:
    bank, labels, queries = map(torch.from_numpy, draw(60, 11))
    votes = knn_predict(bank.to(dtype), labels, queries.to(dtype), 5, 0.07, 7)
    assert votes.dtype == torch.float32
    expected = knn_predict(bank.to(dtype).float(), labels, queries.to(dtype).float(), 5, 0.07, 7)
    assert torch.equal(votes, expected)


def test_k_beyond_the_bank_is_the_whole_bank() -> None:
    bank, labels, queries = map(torch.from_numpy, draw(6, 4))
    assert torch.equal(knn_predict(bank, labels, queries, 200, 0.07, 7), knn_predict(bank, labels, queries, 6, 0.07, 7))


class Watch(TorchDispatchMode):
    """Records the number of elements of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, torch.Tensor) and value._base is None:
                self.sizes.append(value.numel())
        return out


def test_the_largest_temporary_is_a_block(monkeypatch) -> None:
    monkeypatch.setattr(knn, "QUERY_BLOCK", 8)
    monkeypatch.setattr(knn, "BANK_BLOCK", 16)
    bank, labels, queries = map(torch.from_numpy, draw(600, 50))
    with Watch() as watch:
        knn_predict(bank, labels, queries, 5, 0.07, 7)
    largest_result = 50 * 7
    assert max(watch.sizes) <= max(largest_result, 16 * 12, 8 * 16) and len(watch.sizes) > 50


def test_memory_is_bounded_for_many_classes_and_wide_features(monkeypatch) -> None:
    monkeypatch.setattr(knn, "BLOCK_BYTES", 8000)  # a thousand numbers of fp64
    classes = torch.arange(700)
    bank = torch.from_numpy(np.random.default_rng(0).normal(size=(700, 40)))
    with Watch() as watch:
        assert knn_accuracy(bank, classes, bank[:90], classes[:90]) == {"top1": 1.0, "top5": 1.0}
    without_bound = 90 * 700
    assert max(watch.sizes) <= 90 * 40 < without_bound  # the queries themselves


def test_a_stop_is_answered_between_blocks(monkeypatch) -> None:
    monkeypatch.setattr(knn, "QUERY_BLOCK", 8)
    nearest, done = knn._find_nearest, []

    def stopping(*arguments):
        done.append(len(arguments[0]))
        request_stop()
        return nearest(*arguments)

    monkeypatch.setattr(knn, "_find_nearest", stopping)
    bank, labels, queries = map(torch.from_numpy, draw(60, 50))
    with pytest.raises(Stopped):
        knn_accuracy(bank, labels, queries, labels[:50])
    assert len(done) <= 2


BANK, LABELS, QUERIES = torch.eye(4), torch.arange(4), torch.ones(2, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((BANK[:0], LABELS[:0], QUERIES, 1, 0.1, 4), "N > 0"),
        ((BANK[0], LABELS, QUERIES, 1, 0.1, 4), "bank must be"),
        ((BANK, LABELS, QUERIES[:, :3], 1, 0.1, 4), r"queries must be \(Q, 4\)"),
        ((BANK, LABELS[:3], QUERIES, 1, 0.1, 4), "bank_labels must be"),
        ((BANK, LABELS.float(), QUERIES, 1, 0.1, 4), "integers"),
        ((BANK, LABELS, QUERIES, 1, 0.1, 3), "got 0 to 3"),
        ((BANK, LABELS - 1, QUERIES, 1, 0.1, 4), "got -1 to 2"),
        ((BANK, LABELS, QUERIES, 0, 0.1, 4), "k must be"),
        ((BANK, LABELS, QUERIES, 1, 0.0, 4), "temperature"),
        ((BANK, LABELS, QUERIES, 1, float("nan"), 4), "temperature"),
        ((BANK, LABELS, QUERIES * float("nan"), 1, 0.1, 4), "NaN"),
        ((BANK * float("nan"), LABELS, QUERIES, 1, 0.1, 4), "NaN"),
    ],
)
def test_bad_input_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        knn_predict(*arguments)


def test_accuracies_are_shares_of_the_votes_first_and_first_five() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 9, 300))
    features = torch.from_numpy(np.eye(9)[labels] + 0.7 * rng.normal(size=(300, 9)))
    votes = knn_predict(features[:200], labels[:200], features[200:], 20, 0.07, 9).numpy()
    places = [int((row > row[label]).sum()) for row, label in zip(votes, labels[200:].tolist(), strict=True)]
    assert len({n for n in range(9) if places.count(n)}) > 6  # some are fifth, and sixth
    expected = {f"top{n}": sum(place < n for place in places) / 100 for n in (1, 5)}
    assert knn_accuracy(features[:200], labels[:200], features[200:], labels[200:]) == pytest.approx(expected)


def test_classes_that_the_bank_lacks_are_missed() -> None:
    accuracy = knn_accuracy(torch.eye(4), torch.arange(4), torch.eye(4), torch.tensor([0, 1, 2, 9]), k=1)
    assert accuracy["top1"] == 0.75


def test_nearest_others_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(knn, "QUERY_BLOCK", 7)
    monkeypatch.setattr(knn, "BANK_BLOCK", 5)
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    features[11:14] = features[3]  # four images that are the same
    similarity, index = knn.nearest_others(features, 2)
    unit = torch.nn.functional.normalize(features, dim=1)
    expected = (unit @ unit.T).fill_diagonal_(-2).topk(2).values
    assert torch.allclose(similarity, expected, atol=1e-6)
    assert (index != torch.arange(20)[:, None]).all() and {*index[3].tolist()} <= {11, 12, 13}
    assert knn.nearest_others(features[:2], 5)[1].tolist() == [[1], [0]]
