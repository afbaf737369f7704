"""Run as a script: the compiled routines on operands, results and scratch memory beside pages that nobody may touch.

Each tensor ends, and in a second round begins, where such a page begins or ends: a read or a write beyond it is a
crash, which no test of values can see. Prints the names of the routines that it called.
"""

import ctypes
import mmap

import torch

from mixft.cpu import native
from mixft.cpu.accumulate import accumulate_gradients_
from mixft.cpu.activation import finish_product
from mixft.cpu.activation_backward import activation_backward
from mixft.cpu.adamw import adamw_step_
from mixft.cpu.dequantize import dequantize
from mixft.cpu.dropout import dropout
from mixft.cpu.grad import gradient_statistics, unscale_gradients_
from mixft.cpu.grad_scalars import gradient_scalars
from mixft.cpu.int8_epilogue import apply_int8_epilogue
from mixft.cpu.int8_input_gradient import int8_input_gradient
from mixft.cpu.int8_layer import int8_layer
from mixft.cpu.int8_matmul import _compiled, _many_rows, weight_only_matmul
from mixft.cpu.lion import lion_step_
from mixft.cpu.optimizer_state import decode_state, encode_state, join_weights, split_weights
from mixft.cpu.quantize import quantize
from mixft.cpu.quantize_gradient import quantize_gradient
from mixft.cpu.sgd import sgd_step_

PAGE = mmap.PAGESIZE
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The last one is for two threads.
SHAPES = ((1, 1, 1), (3, 7, 31), (5, 37, 33), (13, 66, 70), (2, 131, 32), (70, 131, 70))
protect = ctypes.CDLL(None).mprotect
empty, empty_like = torch.empty, torch.empty_like
at_the_end = True


def place(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy between two pages that can neither be read nor written."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + room):
        assert protect(ctypes.c_void_p(page), PAGE, 0) == 0
    offset = PAGE + (room - size if at_the_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)


def normal(*shape, dtype=torch.float32):
    return place(torch.randn(shape).to(dtype))


def int8(*shape):
    return place(torch.randint(-128, 128, shape, dtype=torch.int8))


def int32(*shape):
    return place(torch.randint(-9, 9, shape, dtype=torch.int32))


def products(M, K, N, dtype):
    scale, sums, bias, left, right = normal(N, 1), int32(N), normal(N, dtype=dtype), normal(M, 3), normal(3, N)
    x, weight = normal(M, K, dtype=dtype), int8(N, K)
    int8_layer(x, weight, scale, bias, "gelu", left=left, right=right)
    int8_layer(x, weight, scale, None, "none", 0.1, 3, sums)
    int8_input_gradient(normal(M, K, dtype=dtype), int8(K, N), normal(K, 1), left, right)
    a, a_scale, zeros = int8(M, K), normal(M, 1), int32(M, 1)
    for b in (int8(N, K), int8(K, N).t()):
        _compiled(a, b, a_scale, scale, bias, "none", dtype, zeros, sums)
    weight_only_matmul(x, int8(N, K), scale, bias, "silu", dtype)
    _many_rows(x, int8(N, K), scale, bias, "silu", dtype)
    apply_int8_epilogue(int32(M, N), a_scale, scale, bias, "none", dtype, zeros, sums)


def passes(M, K, N, dtype):
    x, seed = normal(M, K, N, dtype=dtype), place(torch.tensor(7))
    for symmetric in (True, False):
        values, scale, zero_point = quantize(x, symmetric, seed)
        dequantize(values, scale, None if symmetric else zero_point, dtype)
        quantize(normal(M * N, K, 1, dtype=dtype), symmetric, None, normal(K))
    quantize_gradient(normal(K, M * N, dtype=dtype), normal(K), normal(M * N), seed)
    finish_product(x, "relu", torch.float16, normal(M, K, N), torch.bfloat16)
    activation_backward(normal(K, M * N, dtype=dtype), normal(K, M * N), "gelu", dtype, True)
    dropout(x, 2**15, 3)
    grads, buffers = [x, normal(K, dtype=dtype)], [normal(M, K, N), normal(K)]
    accumulate_gradients_(grads, buffers, None, torch.zeros(1), torch.zeros(2, dtype=torch.int64), False, True)
    unscale_gradients_(grads, torch.tensor(0.5), torch.zeros(1), None)
    gradient_statistics(grads)
    gradient_scalars(grads, normal(1), place(torch.zeros(())), 1.0)


def steps(size, dtype):
    lr, rest = torch.tensor(0.1), (None, None, None)
    grads, count, flags = [normal(size, dtype=dtype)], [place(torch.zeros(()))], (False, True)
    first, first_scale = encode_state(normal(size), True)
    second, second_scale = encode_state(normal(size).abs(), False)
    codes = [[first], [second], [], [first_scale], [second_scale], []]
    wide = [[normal(size)], [normal(size).abs()], [normal(size).abs()], [], [], []]
    narrow = [[normal(size, dtype=torch.bfloat16)], [normal(size, dtype=torch.bfloat16)], [], [], [], []]
    for states in (codes, wide, narrow):
        params = [normal(size, dtype=dtype)]
        adamw_step_(params, grads, [], *states, count, lr, *rest, 0.9, 0.99, 1e-8, 0.1, True, *flags)
        sgd_step_(params, grads, [], states[0], states[3], count, lr, *rest, 0.9, 0.0, 0.1, True, *flags)
        lion_step_(params, grads, [], states[0], states[3], count, lr, *rest, 0.9, 0.99, 0.1, *flags)
    decode_state(first, first_scale)
    if dtype != torch.float32:
        param, remainder = split_weights(normal(size), dtype)
        join_weights(param, remainder)
        lion_step_([param], grads, [remainder], [first], [first_scale], count, lr, *rest, 0.9, 0.99, 0.1, False, False)


def note(routine: native.Routine, *arguments) -> None:
    called.add(routine.name)
    call(routine, *arguments)


if __name__ == "__main__":
    torch.set_num_threads(2)
    called, call = set(), native.Routine.__call__
    native.Routine.__call__ = note
    torch.empty = lambda *shape, **options: place(empty(*shape, **options))
    torch.empty_like = lambda *like, **options: place(empty_like(*like, **options))
    native.scratch = lambda size: torch.empty(size, dtype=torch.uint8)
    for at_the_end in (True, False):
        for kind in FLOATS if at_the_end else FLOATS[:1]:
            for shape in SHAPES:
                products(*shape, kind)
                passes(*shape, kind)
            for length in (1, 31, 32, 33, 257, 1025, 40001):
                steps(length, kind)
    print(*sorted(called))
