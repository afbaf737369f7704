"""Which layer computes in which dtype: set by rules, changed for evaluation, or following the run."""

from .policy import ModulePrecision, PolicyReport, PrecisionPolicy

__all__ = ["ModulePrecision", "PolicyReport", "PrecisionPolicy"]
