"""The update rules, each written once, on FP32 values of one block.

``p`` is the weight, ``g`` the gradient after unscaling and clipping (negated when maximizing), ``t`` the step count
with this step. Each rule returns the new weight and the new state.

AdamW (Loshchilov and Hutter 2019) in the arrangement of ``torch.optim.AdamW``, and Adam (Kingma and Ba 2015)::

    p <- p * (1 - lr * weight_decay)   AdamW          g <- g + weight_decay * p   Adam
    m <- beta1 * m + (1 - beta1) * g
    v <- beta2 * v + (1 - beta2) * g^2
    u <- v, or with AMSGrad vmax <- max(vmax, v) and u <- vmax   (Reddi et al. 2018)
    p <- p - lr / (1 - beta1^t) * m / (sqrt(u) / sqrt(1 - beta2^t) + eps)

SGD in the arrangement of ``torch.optim.SGD``::

    g <- g + weight_decay * p
    b <- g where t = 1, else momentum * b + (1 - dampening) * g
    p <- p - lr * b, or with Nesterov momentum p - lr * (g + momentum * b)

Lion (Chen et al. 2023)::

    p <- p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
    m <- beta2 * m + (1 - beta2) * g
"""

import triton
import triton.language as tl


@triton.jit
def one_minus_power(log_beta, step):
    """1 - beta^step from ln(beta), without the cancellation of 1 - 0.999 in FP32."""
    x = log_beta * step
    # Near zero the series of exp(x) - 1, whose eleventh term is below FP32 resolution at |x| = 0.5.
    series = 1.0 + x * (1.0 / 10.0)
    for i in tl.static_range(8):
        series = 1.0 + x * series * (1.0 / (9.0 - i))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def lerp(a, b, weight):
    """``a + weight * (b - a)``, from the nearer of the two, as torch has it: at a weight of 1 it is ``b``."""
    # One number for all, by which the processor can branch; a choice between two results would take their registers.
    if weight < 0.5:
        result = a + weight * (b - a)
    else:
        result = b - (1.0 - weight) * (b - a)
    return result


@triton.jit
def decayed(g, p, weight_decay):
    """``g + weight_decay * p``; without decay an infinite weight makes no NaN of the gradient."""
    return tl.where(weight_decay == 0.0, g, g + weight_decay * p)


@triton.jit
def adam_rule(
    p, g, m, v, v_max, decay, step_size, bias2_sqrt, eps, weight_decay,
    one_minus_beta1, beta2, one_minus_beta2, DECOUPLED: tl.constexpr,
):  # fmt: skip
    if DECOUPLED:
        p = p * decay
    else:
        g = decayed(g, p, weight_decay)
    m = lerp(m, g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    # Not tl.maximum, which may drop a NaN and so hide it.
    v_max = tl.where(v_max > v, v_max, v)
    p = p - step_size * (m / (tl.sqrt(v_max) / bias2_sqrt + eps))
    return p, m, v, v_max


@triton.jit
def sgd_rule(
    p, g, b, rate, is_first, weight_decay, momentum, one_minus_dampening,
    HAS_BUFFER: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    g = decayed(g, p, weight_decay)
    if HAS_BUFFER:
        b = tl.where(is_first, g, momentum * b + one_minus_dampening * g)
        g = g + momentum * b if NESTEROV else b
    return p - rate * g, b


@triton.jit
def lion_rule(p, g, m, rate, decay, one_minus_beta1, one_minus_beta2):
    direction = m + one_minus_beta1 * (g - m)
    # A NaN has no sign; it stays a NaN.
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction))
    return p * decay - rate * sign, m + one_minus_beta2 * (g - m)
