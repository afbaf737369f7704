"""Optimizers with master weights, gradient scaling, clipping and overflow skipping inside the step."""

from .adam import Adam, AdamW
from .gradient_release import GradientRelease, release_gradients
from .lion import Lion
from .memory import MemoryReport
from .sgd import SGD
from .swap import swap

__all__ = ["SGD", "Adam", "AdamW", "GradientRelease", "Lion", "MemoryReport", "release_gradients", "swap"]
