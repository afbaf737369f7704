"""The benchmarks' core: an unchecked output is never timed, nobody vanishes, and figures are what they are called."""

import contextlib
import json
import statistics
from dataclasses import replace

import pytest
import torch

from mixft.benchmarks import recording, run, timing
from mixft.benchmarks.case import Call, Case, Missing, Refused, compiled, complaint, each
from mixft.benchmarks.growth import slopes
from mixft.benchmarks.machine import Machine, measure_machine
from mixft.benchmarks.recording import Recording, Row, Sweep
from mixft.benchmarks.run import failed, run_case
from mixft.benchmarks.timing import Effort, take_turns

CPU = torch.device("cpu")
MACHINE = Machine(1e9, 5e8, {"fp32": 1e12, "fp16": 1e11, "int8": 4e12})
EFFORT = Effort(rounds=3, seconds=1.0, compiles=False, memory=False)


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**10)


def toy(ours=lambda x: [2 * x], peer=lambda x: [x + x], **options) -> Case:
    providers = {"mixft": each(ours), "torch": each(peer)} | options.pop("more", {})
    return Case(
        "toy/5",
        inputs=lambda device: torch.arange(5.0, device=device),
        exact=lambda x: [2 * x.double()],
        providers=providers,
        **{"bound": 1e-6, "bytes": 40} | options,
    )


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ([torch.tensor([0.0, 2.0, 4.0, 6.0, 8.1])], "error 1.3e-02"),
        ([torch.tensor([0.0, 2.0, 4.0, 6.0, float("nan")])], "error nan"),
        ([torch.zeros(4)], "shape"),
        ([], "0 results"),
    ],
)
def test_a_wrong_output_is_said(output, said):
    exact = [torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0]).double()]
    assert said in complaint(output, exact, 1e-6)
    assert complaint(exact, exact, 0.0) is None


def test_a_wrong_provider_gets_no_time_and_the_others_do():
    rows = run_case(toy(peer=lambda x: [2.1 * x]), CPU, EFFORT, MACHINE)
    ours, peer = rows
    assert (ours.status, peer.status) == ("timed", "wrong")
    assert ours.seconds > 0
    assert "error" in peer.reason
    assert peer.seconds is peer.speedup is peer.floor_fraction is None
    assert failed(rows)
    wrong, torch_s = run_case(toy(ours=lambda x: [2.1 * x]), CPU, EFFORT, MACHINE)
    assert wrong.status == "wrong"
    assert torch_s.seconds > 0
    assert torch_s.speedup is None


def test_a_provider_may_have_a_bound_of_its_own():
    case = toy(peer=lambda x: [2.1 * x])
    assert run_case(replace(case, own_bounds={"torch": 0.2}), CPU, EFFORT, MACHINE)[1].status == "timed"
    assert run_case(replace(case, own_bounds={"mixft": 0.2}), CPU, EFFORT, MACHINE)[1].status == "wrong"


def test_who_is_missing_or_refuses_has_a_row_that_says_why():
    def missing(x):
        raise Missing("absent is not installed")

    def refuses(x):
        raise Refused("only rows of 16")

    def breaks(x):
        raise RuntimeError("no kernel\nat all")

    case = toy(more={"absent": missing, "picky": refuses, "broken": each(breaks), "torch.compile": compiled(torch.neg)})
    rows = run_case(case, CPU, EFFORT, MACHINE)
    assert [(row.provider, row.status, row.reason) for row in rows[2:]] == [
        ("absent", "missing", "absent is not installed"),
        ("picky", "refused", "only rows of 16"),
        ("broken", "refused", "RuntimeError: no kernel"),
        ("torch.compile", "refused", "takes seconds to compile: left out of quick runs"),
    ]
    assert not failed(rows)


def test_a_provider_that_breaks_the_gpu_ends_the_run(monkeypatch):
    def breaks(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def wait(device):
        raise RuntimeError(f"{device} is gone")

    monkeypatch.setattr(run, "wait", wait)
    with pytest.raises(RuntimeError, match="cpu is gone"):
        run_case(toy(more={"broken": each(breaks)}), CPU, EFFORT, MACHINE)


def test_a_provider_that_fails_only_when_it_is_timed_does_not_end_the_run():
    def prepare(x):
        calls = iter([[2 * x]])

        def run():
            for result in calls:
                return result
            raise RuntimeError("out of memory")

        return Call(run)

    rows = run_case(toy(more={"greedy": prepare}), CPU, EFFORT, MACHINE)
    assert [(row.status, row.reason) for row in rows] == [
        ("timed", None),
        ("timed", None),
        ("refused", "RuntimeError: out of memory"),
    ]


@pytest.mark.parametrize("calls", [2, 5, 8])
def test_a_provider_that_fails_in_a_later_round_does_not_end_the_run(monkeypatch, calls):
    monkeypatch.setattr(timing, "MOST_REPEATS", 1)

    def prepare(x):
        left = iter(range(calls))

        def run():
            if next(left, None) is None:
                raise RuntimeError("out of memory")
            return [2 * x]

        return Call(run)

    case = toy(more={"greedy": prepare})
    rows = run_case(case, CPU, replace(EFFORT, rounds=9, fewest_rounds=9), MACHINE)
    assert [(row.provider, row.status) for row in rows] == [
        ("mixft", "timed"),
        ("torch", "timed"),
        ("greedy", "refused"),
    ]
    assert rows[2].reason == "RuntimeError: out of memory"
    ours = run_case(replace(case, providers={"mixft": prepare, "torch": case.providers["torch"]}), CPU, EFFORT, MACHINE)
    if calls == 2:
        assert (ours[0].status, ours[1].status, ours[1].speedup) == ("refused", "timed", None)


@pytest.mark.parametrize("part", ["inputs", "exact"])
def test_a_case_whose_inputs_cannot_be_made_does_not_end_the_run(part):
    def fails(_):
        raise ModuleNotFoundError("No module named 'transformers'")

    rows = run_case(replace(toy(), **{part: fails}), CPU, EFFORT, MACHINE)
    said = "no inputs: ModuleNotFoundError: No module named 'transformers'"
    assert [(row.provider, row.status, row.reason) for row in rows] == [
        ("mixft", "refused", said),
        ("torch", "refused", said),
    ]


def test_memory_that_cannot_be_measured_leaves_the_time(monkeypatch):
    def measure(case, provider, device):
        if provider == "torch":
            raise RuntimeError("the process was ended")
        return {"peak": 7}

    monkeypatch.setattr(run, "measure_memory", measure)
    ours, peer = run_case(toy(memory=True), CPU, replace(EFFORT, memory=True), MACHINE)
    assert (ours.memory, ours.reason) == ({"peak": 7}, None)
    assert (peer.memory, peer.reason) == (None, "memory not measured: RuntimeError: the process was ended")
    assert peer.status == "timed"


def test_a_case_too_large_for_the_memory_is_refused():
    rows = run_case(toy(needs=10**18), CPU, EFFORT, MACHINE)
    assert {row.status for row in rows} == {"refused"}
    assert "needs 1000000000 GB of memory" in rows[0].reason


def test_the_figures_of_a_row_agree(monkeypatch):
    samples = {"mixft": [1.0, 2.0, 4.0], "torch": [2.0, 6.0, 4.0]}
    monkeypatch.setattr(run, "take_turns", lambda samplers, effort, tolerated: (samples, {}))
    case = toy(bytes=2_000_000_000, operations=3_000_000_000_000, rate="fp32", sweep=Sweep("toy", "rows", 5))
    ours, peer = run_case(case, CPU, EFFORT, MACHINE)
    assert (ours.seconds, ours.seconds_low, ours.seconds_high) == (2.0, 1.5, 3.0)
    assert ours.host_seconds == 2.0
    assert ours.speedup == ours.speedup_low == ours.speedup_high == 1
    # Ratios within the rounds: 2, 3, 1.
    assert (peer.speedup, peer.speedup_low, peer.speedup_high) == (2.0, 1.5, 2.5)
    assert peer.floor_seconds == pytest.approx(3)
    assert peer.floor_fraction == pytest.approx(3 / 4)
    assert peer.sweep == Sweep("toy", "rows", 5)


def test_the_floor_is_the_longer_of_traffic_and_arithmetic():
    assert MACHINE.floor_seconds(2_000_000_000) == pytest.approx(2)
    assert MACHINE.floor_seconds(1, 3_000_000_000_000, "fp32") == pytest.approx(3)
    # This machine multiplies FP16 slower than FP32, so FP32 is what FP16 is held against.
    assert MACHINE.floor_seconds(1, 3_000_000_000_000, "fp16") == pytest.approx(3)
    assert MACHINE.floor_seconds(1, 8_000_000_000_000, "int8") == pytest.approx(2)
    # A CPU reads what a copy overwrites, so work in place can move more than a copy.
    assert replace(MACHINE, update_bytes_per_second=2e9).floor_seconds(2_000_000_000) == pytest.approx(1)


def test_rounds_are_interleaved():
    order, times = [], iter([1.0, 10.0, 20.0, 2.0, 9.0, 30.0])
    samplers = {name: lambda name=name: (order.append(name), next(times))[1] for name in "ab"}
    samples, failures = take_turns(samplers, EFFORT)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [1.0, 2.0, 9.0], "b": [10.0, 20.0, 30.0]}
    assert not failures


def test_rounds_end_when_the_time_is_up():
    samples, _ = take_turns({"a": lambda: 1.0}, Effort(rounds=1000, seconds=0.0, fewest_rounds=5))
    assert samples == {"a": [1.0] * 5}


def test_the_caches_are_cleared_before_every_call_and_outside_of_its_time(monkeypatch):
    events = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: events.append("clock") or len(events))
    flush = type("Flush", (), {"add_": lambda self, value: events.append("flush")})()
    monkeypatch.setattr(timing, "_flush_buffer", lambda device: flush)
    timing._cpu_clock(lambda: events.append("call"))()
    assert events == ["flush", "clock", "call", "clock"]
    events.clear()
    timing._cpu_clock(lambda: events.append("call"), lambda: events.append("other data"))()
    assert events == ["flush", "other data", "clock", "call", "clock"]


@pytest.mark.parametrize(("size", "rehearsed"), [(2**9, True), (2**10, False)])
def test_a_call_is_rehearsed_on_inputs_of_its_own_where_they_leave_the_caches_room(size, rehearsed):
    seen = []
    case = toy(ours=lambda x: seen.append(x.data_ptr()) or [2 * x], bytes=size)
    run_case(case, CPU, EFFORT, MACHINE)
    assert len(set(seen)) == (2 if rehearsed else 1)


def test_a_gpu_is_kept_waiting_while_the_host_queues_the_call(monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            events.append("record")

        def synchronize(self):
            events.append("wait")

        def elapsed_time(self, other):
            return 3.0

    flush = type("Flush", (), {"add_": lambda self, value: events.append("flush")})()
    monkeypatch.setattr(timing, "_flush_buffer", lambda device: flush)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(events.append(f"on {device}")))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append(f"sleep {cycles}"))
    monkeypatch.setattr(timing, "_sleep_rate", lambda device: 1e6)
    monkeypatch.setattr(timing, "host_seconds", lambda call, device, rounds: 0.25)
    clock = timing._gpu_clock(lambda: events.append("call"), torch.device("cuda:1"))
    assert clock() == pytest.approx(3e-3)
    assert events == ["call", "flush", "on cuda:1", "sleep 500000", "record", "call", "record", "wait"]


def test_quartiles_of_few_values():
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.ratios([2.0, 8.0], [1.0, 2.0])[1] == statistics.median([2.0, 4.0])


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr("mixft.benchmarks.machine.STREAM_BYTES", 2**20)
    monkeypatch.setitem(measure_machine.__globals__["MATMUL_SIZE"], "cpu", 64)
    machine = measure_machine(CPU, EFFORT)
    assert machine.copy_bytes_per_second > 1e7
    assert machine.read_bytes_per_second > 1e7
    assert machine.update_bytes_per_second > 1e7
    assert set(machine.matmul_operations_per_second) == {"fp32", "fp16", "bf16", "int8"}
    assert min(machine.matmul_operations_per_second.values()) > 1e6


def test_a_recording_comes_back_from_its_file(tmp_path):
    rows = [Row("toy/5", "toy", "mixft", "timed", seconds=1.0, sweep=Sweep("toy", "rows", 5), memory={"peak": 3})]
    whole = Recording({"torch": "2"}, MACHINE, 0.5, 31, False, rows)
    file = tmp_path / "results.json"
    whole.write(file)
    assert recording.read(file) == whole
    assert json.loads(file.read_text())["format"] == 1
    file.write_text(json.dumps({"results": []}))
    with pytest.raises(ValueError, match="format None"):
        recording.read(file)


def test_the_slope_of_a_series():
    def row(provider, value, seconds, status="timed"):
        return Row(f"s/{value}", "s", provider, status, seconds=seconds, sweep=Sweep("step", "parameters", value))

    rows = [row("mixft", value, 2e-9 * value) for value in (10**4, 10**5, 10**6)]
    rows += [row("torch", value, 3e-9 * value**0.5) for value in (10**4, 10**5, 10**6)]
    rows += [row("few", 10**4, 1.0), row("few", 10**5, 2.0), row("few", 10**6, None, "refused")]
    fitted = slopes(rows)[("step", "parameters")]
    assert fitted == {"mixft": pytest.approx(1.0), "torch": pytest.approx(0.5)}


def test_a_call_may_return_something_else_than_its_result():
    call = Call(lambda: (torch.ones(2), 3), result=lambda returned: [returned[0] * returned[1]])
    assert torch.equal(call.checked_result()[0], torch.full((2,), 3.0))
