"""Schedules as pure functions of progress = spent / budget, in [0, 1]. None counts steps or epochs."""

import math


def linear(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1 along a line."""
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate_factor(progress: float, schedule: str, warmup: float) -> float:
    """Learning rate over its peak: a linear rise over `warmup`, then `cosine` to 0 or `poly` (1 - progress^2)."""
    rise = min(1.0, progress / warmup) if warmup > 0 else 1.0
    if schedule == "poly":
        return rise * (1 - progress**2)
    after = max(0.0, progress - warmup) / max(1 - warmup, 1e-12)
    return rise * cosine(1.0, 0.0, min(1.0, after))


def thaw_factor(progress: float, frozen: float, warmup: float) -> float:
    """What is 0 up to progress `frozen`, rises to 1 over `warmup` from there, and is 1 if nothing is ever frozen."""
    if frozen <= 0 or progress >= frozen + warmup:
        return 1.0
    return (progress - frozen) / warmup if progress > frozen else 0.0
