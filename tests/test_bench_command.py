"""``mixft bench``: what is shown, written and refused."""

import json
from dataclasses import replace

import pytest
import torch

from mixft.benchmarks import machine, registry, timing
from mixft.benchmarks.case import Case, Missing, each
from mixft.benchmarks.machine import Machine
from mixft.benchmarks.recording import Row
from mixft.cli import bench_table, main
from mixft.cli.bench import select

MACHINE = Machine(1e9, 5e8, {"fp32": 1e12})


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**10)
    monkeypatch.setattr(machine, "measure_machine", lambda device, effort: MACHINE)


def absent(x):
    raise Missing("absent is not installed")


def toy(ours=lambda x: [2 * x], peer=lambda x: [x + x], **options) -> Case:
    return Case(
        "toy/5",
        inputs=lambda device: torch.arange(5.0, device=device),
        exact=lambda x: [2 * x.double()],
        providers={"mixft": each(ours), "torch": each(peer), "absent": absent},
        **{"bound": 1e-6, "bytes": 40} | options,
    )


@pytest.fixture
def one_case(monkeypatch):
    """A registry of one small case, on a machine that is not measured."""
    return lambda case: monkeypatch.setattr(registry, "CASES", (case,))


def test_the_table_and_the_file(one_case, tmp_path, capsys):
    one_case(toy())
    file = tmp_path / "results.json"
    assert main(["bench", "toy", "--quick", "--device", "cpu", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "copy 1.0 GB/s" in out
    (line,) = [line for line in out.splitlines() if line.startswith("toy/5")]
    assert "torch " in line
    assert "x ±" in line
    assert "no time for absent in toy/5: absent is not installed" in out
    report = json.loads(file.read_text())
    assert report["format"] == 1
    assert report["environment"]["torch"] == torch.__version__
    assert "commit" in report["environment"]
    assert report["machine"]["matmul_operations_per_second"] == {"fp32": 1e12}
    assert report["quick"] is True
    assert [row["provider"] for row in report["rows"]] == ["mixft", "torch", "absent"]
    assert [row["status"] for row in report["rows"]] == ["timed", "timed", "missing"]


def test_cases_run_in_the_order_in_which_they_are_named(monkeypatch, tmp_path):
    """What ``make gpu`` builds on: the first case without a row is the one that ended the process."""
    monkeypatch.setattr(registry, "CASES", tuple(replace(toy(), name=f"toy/{size}") for size in (1, 2, 3)))
    file = tmp_path / "results.json"
    assert main(["bench", "toy/3", "toy/1", "toy/2", "--quick", "--device", "cpu", "--json", str(file)]) == 0
    cases = dict.fromkeys(row["case"] for row in json.loads(file.read_text())["rows"])
    assert list(cases) == ["toy/3", "toy/1", "toy/2"]


def test_the_plot(one_case, tmp_path):
    one_case(toy())
    picture = tmp_path / "ratios.png"
    assert main(["bench", "--quick", "--device", "cpu", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_reason_of_a_slower_row_is_shown_only_where_it_is_slower(one_case, monkeypatch, capsys):
    monkeypatch.setattr("mixft.benchmarks.run.take_turns", lambda samplers, effort, tolerated: (samples, {}))
    one_case(toy(reason_if_slower="it does more"))
    samples = {"mixft": [2.0], "torch": [1.0]}
    assert main(["bench", "--device", "cpu"]) == 0
    assert "slower than a peer in toy/5: it does more" in capsys.readouterr().out
    samples = {"mixft": [1.0], "torch": [1.0]}
    assert main(["bench", "--device", "cpu"]) == 0
    assert "slower than a peer in toy/5: it does more" not in capsys.readouterr().out


def test_the_reason_of_a_slower_row_is_not_that_of_a_revision():
    ours, base = (
        Row("toy/5", "toy", provider, "timed", seconds=1.0, speedup=0.5, speedup_low=0.5, speedup_high=0.5, note=note)
        for provider, note in (("mixft", "it does more"), ("mixft main", None))
    )
    lines = bench_table.remarks([ours, base], "main")
    assert lines == ["faster than mixft main in 0 of 1 cases", "slower than mixft main in 1 of 1 cases: toy/5"]


def test_long_cases_are_left_out_of_quick_runs_unless_named(one_case, capsys):
    one_case(toy(long=True))
    assert main(["bench", "--quick", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "toy/5" not in out
    assert "1 cases that take longer: without --quick" in out
    assert main(["bench", "toy", "--quick", "--device", "cpu"]) == 0
    assert "toy/5" in capsys.readouterr().out


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (1000.0, True)])
def test_a_busy_machine_is_said(one_case, monkeypatch, capsys, load, warned):
    one_case(toy())
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    assert main(["bench", "--quick", "--device", "cpu"]) == 0
    assert ("keeps this machine busy" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_a_wrong_output_is_exit_code_1(one_case, capsys, wrong):
    one_case(toy(**{wrong: lambda x: [3 * x]}))
    assert main(["bench", "--quick", "--device", "cpu"]) == 1
    assert "WRONG: error 5.0e-01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such_case"], "no case is named 'no_such_case'; there are "),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--json", "/no/such/folder/file.json"], "--json /no/such/folder/file.json cannot be written"),
        (["--json", "."], "--json . cannot be written"),
        (["--plot", "/no/such/folder/file.png"], "--plot /no/such/folder/file.png cannot be written"),
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
    assert select(names, ["linear"]) == ["linear/1", "linear/16"]
    assert select(names, ["linear/16", "adamw/*", "linear"]) == ["linear/16", "adamw/fp32", "linear/1"]
    assert select(names, ["*"]) == names


def test_a_case_that_does_not_fit_the_screen_goes_on_below_its_ratios():
    ours = Row("toy/5", "toy", "mixft", "timed", seconds=1e-3, floor_fraction=0.5)
    ratio = {"seconds": 2e-3, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1}
    others = [Row("toy/5", "toy", f"peer {number}", "timed", **ratio) for number in range(6)]
    lines = str(bench_table.case_line([ours, *others], width=8, screen=80)).split("\n")
    assert lines[0].startswith("toy/5        1.000       50%  peer 0 2.00x ±5%  peer 1 2.00x ±5%")
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines)
    assert all(line.startswith(" " * 30 + "peer") for line in lines[1:])


def test_ratios_are_coloured_only_where_they_differ_from_1():
    assert [bench_table._style(ratio) for ratio in (1.5, 1.0, 0.9)] == ["green", "", "red"]
