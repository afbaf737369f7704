"""Quantized copies that serve again: a layer's weight while gradients accumulate, an input that several layers read."""

import functools
import math
import threading
import weakref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from mixft.ops.capture import capturing, stream_of
from mixft.ops.int8_operands import quantized_rows

Quantized = tuple[Tensor, Tensor]

# Elements of a CPU tensor that are compared with what they were before its copy serves again.
PROBED = 64

_optimizer_steps = [0]
# Steps that a CUDA graph replays are counted once only, when it is captured.
_captured_steps = [0]


def _count_step(*_) -> None:
    _optimizer_steps[0] += 1
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured_steps[0] += 1


@functools.cache
def _watch_optimizers() -> None:
    """Count the steps of every torch optimizer of the process, as some write through ``.data``, unseen by versions."""
    register_optimizer_step_post_hook(_count_step)


class WeightCache:
    """The int8 copy of one weight, kept while gradients accumulate in ``weight.grad``.

    A copy serves again only if the weight has a gradient, so that at least one backward has run since it was cleared,
    and nothing shows that the weight has changed: its memory, its version (every in-place operation raises it, those of
    mixft's optimizers too), a step of any ``torch.optim.Optimizer``, and on a CPU a sample of its elements, which a
    write through ``weight.data`` to all of it changes. Not seen is such a write between two parts of one batch on a
    GPU, or one to single elements. What a CUDA graph changes when it is replayed is not seen either, so no copy serves
    again once a forward of the layer, or a step of any optimizer, was captured.
    """

    def __init__(self):
        _watch_optimizers()
        self.captured = False
        self.accumulates = False
        self.entry: tuple[tuple, Tensor | None, Quantized] | None = None

    def __reduce__(self):
        return WeightCache, ()

    def quantized(self, weight: Tensor, matrix: Tensor) -> Quantized:
        """Values and scale of the rows of ``matrix``, which is ``weight`` or its transpose."""
        # What a CUDA graph replays must quantize again, since its inputs and weights change in between.
        self.captured = self.captured or capturing(weight.device)
        if type(weight) is not torch.nn.Parameter or weight.is_inference() or self.captured or _captured_steps[0]:
            self.entry = None
            return quantized_rows(matrix)
        changes = (weight._version, _optimizer_steps[0])
        key = (weight.data_ptr(), weight.dtype, weight.shape, stream_of(weight.device), *changes)
        probe = _probe(weight)
        accumulating, entry = weight.grad is not None, self.entry
        unchanged = entry is not None and entry[0] == key and (probe is None or torch.equal(probe, entry[1]))
        if accumulating and unchanged:
            return entry[2]
        # The first part of a batch cannot tell whether there will be another one: the last batch tells.
        self.accumulates = self.accumulates or accumulating
        quantized = quantized_rows(matrix)
        self.entry = (key, probe, quantized) if self.accumulates else None
        return quantized


def _probe(tensor: Tensor) -> Tensor | None:
    """A sample of the elements of a CPU tensor [..., K]."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return None
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // PROBED)
    # Not the same few columns of every row.
    while math.gcd(step, tensor.shape[-1]) > 1:
        step += 1
    return flat[::step].clone()


class SharedInput(threading.local):
    """The int8 copy of the input that was quantized last in this thread.

    The query, key and value layers of attention read one tensor: the second and third take the first's copy. It serves
    each layer once and as long as the tensor lives and has not been written to, which its version tells, and on a CPU a
    sample of its elements: NumPy may write to its memory.
    """

    def __init__(self):
        self.entry = None

    def quantized(self, layer: object, source: Tensor, input: Tensor) -> Quantized:
        """Values and scale of the rows of ``input``, which is ``source`` in the dtype to compute in."""
        rows = input.reshape(input.shape[:-1].numel(), input.shape[-1])
        if type(source) is not Tensor or capturing(source.device) or source.is_inference():
            return quantized_rows(rows)
        entry = self.entry
        if entry is not None and entry.serves(layer, source, input.dtype):
            return entry.quantized
        self.entry = _Entry(layer, source, input.dtype, quantized_rows(rows))
        return self.entry.quantized


class _Entry:
    def __init__(self, layer: object, source: Tensor, dtype: torch.dtype, quantized: Quantized):
        self.source = weakref.ref(source, self.forget)
        self.version = source._version
        self.stream = stream_of(source.device)
        self.probe = _probe(source)
        self.dtype = dtype
        self.layers = {id(layer)}
        self.quantized = quantized

    def forget(self, _) -> None:
        self.quantized = None

    def serves(self, layer: object, source: Tensor, dtype: torch.dtype) -> bool:
        if self.source() is not source or self.version != source._version or self.dtype != dtype:
            return False
        if self.stream != stream_of(source.device):
            return False
        if self.probe is not None and not torch.equal(self.probe, _probe(source)):
            return False
        first_use = id(layer) not in self.layers
        self.layers.add(id(layer))
        return first_use


shared_input = SharedInput()
