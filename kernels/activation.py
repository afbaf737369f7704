"""The activations that an epilogue can apply, and their derivatives, in FP32.

=============  =======================================================
``none``       x
``relu``       max(x, 0), NaN kept, as torch does
``gelu``       x Phi(x), the erf form, torch's default
``gelu_tanh``  0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))  (Hendrycks and Gimpel, 2016)
``silu``       x / (1 + exp(-x))
=============  =======================================================
"""

import triton
import triton.language as tl


@triton.jit
def logistic(x):
    """sigmoid(x) and 1 - sigmoid(x), each with all of its digits: no exp overflows, and nothing cancels."""
    decay = tl.exp(-tl.abs(x))
    above = 1.0 / (1.0 + decay)
    below = decay * above
    return tl.where(x < 0, below, above), tl.where(x < 0, above, below)


@triton.jit
def tanh_argument(x):
    """Of gelu_tanh, which is x times the sigmoid of it: 2 sqrt(2/pi) (x + 0.044715 x^3)."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        gate, _ = logistic(tanh_argument(x))
        x = x * gate
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    """d activate(x) / dx at the pre-activation ``x`` of an activation that is smooth."""
    # Beyond 64 every slope is within 1e-25 of 0 or 1; without the limits an infinite x would give 0 * Inf.
    x = tl.where(x > 64.0, 64.0, tl.where(x < -64.0, -64.0, x))
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        gate, rest = logistic(tanh_argument(x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = gate * (1.0 + x * rest * inner)
    elif ACTIVATION == "silu":
        gate, rest = logistic(x)
        slope = gate * (1.0 + x * rest)
    else:
        slope = x * 0.0 + 1.0
    return slope


@triton.jit
def multiply_by_slope(grad, x, ACTIVATION: tl.constexpr):
    """``grad`` times the slope at the pre-activation ``x``. Where ReLU's is 0, so is the product, whatever ``grad``; at
    NaN it is 1, as torch has it."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, grad)
    else:
        return grad * activation_derivative(x, ACTIVATION)
