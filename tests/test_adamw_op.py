"""``mixft.ops.adamw_`` against the formula written out in FP64."""

import math

import pytest
import torch
from conftest import EPSILON, assert_within_budget, error

from mixft.ops import adamw_

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [1, 17, 66, 1000, 16385]
HYPERPARAMETERS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def scalar(value, device):
    return torch.tensor(value, dtype=torch.float32, device=device)


def problem(device, shapes, dtype, *, masters=True, amsgrad=False, grad_dtype=None, step=0.0):
    """The tensor arguments of ``adamw_`` for parameters of ``shapes``; odd ones are NaN-free random."""
    params = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    wide = [param.float() + (1e-4 if dtype != torch.float32 else 0.0) for param in params]
    return {
        "params": params,
        "grads": [torch.randn(shape, device=device).to(grad_dtype or dtype) for shape in shapes],
        "masters": wide if masters else [],
        "exp_avgs": [torch.randn(shape, device=device) * (step > 0) for shape in shapes],
        "exp_avg_sqs": [torch.rand(shape, device=device) * (step > 0) for shape in shapes],
        "max_exp_avg_sqs": [torch.rand(shape, device=device) * (step > 0) for shape in shapes] if amsgrad else [],
        "steps": [scalar(step, device) for _ in shapes],
    }


def clone(tensors):
    return {name: [tensor.clone() for tensor in listed] for name, listed in tensors.items()}


def formula(tensors, *, lr, factor=1.0, beta1, beta2, eps, weight_decay, maximize=False, dtype=torch.float64):
    """One step of the textbook formula at ``dtype``; the weights, moments and maxima, each a list."""
    weights, exp_avgs, exp_avg_sqs, maxima = [], [], [], []
    for i, grad in enumerate(tensors["grads"]):
        weight = (tensors["masters"] or tensors["params"])[i].to(dtype)
        g = grad.to(dtype) * factor * (-1 if maximize else 1)
        t = tensors["steps"][i].item() + 1
        m = beta1 * tensors["exp_avgs"][i].to(dtype) + (1 - beta1) * g
        v = beta2 * tensors["exp_avg_sqs"][i].to(dtype) + (1 - beta2) * g * g
        u = v
        if tensors["max_exp_avg_sqs"]:
            u = torch.maximum(tensors["max_exp_avg_sqs"][i].to(dtype), v)
            maxima.append(u)
        weight = weight * (1 - lr * weight_decay)
        weight = weight - lr / (1 - beta1**t) * m / (u.sqrt() / math.sqrt(1 - beta2**t) + eps)
        weights.append(weight)
        exp_avgs.append(m)
        exp_avg_sqs.append(v)
    return weights, exp_avgs, exp_avg_sqs, maxima


def assert_follows_formula(before, after, lr, **options):
    exact = formula(before, lr=lr, **options)
    theirs = formula(before, lr=lr, dtype=torch.float32, **options)
    stored = (after["masters"] or after["params"], *(after[n] for n in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")))
    for actual, expected, single in zip(stored, exact, theirs, strict=True):
        for a, e, s in zip(actual, expected, single, strict=True):
            assert_within_budget(a, e, s.to(a.dtype), epsilon=3e-7)
    for old, new in zip(before["steps"], after["steps"], strict=True):
        assert new.item() == old.item() + 1
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert torch.equal(old, new), "gradients are to stay as they are"
    for param, master in zip(after["params"], after["masters"], strict=False):
        assert torch.equal(param, master.to(param.dtype))


@pytest.mark.parametrize("step", [0.0, 1.0, 7.0, 100000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_follows_the_formula(device, dtype, step):
    after = problem(device, SIZES, dtype, masters=dtype != torch.float32, step=step)
    before = clone(after)
    adamw_(**after, lr=scalar(2.0**-7, device), **HYPERPARAMETERS)
    assert_follows_formula(before, after, 2.0**-7, **HYPERPARAMETERS)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.3)])
def test_options(device, maximize, amsgrad, weight_decay, betas):
    options = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-3, "weight_decay": weight_decay, "maximize": maximize}
    after = problem(device, [17, (3, 5)], torch.float16, amsgrad=amsgrad, step=3.0)
    before = clone(after)
    adamw_(**after, lr=scalar(2.0**-7, device), **options)
    assert_follows_formula(before, after, 2.0**-7, **options)


def test_each_tensor_has_a_step_count_of_its_own(device):
    after = problem(device, [3, 17, 5, 4], torch.float32, masters=False, step=1.0)
    for step, count in zip(after["steps"], (1.0, 40.0, 40.0, 0.0), strict=True):
        step.fill_(count)
    before = clone(after)
    adamw_(**after, lr=scalar(2.0**-7, device), **HYPERPARAMETERS)
    assert_follows_formula(before, after, 2.0**-7, **HYPERPARAMETERS)


def test_a_nan_reaches_the_weight_and_every_state(device):
    # Of less than a vector torch's fused routine takes a maximum that passes over NaN.
    after = problem(device, [64], torch.float32, masters=False, amsgrad=True, step=3.0)
    after["grads"][0][2] = torch.nan
    adamw_(**after, lr=scalar(2.0**-7, device), **HYPERPARAMETERS)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        assert after[name][0].isnan().nonzero().tolist() == [[2]], name


@pytest.mark.parametrize(("dtype", "grad_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_gradients_of_another_dtype(device, dtype, grad_dtype):
    after = problem(device, SIZES, dtype, masters=dtype != torch.float32, grad_dtype=grad_dtype)
    before = clone(after)
    adamw_(**after, lr=scalar(2.0**-7, device), **HYPERPARAMETERS)
    assert_follows_formula(before, after, 2.0**-7, **HYPERPARAMETERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unscales_and_clips(device, dtype):
    after = problem(device, [17, 0, 1000], dtype, masters=dtype != torch.float32)
    for grad in after["grads"]:
        grad.mul_(128)
    before = clone(after)
    adamw_(
        **after,
        lr=scalar(2.0**-7, device),
        inv_scale=scalar(1 / 128, device),
        clip_coef=scalar(0.25, device),
        found_inf=scalar(0.0, device).reshape(1),
        **HYPERPARAMETERS,
    )
    assert_follows_formula(before, after, 2.0**-7, factor=1 / 512, **HYPERPARAMETERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_without_masters_a_16_bit_parameter_is_rounded_once(device, dtype):
    after = problem(device, SIZES, dtype, masters=False)
    before = clone(after)
    adamw_(**after, lr=scalar(2.0**-7, device), **HYPERPARAMETERS)
    assert_follows_formula(before, after, 2.0**-7, **HYPERPARAMETERS)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_found_inf_leaves_every_bit(device, dtype, amsgrad):
    after = problem(device, [17, 16385], dtype, masters=dtype != torch.float32, amsgrad=amsgrad, step=2.0)
    after["grads"][1][-1] = float("nan")
    after["exp_avgs"][0][3] = float("nan")
    before = clone(after)
    adamw_(**after, lr=scalar(0.1, device), found_inf=scalar(1.0, device), **HYPERPARAMETERS)
    for name in before:
        for old, new in zip(before[name], after[name], strict=True):
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8)) if old.dim() else torch.equal(old, new)


def layouts(make):
    """One tensor of each layout: misaligned, transposed, channels-last, strided, scalar and empty."""
    return [
        make(1001)[1:],
        make(33, 17).t(),
        make(2, 3, 5, 7).to(memory_format=torch.channels_last),
        make(40, 6)[:, ::2],
        make(),
        make(0, 3),
        make(8, 4),
    ]


@pytest.mark.parametrize("masters", [False, True])
def test_any_layout_of_any_tensor(device, masters):
    def make(*shape):
        return torch.randn(shape, device=device)

    params = layouts(make)
    plain = [param.clone() for param in params]
    after = {
        "params": params,
        # Contiguous where the parameter is not, and the reverse.
        "grads": [
            *(torch.randn(p.shape, device=device) for p in params[:-1]),
            torch.randn(1, device=device).expand(8, 4),
        ],
        "masters": [param.clone() for param in params] if masters else [],
        "exp_avgs": [torch.zeros(p.shape, device=device) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "max_exp_avg_sqs": [],
        "steps": [scalar(0.0, device) for _ in params],
    }
    before = clone(after) | {"params": plain}
    strides = [param.stride() for param in params]
    adamw_(**after, lr=scalar(2.0**-7, device), **HYPERPARAMETERS)
    assert_follows_formula(before, after, 2.0**-7, **HYPERPARAMETERS)
    assert [param.stride() for param in params] == strides


def test_neighbours_of_a_view_stay(device):
    whole = torch.ones(1003, device=device)
    after = problem(device, [1000], torch.float32, masters=False)
    after["params"] = [whole[1:1001]]
    adamw_(**after, lr=scalar(0.1, device))
    assert whole[0] == 1
    assert (whole[1001:] == 1).all()
    assert (whole[1:1001] != 1).all()


def test_repeated_calls_on_moving_gradients(device):
    after = problem(device, [17, 33000], torch.float32, masters=False)
    kept = []
    for _ in range(3):
        before = clone(after)
        adamw_(**after, lr=scalar(2.0**-7, device), **HYPERPARAMETERS)
        assert_follows_formula(before, after, 2.0**-7, **HYPERPARAMETERS)
        kept.append(after["grads"])
        after["grads"] = [torch.randn(grad.shape, device=device) for grad in after["grads"]]


def placed(memory, tensor):
    """A copy of ``tensor`` at the start of ``memory``."""
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def test_addresses_serve_other_tensors_later(device):
    memory = {}
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    kinds = [(float32, float32), (float32, bfloat16), (float32, float16), (bfloat16, bfloat16), (bfloat16, float16)]
    for size in (17, 66, 17):
        for dtype, grad_dtype in kinds:
            for masters in (False, True):
                tensors = problem(
                    device, [(size,), (5,)], dtype, grad_dtype=grad_dtype, masters=masters, amsgrad=masters, step=3.0
                )
                for name, listed in tensors.items():
                    for position, tensor in enumerate(listed):
                        key = name, position
                        memory.setdefault(key, torch.zeros(4 * 66, dtype=torch.uint8, device=device))
                        listed[position] = placed(memory[key], tensor)
                before = clone(tensors)
                adamw_(**tensors, lr=scalar(1e-3, device), **HYPERPARAMETERS)
                assert_follows_formula(before, tensors, lr=1e-3, **HYPERPARAMETERS)


def test_steps_side_by_side_and_apart(device):
    after = problem(device, [3, 4, 5], torch.float32, masters=False)
    buffer = torch.tensor([5.0, 7.0, 9.0, 11.0], device=device)
    for steps, expected in (([0, 1, 2], [6, 8, 10, 11]), ([0, 2, 3], [7, 8, 11, 12]), ([2, 1, 0], [8, 9, 12, 12])):
        adamw_(**after | {"steps": [buffer[i] for i in steps]}, lr=scalar(0.1, device))
        assert buffer.tolist() == expected


@pytest.mark.parametrize("step", [0.0, 3.0, 600.0, 1e6])
def test_bias_corrections_keep_their_digits(device, step):
    after = problem(device, [2], torch.float32, masters=False, step=step)
    grad = torch.tensor([3.0, -0.5], device=device)
    # Moments as a constant gradient would have left them, so that the step is the sign of the gradient.
    after |= {"params": [torch.zeros(2, device=device)], "grads": [grad]}
    after |= {"exp_avgs": [grad * (1 - 0.9**step)], "exp_avg_sqs": [grad.square() * (1 - 0.999**step)]}
    before, options = clone(after), HYPERPARAMETERS | {"eps": 0.0, "weight_decay": 0.0}
    adamw_(**after, lr=scalar(1.0, device), **options)
    assert_follows_formula(before, after, 1.0, **options)
    assert error(after["params"][0], torch.tensor([-1.0, 1.0]).double()) <= EPSILON[torch.float32]


def test_no_parameters():
    given = {"lr": 0.1, "inv_scale": 0.5, "clip_coef": 0.25, "found_inf": 1.0}
    scalars = {name: torch.tensor(value) for name, value in given.items()}
    assert adamw_([], [], [], [], [], [], [], **scalars) is None
    assert all(torch.equal(scalars[name], torch.tensor(value)) for name, value in given.items())
    with pytest.raises(ValueError, match="grads has 1 tensors for 0 parameters"):
        adamw_([], [torch.ones(2)], [], [], [], [], [], **scalars)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("grads", [torch.ones(3)], ValueError, "grads has 1 tensors for 2"),
        ("grads", [torch.ones(3), torch.ones(5)], ValueError, r"grads\[1\] has shape \(5,\)"),
        ("params", [torch.ones(3), torch.ones(4).double()], TypeError, r"params\[1\] is torch.float64"),
        ("masters", [torch.ones(3), torch.ones(4).half()], TypeError, r"masters\[1\] is torch.float16"),
        ("exp_avgs", [torch.ones(3), torch.ones(4).half()], TypeError, r"exp_avgs\[1\]"),
        ("grads", [torch.ones(3), torch.ones(4).to_sparse()], ValueError, r"grads\[1\] is torch.sparse_coo"),
        ("steps", [torch.ones(()), torch.ones(2)], ValueError, r"steps\[1\] has 2 elements"),
        ("lr", 0.1, TypeError, "lr is float"),
        ("found_inf", torch.ones(2), ValueError, "found_inf has shape"),
        ("exp_avg_sqs", [torch.ones(3), torch.ones(4, device="meta")], ValueError, r"exp_avg_sqs\[1\] is on meta"),
    ],
)
def test_refusals(name, value, error, message):
    arguments = problem(torch.device("cpu"), [3, 4], torch.float32, masters=False) | {"lr": torch.tensor(0.1)}
    before = [param.clone() for param in arguments["params"]]
    with pytest.raises(error, match=message):
        adamw_(**arguments | {name: value})
    assert all(map(torch.equal, before, arguments["params"]))


def test_opcheck(device):
    tensors = problem(device, [3, 17], torch.float16, amsgrad=True)
    steps = tensors.pop("steps")
    scalars = (scalar(0.1, device), scalar(0.5, device), None, scalar(0.0, device))
    rule = (0.9, 0.999, 1e-8, 0.01, True, False, False)
    arguments = (*tensors.values(), [], [], [], steps, *scalars, *rule)
    torch.library.opcheck(torch.ops.mixft.adamw_step_.default, arguments)
