"""The error of a compressed gradient: squared bias and cost-adjusted variance, estimated from paired draws.

Lin et al., "Accelerating Augmentation Invariance Pretraining" (arXiv 2410.22364), section 4. With g a gradient of one
uncompressed batch, g_a that of the same batch under a strategy a, G = E[g], and k_a the cost of a over uncompressed:

    bias2(a) = || E[g_a] - G ||^2     var(a) = E || g_a - E[g_a] ||^2     ca_mse(a) = bias2(a) + k_a var(a)

The bias is estimated from the differences d_i = g_a_i - g_i of n pairs (the same images, views and negatives) as the
mean of <d_i, d_j> over i != j. The plain || mean d ||^2 also holds the noise, || d - E d ||^2 / n on average, and
holds most of it for exactly the strategies whose bias is smallest.

The gain is a second measure, which the paper does not have. It is the way along G that the price of one uncompressed
step buys, if cheaper batches buy more steps and if the learning rate sets the length of a step, as it does in AdamW:

    gain(a) = <G, E[g_a]> / (k_a sqrt(E || g_a ||^2))

To first order it is the decrease of the uncompressed loss per unit. Unlike ca_mse it ignores the length of compressed
gradients, and it spends what is saved on more steps instead of on larger averages.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from scipy.special import ndtri, stdtr, stdtrit
from torch import Tensor

from ..utils.seeding import generator

SKETCH_SIZE = 8192
"""Numbers that remain of a gradient for the leave-one-out; shorter gradients are kept as they are."""

MAX_BLOCKS = 256
"""Draws are left out one by one up to this many, then in blocks, so that memory does not grow with them."""

CLEAR, MAX_SCORE = float(ndtri(0.975)), 10.0
"""The score from which on a difference is clear, and the largest score, which draws without noise get."""

Name = TypeVar("Name", bound=Hashable)


class GradientNotFinite(ValueError):
    """A gradient holds NaN or infinity, so nothing can be estimated from it."""


@dataclass(frozen=True)
class GradientError:
    """Errors of one strategy's gradient, in squared units of the gradient; intervals are of 95%.

    `ca_variance` is the variance of what the price of one uncompressed batch buys; `ca_mse` is
    `bias2 + ca_variance`; `reference_norm2` is || G ||^2, to report them relative to; `gain` is in units of the
    gradient.
    """

    bias2: float
    variance: float
    ca_variance: float
    ca_mse: float
    reference_norm2: float
    bias2_interval: tuple[float, float]
    ca_mse_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]


class GradientErrorAccumulator(Generic[Name]):
    """It sums paired draws and estimates errors from the sums. Its memory does not grow with the number of draws.

    Args:
        relative_cost: k_a of each strategy by name: its cost over the uncompressed one's.
    """

    def __init__(self, relative_cost: Mapping[Name, float]):
        self.relative_cost = dict(relative_cost)
        self.num_draws = 0
        self._reference = _Sums()
        self._differences = {name: _Sums() for name in self.relative_cost}
        self._compressed_norm2 = {name: _Blocks() for name in self.relative_cost}

    @torch.no_grad()
    def add(self, reference: Tensor, compressed: Mapping[Name, Tensor]) -> None:
        """Add one paired draw: flat gradients (D,), uncompressed and under every strategy.

        Raises:
            GradientNotFinite: a gradient is not finite.
        """
        # Two transfers from the device for all gradients are faster than several for each.
        names = list(compressed)
        reference_norm, *norms = torch.stack([_norm(vector) for vector in (reference, *compressed.values())]).tolist()
        for name, norm in zip(["the reference", *names], [reference_norm, *norms], strict=True):
            if not math.isfinite(norm):
                raise GradientNotFinite(f"the gradient of {name} is not finite")
        self._reference.take(reference)
        sketches, difference_norms = [_sketch(reference)], []
        for name in names:
            difference = compressed[name] - reference
            self._differences[name].take(difference)
            sketches.append(_sketch(difference))
            difference_norms.append(_norm(difference))
        reference_sketch, *of_differences = torch.stack(sketches).cpu()
        self._reference.note(reference_norm**2, reference_sketch)
        of_difference = zip(torch.stack(difference_norms).tolist(), of_differences, strict=True)
        for name, norm, (difference_norm, sketch) in zip(names, norms, of_difference, strict=True):
            self._differences[name].note(difference_norm**2, sketch)
            self._compressed_norm2[name].add(norm**2)
        self.num_draws += 1

    def result(self) -> dict[Name, GradientError]:
        """Estimate the errors of every strategy.

        Raises:
            ValueError: fewer than three draws, too few for an interval.
        """
        if self.num_draws < 3:
            raise ValueError(f"an estimate with an interval needs at least 3 draws, got {self.num_draws}")
        return {name: self._of(name) for name in self.relative_cost}

    def evidence(self, criterion: str, one: Name, other: Name) -> float:
        """Return a standard normal score of how surely "ca_mse" or "gain" of one strategy is above the other's.

        It tests the difference of the two, because most of their noise is the same. The difference over its deviation
        follows Student's t, and the score is as improbable as that value. Above CLEAR, the 95% interval of the
        difference lies above 0. The sum of the scores of n independent probes, over the root of n, is a score again
        (Stouffer 1949).

        Raises:
            ValueError: fewer than three draws.
        """
        errors = self.result()
        estimate = getattr(errors[one], criterion) - getattr(errors[other], criterion)
        left_out = self._left_out(one)[criterion] - self._left_out(other)[criterion]
        quotient = abs(estimate) / (_deviation(left_out) + 1e-300)
        score = -float(ndtri(stdtr(len(left_out) - 1, -quotient)))
        return math.copysign(min(score, MAX_SCORE), estimate)

    def _of(self, name: Name) -> GradientError:
        draws, left_out = self.num_draws, self._left_out(name)
        difference, reference, norm2 = self._differences[name], self._reference, self._compressed_norm2[name]
        whole = _combine(
            self.relative_cost[name],
            draws,
            norm2.total / draws,
            _norm2((difference.total + reference.total) / draws),
            difference.product_of_different_draws(),
            reference.product_of_different_draws(),
        )
        for key in ("bias2", "ca_mse", "gain"):
            whole[f"{key}_interval"] = _jackknife(whole[key], left_out[key])
        return GradientError(**whole)

    def _left_out(self, name: Name) -> dict[str, Tensor]:
        """Estimate the errors without each block from the sketches: float64 (blocks,) each."""
        difference, reference, norm2 = self._differences[name], self._reference, self._compressed_norm2[name]
        rest = self.num_draws - torch.tensor(reference.blocks.counts, dtype=torch.float64)
        without = difference.sketches_without() + reference.sketches_without()
        return _combine(
            self.relative_cost[name],
            rest,
            (norm2.total - torch.tensor(norm2.values, dtype=torch.float64)) / rest,
            (without / rest[:, None]).square().sum(1),
            difference.product_without(),
            reference.product_without(),
        )


def _combine(cost: float, draws, mean_norm2, norm2_of_mean, bias2, reference_norm2) -> dict[str, Any]:
    """Estimate the errors from means over draws, which are numbers, or tensors (blocks,) without each block.

    Args:
        mean_norm2, norm2_of_mean: of the compressed gradients.
    """
    variance = (mean_norm2 - norm2_of_mean) * draws / (draws - 1)
    # <G, E g_a> by || E g_a - G ||^2, of which each part is free of the noise of single draws
    product = (mean_norm2 - variance + reference_norm2 - bias2) / 2
    return {
        "bias2": bias2,
        "variance": variance,
        "ca_variance": cost * variance,
        "ca_mse": bias2 + cost * variance,
        "reference_norm2": reference_norm2,
        "gain": product / (cost * _root(mean_norm2)),
    }


class _Blocks:
    """Values summed in at most MAX_BLOCKS blocks of consecutive draws. When the blocks are full, pairs are merged."""

    def __init__(self):
        self.values: list = []
        self.counts: list[int] = []
        self.size = 1

    def add(self, value) -> None:
        if self.counts and self.counts[-1] < self.size:
            self.values[-1] = self.values[-1] + value
            self.counts[-1] += 1
            return
        if len(self.values) == MAX_BLOCKS:
            self.values = [a + b for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]
            self.size *= 2
        self.values.append(value)
        self.counts.append(1)

    @property
    def total(self):
        return sum(self.values)


class _Sums:
    """The sum of vectors x_i (D,) and of their squared norms, both exact, and sketches of the vectors by block."""

    def __init__(self):
        self.total = torch.zeros(())
        self.norm2 = 0.0
        self.blocks, self.block_norm2 = _Blocks(), _Blocks()
        self.num_draws = 0

    def take(self, vector: Tensor) -> None:
        """Add a vector on the device. `note` adds the rest on the host."""
        if self.num_draws == 0:
            self.total = torch.zeros_like(vector, dtype=torch.promote_types(vector.dtype, torch.float32))
        self.total += vector

    def note(self, norm2: float, sketch: Tensor) -> None:
        self.norm2 += norm2
        self.blocks.add(sketch)
        self.block_norm2.add(_norm2(sketch))
        self.num_draws += 1

    def product_of_different_draws(self) -> float:
        """Return the mean of <x_i, x_j> over i != j, an unbiased estimate of || E[x] ||^2."""
        return (_norm2(self.total) - self.norm2) / (self.num_draws * (self.num_draws - 1))

    def sketches_without(self) -> Tensor:
        """Return the sum of all sketches except those of each block: float64 (blocks, size)."""
        blocks = torch.stack(self.blocks.values)
        return blocks.sum(0) - blocks

    def product_without(self) -> Tensor:
        """Estimate `product_of_different_draws` without each block from the sketches: float64 (blocks,)."""
        counts = torch.tensor(self.blocks.counts, dtype=torch.float64)
        rest = self.num_draws - counts
        norm2 = torch.tensor(self.block_norm2.values, dtype=torch.float64)
        left = self.sketches_without().square().sum(1) - (norm2.sum() - norm2)
        return left / (rest * (rest - 1))


def _norm(vector: Tensor) -> Tensor:
    """Return the norm as a float64 scalar."""
    return torch.linalg.vector_norm(vector, dtype=torch.float64)


def _norm2(vector: Tensor) -> float:
    return float(_norm(vector)) ** 2


def _root(norm2):
    """Return the root of squared norms. It is above 0, so that the gain of a gradient of zeros is 0 and not NaN."""
    return (norm2 + 1e-300) ** 0.5


def _sketch(vector: Tensor) -> Tensor:
    """Return a sketch, float64 (min(D, SKETCH_SIZE),), with the inner products of the vectors up to noise.

    It is a count sketch (Charikar et al., ICALP 2002): every number gets a random sign and is added to one of the
    places. Here the places are taken in turn, which needs no table of them.
    """
    if vector.numel() <= SKETCH_SIZE:
        return vector.double()
    rows = math.ceil(vector.numel() / SKETCH_SIZE)
    folded = torch.nn.functional.pad(vector, (0, rows * SKETCH_SIZE - vector.numel())).view(rows, SKETCH_SIZE)
    signs = _signs(rows, vector.device)
    return (folded * signs).sum(0, dtype=torch.float64)


_SIGNS: dict[tuple[int, torch.device], Tensor] = {}


def _signs(rows: int, device: torch.device) -> Tensor:
    """Draw int8 (rows, SKETCH_SIZE) of +1 and -1, the same in every process."""
    if (rows, device) not in _SIGNS:
        _SIGNS.clear()
        bits = torch.randint(0, 2, (rows, SKETCH_SIZE), generator=generator(0, "sketch"), dtype=torch.int8)
        _SIGNS[rows, device] = (2 * bits - 1).to(device)
    return _SIGNS[rows, device]


def _jackknife(estimate: float, left_out: Tensor) -> tuple[float, float]:
    """Return the 95% interval of an estimate, by Student's t, from the estimates without each block (blocks,)."""
    margin = float(stdtrit(len(left_out) - 1, 0.975)) * _deviation(left_out)
    return estimate - margin, estimate + margin


def _deviation(left_out: Tensor) -> float:
    """Return the standard deviation of an estimate by the jackknife (Tukey 1958), from those without each block."""
    blocks = len(left_out)
    return float((left_out - left_out.mean()).square().sum() * (blocks - 1) / blocks) ** 0.5


def estimate_errors(
    gradient: Callable[[Name | None, int], Tensor],
    relative_cost: Mapping[Name, float],
    draws: Iterable[int],
    max_bytes: float = 4e9,
    progress: Callable[[int], object] = lambda computed: None,
    uncompressed: Name | None = None,
) -> dict[Name, GradientError]:
    """Estimate the errors of every strategy from paired draws, in chunks of strategies that fit into memory.

    Args:
        gradient: `gradient(name, draw)` is the flat gradient (D,) of the draw under a strategy, `gradient(None, draw)`
            the uncompressed one. It must be a pure function, because each chunk calls it again for the latter.
        relative_cost: k_a by strategy.
        draws: numbers of the draws.
        max_bytes: memory for the sums of the strategies of one chunk, two gradients a strategy while a draw is added.
        progress: called with 1 for each gradient that has been computed.
        uncompressed: the strategy, if any, whose gradient `gradient(None, draw)` is: it is not computed twice.

    Raises:
        ValueError: not even one strategy fits into `max_bytes`; fewer than three draws; a gradient is not finite.
    """
    draws = list(draws)
    size = gradient(None, draws[0])
    needed = 2 * size.numel() * max(4, size.element_size())
    fitting = int(max_bytes // needed)
    if fitting < 1:
        raise ValueError(f"the sums of one strategy take {needed:.3g} bytes; the limit is {max_bytes:.3g}")
    names = list(relative_cost)
    errors: dict[Name, GradientError] = {}
    for chunk in chunks(names, fitting):
        accumulator = GradientErrorAccumulator({name: relative_cost[name] for name in chunk})
        for draw in draws:
            reference = gradient(None, draw)
            progress(1)
            compressed = {}
            for name in chunk:
                compressed[name] = reference if name == uncompressed else gradient(name, draw)
                progress(1)
            accumulator.add(reference, compressed)
        errors |= accumulator.result()
    return errors


def chunks(names: Sequence[Name], size: int) -> list[list[Name]]:
    """Split `names` into lists of at most `size` names, as even as possible."""
    count = math.ceil(len(names) / size)
    return [list(names[len(names) * i // count : len(names) * (i + 1) // count]) for i in range(count)]
