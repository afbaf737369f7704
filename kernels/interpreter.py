"""BF16 in Triton's interpreter, which stores it as bit patterns and then multiplies and converts those as integers.

Kernels need no path of their own for it: this replaces the interpreter's dot and cast by ones that see the values.
"""

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

interpreted_dot = InterpreterBuilder.create_dot
interpreted_cast = InterpreterBuilder.cast_impl


def widened(handle: TensorHandle) -> TensorHandle:
    """A BF16 operand as the same values in FP32; others as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = torch.from_numpy(handle.data.view("int16").copy()).view(torch.bfloat16)
    return TensorHandle(values.float().numpy(), tl.float32)


def dot(self, a, b, *args):
    return interpreted_dot(self, widened(a), widened(b), *args)


def cast(self, source, target):
    source = widened(source)
    if target.scalar != tl.bfloat16:
        return interpreted_cast(self, source, target)
    values = torch.from_numpy(source.data.astype("float32")).to(torch.bfloat16)
    return TensorHandle(values.view(torch.int16).numpy().view("uint16"), tl.bfloat16)


def install() -> None:
    """Make the interpreter right for BF16 in this process."""
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
