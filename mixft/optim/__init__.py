"""Optimizers with FP32 master weights, gradient scaling, clipping and overflow skipping inside the step."""

from .adamw import AdamW

__all__ = ["AdamW"]
