"""Loss scaling for training in FP16."""

from .loss_scaler import LossScaler

__all__ = ["LossScaler"]
