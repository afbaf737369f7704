"""Loss scaling for training in FP16, and what goes with it."""

from .loss_scaler import LossScaler

__all__ = ["LossScaler"]
