"""Loss scaling for training in FP16, and gradient accumulation and clipping in FP32."""

from .clip_grad import clip_grad_norm_, grad_norm
from .grad_accumulator import GradAccumulator
from .loss_scaler import LossScaler

__all__ = ["GradAccumulator", "LossScaler", "clip_grad_norm_", "grad_norm"]
