"""Masters whole, split and none, and state in FP32, BF16 and 8 bits: values, conversions, bytes."""

import re
from pathlib import Path

import pytest
import torch
from optimizer_cases import (
    STORAGES,
    bits,
    copies,
    every_optimizer,
    every_storage,
    give_gradients,
    members,
    mixed_parameters,
    parameters,
    run_beside,
    through_a_file,
    weight,
)

from mixft.ops.optimizer_state import quantize_state
from mixft.optim import SGD, AdamW
from mixft.optim.storage import Storage

SIXTEEN_BITS = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def device(native_device):
    return native_device


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@every_optimizer
def test_split_masters_are_fp32_masters(device, case, dtype):
    params = parameters(device, dtype)
    whole = case.ours(params, **case.options)
    split = case.ours(copies(params), **case.options, master_weights="split")
    run_beside(whole, [split], 4)
    for param, twin in zip(params, members(split), strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(weight(whole, param), weight(split, twin))
        else:
            # A master below 2^-16 is kept to 2^-40.
            torch.testing.assert_close(weight(whole, param), weight(split, twin), rtol=0, atol=2.0**-36)
        assert split.state[twin]["master"].dtype == torch.int16


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@every_optimizer
def test_a_change_by_hand_stays_with_split_masters(device, case, dtype):
    param = torch.nn.Parameter(torch.randn(200, device=device).to(dtype))
    optimizer = case.ours([param], lr=2.0**-9, master_weights="split")
    give_gradients([param])
    optimizer.step()
    by_hand = torch.where(torch.arange(200, device=device) % 2 == 0, 0.0, torch.randn(200, device=device)).to(dtype)
    param.data.copy_(by_hand)
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(param.detach(), by_hand, rtol=2.0**-7, atol=1e-7)


def test_a_split_master_may_change_its_dtype(device):
    param = torch.nn.Parameter(torch.randn(17, device=device).half())
    optimizer = AdamW([param], lr=2.0**-7, master_weights="split")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float16):
        param.data = param.data.to(dtype)
        before = param.detach().float()
        give_gradients([param])
        optimizer.step()
        assert ("master" in optimizer.state[param]) == (dtype != torch.float32)
        torch.testing.assert_close(param.detach().float(), before, rtol=2.0**-7, atol=2.0**-5)


@every_storage
@every_optimizer
def test_a_state_dictionary_is_fp32_and_goes_into_every_other_storage(device, case, storage):
    params = mixed_parameters(device)
    first = case.ours(params, **case.options, **storage)
    run_beside(first, [], 2)
    saved = through_a_file(first.state_dict())
    names = set(first.state_names(first.param_groups[0]))
    has_masters = first.master_weights != "none"
    for position, param in enumerate(params):
        master = {"master"} if has_masters and param.dtype != torch.float32 else set()
        state = saved["state"][position]
        assert state.keys() == {"step"} | names | master
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert {value.shape for name, value in state.items() if name != "step"} == {param.shape}
    for other in STORAGES.values():
        second = case.ours(copies(params), **other)
        second.load_state_dict(saved)
        for position, (param, twin) in enumerate(zip(params, members(second), strict=True)):
            if second.master_weights == "none" or not has_masters:
                assert torch.equal(weight(second, twin).to(twin.dtype), param)
            else:
                torch.testing.assert_close(weight(second, twin), weight(first, param), rtol=0, atol=2.0**-40)
            loaded = second.state_dict()["state"][position]
            for name in names:
                # Three mantissa bits, and an absolute floor in a group of values.
                exact = second.state_dtype in (first.state_dtype, torch.float32)
                close = {"rtol": 0, "atol": 0} if exact else {"rtol": 2.0**-4, "atol": 2.0**-16}
                torch.testing.assert_close(loaded[name], saved["state"][position][name], **close)


def test_a_step_count_put_elsewhere_from_outside_comes_to_the_parameter():
    """As ``ZeroRedundancyOptimizer.load_state_dict`` leaves it, for a parameter on a GPU."""
    param = torch.nn.Parameter(torch.empty(3, device="meta"))
    state = {"step": torch.tensor(2.0), "exp_avg": torch.empty(3, device="meta")}
    AdamW([param]).storage.complete(param, state, ("exp_avg",))
    assert state["step"].device == param.device


def test_momentum_put_into_the_state_from_outside_goes_on(device):
    """As ``ZeroRedundancyOptimizer.load_state_dict`` does, with what ``torch.optim.SGD`` saved: it counts no steps."""
    theirs = parameters(device)
    reference = torch.optim.SGD(theirs, lr=2.0**-5, momentum=0.9)
    give_gradients(theirs)
    reference.step()
    ours = copies(theirs)
    optimizer = SGD(ours, lr=2.0**-5, momentum=0.9)
    for param, twin in zip(theirs, ours, strict=True):
        optimizer.state[twin] = {"momentum_buffer": reference.state[param]["momentum_buffer"].clone()}
    run_beside(reference, [optimizer], 2)
    for param, twin in zip(theirs, ours, strict=True):
        torch.testing.assert_close(twin, param, rtol=1e-6, atol=1e-6)


@every_storage
@every_optimizer
def test_every_storage_follows_fp32(device, case, storage):
    """Eight steps downhill a quadratic end where FP32 storage ends, to the precision of the storage."""
    target = torch.linspace(-1, 1, 66, device=device)
    params = [torch.nn.Parameter(torch.zeros(66, device=device, dtype=torch.bfloat16)) for _ in range(2)]
    exact = case.ours([params[0]], lr=2.0**-5)
    ours = case.ours([params[1]], lr=2.0**-5, **storage)
    for _ in range(8):
        for param in params:
            param.grad = (param.detach().float() - target).to(param.dtype)
        exact.step()
        ours.step()
    torch.testing.assert_close(params[1].float(), params[0].float(), rtol=2.0**-5, atol=2.0**-5)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_split_int8_adamw_takes_six_bytes_and_a_half_a_parameter(device, dtype):
    params = parameters(device, dtype, [(1000, 40), (1024,), (31,)])
    optimizer = AdamW(params, master_weights="split", state_dtype=torch.int8)
    give_gradients(params)
    optimizer.step()
    elements = sum(param.numel() for param in params)
    held = sum(value.nbytes for param in params for value in (param, *optimizer.state[param].values()))
    assert held / elements <= 6.5
    report = optimizer.memory_report()
    assert report.elements == elements
    assert report.parameters + report.optimizer == held
    assert report.bytes_per_parameter == held / elements
    assert report.gradients == 2 * elements


def test_an_optimizer_is_shown_with_all_of_its_options():
    text = repr(AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.25, max_grad_norm=0.5, master_weights="split"))
    assert text.startswith("AdamW (\nParameter Group 0\n")
    assert text.endswith("\n)")
    for line in ("lr: 0.25", "max_grad_norm: 0.5", "master_weights: split", "state_dtype: torch.float32"):
        assert f"    {line}\n" in text


def test_the_memory_report_tells_everything_apart(device):
    params = [*parameters(device, torch.float16, [(64,)]), *parameters(device, torch.float32, [(36,)])]
    optimizer = AdamW(params, amsgrad=True)
    empty = optimizer.memory_report()
    assert (empty.parameters, empty.optimizer, empty.gradients) == (64 * 2 + 36 * 4, 0, 0)
    assert "100 parameters have no state yet" in str(empty)
    give_gradients(params)
    optimizer.step()
    report = optimizer.memory_report()
    assert report.masters == 64 * 4
    assert report.remainders == report.scales == 0
    assert report.state == dict.fromkeys(["exp_avg", "exp_avg_sq", "max_exp_avg_sq"], 400)
    assert report.steps == 8
    assert report.gradients == 64 * 2 + 36 * 4
    lines = str(report).splitlines()
    assert lines[0] == "100 parameters"
    assert [line.split()[0] for line in lines[1:6]] == ["parameters", "masters", *list(report.state)[:3]]
    assert lines[2].endswith("2.560 bytes a parameter")
    assert "17.36" in lines[-2]
    assert report.without_state == 0


def readme_rows():
    """The memory table of the README: the options in each row, and its figures."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    rows = re.findall(r"^\| `AdamW\((.*)\)` \| ([\d. |]+) \|$", text, flags=re.MULTILINE)
    return [(options, figures.split(" | ")) for options, figures in rows]


@pytest.mark.parametrize(("options", "figures"), readme_rows())
def test_the_readme_s_memory_table_is_what_the_report_says(options, figures):
    named = dict(pair.split("=") for pair in options.split(", ") if pair)
    values = {"torch.bfloat16": torch.bfloat16, "torch.int8": torch.int8, "True": True}
    params = parameters("cpu", torch.bfloat16, [(1024, 256)])
    optimizer = AdamW(params, **{name: values.get(value, value.strip('"')) for name, value in named.items()})
    give_gradients(params)
    optimizer.step()
    report = optimizer.memory_report()
    moments = sum(report.state.values()) + report.scales
    sizes = (report.parameters, report.masters + report.remainders, moments, report.parameters + report.optimizer)
    assert [f"{size / report.elements:.2f}" for size in sizes] == figures


def test_the_readme_s_memory_table_has_rows():
    assert len(readme_rows()) == 5


def test_8_bit_state_follows_a_new_layout(device):
    param = torch.nn.Parameter(torch.randn(2, 40, 5, 3, device=device))
    optimizer = AdamW([param], state_dtype=torch.int8)
    give_gradients([param])
    optimizer.step()
    before = optimizer.state_dict()["state"][0]
    param.data = param.data.to(memory_format=torch.channels_last)
    param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    after = optimizer.state_dict()["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[param][name].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(after[name], before[name], rtol=2.0**-4, atol=2.0**-16)
    assert bits(after["step"]) == bits(before["step"])


@pytest.mark.parametrize("signed", [True, False])
def test_new_8_bit_state_is_quantized_zeros(signed):
    param = torch.randn(7, 33).t()
    made: dict = {}
    Storage("none", torch.int8, {"exp_avg": signed}).complete(param, made, ["exp_avg"])
    codes, scales = quantize_state(torch.zeros_like(param), signed=signed)
    assert torch.equal(made["exp_avg"], codes)
    assert made["exp_avg"].dtype == codes.dtype
    assert made["exp_avg"].stride() == codes.stride()
    assert torch.equal(made["exp_avg_scale"], scales)
    assert made["exp_avg_scale"].dtype == scales.dtype


@pytest.mark.parametrize("storage", [{}, {"master_weights": "split"}], ids=["fp32", "split"])
def test_state_put_back_in_16_bits_is_widened_and_masters_made_anew(device, storage):
    param = torch.nn.Parameter(torch.randn(300, device=device).bfloat16())
    optimizer = AdamW([param], lr=0.1, **storage)
    give_gradients([param])
    optimizer.step()
    state, kept = optimizer.state[param], param.detach().clone()
    for name in state:
        state[name] = state[name].to(torch.bfloat16)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(param, kept)
    assert state["exp_avg"].dtype == torch.float32
    assert state["master"].dtype == (torch.int16 if storage else torch.float32)
    assert torch.equal(weight(optimizer, param), kept.float())
