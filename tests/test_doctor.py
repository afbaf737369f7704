"""``mixft doctor``: it tells a sound machine from one where an op is wrong, and describes either."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mixft import ops
from mixft.cli import environment, main, serving
from mixft.cli.self_test import ROUNDING, run_case
from mixft.cli.self_test_cases import CASES
from mixft.cpu import grad as cpu_grad
from mixft.cpu import quantize as cpu_quantize
from mixft.kernels.architecture import ARCHITECTURES
from mixft.ops.registration import cpu_routine


@pytest.fixture(autouse=True)
def cpu_routines(monkeypatch):
    """The doctor of a CPU without the interpreter, as a user has it."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cpu_routine.cache_clear()
    yield
    cpu_routine.cache_clear()


def report(capsys) -> tuple[int, dict]:
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_every_op_is_tested_in_every_dtype():
    tested = {(case.op, case.dtype) for case in CASES}
    untested = {(op, dtype) for op in ops.__all__ for dtype in ROUNDING} - tested
    assert not untested, "mixft/cli/self_test_cases.py has no case for these"
    assert {op for op, _ in tested} <= set(ops.__all__)


def test_a_sound_machine_is_green(capsys):
    code, found = report(capsys)
    assert code == 0
    assert found["passed"] is True
    assert len(found["ops"]) == len(CASES)
    for row in found["ops"]:
        assert row["passed"], row
        assert 0 <= row["error"] <= row["bound"]
        assert row["served_by"].startswith("CPU")
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["devices"][0]["device"] == "cpu"
    assert found["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert set(found["cpu"]["instruction_sets"]) == set(environment.INSTRUCTION_SETS)


def test_the_table_names_every_op(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for op in ops.__all__:
        assert op in out
    assert f"{len(CASES)} checks passed, 0 failed" in out


def test_only_a_terminal_sees_how_far_it_is(monkeypatch, capsys):
    main(["doctor", "--json"])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["doctor", "--json"])
    captured = capsys.readouterr()
    assert "testing" in captured.err
    assert json.loads(captured.out)["passed"]


def wrong_values(*arguments):
    values, scale, zero_point = sound_quantize(*arguments)
    return values + 1, scale, zero_point


def wrong_scale(*arguments):
    values, scale, zero_point = sound_quantize(*arguments)
    return values, scale * 1.02, zero_point


def not_a_number(*arguments):
    values, scale, zero_point = sound_quantize(*arguments)
    return values, torch.full_like(scale, float("nan")), zero_point


def raising(*arguments):
    raise NotImplementedError("no such [instruction]")


sound_quantize = cpu_quantize.quantize


@pytest.mark.parametrize("broken", [wrong_values, wrong_scale, not_a_number, raising])
def test_a_broken_routine_turns_it_red(monkeypatch, capsys, broken):
    monkeypatch.setattr(cpu_quantize, "quantize", broken)
    code, found = report(capsys)
    assert code == 1
    assert found["passed"] is False
    wrong = {row["op"] for row in found["ops"] if not row["passed"]}
    assert "quantize" in wrong
    assert not wrong & {"matmul", "dequantize", "grad_stats", "unscale_"}


@pytest.mark.parametrize("broken", [wrong_values, wrong_scale])
def test_wrong_numbers_are_an_error_above_the_bound(monkeypatch, capsys, broken):
    """Of the ops that quantize, none fails because the broken routine does not take its call."""
    monkeypatch.setattr(cpu_quantize, "quantize", broken)
    wrong = [row for row in report(capsys)[1]["ops"] if not row["passed"]]
    assert {row["op"] for row in wrong} >= {"quantize", "training_int8_linear"}
    for row in wrong:
        assert row["failure"] is None
        assert row["error"] > row["bound"]


def test_an_overflow_check_that_never_fires_turns_it_red(monkeypatch, capsys):
    def deaf(grads, inv_scale, found_inf, nonfinite):
        for grad in grads:
            grad.mul_(inv_scale)

    monkeypatch.setattr(cpu_grad, "unscale_gradients_", deaf)
    code, found = report(capsys)
    assert code == 1
    assert {row["op"] for row in found["ops"] if not row["passed"]} == {"unscale_"}


def test_the_table_says_what_failed(monkeypatch, capsys):
    monkeypatch.setattr(cpu_quantize, "quantize", raising)
    assert main(["doctor"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "WRONG" in out
    assert "quantize float16 on cpu: NotImplementedError: no such [instruction]" in out


def test_a_missing_package_is_said(monkeypatch, capsys):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "a-package-that-nobody-has"))
    code, found = report(capsys)
    assert code == 0
    assert found["versions"]["a-package-that-nobody-has"] is None
    main(["doctor"])
    assert "a-package-that-nobody-has not installed" in " ".join(capsys.readouterr().out.split())


def test_linux_answers_for_the_probes_that_torch_lacks(monkeypatch):
    monkeypatch.setattr(environment, "INSTRUCTION_SETS", {"one": (("_is_not_there",), "one"), "two": ((), "two")})
    monkeypatch.setattr(environment, "_cpuinfo", lambda key: {"flags": "zero one three"}[key])
    assert environment.cpu_features()["instruction_sets"] == {"one": True, "two": False}


@pytest.mark.parametrize(
    ("name", "told"), [("AMD EPYC", "AMD EPYC family 25 model 17"), ("AMD EPYC 9654", "AMD EPYC 9654")]
)
def test_a_name_that_several_processors_have_is_told_apart(monkeypatch, name, told):
    known = {"model name": name, "cpu family": "25", "model": "17"}
    monkeypatch.setattr(environment, "_cpuinfo", known.__getitem__)
    assert environment.cpu_name() == told


@pytest.mark.parametrize(
    ("arch", "op", "dtype", "code"),
    [
        ("sm_90", "matmul", torch.float16, "Triton, sm_90"),
        ("sm_90", "matmul", torch.float32, "torch.matmul"),
        ("sm_75", "matmul", torch.float16, "torch.matmul"),
        ("sm_90", "mlp", torch.float32, "torch.matmul"),
        ("sm_75", "grad_stats", torch.float16, "Triton, sm_75"),
        ("sm_75", "int8_matmul", torch.float16, None),
        ("gfx942", "training_int8_linear", torch.bfloat16, "Triton, gfx942"),
    ],
)
def test_what_serves_a_gpu(monkeypatch, arch, op, dtype, code):
    monkeypatch.setattr("mixft.kernels.architecture.architecture_of", lambda device: ARCHITECTURES[arch])
    assert serving.served_by(op, dtype, torch.device("cuda", 0)) == code


def test_an_op_without_code_here_is_no_failure(monkeypatch, capsys):
    def served_by(op, dtype, device):
        return None if op == "matmul" else "CPU"

    monkeypatch.setattr(serving, "served_by", served_by)
    code, found = report(capsys)
    assert code == 0
    assert {row["op"] for row in found["ops"] if row["passed"] is None} == {"matmul"}


def test_the_triton_code_passes_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for case in CASES:
        if case.dtype == torch.float16:
            assert run_case(case, torch.device("cpu")).passed, case.op


def test_the_installed_command_exits_with_its_verdict():
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = "import sys; from mixft.cli import main; sys.exit(main(['doctor', '--json']))"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["passed"]
