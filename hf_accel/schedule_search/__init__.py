"""Gradient errors, and the schedules that follow from them."""

from .gradient_error import GradientError
from .gradient_probe import GradientProbe, estimate_gradient_errors
