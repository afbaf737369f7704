"""int8 quantize and dequantize: values against FP64, rounding, special values, layouts, statistics of the noise."""

import pytest
import torch
from conftest import SERVERS

from mixft.cpu import native
from mixft.cpu.quantize import quantize as cpu_quantize
from mixft.cpu.quantize import rounding_noise
from mixft.kernels.quantize_tiles import QuantizeConfig
from mixft.ops.dequantize import _dequantize, dequantize
from mixft.ops.quantize import _quantize, quantize

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
SMALLEST_SCALE = 2.0**-126
# What an FP32 product with a rounded inverse may miss of an exact quotient below 256.
QUOTIENT_ERROR = 2.0**-15

SHAPES = [
    ((1,), -1),
    ((17,), 0),
    ((3, 129), 1),
    ((66, 1000), -1),
    ((66, 100), 0),
    ((66, 100), None),
    ((3, 5, 7), 0),
    ((3, 5, 7), 1),
    ((3, 5, 7), -1),
    ((3, 5, 7), None),
    ((300, 70), 0),
    ((2, 1100, 65), 1),
    ((20001,), 0),
    ((2, 16385), 1),
    ((70000,), None),
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def reduced(x, dim, how):
    """``how`` ("amax" or "amin") of the FP64 ``x`` with the reduced dimension kept."""
    return getattr(x, how)(tuple(range(x.dim())) if dim is None else dim, keepdim=True)


def check(x, dim, symmetric):
    """Hold the quantization of finite ``x`` to the formulas, evaluated in FP64."""
    values, scale, zero_point = quantize(x, dim=dim, symmetric=symmetric)
    exact = x.double()
    high, low = reduced(exact, dim, "amax").clamp(min=0), reduced(exact, dim, "amin").clamp(max=0)
    span = torch.maximum(high, -low) / 127 if symmetric else (high - low) / 255
    assert values.shape == x.shape
    assert values.dtype == torch.int8
    assert values.is_contiguous()
    assert scale.dtype == torch.float32
    assert scale.shape == span.shape
    torch.testing.assert_close(scale.double(), span.clamp(min=SMALLEST_SCALE), rtol=1e-6, atol=0.0)
    quotient = exact / scale.double()
    if symmetric:
        assert zero_point is None
    else:
        assert zero_point.dtype == torch.int32
        assert zero_point.shape == scale.shape
        wanted = -128 - low / scale.double()
        assert ((zero_point - wanted).abs() <= 0.5 + QUOTIENT_ERROR).all()
        quotient = (quotient + zero_point).clamp(-128, 127)
    assert ((values - quotient).abs() <= 0.5 + QUOTIENT_ERROR).all()
    restored = dequantize(values, scale, zero_point, dim=dim).double()
    # A range whose zero point was rounded may end half a step outside of what int8 can hold.
    steps = 0.5 if symmetric else 1.0
    assert ((restored - exact).abs() <= (steps + 2 * QUOTIENT_ERROR) * scale).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_values(device, shape, dim, dtype, symmetric):
    check((torch.randn(shape, device=device) * 3 + 1).to(dtype), dim, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[1:, 1:],
        lambda x: x.flatten()[1:-2].view(-1, 11),
        lambda x: x[:1].expand(5, -1),
        lambda x: x.view(10, -1, 7).permute(2, 0, 1),
    ],
    ids=["transposed", "strided", "offset", "misaligned", "expanded", "permuted"],
)
def test_layouts(device, view, dim, symmetric):
    x = view(torch.randn(30, 21, device=device))
    check(x, dim, symmetric)
    for other, expected in zip(quantize(x, dim=dim), quantize(x.contiguous(), dim=dim), strict=True):
        assert other is expected is None or torch.equal(other, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "dim", "size"), [((5, 96), -1, 32), ((60, 9), 0, 20), ((2, 12, 5), 1, 3), ((8,), 0, 1)]
)
def test_groups_are_quantized_on_their_own(device, shape, dim, size, symmetric):
    x = torch.randn(shape, device=device)
    values, scale, zero_point = quantize(x, dim=dim, group_size=size, symmetric=symmetric)
    restored = dequantize(values, scale, zero_point, dim=dim, group_size=size)
    assert scale.shape[dim] == shape[dim] // size
    for index in range(shape[dim] // size):
        part = x.narrow(dim, index * size, size)
        alone = quantize(part, dim=dim, symmetric=symmetric)
        assert torch.equal(values.narrow(dim, index * size, size), alone[0])
        assert torch.equal(scale.narrow(dim, index, 1), alone[1])
        assert symmetric or torch.equal(zero_point.narrow(dim, index, 1), alone[2])
        assert torch.equal(restored.narrow(dim, index * size, size), dequantize(*alone, dim=dim))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exponent", [-3, 0, 4])
def test_ties_go_to_even(device, dtype, exponent):
    halves = torch.arange(-63, 64, 2, device=device) / 2
    x = torch.cat([halves, torch.tensor([127.0], device=device)]).mul(2.0**exponent).to(dtype)
    values, scale, _ = quantize(x)
    assert scale.item() == 2.0**exponent
    assert torch.equal(values[:-1].double(), halves.double().round())


@pytest.mark.skipif(not native.available(), reason="needs the compiled routines")
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernel_and_the_compiled_routine_round_alike_near_ties(monkeypatch, symmetric):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    high = torch.rand(20, 1) * 10.0 ** torch.linspace(-38, 37, 20)[:, None]
    x = torch.cat([torch.arange(-253, 254, 2) / 254 * high, high], 1)
    for along in (x.unsqueeze(-1), x.t().contiguous().unsqueeze(0)):
        results = []
        for interpreted in ("1", "0"):
            monkeypatch.setenv("TRITON_INTERPRET", interpreted)
            results.append(_quantize(along, symmetric, None))
        assert all(map(torch.equal, *results))


def test_affine_ties_go_to_even(device):
    x = torch.arange(511, device=device) / 2
    values, scale, zero_point = quantize(x, symmetric=False)
    assert scale.item() == 1.0
    assert zero_point.item() == -128
    assert torch.equal(values.double(), (x.double() - 128).round())


def test_affine_range_that_would_round_past_the_top(device):
    # Z = round(-128 + 127.5) = 0, so that the largest element falls on 127.5, which rounds to 128.
    values, scale, zero_point = quantize(torch.tensor([-127.5, 0.0, 127.5], device=device), symmetric=False)
    assert scale.item() == 1.0
    assert zero_point.item() == 0
    assert values.tolist() == [-128, 0, 127]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_zeros(device, dim, symmetric):
    x = torch.zeros(3, 40, device=device)
    values, scale, zero_point = quantize(x, dim=dim, symmetric=symmetric)
    assert (scale == SMALLEST_SCALE).all()
    assert (values == (0 if symmetric else zero_point)).all()
    assert torch.equal(dequantize(values, scale, zero_point, dim=dim), x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("largest", [2.0**-149, 1e-42, 1e-38, 1e-36, 2e-36, 1e-30, 1e30, 3.3e38])
def test_extreme_magnitudes(device, largest, symmetric):
    # The last span, 6.6e38, is beyond FP32; the rows themselves, restored with half a step to spare, are within.
    x = torch.linspace(-1, 1, 255, dtype=torch.float64, device=device).mul(largest).float()
    check(torch.stack([x, x.flip(0)]), -1, symmetric)
    check(torch.stack([x, x.flip(0)], 1), 0, symmetric)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [((4, 30), 1), ((30, 4), 0), ((20001,), None)])
def test_nonfinite_values_saturate(device, shape, dim, stochastic, dtype):
    clean = torch.randint(-127, 128, shape, device=device).to(dtype)
    clean.flatten()[-3:] = 127
    clean.flatten()[:3] = 0
    x = clean.clone()
    x.flatten()[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for symmetric, lowest in ((True, -127), (False, -128)):
        options = {"dim": dim, "symmetric": symmetric}
        values, scale, zero_point = quantize(x, stochastic=stochastic, **options)
        expected, expected_scale, expected_zero = quantize(clean, **options)
        assert torch.equal(scale, expected_scale)
        zero = 0 if symmetric else expected_zero.flatten()[0].item()
        assert symmetric or torch.equal(zero_point, expected_zero)
        assert values.flatten()[:3].tolist() == [zero, 127, lowest]
        if not stochastic:
            assert torch.equal(values.flatten()[3:], expected.flatten()[3:])


def test_a_group_without_a_finite_value(device):
    x = torch.tensor([[float("nan")] * 3, [float("inf"), float("-inf"), float("nan")]], device=device)
    values, scale, _ = quantize(x)
    assert (scale == SMALLEST_SCALE).all()
    assert values.tolist() == [[0, 0, 0], [127, -127, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nonfinite_values_raise_on_request(device, bad, dtype):
    x = torch.ones(3, 5, dtype=dtype, device=device) * torch.finfo(dtype).max
    x[0, 0] *= -1
    assert (quantize(x, nonfinite="error")[0].abs() == 127).all()
    x[1, 2] = bad
    with pytest.raises(ValueError, match="x holds NaN or infinity"):
        quantize(x, nonfinite="error")


def fractions(shape, device):
    """Values with scale 1 (each row or column holds a 127), fractions uniform, and their FP64 copy."""
    x = torch.rand(shape, device=device) * 200 - 100
    x[:1] = 127
    x[:, :1] = 127
    return x, x.double()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [((64, 512), 1), ((64, 512), 0), ((600, 80), 0), ((64, 512), None)])
def test_stochastic_rounding_is_unbiased_and_uncorrelated(device, shape, dim, symmetric):
    x, exact = fractions(shape, device)
    values, scale, zero_point = quantize(x, dim=dim, symmetric=symmetric, stochastic=True)
    quotient = exact / scale + (0 if symmetric else zero_point)
    assert ((values - quotient).abs() < 1 + QUOTIENT_ERROR).all()
    error = values - quotient
    inner = error[1:, 1:]
    fraction = (quotient - quotient.floor())[1:, 1:]
    # The rounding error of a fraction f has mean 0 and variance f (1 - f); six standard deviations, or 1 in 5e8.
    sigma = (fraction * (1 - fraction)).sum().sqrt().item()
    assert abs(inner.sum().item()) <= 6 * sigma + inner.numel() * 2.0**-15
    # Weighted by f itself: rounding at a fixed threshold, or with noise of another width, would show here.
    weight = fraction - 0.5
    sigma = (weight.square() * fraction * (1 - fraction)).sum().sqrt().item()
    assert abs((inner * weight).sum().item()) <= 6 * sigma
    power = inner.square().mean().item()
    for dimension in (0, 1):
        for lag in (1, 2, 4, 8, 16, 60, 64, 256):
            length = inner.shape[dimension] - lag
            if length > 0:
                product = inner.narrow(dimension, lag, length) * inner.narrow(dimension, 0, length)
                assert abs(product.mean().item()) <= 6 * power / product.numel() ** 0.5


def test_stochastic_rounding_keeps_representable_values(device):
    x = torch.arange(-127, 129, device=device).clamp(max=127).repeat(40, 1) * 0.5
    values, scale, _ = quantize(x, stochastic=True)
    assert torch.equal(values, (x * 2).to(torch.int8))
    assert (scale == 0.5).all()
    whole = torch.arange(256, device=device).repeat(40, 1).float()
    values, _, zero_point = quantize(whole, symmetric=False, stochastic=True)
    assert torch.equal(values - zero_point, whole.int())


def philox_words(counter, group, seed):
    """Four random words of Philox 4x32 of seven rounds, in Python's integers."""
    a, b, c, d = counter, group % 2**32, group >> 32, 0
    first_key, second_key = seed % 2**32, seed >> 32
    for _ in range(7):
        even, odd = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (odd >> 32) ^ b ^ first_key, odd % 2**32, (even >> 32) ^ d ^ second_key, even % 2**32
        first_key, second_key = (first_key + 0x9E3779B9) % 2**32, (second_key + 0xBB67AE85) % 2**32
    return a, b, c, d


def noise_of(group, position, seed):
    a, b, c, d = philox_words(position // 8, group, seed)
    word = (a, c, b, d)[position % 4]
    bits = word >> 16 if position % 8 > 3 else word % 2**16
    return (bits | 1) / 2**16 - 0.5


# Without compiled routines the CPU draws other numbers.
@pytest.mark.parametrize(
    "device",
    [server for server in SERVERS if server != "torch" and (server != "cpu" or native.available())],
    indirect=True,
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 21, 1), (2, 19, 3), (1, 17, 18)])
def test_the_random_numbers_are_those_documented(device, shape, symmetric):
    outer, n, inner = shape
    seed = 0x123456789ABCDEF
    x = torch.randn(shape, device=device)
    values, scale, zero_point = _quantize(x, symmetric, torch.tensor(seed, device=device))
    quotient = x.double() / scale + (0 if symmetric else zero_point)
    quotient = quotient.clamp(-127 if symmetric else -128, 127).cpu()
    noise = [[[noise_of(o * inner + i, j, seed) for i in range(inner)] for j in range(n)] for o in range(outer)]
    shifted = quotient + torch.tensor(noise, dtype=torch.float64)
    assert ((values.cpu() - shifted).abs() <= 0.5 + QUOTIENT_ERROR).all()


@pytest.mark.parametrize("shape", [(1, 140001, 1), (3, 40001, 1), (1, 4101, 33)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_number_of_threads_changes_nothing(without_interpreter, one_thread, shape, symmetric):
    x, seed = torch.randn(shape) + 1, torch.tensor(3)
    expected = _quantize(x, symmetric, seed)
    torch.set_num_threads(2)
    assert all(map(torch.equal, _quantize(x, symmetric, seed), expected))


def test_noise_of_torchs_operators_stays_within_a_half():
    # In units of 2^-16. A million draws of 16 bits meet each number about 16 times, so a whole half would be met too.
    noise = rounding_noise(torch.Size([1000, 1003]), torch.Generator().manual_seed(1))
    assert noise.min() == -32767
    assert noise.max() == 32767
    assert abs(noise.double().mean().item()) < 6 * 2**16 / 12**0.5 / noise.numel() ** 0.5


def test_stochastic_rounding_follows_the_generator(device):
    x, _ = fractions((9, 100), device)
    torch.manual_seed(7)
    first, second = quantize(x, stochastic=True)[0], quantize(x, stochastic=True)[0]
    torch.manual_seed(7)
    assert torch.equal(quantize(x, stochastic=True)[0], first)
    assert torch.equal(quantize(x, stochastic=True)[0], second)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    quantize(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 77), 1), ((77, 5), 0), ((2, 700, 66), 1), ((2, 3, 4), None), ((), None)]
)
def test_dequantize(device, shape, dim, dtype):
    values = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    scale = torch.rand_like(reduced(values.double(), dim, "amax")).float()
    zero_point = torch.randint_like(scale, -128, 128).to(torch.int32)
    for zero in (None, zero_point):
        exact = (values.double() - (0 if zero is None else zero)) * scale.double()
        actual = dequantize(values, scale, zero, dim=dim, dtype=dtype)
        assert actual.dtype == dtype
        assert actual.shape == values.shape
        assert torch.equal(actual, exact.float().to(dtype))


def test_dequantize_of_views(device):
    values = torch.randint(-128, 128, (12, 10), dtype=torch.int8, device=device).t()
    scale = torch.rand(12, 20, device=device)[:, ::2].t()[:, :1]
    expected = values.double() * scale.double()
    assert torch.equal(dequantize(values, scale), expected.float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_gradient_to_the_input_and_one_to_the_scale(device, symmetric):
    x = torch.randn(4, 12, device=device, requires_grad=True)
    values, scale, zero_point = quantize(x, group_size=4, symmetric=symmetric)
    assert not scale.requires_grad
    scale.requires_grad_()
    weight = torch.randn(4, 12, device=device)
    (dequantize(values, scale, zero_point, group_size=4) * weight).sum().backward()
    steps = values.double() - (0 if symmetric else zero_point.repeat_interleave(4, 1))
    exact = (steps * weight.double()).view(4, 3, 4).sum(-1)
    torch.testing.assert_close(scale.grad.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 2)])
@pytest.mark.parametrize("dim", [0, -1, None])
def test_empty(device, shape, dim, symmetric):
    values, scale, zero_point = quantize(
        torch.empty(shape, device=device), dim=dim, symmetric=symmetric, stochastic=True
    )
    expected = [1] * len(shape)
    if dim is not None:
        expected = list(shape)
        expected[dim] = 1
    assert values.shape == shape
    assert list(scale.shape) == expected
    assert (scale == SMALLEST_SCALE).all()
    assert symmetric or (zero_point == -128).all()
    assert dequantize(values, scale, zero_point, dim=dim).shape == shape


def test_scalar(device):
    values, scale, _ = quantize(torch.tensor(-2.0, device=device))
    assert (values.item(), scale.shape) == (-127, ())
    torch.testing.assert_close(dequantize(values, scale).item(), -2.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "dim"), [((40, 100), 1), ((40, 100), 0), ((300, 70), 0), ((4000,), None)])
def test_every_server_gives_the_same_bits(device, shape, dim, dtype):
    x = torch.randn(shape).to(dtype)
    layout = {None: (1, -1, 1), 0: (1, *shape), 1: (*shape, 1)}[dim]
    expected, expected_scale, _ = cpu_quantize(x.view(layout), True, None)
    values, scale, _ = quantize(x.to(device), dim=dim)
    assert torch.equal(scale.cpu().flatten(), expected_scale.flatten())
    assert torch.equal(values.cpu().flatten(), expected.flatten())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 130), 1), ((2500,), None), ((230, 11), 0), ((3, 150, 9), 1), ((40, 5), 1), ((5, 40), 0)]
)
def test_many_tiles_a_program_and_many_pieces(device, monkeypatch, shape, dim, symmetric):
    tiny = QuantizeConfig(elements=256, resident=64, columns=8, elements_per_thread=16, programs=3)
    monkeypatch.setattr("mixft.kernels.quantize.configuration", lambda *_: tiny)
    monkeypatch.setattr("mixft.cpu.quantize.PIECE", 50)
    x = torch.randn(shape, device=device) * torch.linspace(1, 4, shape[-1], device=device)
    for sample in (x, x.flip(0), x.flip(-1)):
        check(sample, dim, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", [None, 5])
def test_opcheck(device, symmetric, seed):
    x = torch.randn(3, 10, 4, device=device)
    seed = None if seed is None else torch.tensor(seed, device=device)
    torch.library.opcheck(_quantize, (x, symmetric, seed))
    values, scale, zero_point = _quantize(x, symmetric, seed)
    scale.requires_grad_()
    torch.library.opcheck(_dequantize, (values, scale, None if symmetric else zero_point, torch.float16))


@pytest.mark.parametrize("stochastic", [True, False])
def test_compiled(device, stochastic):
    def restored(x):
        values, scale, zero_point = quantize(x, dim=0, group_size=4, symmetric=False, stochastic=stochastic)
        return values, dequantize(values, scale, zero_point, dim=0, group_size=4, dtype=x.dtype)

    compiled = torch.compile(restored, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (8, 12):
        x = torch.randn(rows, 6, device=device)
        torch.manual_seed(3)
        expected = restored(x)
        torch.manual_seed(3)
        for actual, wanted in zip(compiled(x), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.float64)}, TypeError, "x must be .* it is torch.float64"),
        ({"dim": 2}, IndexError, "dim must be None or from -2 to 1"),
        ({"group_size": 4}, ValueError, "group_size must divide dimension 1 of size 6; it is 4"),
        ({"group_size": 0}, ValueError, "group_size must divide dimension 1 of size 6; it is 0"),
        ({"group_size": 2, "dim": None}, ValueError, "group_size needs a dim"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be .* 'ignore'"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(**{"x": torch.ones(2, 6)} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": torch.ones(2, 6)}, TypeError, "values must be torch.int8"),
        ({"scale": torch.ones(2, 1).half()}, TypeError, "scale must be torch.float32"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have shape \(2, 1\); it has shape \(2,\)"),
        ({"dim": 0}, ValueError, r"scale must have shape \(1, 6\)"),
        ({"group_size": 3}, ValueError, r"scale must have shape \(2, 2\)"),
        ({"zero_point": torch.ones(2, 1)}, TypeError, "zero_point must be torch.int32"),
        ({"zero_point": torch.ones(1, 1).int()}, ValueError, "zero_point must have shape"),
        ({"dtype": torch.float64}, TypeError, "^dtype must be"),
        ({"scale": torch.ones(2, 1, device="meta")}, ValueError, "one device"),
    ],
)
def test_dequantize_refused(arguments, error, message):
    valid = {"values": torch.ones(2, 6, dtype=torch.int8), "scale": torch.ones(2, 1)}
    with pytest.raises(error, match=message):
        dequantize(**valid | arguments)
