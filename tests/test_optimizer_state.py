"""Split FP32 weights, 8-bit block-wise codes and the dither: what they hold exactly, and what they lose."""

import pytest
import torch

from mixft.cpu import optimizer_state as on_cpu
from mixft.ops.optimizer_state import dequantize_state, join_master, quantize_state, split_master

HALVES = [torch.float16, torch.bfloat16]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), 65504.0, 65519.9, 3.4028234e38, 1e-45, 2.0**-14, 2.0**-16, 2.0**-24]


def bits_of(tensor):
    return tensor.view(torch.int32)


def all_kinds(device, count=20000):
    """FP32 values of random bits, without NaN, of ordinary sizes, special ones, and ties of both formats."""
    random = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int64).int().view(torch.float32)
    ordinary = torch.randn(count) * 10.0 ** torch.empty(count).uniform_(-8, 4)
    ties = torch.arange(0, 2**16, 7, dtype=torch.int32) << 16
    ties = torch.cat([ties | 0x8000, ties | 0x7FFF, ties | 0x8001, ties | 0x1000]).view(torch.float32)
    values = torch.cat([random, ordinary, ties, torch.tensor(SPECIAL)])
    return values[~values.isnan()].to(device)


def test_a_bf16_split_is_exact_for_every_value(device):
    master = all_kinds(device)
    param, remainder = split_master(master, torch.bfloat16)
    assert torch.equal(bits_of(join_master(param, remainder)), bits_of(master))
    finite = master.abs() < 3e38
    nearest = master.bfloat16()
    is_tie = (bits_of(master) & 0xFFFF) == 0x8000
    assert torch.equal(param[finite & ~is_tie], nearest[finite & ~is_tie])
    assert (param[is_tie & finite].abs() >= nearest[is_tie & finite].abs()).all()


def test_an_fp16_split_is_exact_from_2_to_the_minus_16(device):
    master = all_kinds(device)
    param, remainder = split_master(master, torch.float16)
    assert torch.equal(param.view(torch.int16), master.half().view(torch.int16))
    joined = join_master(param, remainder)
    magnitude = master.abs()
    held = (magnitude >= 2.0**-16) & (magnitude < 65520)
    assert torch.equal(bits_of(joined[held]), bits_of(master[held]))
    small = magnitude < 2.0**-16
    assert ((joined - master)[small].abs() <= 2.0**-40).all()
    assert joined[magnitude >= 65520].isinf().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_every_parameter_joins_with_no_remainder_to_itself(device, dtype):
    param = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype).to(device)
    joined = join_master(param, torch.zeros_like(param, dtype=torch.int16))
    assert torch.equal(joined.nan_to_num(nan=1.0), param.float().nan_to_num(nan=1.0))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_split_joined_and_split_again_joins_to_the_same(device, dtype):
    joined = join_master(*split_master(all_kinds(device), dtype))
    assert torch.equal(bits_of(join_master(*split_master(joined, dtype))), bits_of(joined))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_nan_stays_one_whatever_its_bits(device, dtype):
    patterns = [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000 - 2**31, 0x7FFFFFFF - 2**31]
    master = torch.tensor(patterns, dtype=torch.int64).int().view(torch.float32).to(device)
    param, remainder = split_master(master, dtype)
    assert param.isnan().all()
    assert join_master(param, remainder).isnan().all()


def spread_values(device, signed):
    """Groups of ordinary, tiny, huge, zero and sparse values, and a group that is not whole."""
    values = torch.randn(1000) * 10.0 ** torch.empty(1000).uniform_(-6, 2)
    values[64:96] = 0
    values[96:128] *= 1e-30
    values[128:160] *= 1e30
    values[160:191] = 0
    values[192:224] = 2.0 ** torch.arange(32)
    return (values if signed else values.abs()).to(device)


def largest_of_groups(values):
    padded = torch.nn.functional.pad(values.abs(), (0, -values.numel() % 32)).view(-1, 32)
    return padded.amax(1).repeat_interleave(32)[: values.numel()]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_within_half_a_step(device, signed):
    values = spread_values(device, signed)
    codes, scales = quantize_state(values, signed=signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert (scales.dtype, scales.shape) == (torch.uint8, (32,))
    decoded = dequantize_state(codes, scales)
    largest = largest_of_groups(values)
    in_reach = values.abs() >= largest * 2.0 ** (-14 if signed else -30)
    # Half of an eighth of the octave that the value is in.
    assert ((decoded - values).abs() <= values.abs() / 16)[in_reach].all()
    assert (decoded.abs() <= largest * 2.0 ** (-13.9 if signed else -29.9))[~in_reach].all()


def test_a_second_moment_is_zero_only_where_it_was(device):
    values = spread_values(device, signed=False)
    decoded = dequantize_state(*quantize_state(values, signed=False))
    assert torch.equal(decoded == 0, values == 0)
    out_of_reach = values < largest_of_groups(values) * 2.0**-32
    assert (decoded >= values)[out_of_reach].all()


@pytest.mark.parametrize("signed", [True, False])
def test_decoded_codes_give_the_same_codes(device, signed):
    codes, scales = quantize_state(spread_values(device, signed), signed=signed)
    again, scales_again = quantize_state(dequantize_state(codes, scales), signed=signed)
    assert torch.equal(again, codes)
    assert torch.equal(scales_again, scales)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_decodes_to_a_value_of_its_own(device, signed):
    codes = torch.arange(-127, 128, dtype=torch.int8) if signed else torch.arange(256).to(torch.uint8)
    # The top code in every group, so that the scale holds for all.
    codes = torch.cat([codes.new_full((len(codes), 1), codes[-1].item()), codes[:, None].expand(-1, 31)], 1)
    codes = codes.reshape(-1).to(device)
    scales = torch.full((codes.numel() // 32,), 127, dtype=torch.uint8, device=device)
    decoded = dequantize_state(codes, scales)
    assert (decoded.view(-1, 32)[1:, 1] > decoded.view(-1, 32)[:-1, 1]).all()
    assert decoded.max() == 1.875
    again, scales_again = quantize_state(decoded, signed=signed)
    assert torch.equal(again, codes)
    assert torch.equal(scales_again, scales)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_under_every_scale(device, signed):
    """Those together that no encoder makes too; the formula is that of ``mixft.kernels.optimizer_state``, in int64."""
    kinds = torch.arange(-127, 129).clamp(max=127) if signed else torch.arange(256)
    codes, scales = kinds.repeat(256), torch.arange(256).repeat_interleave(8)
    exponents = scales.repeat_interleave(32)
    bits = (codes.abs() + 8 * exponents - (120 if signed else 248)).clamp(min=1) << 20
    exact = bits.int().view(torch.float32).copysign(codes).where(codes != 0, 0).where(exponents != 255, torch.nan)
    dtype = torch.int8 if signed else torch.uint8
    decoded = dequantize_state(codes.to(device, dtype), scales.to(device, torch.uint8))
    assert torch.equal(decoded.cpu().nan_to_num(nan=-1e39), exact.nan_to_num(nan=-1e39))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_group_with_a_nonfinite_value_is_nan_and_its_neighbours_are_not(device, value):
    values = torch.ones(96, device=device)
    values[40] = value
    decoded = dequantize_state(*quantize_state(values, signed=True))
    assert decoded[32:64].isnan().all()
    assert (decoded[:32] == 1).all()
    assert (decoded[64:] == 1).all()


def hard_groups():
    """Groups in which a rounding to Inf, a NaN with a sign, a denormal or a value beside zeros is a case of its own."""
    nonfinite = [0x7F800000, -0x400000, 0x7FF00001, 0x7FFFFFFF, -1]
    largest = torch.tensor([0x7F7FFFFF, 0x7F780000, *nonfinite, 1, 0x200000, 0x8000000, 0])
    values = torch.zeros(len(largest), 32)
    values[:, 1] = largest.int().view(torch.float32)
    values[:, 2] = -0.0
    values[:, 3:9] = 2.0**-130
    return torch.cat([values.view(-1), -values.view(-1), torch.randn(66)])


@pytest.mark.parametrize("signed", [True, False])
def test_the_kernel_and_the_cpu_routine_give_the_same_codes(monkeypatch, signed):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values, results = hard_groups(), []
    for interpreted in ("1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        codes, scales = quantize_state(values, signed=signed)
        results.append((codes, scales, dequantize_state(codes, scales)))
    for kernel, routine in zip(*results, strict=True):
        torch.testing.assert_close(routine, kernel, rtol=0, atol=0, equal_nan=True)


def test_any_layout_and_an_empty_tensor(device):
    for values in (torch.randn(33, 17, device=device).t(), torch.randn(40, 6, device=device)[:, ::2], torch.ones(0, 3)):
        codes, scales = quantize_state(values, signed=True)
        assert codes.shape == values.shape
        assert codes.stride() == torch.empty_like(values).stride()
        torch.testing.assert_close(dequantize_state(codes, scales), values, rtol=1 / 15, atol=1e-3)
        param, remainder = split_master(values, torch.bfloat16)
        assert torch.equal(join_master(param, remainder), values)
    param, remainder = split_master(torch.randn(5, 7, device=device), torch.float16)
    assert torch.equal(join_master(param.t().contiguous().t(), remainder), join_master(param, remainder)), (
        "the two may differ in layout"
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_has_the_right_mean_and_is_a_neighbour(dtype):
    values = torch.cat([torch.randn(300), torch.randn(300) * 1e-6, torch.tensor([0.0, 65504.0, 1.0])])
    steps = 512
    begin = on_cpu.phases(0, len(values))
    total = torch.zeros(len(values), dtype=torch.float64)
    spacing = (values.abs().to(dtype).view(torch.int16) + 1).view(dtype).double() - values.abs().to(dtype).double()
    for step in range(1, steps + 1):
        offset = (step * on_cpu.PARAMETER + 2**31) % 2**32 - 2**31
        rounded = on_cpu.round_stochastically(values, dtype, begin + offset).double()
        assert ((rounded - values.double()).abs() < spacing).all()
        total += rounded
    # The dither fills the unit interval evenly, so the mean is right to a few parts of the number of steps.
    assert ((total / steps - values.double()).abs() <= 8 / steps * spacing).all()


def test_refusals():
    values = torch.ones(3)
    with pytest.raises(TypeError, match=r"values must be torch\.float32"):
        quantize_state(values.half(), signed=True)
    with pytest.raises(ValueError, match="scales has shape"):
        dequantize_state(torch.ones(33, dtype=torch.int8), torch.ones(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="fill its storage"):
        dequantize_state(torch.ones(4, 6, dtype=torch.int8)[:, ::2], torch.ones(1, dtype=torch.uint8))
    with pytest.raises(TypeError, match="dtype must be"):
        split_master(values, torch.float32)
    with pytest.raises(TypeError, match=r"remainder must be torch\.int16"):
        join_master(values.half(), values)
    with pytest.raises(ValueError, match="remainder has shape"):
        join_master(values.half(), torch.ones(4, dtype=torch.int16))


def test_opcheck(device):
    values = torch.randn(5, 17, device=device)
    codes, scales = quantize_state(values, signed=False)
    param, remainder = split_master(values, torch.float16)
    for op, arguments in (
        ("encode_state", (values, True)),
        ("decode_state", (codes, scales)),
        ("split_weights", (values, torch.bfloat16)),
        ("join_weights", (param, remainder)),
    ):
        torch.library.opcheck(getattr(torch.ops.mixft, op).default, arguments)
