"""``mixft bench``: an unchecked output is never timed, and the registry's cases are what they say."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

from mixft.benchmarks import registry, timing
from mixft.benchmarks.case import Case, Workload, complaint
from mixft.benchmarks.registry import CASES
from mixft.benchmarks.run import run_case
from mixft.benchmarks.timing import Machine, interleaved_medians
from mixft.cli import main
from mixft.cli.bench import select

CPU = torch.device("cpu")
MACHINE = Machine(copy_bytes_per_second=1e9, matmul_operations_per_second=1e12)


@pytest.fixture(autouse=True)
def cpu_routines(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-5)


def toy(ours=lambda x: 2 * x, peer=lambda x: x + x) -> Case:
    def build(device):
        x = torch.arange(5.0)
        return Workload({"mixft": lambda: [ours(x)], "torch": lambda: [peer(x)]}, [2 * x.double()], 1e-6, 40)

    return Case("toy/5", build)


@pytest.fixture
def one_case(monkeypatch):
    """A registry of one small case, on a machine that is not measured."""

    def use(case: Case) -> None:
        monkeypatch.setattr(registry, "CASES", (case,))
        monkeypatch.setattr(timing, "measure_machine", lambda device, rounds: MACHINE)

    return use


def test_every_case_has_its_own_name():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def family(case: Case) -> str:
    return case.name.split("/")[0]


MULTI_TENSOR = [case for case in CASES if family(case) in ("adamw", "grad_stats", "unscale")]
OTHERS = [case for case in CASES if case not in MULTI_TENSOR and "4096x4096" not in case.name]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_the_providers_of_a_case_do_the_same_work(case):
    check(case)


@pytest.mark.parametrize("case", MULTI_TENSOR, ids=lambda case: case.name)
def test_the_providers_of_a_multi_tensor_case_do_the_same_work(monkeypatch, case):
    monkeypatch.setattr(registry, "BERT", [(300, 7), (1000,), (1,)])
    check(case)


def check(case: Case) -> None:
    torch.manual_seed(0)
    workload = case.build(CPU)
    assert tuple(workload.providers) == ("mixft", *case.peers)
    for name, call in workload.providers.items():
        assert complaint(call(), workload, name) is None, name


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
    assert said in complaint(output, toy().build(CPU), "mixft")


def test_a_provider_may_have_a_bound_of_its_own():
    workload = replace(toy().build(CPU), own_bounds={"torch": 0.02})
    output = [torch.tensor([0.0, 2.0, 4.0, 6.0, 8.1])]
    assert complaint(output, workload, "torch") is None
    assert "bound 1.0e-06" in complaint(output, workload, "mixft")


def test_a_wrong_provider_gets_no_time_and_the_others_do():
    ours, peer = run_case(toy(peer=lambda x: 2.1 * x), CPU, 3, MACHINE)
    assert ours.complaint is None
    assert ours.seconds > 0
    assert "error" in peer.complaint
    assert peer.seconds is peer.speedup is peer.floor_fraction is None
    wrong, torch_s = run_case(toy(ours=lambda x: 2.1 * x), CPU, 3, MACHINE)
    assert wrong.seconds is None
    assert torch_s.seconds > 0
    assert torch_s.speedup is None


def test_the_figures_of_a_result_agree():
    ours, peer = run_case(toy(), CPU, 3, MACHINE)
    assert ours.speedup == 1
    assert peer.speedup == pytest.approx(peer.seconds / ours.seconds)
    assert ours.floor_fraction == pytest.approx(40e-9 / ours.seconds)


def test_the_floor_is_the_longer_of_traffic_and_arithmetic():
    assert MACHINE.floor_seconds(2_000_000_000, 0) == pytest.approx(2)
    assert MACHINE.floor_seconds(1, 3_000_000_000_000) == pytest.approx(3)


def test_rounds_are_interleaved_and_the_median_is_taken(monkeypatch):
    order, clock = [], iter([1.0, 10.0, 20.0, 2.0, 9.0, 30.0])
    monkeypatch.setattr(timing, "_repeats", lambda call: 1)
    monkeypatch.setattr(timing, "_cpu_clock", lambda call, repeats: (call(), next(clock))[1])
    medians = interleaved_medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert medians == {"a": statistics.median([1.0, 2.0, 9.0]), "b": statistics.median([10.0, 20.0, 30.0])}


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr(timing, "COPY_BYTES", 2**20)
    machine = timing.measure_machine(CPU, 1)
    assert machine.copy_bytes_per_second > 1e8
    assert machine.matmul_operations_per_second > 1e8


def test_the_table_and_the_file(one_case, tmp_path, capsys):
    one_case(toy())
    file = tmp_path / "results.json"
    assert main(["bench", "toy", "--quick", "--device", "cpu", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "copy 1.0 GB/s" in out
    assert "toy/5" in out
    report = json.loads(file.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert report["machine"] == {"copy_bytes_per_second": 1e9, "matmul_operations_per_second": 1e12}
    assert [row["provider"] for row in report["results"]] == ["mixft", "torch"]
    assert all(row["seconds"] > 0 for row in report["results"])


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (1000.0, True)])
def test_a_busy_machine_is_said(one_case, monkeypatch, capsys, load, warned):
    one_case(toy())
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    assert main(["bench", "--quick", "--device", "cpu"]) == 0
    assert ("keeps this machine busy" in capsys.readouterr().out) == warned


def test_a_wrong_output_is_exit_code_1(one_case, tmp_path, capsys):
    one_case(toy(ours=lambda x: 3 * x))
    file = tmp_path / "results.json"
    assert main(["bench", "--quick", "--device", "cpu", "--json", str(file)]) == 1
    assert "WRONG: error 5.0e-01" in " ".join(capsys.readouterr().out.split())
    assert json.loads(file.read_text())["results"][0]["seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such_case"], "no case is named 'no_such_case'; there are quant_linear, half_linear"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--json", "/no/such/folder/file.json"], "--json /no/such/folder/file.json cannot be written"),
        (["--json", "."], "--json . cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_cases_are_chosen_by_name_family_or_pattern():
    names = ["linear/1", "linear/16", "adamw/fp32"]
    assert select(names, ["linear"]) == {"linear/1", "linear/16"}
    assert select(names, ["linear/1", "adamw/*"]) == {"linear/1", "adamw/fp32"}
    assert select(names, ["*"]) == set(names)
