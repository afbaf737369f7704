"""The precisions to train in: each builds, from an FP32 model, what the training loop needs and no more.

``fp32`` is plain torch, the baseline: ``torch.nn.Linear``, ``torch.optim.AdamW``, torch's own clipping. ``bf16``
is torch's autocast with mixft's optimizer. ``fp16`` has all parameters in FP16, FP32 masters in the optimizer and
a loss scaler. ``auto`` starts as ``fp16`` under a precision controller, which raises to FP32 what needs it. ``int8``
multiplies in int8, forward and backward, from FP32 parameters; of a model frozen under adapters it keeps int8 weights
alone. ``fp16``, ``auto`` and ``int8`` use mixft's layers, dropout included, and ``int8`` on a CPU its attention with
dropout. How mixft's optimizer stores masters and moments is chosen apart from the precision, by `OptimizerStorage`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from transformers.activations import GELUActivation

import mixft
from mixft.cli.attention import use_dropout_attention
from mixft.cli.job import Recipe
from mixft.nn.conv1d import is_conv1d
from mixft.nn.noise_guard import NoiseGuard
from mixft.nn.quantization import HEAD_NAMES, SMALLEST_SIDE, SMALLEST_WEIGHT
from mixft.precision import PrecisionEvent

WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class OptimizerStorage:
    """How mixft's optimizer keeps master weights and moments: its ``master_weights``, and a key of STATE_DTYPES."""

    master_weights: str = "auto"
    state_dtype: str = "fp32"


@dataclass
class Setup:
    """A model and what trains it.

    Attributes:
        model: the model, converted for the precision.
        optimizer: over all of its parameters.
        autocast: dtype of torch's autocast in the forward pass, None for none.
        scaler: a loss scaler, None for none.
        max_grad_norm: clip to this norm before the step; None where the optimizer clips inside it.
        accumulator: sums the gradients of 16-bit parameters over micro-batches, None where ``.grad`` does it.
        controller: changes the precision of layers on the way, None for none.
        events: the layers that the noise of int8 took back to floats, in that order.
        steps: optimizer steps so far.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    autocast: torch.dtype | None = None
    scaler: "mixft.amp.LossScaler | None" = None
    max_grad_norm: float | None = None
    accumulator: "mixft.amp.GradAccumulator | None" = None
    controller: "mixft.PrecisionController | None" = None
    events: list[PrecisionEvent] = field(default_factory=list)
    steps: int = 0

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's logits, FP32 [batch, classes]."""
        device = inputs["input_ids"].device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            return self.model(**inputs).logits.float()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch to those since the last step."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()
        if self.accumulator is not None:
            self.accumulator.accumulate()

    def step(self, loss: torch.Tensor) -> None:
        """One optimizer step for a batch of this loss; gradients are cleared after it."""
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.controller is not None:
            self.controller.step(loss)
        self.optimizer.zero_grad()
        self.steps += 1
        self.events += self._new_fallbacks()

    def loss_scale(self) -> float | None:
        return None if self.scaler is None else self.scaler.get_scale()

    def overflow_steps(self) -> int:
        return 0 if self.scaler is None else int(self.scaler.overflow_steps)

    def overflows(self) -> list[dict]:
        """The last iterations that were skipped, and the parameters that overflowed in them."""
        return [] if self.scaler is None else [step._asdict() for step in self.scaler.overflow_history()]

    def precision_events(self) -> list[dict]:
        """The switches of the controller and the fallbacks of int8 layers, as ``report.json`` has them."""
        return [asdict(event) for event in (*self.events, *(self.controller.events if self.controller else ()))]

    def _new_fallbacks(self) -> list[PrecisionEvent]:
        known = {(event.layer, event.after) for event in self.events}
        after = {"layer": "bf16" if self.autocast else "fp32", "gradients": "int8 with gradients in floats"}
        fallbacks = [
            PrecisionEvent(self.steps, name, "signal-to-noise", "int8", after[guard.fallback], dict(guard.sqnr))
            for name, guard in self._guards()
            if guard.fallback
        ]
        return [event for event in fallbacks if (event.layer, event.after) not in known]

    def _guards(self) -> Iterator[tuple[str, NoiseGuard]]:
        """The guard of each int8 layer, with the layer's name."""
        for name, module in self.model.named_modules():
            if isinstance(module, mixft.nn.QuantLinear):
                yield name, module.guard

    def optimizer_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state."""
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))

    def model_bytes(self) -> int:
        """Bytes of all parameters and buffers, shared ones counted once."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    def widest_dtype(self) -> torch.dtype:
        """The dtype that holds every parameter's value."""
        return max((parameter.dtype for parameter in self.model.parameters()), key=lambda dtype: dtype.itemsize)


def quantize(model: torch.nn.Module, mode: str) -> None:
    """Quantize the layers that mixft picks; where all are too small to gain by it, all below the model's top, so
    that a small model too is compared in int8.

    Raises:
        ValueError: there is no such layer, or a weight is not finite.
    """
    inner = inner_linear_layers(model)
    weights = [model.get_submodule(name).weight for name in inner]
    gain = any(weight.numel() >= SMALLEST_WEIGHT and min(weight.shape) >= SMALLEST_SIDE for weight in weights)
    gating = {} if gain or mode != "train" else {"shape_gating": False}
    mixft.quantize_(model, mode, include=None if gain else inner, **gating)


def inner_linear_layers(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers below the model's top, where its output head is."""
    kinds = (torch.nn.Linear, mixft.nn.QuantLinear)
    return [
        name for name, module in model.named_modules() if "." in name and (type(module) in kinds or is_conv1d(module))
    ]


def adapted_layers(model: torch.nn.Module) -> list[str]:
    """Names of the layers that take an adapter: the linear ones below the model's top, but for heads."""
    return [name for name in inner_linear_layers(model) if not set(name.split(".")) & set(HEAD_NAMES)]


def set_up(precision: str, model: torch.nn.Module, recipe: Recipe) -> Setup:
    """What trains ``model`` in that precision."""
    storage = OptimizerStorage(recipe.master_weights, recipe.state_dtype)
    precisions = PRECISIONS if recipe.lora is None else LORA_PRECISIONS
    setup = precisions[precision](model, recipe.learning_rate, storage)
    if recipe.grad_accumulation > 1 and setup.widest_dtype().itemsize < 4:
        setup.accumulator = mixft.amp.GradAccumulator(setup.optimizer, setup.scaler)
    return setup


def _fp32(model: torch.nn.Module, learning_rate: float, storage: OptimizerStorage) -> Setup:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    return Setup(model, optimizer, max_grad_norm=MAX_GRAD_NORM)


def _bf16(model: torch.nn.Module, learning_rate: float, storage: OptimizerStorage) -> Setup:
    return Setup(model, _fused_adamw(model, learning_rate, storage), autocast=torch.bfloat16)


def _fp16(model: torch.nn.Module, learning_rate: float, storage: OptimizerStorage) -> Setup:
    model.half()
    replace_layers(model, torch.nn.Linear, mixft.nn.Linear.from_linear)
    replace_layers(model, torch.nn.Dropout, mixft.nn.Dropout.from_dropout)
    return Setup(model, _fused_adamw(model, learning_rate, storage), scaler=mixft.amp.LossScaler())


def _auto(model: torch.nn.Module, learning_rate: float, storage: OptimizerStorage) -> Setup:
    setup = _fp16(model, learning_rate, storage)
    setup.controller = mixft.PrecisionController(setup.model, setup.optimizer, setup.scaler)
    return setup


def _int8(model: torch.nn.Module, learning_rate: float, storage: OptimizerStorage) -> Setup:
    quantize(model, mode="train")
    return _around_int8(model, learning_rate, storage)


def _around_int8(model: torch.nn.Module, learning_rate: float, storage: OptimizerStorage) -> Setup:
    replace_layers(model, torch.nn.Dropout, mixft.nn.Dropout.from_dropout)
    on_gpu = next(model.parameters()).is_cuda
    if not on_gpu:
        replace_layers(model, GELUActivation, lambda _: mixft.nn.GELU())
        use_dropout_attention(model)
    return Setup(model, _fused_adamw(model, learning_rate, storage), autocast=torch.bfloat16 if on_gpu else None)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def replace_layers(model: torch.nn.Module, kind: type, make: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """Put ``make(layer)`` in the place of each layer that is of exactly this kind."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is kind:
                setattr(module, name, make(child))


def _fused_adamw(model: torch.nn.Module, learning_rate: float, storage: OptimizerStorage) -> torch.optim.Optimizer:
    return mixft.optim.AdamW(
        trainable(model).items(),
        lr=learning_rate,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        master_weights=storage.master_weights,
        state_dtype=STATE_DTYPES[storage.state_dtype],
    )


PRECISIONS: dict[str, Callable[[torch.nn.Module, float, OptimizerStorage], Setup]] = {
    "fp32": _fp32,
    "bf16": _bf16,
    "fp16": _fp16,
    "auto": _auto,
    "int8": _int8,
}

# With adapters on a frozen model, whose weights keep what the others would change.
LORA_PRECISIONS: dict[str, Callable[[torch.nn.Module, float, OptimizerStorage], Setup]] = {
    "fp32": _fp32,
    "bf16": _bf16,
    "int8": _around_int8,
}
