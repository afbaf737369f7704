"""``mixft inspect``: what it compiles, prints, writes and refuses."""

import json
from dataclasses import replace

import pytest
import torch

from mixft.cli import inspect as command
from mixft.cli import main
from mixft.kernels import parallel_compilation
from mixft.kernels.architecture import ARCHITECTURES
from mixft.kernels.compilation import can_compile, kernel_modules
from mixft.kernels.parallel_compilation import Job, Outcome, compile_all, jobs_of
from mixft.kernels.traffic import estimate, tiling
from mixft.kernels.variant import MatrixProduct

KERNEL = "reduce_stats"


needs_compiler = pytest.mark.skipif(not can_compile(), reason="Triton 3.2 does not compile for a GPU that is not there")


@pytest.fixture(scope="module")
def real() -> Outcome:
    (job,) = [job for job in jobs_of("mixft.kernels.grad", "sm_90") if job.variant == KERNEL]
    (outcome,) = compile_all([job])
    return outcome


@pytest.fixture
def compiler(monkeypatch):
    """Replaces the compiler by a function from a job to its outcome."""

    def use(outcome_of) -> None:
        monkeypatch.setattr(parallel_compilation, "compile_all", lambda jobs: map(outcome_of, reversed(jobs)))

    return use


@needs_compiler
def test_the_screen_of_a_real_kernel(real, capsys, tmp_path):
    path = tmp_path / "report.json"
    assert main(["inspect", KERNEL, "--arch", "sm_90,gfx942", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    for text in (
        "sm_90, as H100 SXM",
        "3.35 TB/s",
        "gfx942, as MI300X",
        "304 compute units",
        KERNEL,
        "not measured yet",
    ):
        assert text in out
    assert out.count("1 configurations: 1 compile, 0 spill registers, 0 at fault") == 2
    assert str(real.compiled.registers) in out

    report = json.loads(path.read_text())
    assert [(entry["variant"], entry["architecture"]) for entry in report["kernels"]] == [
        (KERNEL, "sm_90"),
        (KERNEL, "gfx942"),
    ]
    assert report["kernels"][0]["compiled"]["registers"] == real.compiled.registers
    assert report["kernels"][0]["compiled"]["occupancy"]["limits"] == list(real.compiled.occupancy.limits)
    assert report["architectures"]["sm_90"]["gpu"]["source"]
    assert report["versions"]["triton"]


@needs_compiler
def test_a_report_that_was_there_stays_until_the_new_one_is_whole(real, compiler, tmp_path, monkeypatch):
    compiler(lambda job: replace(real, job=job))
    path = tmp_path / "report.json"
    path.write_text("old")

    def refuse(source, target):
        assert json.loads(source.read_text())["kernels"]
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        main(["inspect", KERNEL, "--arch", "sm_90", "--json", str(path)])
    assert path.read_text() == "old"


@needs_compiler
def test_every_variant_has_a_row_that_fits(real, compiler, capsys):
    """All kernels at once, in the order of their modules, whatever order they are compiled in."""
    works = {it.name: it.work for module in kernel_modules().values() for it in module.variants(ARCHITECTURES["sm_90"])}

    def outcome_of(job: Job) -> Outcome:
        work, gpu = works[job.variant], ARCHITECTURES["sm_90"].gpu
        found = replace(real.compiled, name=job.variant, work=work, matrix_instructions=("tcgen05.mma",))
        if work is not None:
            found = replace(found, estimate=estimate(work, gpu), bytes_per_element=17.25)
        if isinstance(work, MatrixProduct):
            found = replace(found, tiling=tiling(work, gpu, 1), shared_memory=227 * 1024)
        return Outcome(job, found)

    compiler(outcome_of)
    assert main(["inspect", "*", "--arch", "sm_90"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert "…" not in out
    assert {"4096^3", "512x4096^2", "138.9", "17.25"} <= set(out.split())
    rows = [line.split("  ")[0].strip() for line in out.splitlines()]
    shown = [job.variant for job in command.jobs(["sm_90"], command.choose_kernels(["*"]))]
    for variant in shown:
        kernel, bracket, rest = variant.partition("[")
        assert kernel in rows
        assert not bracket or any(row.startswith(rest[:-1]) for row in rows), variant
    assert main(["inspect", "--arch", "sm_90"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert "…" not in out
    assert {"4096^3", "512x4096^2", "138.9", "17.25"} <= set(out.split())


@needs_compiler
def test_without_a_kernel_one_screen(real, compiler, capsys):
    """One row for each kernel, the aligned variant where there is one; what is at fault is named all the same."""

    def outcome_of(job: Job) -> Outcome:
        spilled = 60 if job.variant == "unscale[fp16,unaligned]" else 0
        found = replace(real.compiled, name=job.variant, spilled_bytes=spilled, loads={16: 1})
        return Outcome(job, replace(found, wide_loads="unaligned" not in job.variant))

    compiler(outcome_of)
    assert main(["inspect", "--arch", "sm_90"]) == 1
    out = capsys.readouterr().out
    rows = out.partition("regs: a thread")[0].splitlines()
    kernels = command.choose_kernels(["*"])
    for kernel in kernels:
        assert sum(row.partition("[")[0].split(" ")[0] == kernel for row in rows) == 1, kernel
    assert "unscale[fp16,unaligned]: spills 60 bytes a thread" in out
    assert f"{len(kernels)} shown" in out
    assert "unscale[fp16] " in out


@needs_compiler
def test_what_does_not_compile_is_a_row_and_exit_code_1(real, compiler, capsys, tmp_path):
    def outcome_of(job: Job) -> Outcome:
        if job.variant == "unscale[bf16]":
            return Outcome(job, failure="CompilationError: at 2:16:\n no [such] thing")
        spilled = 60 if job.variant == "unscale[fp32]" else 0
        return Outcome(job, replace(real.compiled, name=job.variant, spilled_bytes=spilled))

    compiler(outcome_of)
    path = tmp_path / "report.json"
    assert main(["inspect", "unscale", "--arch", "sm_90", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "unscale[bf16]: CompilationError" in out
    assert "no [such] thing" in out
    assert "unscale[fp32]: spills 60 bytes a thread" in out
    assert "48+60" in out
    assert "4 configurations: 3 compile, 1 spill registers, 2 at fault" in out
    complaints = {entry["variant"]: entry["complaints"] for entry in json.loads(path.read_text())["kernels"]}
    assert {name for name, found in complaints.items() if found} == {"unscale[bf16]", "unscale[fp32]"}


@needs_compiler
def test_a_compiler_that_crashes_takes_no_other_variant_with_it():
    sound = jobs_of("mixft.kernels.grad", "sm_90")[:2]
    crashing = Job("crashing_kernels", "any", "sm_90")
    outcomes = {outcome.job: outcome for outcome in compile_all([sound[0], crashing, sound[1]])}
    assert set(outcomes) == {*sound, crashing}
    assert outcomes[crashing].failure == "the compiler crashed"
    assert all(outcomes[job].compiled is not None for job in sound)


@needs_compiler
def test_a_kernel_that_an_architecture_lacks_is_named(compiler, capsys, real):
    compiler(lambda job: Outcome(job, replace(real.compiled, name=job.variant)))
    assert main(["inspect", "int8_matmul", "--arch", "sm_75"]) == 0
    out = capsys.readouterr().out
    assert "int8_matmul: none for sm_75" in out
    assert "0 configurations" in out


@pytest.mark.parametrize(
    ("patterns", "kernels"),
    [
        (["grad"], ["unscale", "partial_stats", "reduce_stats"]),
        (["unscale"], ["unscale"]),
        (["*stats", "unscale"], ["unscale", "partial_stats", "reduce_stats"]),
        (["weight_only_matmul"], ["weight_only_matmul"]),
        (["matmul"], ["matmul"]),
    ],
)
def test_kernels_by_name_module_and_pattern(patterns, kernels):
    assert command.choose_kernels(patterns) == kernels


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["adamvv"], "no kernel is named 'adamvv'; there are"),
        (["--arch", "sm_42"], "'sm_42' is not an architecture; there are sm_75"),
        (["--arch", "sm_90,"], "'' is not an architecture"),
        (["--json", "no/such/folder/report.json"], "cannot be written"),
    ],
)
def test_bad_input_is_refused(arguments, complaint, capsys):
    assert main(["inspect", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["inspect"]) == 2
    assert "Triton, which is not here" in capsys.readouterr().err


def test_the_architecture_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.choose_architectures(None) == ["sm_90"]
    assert command.choose_architectures("gfx942, sm_80,gfx942") == ["gfx942", "sm_80"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("mixft.kernels.architecture.architecture_of", lambda device: ARCHITECTURES["sm_89"])
    assert command.choose_architectures(None) == ["sm_89"]


def test_a_gpu_that_is_too_old_is_refused(monkeypatch, capsys):
    def architecture_of(device):
        raise RuntimeError("mixft has no kernels for compute capability 6.1")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("mixft.kernels.architecture.architecture_of", architecture_of)
    assert main(["inspect"]) == 2
    assert "capability 6.1; --arch takes any" in capsys.readouterr().err
