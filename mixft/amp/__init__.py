"""Loss scaling for training in FP16, and gradient accumulation and clipping in FP32."""

from .grad_accumulator import GradAccumulator
from .loss_scaler import LossScaler

__all__ = ["GradAccumulator", "LossScaler"]
