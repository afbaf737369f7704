"""Which layer computes in which dtype: set by rules, changed for evaluation, or following the run."""

from .controller import PrecisionController
from .event import PrecisionEvent
from .policy import PrecisionPolicy
from .report import ModulePrecision, PolicyReport

__all__ = ["ModulePrecision", "PolicyReport", "PrecisionController", "PrecisionEvent", "PrecisionPolicy"]
