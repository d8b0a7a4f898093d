import numpy as np
import pytest
import torch
from scipy import stats

from hf_accel.schedule_search import gradient_error
from hf_accel.schedule_search.gradient_error import GradientErrorAccumulator, estimate_errors

COST = 0.3


def paired(rng, size, draws, bias, noise=1.0, correlation=0.7):
    """(reference, compressed), each (draws, size): a planted bias of norm `bias`, and noise that they share in part."""
    truth, shift = rng.normal(size=size), rng.normal(size=size)
    own, shared = rng.normal(size=(2, draws, size))
    shift *= bias / np.linalg.norm(shift)
    reference = truth + noise * shared
    return reference, truth + shift + noise * (correlation * shared + (1 - correlation**2) ** 0.5 * own)


def accumulate(reference, compressed):
    accumulator = GradientErrorAccumulator({"a": COST})
    for one, other in zip(reference, compressed, strict=True):
        accumulator.add(torch.from_numpy(one), {"a": torch.from_numpy(other)})
    return accumulator.result()["a"]


def off_diagonal(vectors):
    """The mean of <x_i, x_j> over i != j, by loops."""
    n = len(vectors)
    return sum(vectors[i] @ vectors[j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


@pytest.mark.parametrize("draws", [3, 9])
def test_against_loops(draws):
    reference, compressed = paired(np.random.default_rng(draws), 7, draws, 0.8)
    error = accumulate(reference, compressed)

    def estimates(rows):
        bias2 = off_diagonal(compressed[rows] - reference[rows])
        along = np.mean([reference[i] @ compressed[j] for i in rows for j in rows if i != j])
        length = (compressed[rows] ** 2).sum(1).mean() ** 0.5
        return bias2, bias2 + COST * compressed[rows].var(axis=0, ddof=1).sum(), along / (COST * length)

    everything = np.arange(draws)
    bias2, ca_mse, gain = estimates(everything)
    assert error.bias2 == pytest.approx(bias2)
    assert error.variance == pytest.approx(compressed.var(axis=0, ddof=1).sum())
    assert error.ca_variance == pytest.approx(COST * error.variance)
    assert error.ca_mse == pytest.approx(ca_mse)
    assert error.gain == pytest.approx(gain)
    assert error.reference_norm2 == pytest.approx(off_diagonal(reference))
    if draws > 3:  # leaving one of three out leaves a variance of two
        left = np.array([estimates(np.delete(everything, i)) for i in everything])
        margins = stats.t.ppf(0.975, draws - 1) * ((draws - 1) * left.var(axis=0)) ** 0.5
        assert error.bias2_interval == pytest.approx((bias2 - margins[0], bias2 + margins[0]))
        assert error.ca_mse_interval == pytest.approx((ca_mse - margins[1], ca_mse + margins[1]))
        assert error.gain_interval == pytest.approx((gain - margins[2], gain + margins[2]))


def test_estimates_are_unbiased_where_the_plain_one_is_not():
    rng, size, draws, bias, repetitions = np.random.default_rng(0), 40, 16, 1.0, 400
    truth = {"bias2": bias**2, "ca_mse": bias**2 + COST * size * 0.25}
    found, covered, plain = {name: [] for name in truth}, dict.fromkeys(truth, 0), []
    for _ in range(repetitions):
        reference, compressed = paired(rng, size, draws, bias, noise=0.5)
        error = accumulate(reference, compressed)
        plain.append(((compressed - reference).mean(0) ** 2).sum())
        for name, value in truth.items():
            low, high = getattr(error, f"{name}_interval")
            found[name].append(getattr(error, name))
            covered[name] += low <= value <= high
    for name, value in truth.items():
        assert np.mean(found[name]) == pytest.approx(value, rel=0.02), name
        assert 0.90 <= covered[name] / repetitions <= 0.98, (name, covered[name] / repetitions)
    assert np.mean(plain) > 1.25 * truth["bias2"]


def test_the_gain_is_the_decrease_of_a_linear_loss():
    """Steps of length 1 along single gradients, as many as the price pays for, on the loss <G, x>; and its interval."""
    rng, size, draws, noise = np.random.default_rng(8), 30, 16, 0.5
    truth = rng.normal(size=size)
    mean = 3 * truth + rng.normal(size=size)  # longer, and off by some
    steps = mean + noise * rng.normal(size=(200_000, size))
    decrease = (steps @ truth).mean() / (steps**2).sum(1).mean() ** 0.5 / COST
    found, covered = [], 0
    for _ in range(400):
        reference = truth + noise * rng.normal(size=(draws, size))
        error = accumulate(reference, mean + noise * rng.normal(size=(draws, size)))
        low, high = error.gain_interval
        found.append(error.gain)
        covered += low <= decrease <= high
    assert np.mean(found) == pytest.approx(decrease, rel=0.02)
    assert 0.90 <= covered / 400 <= 0.98
    # it knows no scale: ten times the gradient is the same step
    reference, compressed = paired(rng, size, draws, 0.5)
    assert accumulate(reference, 10 * compressed).gain == pytest.approx(accumulate(reference, compressed).gain)


def test_the_uncompressed_strategy_has_no_bias():
    reference, _ = paired(np.random.default_rng(2), 9, 5, 0.0)
    error = accumulate(reference, reference)
    assert error.bias2 == 0 and error.bias2_interval == (0, 0)
    # and with independent draws, whose difference is noise alone, an interval that holds 0
    other, _ = paired(np.random.default_rng(3), 9, 5, 0.0)
    low, high = accumulate(other - other.mean(0), reference - reference.mean(0)).bias2_interval
    assert low <= 0 <= high


def test_long_gradients_are_sketched_and_their_intervals_keep():
    rng, size = np.random.default_rng(4), 5 * gradient_error.SKETCH_SIZE + 17
    common = np.outer(rng.normal(size=12), rng.normal(size=size)) * 0.3  # the noise of networks has few directions
    reference = rng.normal(size=size) + common + 0.02 * rng.normal(size=(12, size))
    compressed = 0.9 * reference + 0.1 * np.outer(rng.normal(size=12), rng.normal(size=size)) + 0.05
    error = accumulate(reference.astype(np.float32), compressed.astype(np.float32))
    d = compressed - reference
    products = d @ d.T
    exact = (products.sum() - np.trace(products)) / (12 * 11)
    left = [
        (kept.sum() - np.trace(kept)) / (11 * 10)
        for kept in (np.delete(np.delete(products, i, 0), i, 1) for i in range(12))
    ]
    margin = stats.t.ppf(0.975, 11) * (11 * np.var(left)) ** 0.5
    assert error.bias2 == pytest.approx(exact, rel=1e-3)
    assert error.bias2_interval[1] - error.bias2 == pytest.approx(margin, rel=0.1)


def test_sketches_keep_inner_products():
    rng = np.random.default_rng(5)
    one = rng.normal(size=100_000)
    other = one + rng.normal(size=100_000)
    sketches = [gradient_error._sketch(torch.from_numpy(vector)) for vector in (one, other)]
    assert sketches[0].shape == (gradient_error.SKETCH_SIZE,)
    noise = np.linalg.norm(one) * np.linalg.norm(other) / gradient_error.SKETCH_SIZE**0.5
    assert float(sketches[0] @ sketches[1]) == pytest.approx(one @ other, abs=4 * noise)


def test_memory_does_not_grow_with_the_draws(monkeypatch):
    monkeypatch.setattr(gradient_error, "MAX_BLOCKS", 8)
    reference, compressed = paired(np.random.default_rng(6), 5, 100, 0.7)
    accumulator = GradientErrorAccumulator({"a": COST})
    for one, other in zip(reference, compressed, strict=True):
        accumulator.add(torch.from_numpy(one), {"a": torch.from_numpy(other)})
        blocks = accumulator._differences["a"].blocks
        assert len(blocks.values) == len(blocks.counts) <= 8
    assert sum(blocks.counts) == 100 and max(blocks.counts) == 16
    error = accumulator.result()["a"]
    assert error.bias2 == pytest.approx(off_diagonal(compressed - reference))
    # the interval leaves out blocks of the sixteen draws that follow each other, the last of four
    d, left = compressed - reference, []
    for start in range(0, 100, 16):
        kept = np.delete(np.arange(100), np.arange(start, min(start + 16, 100)))
        left.append((off_diagonal(d[kept]), compressed[kept].var(axis=0, ddof=1).sum()))
    bias2, variance = np.array(left).T
    for interval, values in ((error.bias2_interval, bias2), (error.ca_mse_interval, bias2 + COST * variance)):
        margin = stats.t.ppf(0.975, 6) * (6 * values.var()) ** 0.5
        assert (interval[1] - interval[0]) / 2 == pytest.approx(margin)


def test_chunks_change_nothing_and_ask_for_each_gradient_once():
    rng = np.random.default_rng(7)
    table = {
        (name, draw): torch.from_numpy(rng.normal(size=50) + (name is not None))
        for name in (None, "a", "b", "c")
        for draw in range(5)
    }
    costs = {"a": 0.5, "b": 0.2, "c": 1.0}
    asked = []

    def gradient(name, draw):
        asked.append((name, draw))
        return table[name, draw]

    whole = estimate_errors(gradient, costs, range(5))
    assert sorted(asked[1:], key=str) == sorted(table, key=str)
    assert estimate_errors(gradient, costs, range(5), max_bytes=2 * 50 * 8) == whole
    # what is known to be the reference is not asked for, and has no bias
    asked.clear()
    known = estimate_errors(gradient, {**costs, "whole": 1.0}, range(5), uncompressed="whole")
    assert "whole" not in {name for name, _ in asked} and known["whole"].bias2 == 0
    assert {name: known[name] for name in costs} == whole
    with pytest.raises(ValueError, match="800 bytes"):
        estimate_errors(gradient, costs, range(5), max_bytes=100)


def test_what_cannot_be_estimated_is_refused():
    accumulator = GradientErrorAccumulator({"a": 1.0})
    with pytest.raises(ValueError, match="a is not finite"):
        accumulator.add(torch.zeros(3), {"a": torch.full((3,), torch.nan)})
    for _ in range(2):
        accumulator.add(torch.ones(3), {"a": torch.ones(3)})
    with pytest.raises(ValueError, match="at least 3 draws, got 2"):
        accumulator.result()
