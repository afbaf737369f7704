"""A switch of precision, as the controller tells of it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PrecisionEvent:
    """One module that changed its dtype while training.

    Attributes:
        step: the controller's step at which it changed; the next forward pass is the first in the new dtype.
        layer: the module's qualified name; empty for the model itself.
        cause: "gradient overflow", "activation overflow", "loss spike" or "signal-to-noise" of a module that was
            raised, "calm" or "memory" of one that was lowered.
        before: its dtype until then, "fp16", "bf16" or "fp32".
        after: its dtype from then on.
        figures: what decided, by name; see :class:`mixft.PrecisionController`.
    """

    step: int
    layer: str
    cause: str
    before: str
    after: str
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:g}" for name, value in self.figures.items())
        layer = self.layer or "the model"
        return f"step {self.step}: {layer} {self.before} -> {self.after}, {self.cause} ({figures})"
