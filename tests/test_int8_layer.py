"""The compiled int8 layer: exact sums at every edge of its tiles, whatever the threads, and who is served by it."""

import pytest
import torch

from mixft.cli.serving import served_by
from mixft.cpu import int8_layer as compiled
from mixft.cpu import native
from mixft.cpu import packed_weight as packing
from mixft.cpu.activation import ACTIVATIONS
from mixft.cpu.dynamic_int8_linear import dynamic_int8_linear as on_cpu
from mixft.cpu.int8_layer import int8_layer, serves
from mixft.cpu.quantize import quantize
from mixft.cpu.static_int8_linear import static_bytes
from mixft.ops import dynamic_int8_linear

SHAPES = [(1, 1, 1), (3, 66, 17), (11, 4, 33), (12, 128, 64), (25, 1001, 70), (13, 4099, 40), (70, 1001, 70)]

# With few the weight is read as it lies, with many it is packed; which are few depends on the processor.
NUMBERS_OF_ROWS = (*range(1, 25), *range(61, 78))

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_compiled_layer = pytest.mark.skipif(not native.available(), reason="needs the compiled routines")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def integers(M, K):
    """FP32 integers whose rows are their own quantization."""
    x = torch.randint(-127, 128, (M, K)).float()
    x[:, 0] = 127
    return x


@needs_compiled_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sums_are_exact(shape):
    M, K, N = shape
    x, weight = integers(M, K), int8(N, K)
    x[0], weight[0] = -127, -128
    found = int8_layer(x, weight, torch.ones(N, 1), None, "none")
    assert torch.equal(found, (x.double() @ weight.double().t()).float())


@needs_compiled_layer
def test_sums_whose_unsigned_products_pass_int32_are_exact():
    K = 100_000
    x, weight = torch.full((2, K), 127.0), torch.full((2, K), 127, dtype=torch.int8)
    x[1] = -127
    exact = (x.double() @ weight.double().t()).float()
    assert torch.equal(int8_layer(x, weight, torch.ones(2, 1), None, "none"), exact)


@needs_compiled_layer
@pytest.mark.parametrize(("M", "K"), [(14, 2100), (70, 210)])
@pytest.mark.parametrize("zero_point", [0, -37, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_static_rows_are_those_of_torch(M, K, dtype, zero_point):
    N = 35
    x, weight = (torch.randn(M, K) * 3).to(dtype), int8(N, K)
    x[2, 5], x[3, 1], x[4, 7] = torch.inf, -torch.inf, torch.nan
    scale, sums = 0.0173, weight.sum(1, dtype=torch.int32)
    found = int8_layer(x.float(), weight, torch.ones(N, 1), None, "none", scale, zero_point, sums)
    steps = static_bytes(x, scale, zero_point, torch.int8).double() - zero_point
    exact = steps @ weight.double().t() * torch.tensor(scale).double()
    assert (found - exact).abs().max() <= 2**-22 * exact.abs().max()
    half = int8_layer(x, weight, torch.ones(N, 1), None, "none", scale, zero_point, sums)
    assert torch.equal(half, found.to(dtype))


@needs_compiled_layer
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_the_epilogue(activation, bias_dtype):
    M, K, N = 5, 40, 49
    x, weight, scale = integers(M, K), int8(N, K), torch.rand(N, 1)
    bias = None if bias_dtype is None else torch.randn(N).mul(1e4).to(bias_dtype)
    exact = x.double() @ weight.double().t() * scale.double().t() + (0 if bias is None else bias.double())
    exact = ACTIVATIONS[activation](exact)
    found = int8_layer(x, weight, scale, bias, activation)
    assert (found - exact).abs().max() <= 2**-22 * exact.abs().max()


@needs_compiled_layer
@pytest.mark.parametrize(("K", "N"), [(70, 33), (64, 35), (15, 3), (272, 96)])
def test_every_number_of_rows_is_exact(K, N):
    weight, scale = int8(N, K), torch.ones(N, 1)
    for M in NUMBERS_OF_ROWS:
        x = integers(M, K)
        assert torch.equal(int8_layer(x, weight, scale, None, "none"), x @ weight.float().t())


@needs_compiled_layer
def test_rows_are_rounded_as_the_quantizer_rounds_them():
    """To the last bit of what is near a tie, over all magnitudes; an identity as the weight shows the values."""
    high = torch.rand(40, 1) * 10.0 ** torch.linspace(-38, 37, 40)[:, None]
    x = torch.cat([torch.arange(-253, 254, 2) / 254 * high, high], 1)
    x[0], x[1] = 0, 1e-42
    values, scale, _ = quantize(x.unsqueeze(-1), True, None, None, True)
    found = int8_layer(x, torch.eye(x.shape[1]).to(torch.int8), torch.ones(x.shape[1], 1), None, "none")
    assert torch.equal(found, (values * scale).squeeze(-1))


@needs_compiled_layer
@pytest.mark.parametrize("served_elsewhere", [False, True])
@pytest.mark.parametrize("N", [5, 32, 77])
def test_the_activation_is_that_of_the_whole_sum(N, served_elsewhere, monkeypatch):
    x, weight, scale, bias = integers(7, 40), int8(N, 40), torch.rand(N, 1) / 1000, torch.randn(N)
    left, right = torch.randn(7, 3), torch.randn(3, N)
    exact = x.double() @ (weight.double() * scale).t() + bias + left.double() @ right.double()
    monkeypatch.setattr(compiled, "has_amx", lambda: served_elsewhere)
    found = on_cpu(x.repeat(6, 1), weight, scale, bias, "gelu", left.repeat(6, 1), right)[:7]
    assert (found - ACTIVATIONS["gelu"](exact)).abs().max() <= 2**-20 * exact.abs().max()


@needs_compiled_layer
@pytest.mark.parametrize("M", [14, 70])
def test_nothing_is_written_beyond_the_output(M, monkeypatch):
    K, N = 70, 37
    memory = torch.full((M * N + 64,), 7.0)
    empty = torch.empty

    def within(*shape, dtype, device):
        return memory[: M * N].view(M, N) if shape == ((M, N),) else empty(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", within)
    weight = int8(N, K)
    assert int8_layer(torch.randn(M, K), weight, torch.ones(N, 1), None, "none").data_ptr() == memory.data_ptr()
    assert memory[M * N :].eq(7).all()


@needs_compiled_layer
def test_the_bits_do_not_depend_on_the_threads(one_thread):
    # More threads than weight too, and products large enough for more than one.
    for M, K, N in ((40, 500, 70), (100, 500, 70), (3, 3000, 200)):
        x, weight, scale, bias = torch.randn(M, K), int8(N, K), torch.rand(N, 1), torch.randn(N)
        torch.set_num_threads(1)
        alone = int8_layer(x, weight, scale, bias, "none")
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(int8_layer(x, weight, scale, bias, "none"), alone)


@needs_compiled_layer
def test_a_row_does_not_depend_on_those_beside_it():
    x, weight, scale = torch.randn(90, 130), int8(40, 130), torch.rand(40, 1)
    whole = int8_layer(x, weight, scale, None, "none")
    assert torch.equal(int8_layer(x[20:50], weight, scale, None, "none"), whole[20:50])
    for row in (0, 12, 29, 89):
        assert torch.equal(int8_layer(x[row : row + 1], weight, scale, None, "none"), whole[row : row + 1])


@needs_compiled_layer
def test_an_input_larger_than_the_memory_that_is_kept(monkeypatch):
    x, weight, scale = torch.randn(30, 130), int8(40, 130), torch.rand(40, 1)
    expected = int8_layer(x, weight, scale, None, "none")
    monkeypatch.setattr(native, "SCRATCH", 1)
    assert torch.equal(int8_layer(x, weight, scale, None, "none"), expected)


@needs_compiled_layer
@pytest.mark.parametrize("rows", [1, 30, 80])
def test_no_second_copy_of_a_weight_is_kept(rows):
    """A change that torch does not count would leave a copy behind, and the largest models have no room for one."""
    weight, scale, x = int8(40, 130), torch.rand(40, 1), torch.randn(rows, 130)
    before = dynamic_int8_linear(x, weight, scale)
    weight.numpy()[:] = -weight.clamp(min=-127).numpy()
    assert torch.equal(dynamic_int8_linear(x, weight, scale), dynamic_int8_linear(x, weight.clone(), scale))
    assert not torch.equal(dynamic_int8_linear(x, weight, scale), before)
    assert id(weight) not in packing._packed


@needs_compiled_layer
@pytest.mark.parametrize("layout", ["strided", "inference"])
def test_weights_of_other_layouts(layout):
    with torch.inference_mode(layout == "inference"):
        weight = int8(40, 130) if layout == "inference" else int8(130, 40).t()
        x, scale = torch.randn(5, 130), torch.rand(40, 1)
        expected = dynamic_int8_linear(x, weight.contiguous().clone(), scale)
        assert torch.equal(dynamic_int8_linear(x, weight, scale), expected)
        weight.neg_()
        assert torch.equal(dynamic_int8_linear(x, weight, scale), dynamic_int8_linear(x, weight.clone(), scale))


@needs_compiled_layer
def test_its_products_pass_their_own_check():
    assert serves(1)


@needs_compiled_layer
def test_who_is_served(monkeypatch):
    assert served_by("dynamic_int8_linear", torch.float32, torch.device("cpu")) == "CPU, compiled int8 product"
    assert served_by("weight_only_matmul", torch.float32, torch.device("cpu")) == "CPU, compiled product"
    monkeypatch.setattr(compiled, "has_amx", lambda: True)
    assert serves(compiled.AMX_ROWS - 1)
    assert not serves(compiled.AMX_ROWS)
    monkeypatch.setattr(native, "available", lambda: False)
    assert not serves(1)


@needs_compiled_layer
def test_inexact_products_are_not_used(monkeypatch):
    monkeypatch.setattr(compiled, "int8_layer", lambda x, weight, *rest: int8_layer(x, weight.clamp(min=-127), *rest))
    compiled._matches_exact_products.cache_clear()
    assert not serves(1)
    monkeypatch.undo()
    compiled._matches_exact_products.cache_clear()
    assert serves(1)
