"""The fused optimizer steps: every rule, parameter and gradient dtype, master and state, against torch at FP64."""

import pytest
import torch
from conftest import EPSILON, assert_within_budget
from step_problems import RULES, Problem, scalar

from mixft.cpu import native
from mixft.ops import adamw_, lion_, sgd_

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(17,), (0,), (3, 37), (1000,)]
MASTERS = {"none": DTYPES, "fp32": DTYPES, "split": DTYPES[:2]}
COMBINATIONS = [(master, dtype) for master, dtypes in MASTERS.items() for dtype in dtypes]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_unchanged(before, after, names=None):
    for name in names or before:
        assert all(map(same_bits, before[name], after[name])), name


def assert_state_follows(actual, exact, single, state):
    if state == "fp32":
        assert_within_budget(actual, exact, single, EPSILON[torch.float32])
        return
    # Rounded up or down: within one step of the format, and of the smallest code of a group whose largest is below 8.
    relative, smallest = (2.0**-7, 0.0) if state == "bf16" else (2.0**-3, 8 * 2.0**-14)
    assert ((actual.double() - exact).abs() <= exact.abs() * relative * 1.001 + smallest).all()


@pytest.mark.parametrize("state", ["fp32", "bf16", "codes"])
@pytest.mark.parametrize(("master", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_one_step(device, rule, master, dtype, state):
    if state != "fp32" and not RULES[rule].lists:
        state = "fp32"
    grad_dtype = DTYPES[(DTYPES.index(dtype) + len(rule) + len(state)) % 3]
    problem = Problem(RULES[rule], device, SHAPES, dtype, grad_dtype, master, state)
    before = problem.snapshot()
    factor = 0.25 * 0.5
    exact, exact_states = problem.expected(torch.float64, factor)
    single, single_states = problem.expected(torch.float32, factor)
    problem.run(inv_scale=scalar(0.25, device), clip_coef=scalar(0.5, device), found_inf=scalar(0.0, device))
    for actual, expected, theirs in zip(problem.weights(), exact, single, strict=True):
        assert_within_budget(actual, expected, theirs.to(dtype) if master == "none" else theirs, EPSILON[torch.float32])
    for listed in zip(problem.states(), exact_states, single_states, strict=True):
        for actual, expected, theirs in zip(*listed, strict=True):
            assert_state_follows(actual, expected, theirs, state)
    assert_unchanged(before, problem.tensors, ["grads"])
    assert [step.item() for step in problem.tensors["steps"]] == [4.0] * len(SHAPES)
    if master == "fp32":
        for param, weight in zip(problem.tensors["params"], problem.tensors["masters"], strict=True):
            assert same_bits(param, weight.to(dtype))


@pytest.mark.parametrize("options", [{"maximize": True}, {"weight_decay": 0.0}])
@pytest.mark.parametrize("rule", RULES)
def test_options(device, rule, options):
    problem = Problem(RULES[rule], device, SHAPES, torch.float32)
    exact, _ = problem.expected(torch.float64, **options)
    single, _ = problem.expected(torch.float32, **options)
    problem.run(**options)
    for actual, expected, theirs in zip(problem.weights(), exact, single, strict=True):
        assert_within_budget(actual, expected, theirs, EPSILON[torch.float32])


@pytest.mark.parametrize("state", ["fp32", "codes"])
@pytest.mark.parametrize("rule", ["sgd dampened", "sgd nesterov"])
def test_sgd_begins_its_buffer_with_the_gradient(device, rule, state):
    problem = Problem(RULES[rule], device, SHAPES, torch.float32, state=state, step=0.0)
    problem.tensors["steps"][0].fill_(2.0)
    exact, exact_states = problem.expected(torch.float64)
    single, single_states = problem.expected(torch.float32)
    # What a buffer that is yet to begin holds does not matter: all NaN here, in codes by their scales.
    for begins in (problem.tensors["momentum_buffer_scales"] or problem.tensors["momentum_buffers"])[1:]:
        begins.fill_(torch.nan if state == "fp32" else 255)
    problem.run()
    for actual, expected, theirs in zip(problem.weights(), exact, single, strict=True):
        assert_within_budget(actual, expected, theirs, EPSILON[torch.float32])
    for actual, expected, theirs in zip(problem.states()[0], exact_states[0], single_states[0], strict=True):
        assert_state_follows(actual, expected, theirs, state)


@pytest.mark.parametrize("state", ["fp32", "bf16", "codes"])
@pytest.mark.parametrize(("master", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("rule", ["adamw amsgrad", "sgd nesterov", "lion"])
def test_a_skipped_step_leaves_every_bit(device, rule, master, dtype, state):
    """``found_inf`` may be a sum over devices, as torch's GradScaler makes one."""
    problem = Problem(RULES[rule], device, SHAPES, dtype, master=master, state=state)
    problem.tensors["grads"][3][-1] = float("nan")
    before = problem.snapshot()
    problem.run(found_inf=scalar(2.0, device), stochastic_rounding=master == "none")
    assert_unchanged(before, problem.tensors)


@pytest.mark.parametrize("rule", RULES)
def test_a_nan_that_is_not_skipped_stays_one_where_it_is(device, rule):
    problem = Problem(RULES[rule], device, [(40,)], torch.float32)
    problem.tensors["grads"][0][5] = torch.nan
    problem.run()
    for tensors in (problem.weights(), *problem.states()):
        assert tensors[0].isnan().nonzero().tolist() == [[5]]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of the number not taken
@pytest.mark.parametrize("rule", [name for name in RULES if name != "lion"])
def test_without_decay_an_infinite_weight_makes_no_nan(device, rule):
    problem = Problem(RULES[rule], device, [(40,)], torch.float32)
    problem.tensors["params"][0][5] = -torch.inf
    problem.tensors["grads"][0][5] = 0.0
    exact, _ = problem.expected(torch.float64, weight_decay=0.0)
    problem.run(weight_decay=0.0)
    assert exact[0][5] == -torch.inf
    assert problem.weights()[0][5] == -torch.inf
    assert problem.weights()[0].isfinite().sum() == 39


@pytest.mark.parametrize("rule", ["adamw", "adam"])
def test_a_moment_that_forgets_all_is_the_gradient_to_the_bit(device, rule):
    """As generative adversarial networks take Adam."""
    problem = Problem(RULES[rule], device, [(40,)], torch.float32)
    problem.tensors["exp_avgs"][0].mul_(1e6)
    exact, single = (
        problem.expected(kind, betas=(0.0, 0.9), weight_decay=0.0)[0][0] for kind in (torch.float64, torch.float32)
    )
    problem.run(beta1=0.0, beta2=0.9, weight_decay=0.0)
    assert torch.equal(problem.states()[0][0], problem.tensors["grads"][0])
    assert_within_budget(problem.weights()[0], exact, single, EPSILON[torch.float32])


@pytest.mark.parametrize("state", ["fp32", "codes"])
def test_sgd_without_momentum_leaves_buffers_alone(device, state):
    problem = Problem(RULES["sgd dampened"], device, SHAPES, torch.float32, state=state)
    buffers = [torch.clone(buffer) for buffer in problem.states()[0]]
    exact, single = (problem.expected(kind, momentum=0.0)[0] for kind in (torch.float64, torch.float32))
    problem.run(momentum=0.0)
    for actual, expected, theirs in zip(problem.weights(), exact, single, strict=True):
        assert_within_budget(actual, expected, theirs, EPSILON[torch.float32])
    for now, before in zip(problem.states()[0], buffers, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize(("master", "state"), [("split", "codes"), ("none", "bf16")])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_same_step_gives_the_same_bits_whatever_its_neighbours(device, dtype, master, state):
    """Random bits depend on element and step alone: not on the launch, nor on which tensors are in it."""
    whole = Problem(RULES["adamw"], device, [(5,), (1000,)], dtype, master=master, state=state)
    alone = {name: [tensor.clone() for tensor in listed[1:]] for name, listed in whole.tensors.items()}
    whole.run(stochastic_rounding=master == "none")
    RULES["adamw"].op(**alone, lr=scalar(2.0**-7, device), weight_decay=0.1, stochastic_rounding=master == "none")
    for name, listed in alone.items():
        assert all(map(same_bits, listed, whole.tensors[name][1:])), name


def served_by(monkeypatch, interpreted: bool, problem: Problem, **options):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    before = problem.snapshot()
    problem.run(**options)
    after, problem.tensors = problem.tensors, before
    return after


@pytest.mark.parametrize(("master", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("rule", ["adamw amsgrad", "sgd nesterov", "lion"])
def test_the_kernel_and_the_cpu_routine_round_alike(monkeypatch, rule, master, dtype):
    """They differ in the last bits of FP32 only, so nearly every code is the same: the dither is one function."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problem = Problem(RULES[rule], torch.device("cpu"), [(1000,)], dtype, master=master, state="codes")
    options = {"stochastic_rounding": master == "none"}
    kernel, routine = (served_by(monkeypatch, interpreted, problem, **options) for interpreted in (True, False))
    for name in kernel:
        if name in ("masters", "grads"):
            continue
        for a, b in zip(kernel[name], routine[name], strict=True):
            assert (a == b).double().mean() > (0.9 if dtype == torch.float32 and name == "params" else 0.99), name


def every_kind_of_number() -> torch.Tensor:
    """FP32 of all magnitudes in groups of neighbours that are near one another, and groups with special values."""
    special = [torch.nan, torch.inf, -torch.inf, 3.4028234e38, -3.4028234e38, 65519.9, 1e-45, -1e-39, 2.0**-24, -0.0]
    mixed = torch.randn(len(special), 32)
    mixed[:, 5] = torch.tensor(special)
    near = torch.randn(200, 32) * 10.0 ** torch.linspace(-44, 37, 200)[:, None]
    return torch.cat([near, near * 10.0 ** torch.randn(200, 32), mixed]).flatten()[:-7]


@pytest.mark.parametrize("rule", ["signed codes", "unsigned codes", "bf16 state", "fp16", "bf16"])
def test_the_compiled_routine_and_torch_operators_round_every_number_alike(monkeypatch, rule):
    """A first step of SGD stores the gradient itself, AdamW with beta2 = 0 its square, and SGD from zero less it."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    grad = every_kind_of_number()
    size, groups = grad.numel(), -(-grad.numel() // 32)
    kept = []
    for compiled in (True, False):
        monkeypatch.setattr(native, "available", lambda compiled=compiled: compiled)
        params, steps = [torch.zeros(size)], [scalar(0.0, grad.device)]
        codes = [torch.zeros(size, dtype=torch.int8)]
        scales = [torch.zeros(groups, dtype=torch.uint8)]
        if rule == "signed codes":
            arguments = {"momentum_buffer_scales": scales, "lr": scalar(0.0, grad.device), "momentum": 0.5}
            sgd_(params, [grad], [], codes, steps, **arguments)
        elif rule == "unsigned codes":
            codes += [torch.zeros(size, dtype=torch.uint8)]
            scales += [torch.zeros(groups, dtype=torch.uint8)]
            states = {"exp_avg_scales": scales[:1], "exp_avg_sq_scales": scales[1:], "lr": scalar(0.0, grad.device)}
            adamw_(params, [grad], [], codes[:1], codes[1:], [], steps, **states, beta1=0.0, beta2=0.0)
        elif rule == "bf16 state":
            codes = [torch.zeros(size, dtype=torch.bfloat16)]
            sgd_(params, [grad], [], codes, steps, lr=scalar(0.0, grad.device), momentum=0.5)
        else:
            params = [torch.zeros(size, dtype=torch.float16 if rule == "fp16" else torch.bfloat16)]
            sgd_(params, [grad], [], [], steps, lr=scalar(1.0, grad.device), stochastic_rounding=True)
        # A NaN has many bit patterns.
        kept.append([value.nan_to_num(nan=-123.0) for value in (codes[-1], scales[-1], *params)])
    assert all(map(same_bits, *kept))
    assert any(len(value.unique()) > 100 for value in kept[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(monkeypatch, threads):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    problem = Problem(
        RULES["adamw"], torch.device("cpu"), [(7,), (70000,), (0,), (1029,)], torch.bfloat16, None, "split", "codes"
    )
    together = served_by(monkeypatch, False, problem)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        apart = served_by(monkeypatch, False, problem)
    finally:
        torch.set_num_threads(before)
    assert_unchanged(together, apart)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_stochastic_rounding_keeps_small_updates(device, dtype):
    """A hundred steps of a thousandth of the parameter's spacing: rounding to nearest would not move at all."""
    params = [torch.full((1000,), 1.0, dtype=dtype, device=device)]
    spacing = torch.finfo(dtype).eps
    step, lr = scalar(0.0, device), scalar(spacing / 8, device)
    for _ in range(40):
        sgd_(params, [torch.full_like(params[0], -1.0)], [], [], [step], lr=lr, stochastic_rounding=True)
    assert params[0].float().mean().item() == pytest.approx(1.0 + 5 * spacing, abs=0.1 * spacing)


@pytest.mark.parametrize("state", ["bf16", "codes"])
def test_second_moments_decay_though_a_step_is_far_below_their_spacing(device, state):
    problem = Problem(RULES["adamw"], device, [(256,)], torch.float32, state=state)
    problem.tensors["grads"][0].zero_()
    start = problem.states()[1][0].double()
    for _ in range(60):
        problem.run()
    ratio = problem.states()[1][0].double().sum() / start.sum()
    assert ratio.item() == pytest.approx(0.999**60, rel=0.01)


def test_a_step_beyond_one_chunk_and_one_batch(device):
    shapes = [(16384 + 33,), (5,)] if device.type == "cpu" else [((1 << 20) + 16385,), (5,)]
    problem = Problem(RULES["adamw"], device, shapes, torch.bfloat16, master="split", state="codes")
    exact, _ = problem.expected(torch.float64)
    single, _ = problem.expected(torch.float32)
    problem.run()
    for actual, expected, theirs in zip(problem.weights(), exact, single, strict=True):
        assert_within_budget(actual, expected, theirs, EPSILON[torch.float32])


@pytest.mark.parametrize("size", [17, 64])
def test_nothing_is_written_beyond_the_last_element_or_scale(device, size):
    problem = Problem(RULES["adamw amsgrad"], device, [(size,)], torch.bfloat16, master="split", state="codes")
    roomy = {}
    for name in problem.tensors:
        (tensor,) = problem.tensors[name]
        roomy[name] = torch.full((tensor.numel() + 64,), 77, dtype=tensor.dtype, device=device)
        roomy[name][: tensor.numel()] = tensor.flatten()
        problem.tensors[name] = [roomy[name][: tensor.numel()].view(tensor.shape)]
    problem.run()
    for name, buffer in roomy.items():
        assert (buffer[problem.tensors[name][0].numel() :] == 77).all(), name


def test_a_cpu_batch_ends_within_a_tensor(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("mixft.cpu.optimizer_step.BATCH", 64)
    problem = Problem(
        RULES["adamw"], torch.device("cpu"), [(1000,), (7,), (64,)], torch.float16, None, "split", "codes"
    )
    pieces = served_by(monkeypatch, False, problem)
    monkeypatch.setattr("mixft.cpu.optimizer_step.BATCH", 1 << 20)
    whole = served_by(monkeypatch, False, problem)
    assert_unchanged(pieces, whole)


@pytest.mark.parametrize("state", ["bf16", "codes"])
def test_any_layout(device, state):
    rule = RULES["adamw"]
    params = [
        torch.randn(33, 17, device=device).t(),
        torch.randn(40, 6, device=device)[:, ::2],
        torch.randn(1001, device=device)[1:],
    ]
    problem = Problem(rule, device, [param.shape for param in params], torch.float32, state="fp32")
    flat = Problem(rule, device, [param.shape for param in params], torch.float32, state="fp32")
    for name in ("exp_avgs", "exp_avg_sqs", "grads"):
        flat.tensors[name] = [tensor.clone() for tensor in problem.tensors[name]]
        problem.tensors[name] = [torch.empty_like(p).copy_(t) for p, t in zip(params, flat.tensors[name], strict=True)]
    flat.tensors["params"] = [param.clone().contiguous() for param in params]
    problem.tensors["params"] = params
    if state == "bf16":
        problem.tensors["exp_avgs"] = [tensor.bfloat16() for tensor in problem.tensors["exp_avgs"]]
        problem.tensors["exp_avg_sqs"] = [tensor.bfloat16() for tensor in problem.tensors["exp_avg_sqs"]]
    else:
        from mixft.ops.optimizer_state import quantize_state

        for name, signed in (("exp_avgs", True), ("exp_avg_sqs", False)):
            pairs = [quantize_state(tensor, signed=signed) for tensor in problem.tensors[name]]
            problem.tensors[name] = [codes for codes, _ in pairs]
            problem.tensors[problem.scale_name(name)] = [scales for _, scales in pairs]
    flat.tensors["exp_avgs"], flat.tensors["exp_avg_sqs"] = problem.states()
    problem.run()
    flat.run()
    for actual, expected in zip(problem.tensors["params"], flat.tensors["params"], strict=True):
        assert torch.equal(actual, expected)


def wrong(**changes):
    problem = Problem(RULES["adamw"], torch.device("cpu"), [(33,), (4,)], torch.bfloat16, None, "split", "codes")
    problem.tensors |= changes
    return problem


def bytes_of(*sizes):
    return [torch.zeros(size, dtype=torch.uint8) for size in sizes]


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"exp_avg_scales": []}, {}, ValueError, "exp_avg_scales has 0 tensors"),
        ({"exp_avg_scales": bytes_of(1, 1)}, {}, ValueError, r"exp_avg_scales\[0\] has shape \(1,\)"),
        ({"exp_avg_scales": [torch.zeros(2), torch.zeros(1)]}, {}, TypeError, r"exp_avg_scales\[0\] is torch.float32"),
        ({"exp_avgs": bytes_of(33, 4)}, {}, TypeError, r"exp_avgs\[0\] is torch.uint8"),
        ({"exp_avgs": [torch.zeros(33), torch.zeros(4, dtype=torch.int8)]}, {}, TypeError, "one call for each dtype"),
        ({"exp_avgs": [torch.zeros(33), torch.zeros(4)]}, {}, ValueError, "there must be none"),
        ({"params": [torch.zeros(33), torch.zeros(4)]}, {}, TypeError, "needs no remainder"),
        ({"masters": [torch.zeros(33).half(), torch.zeros(4).half()]}, {}, TypeError, r"masters\[0\] is torch.float16"),
        ({}, {"stochastic_rounding": True}, ValueError, "masters must be empty"),
    ],
)
def test_refusals(changes, options, error, message):
    problem = wrong(**changes)
    before = problem.snapshot()
    with pytest.raises(error, match=message):
        problem.run(**options)
    assert_unchanged(before, problem.tensors)


def test_refusals_of_sgd():
    one, step = [torch.ones(3)], [torch.zeros(())]
    with pytest.raises(ValueError, match="momentum_buffers is empty"):
        sgd_(one, one, [], [], step, lr=torch.tensor(0.1), momentum=0.9)
    with pytest.raises(ValueError, match="nesterov is True"):
        sgd_(one, one, [], one, step, lr=torch.tensor(0.1), nesterov=True)


def test_no_parameters():
    scalars = {"lr": torch.tensor(0.1), "found_inf": torch.tensor(1.0)}
    assert adamw_([], [], [], [], [], [], [], **scalars) is None
    assert sgd_([], [], [], [], [], **scalars, momentum=0.9) is None
    assert lion_([], [], [], [], [], **scalars) is None
    assert [value.item() for value in scalars.values()] == [torch.tensor(0.1).item(), 1.0]


@pytest.mark.parametrize("name", ["sgd_step_", "lion_step_"])
def test_opcheck(device, name):
    rule = RULES["sgd nesterov" if name == "sgd_step_" else "lion"]
    problem = Problem(rule, device, [(17,), (40,)], torch.float16, master="split", state="codes")
    tensors = problem.tensors
    state = rule.lists[0][0]
    lists = [tensors[n] for n in ("params", "grads", "masters", state, problem.scale_name(state), "steps")]
    scalars = [scalar(0.1, device), None, scalar(0.5, device), scalar(0.0, device)]
    rest = [0.9, 0.0, 0.1, True, False, False] if name == "sgd_step_" else [0.9, 0.99, 0.1, False, False]
    torch.library.opcheck(getattr(torch.ops.mixft, name).default, (*lists, *scalars, *rest))
