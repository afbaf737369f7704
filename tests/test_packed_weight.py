"""Packed int8 weights on a CPU: exact products, rows as bytes, and a cache that never serves a weight that was."""

import copy
import gc
import pickle

import pytest
import torch
from conftest import assert_within_budget

from mixft.cpu import int8_layer, native
from mixft.cpu import packed_weight as packing
from mixft.cpu.instruction_set import has_int8_dot
from mixft.cpu.packed_weight import PackedWeight, packed_product, packed_product_is_exact, packed_weight
from mixft.cpu.unsigned_rows import unsigned_limbs, unsigned_rows
from mixft.nn import QuantLinear
from mixft.ops import dynamic_int8_linear, weight_only_matmul

needs_vnni = pytest.mark.skipif(not has_int8_dot(), reason="needs a CPU with VNNI")


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def on_the_cpu(request, monkeypatch):
    """With the compiled routines, and as where they are not built: oneDNN serves then."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@needs_vnni
def test_packed_products_pass_their_own_check():
    assert packed_product_is_exact()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype):
    torch.set_default_dtype(dtype)
    try:
        for works in (packed_product_is_exact, int8_layer._matches_exact_products):
            assert works.__wrapped__() == works()
    finally:
        torch.set_default_dtype(torch.float32)


@needs_vnni
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 66, 17), (17, 1000, 33), (2, 2080, 5)])
def test_packed_products(shape, exact):
    M, K, N = shape
    unsigned, weight, scale = torch.randint(0, 256, (M, K), dtype=torch.uint8), int8(N, K), torch.rand(N, 1) / 100
    unsigned[0], weight[0] = 255, 127
    product = (unsigned.double() - 128) @ weight.double().t() * scale.double().t()
    out = packed_product(unsigned, PackedWeight(weight), scale, exact=exact)
    # Without exactness the sum of u w, K 255 127 at the most, is what FP32 rounds.
    size = product.abs().max().item() if exact else K * 255 * 127 * scale.max().item()
    assert (out - product).abs().max().item() <= 2**-22 * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 17), (66, 1000), (70, 1001), (3, 0)])
@pytest.mark.parametrize("compiled", [True, False])
def test_rows_as_bytes(monkeypatch, shape, dtype, compiled):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    x = torch.randn(shape).to(dtype) * 3
    values, scale = unsigned_rows(x) if x.numel() else (torch.empty(shape, dtype=torch.uint8), torch.ones(3, 1))
    assert values.dtype == torch.uint8
    assert ((values.double() - 128) * scale - x.double()).abs().le(0.5001 * scale).all()
    assert values.numel() == 0 or values.int().sub(128).abs().amax(1).eq(127).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite(bad):
    x = torch.randn(3, 70)
    x[1, 60] = bad
    assert unsigned_rows(x)[1].isfinite().flatten().tolist() == [True, False, True]


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5]])
    assert unsigned_rows(x)[0].int().sub(128).tolist() == [[127, 0, 2, 0, -2]]


def restored(limbs, scale):
    q = limbs.double() - 128
    return (q[0] + q[1] / 256 + q[2] / 65536) * scale.double()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-3, 1.0, 1e30, 3.4e38])
def test_limbs_hold_24_bits(magnitude):
    x = torch.randn(17, 333).clamp(-1, 1) * magnitude
    x[0] = torch.linspace(0.99, 1, 333) * magnitude
    x[1] = -x[0]
    limbs, scale = unsigned_limbs(x)
    bound = (2**-22 * x.abs().amax(1, keepdim=True).double()).clamp(min=2.0**-124)
    assert ((restored(limbs, scale) - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_limbs_of_16_bit_numbers_are_exact(dtype):
    x = torch.cat([torch.randn(40), 2.0 ** -torch.arange(12)]).to(dtype).double().clamp(-1, 1)
    x = torch.where(x.abs() < 2**-12, 1, x)[None].to(dtype)
    assert torch.equal(restored(*unsigned_limbs(x)), x.double())


@needs_vnni
def test_a_weight_is_packed_once_and_again_when_it_changes():
    weight = int8(40, 64)
    first = packed_weight(weight)
    assert packed_weight(weight) is first
    weight[3, 4] += 1
    assert packed_weight(weight) is not first
    assert packed_weight(weight.clone()) is not packed_weight(weight)
    assert packed_weight(weight[:, ::2]) is None


@needs_vnni
def test_sums_over_a_weight_make_no_wide_copy_of_it():
    """64 bits a number would be eight times the weight, of the largest layer while all others are in memory."""
    weight = int8(2048, 1024)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sums = PackedWeight(weight).column_sums
    assert torch.equal(sums, weight.double().sum(1))
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) <= weight.nbytes


def test_the_packed_copy_dies_with_its_weight():
    gc.collect()
    before = len(packing._packed)
    weight = int8(40, 64)
    assert packing.kept(weight) is not None
    assert len(packing._packed) == before + 1
    del weight
    assert len(packing._packed) == before


def layer_and_input(mode):
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 48), mode).requires_grad_(False)
    x = torch.randn(5, 64)
    return layer, x, layer(x)


def reference(layer, x):
    """The layer in FP64 on its own tensors; exact up to the quantization of ``x``."""
    return x.double() @ (layer.weight.double() * layer.weight_scale.double()).t() + layer.bias.double()


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.neg_(),
        lambda layer: layer.weight.mul_(0),
        lambda layer: layer.weight_scale.mul_(2),
        lambda layer: layer.bias.add_(3),
        lambda layer: layer.load_state_dict(QuantLinear.from_linear(torch.nn.Linear(64, 48), layer.mode).state_dict()),
        lambda layer: layer.load_state_dict(
            QuantLinear.from_linear(torch.nn.Linear(64, 48), layer.mode).state_dict(), assign=True
        ),
        lambda layer: setattr(layer, "weight", -layer.weight),
        lambda layer: setattr(layer, "weight_scale", layer.weight_scale * 3),
    ],
    ids=["in place", "zeroed", "scale", "bias", "load_state_dict", "assign", "new weight", "new scale"],
)
def test_a_change_after_the_first_call_is_seen(mode, change):
    layer, x, before = layer_and_input(mode)
    change(layer)
    after = layer(x)
    assert not torch.equal(after, before)
    exact = reference(layer, x)
    assert (after - exact).abs().max() <= 0.02 * max(exact.abs().max().item(), 1.0)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("name", ["weight", "weight_scale"])
def test_another_tensor_at_the_same_address_is_seen(name, mode, rows):
    layer, _, _ = layer_and_input(mode)
    x, tensor = torch.randn(rows, 64), getattr(layer, name)
    memory = bytearray(tensor.nbytes)

    def placed(values):
        """``values`` in a new storage at the address of the last one, as an allocator gives memory that was freed."""
        return torch.frombuffer(memory, dtype=values.dtype).view(values.shape).copy_(values)

    tensor.data = placed(tensor.clone())
    before = layer(x)
    tensor.data = placed(tensor.neg())
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - before)


@needs_vnni
def test_no_other_storage_takes_the_identity_of_one_that_was_packed():
    weight, scale = int8(40, 64), torch.empty_strided((40, 1), (2, 1)).fill_(0.5)
    packed = packed_weight(weight)
    packed.column_terms(scale)
    for tensor in (weight, scale):
        identity = tensor.untyped_storage()._cdata
        tensor.data = torch.empty(0, dtype=tensor.dtype)
        others = [torch.empty(1) for _ in range(1000)]
        assert identity not in {other.untyped_storage()._cdata for other in others}
    # The weight's memory is free to go.
    assert packed.storage.expired()


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_weight_that_is_turned_over_is_seen(mode):
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 64), mode).requires_grad_(False)
    x = torch.randn(5, 64)
    layer(x)
    layer.weight.data = layer.weight.data.t()
    exact = reference(layer, x)
    assert (layer(x) - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_copies_of_a_layer_that_was_called(mode):
    layer, x, expected = layer_and_input(mode)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer), layer.to("cpu")):
        assert torch.equal(twin(x), expected)
    twin = copy.deepcopy(layer)
    twin.weight.neg_()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_changes_of_inference_tensors_are_seen(mode):
    with torch.inference_mode():
        layer, x, before = layer_and_input(mode)
        layer.weight.neg_()
        layer.bias.neg_()
        torch.testing.assert_close(layer(x), -before)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_without_packed_weights_the_values_are_the_same(monkeypatch, mode, rows):
    layer, x, _ = layer_and_input(mode)
    x = x[:rows]
    found = layer(x)
    monkeypatch.setattr(packing, "packed_product_is_exact", lambda: False)
    packing._packed.clear()
    torch.testing.assert_close(layer(x), found, rtol=1e-5, atol=1e-5)


@needs_vnni
def test_weight_only_in_pieces_of_rows(monkeypatch):
    weight, scale, x = int8(24, 40), torch.rand(24), torch.randn(37, 40)
    whole = weight_only_matmul(x, weight, scale)
    monkeypatch.setattr("mixft.cpu.int8_matmul.PIECE", 1)
    assert torch.equal(weight_only_matmul(x, weight, scale), whole)


def test_weight_only_takes_rows_with_nan_or_infinity_as_torch_does():
    weight, scale = int8(24, 40), torch.rand(24)
    x = torch.randn(4, 40)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    expected = x @ (weight * scale[:, None]).t()
    torch.testing.assert_close(weight_only_matmul(x, weight, scale), expected, equal_nan=True, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("M", [1, 3])
def test_weight_only_of_one_large_activation_among_small_ones(M):
    """Fixed point: every element to within 2^-22 of the largest."""
    weight, scale = int8(24, 300), torch.rand(24)
    x = torch.randn(M, 300)
    x[:, 7] = 1000.0
    exact = x.double() @ (weight.double() * scale.double()[:, None]).t()
    out = weight_only_matmul(x, weight, scale)
    bound = 2**-22 * 1000 * (weight.double().abs().sum(1) * scale).max() + 2**-22 * exact.abs().max()
    assert (out - exact).abs().max() <= bound
    assert_within_budget(out, exact, exact.float(), 2**-18)


@pytest.mark.parametrize("M", [1, 2])
def test_a_weight_too_large_for_the_row_product(M):
    linear = torch.nn.Linear(1200, 900)
    weight, x = QuantLinear.from_linear(linear, "dynamic"), torch.randn(M, 1200)
    with torch.no_grad():
        y = dynamic_int8_linear(x, weight.weight, weight.weight_scale, linear.bias)
        assert (y - linear(x)).norm() <= 0.02 * linear(x).norm()
