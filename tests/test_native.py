"""The compiled CPU routines: that they are here, are called as they are declared, and say why where they are not."""

import ctypes
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from mixft.cpu import native
from mixft.cpu.accumulate import accumulate_gradients_
from mixft.cpu.compiled_step import StepTensors
from mixft.cpu.grad import gradient_statistics
from mixft.cpu.int8_layer import serves
from mixft.kernels.multi_tensor import addresses as launched_addresses
from mixft.ops import dynamic_int8_linear, weight_only_matmul

built_here = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the C code is for x86-64 Linux"
)
ROOT = Path(__file__).parent.parent
INSTALLED = Path(native.__file__).parent
DECLARATION = re.compile(r"^void (\w+)\(([^)]*)\)\n?\s*{", re.MULTILINE)
C_TYPES = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def declared() -> dict[str, tuple]:
    """What each exported function of native/ takes."""
    functions = {}
    for source in sorted((ROOT / "native").glob("*.c")):
        for name, parameters in DECLARATION.findall(source.read_text()):
            words = [parameter.replace("const ", "").strip() for parameter in parameters.split(",")]
            functions[name] = tuple(ctypes.c_void_p if "*" in word else C_TYPES[word.split()[0]] for word in words)
    return functions


def called() -> dict[str, tuple]:
    """What mixft/cpu passes to each."""
    routines = {}
    for path in INSTALLED.glob("*.py"):
        module = importlib.import_module(f"mixft.cpu.{path.stem}")
        routines |= {value.name: value.types for value in vars(module).values() if isinstance(value, native.Routine)}
    return routines


def test_every_routine_is_called_as_it_is_declared():
    assert called() == declared()
    assert called()


def test_the_tensors_of_a_step_lie_as_they_are_declared():
    body = re.search(r"struct step {(.*?)};", (ROOT / "native" / "optimizer_step.h").read_text(), re.DOTALL)[1]
    fields = []
    for declaration in re.sub(r"/\*.*?\*/", "", body).split(";")[:-1]:
        first, *others = declaration.replace("const ", "").split(",")
        for name in (first.split()[-1], *others):
            bare = name.strip(" *").partition("[")[0]
            kind = ctypes.c_void_p if "*" in declaration else C_TYPES[first.split()[0]]
            fields.append((bare, kind * 3 if "[STATES]" in name else kind))
    assert tuple(fields) == StepTensors._fields_


@built_here
def test_they_are_built_where_the_tests_run():
    assert native.why_unavailable() is None


@built_here
def test_every_build_holds_every_routine():
    for name in native.LIBRARIES.values():
        (path,) = INSTALLED.glob(f"{name}{EXTENSION_SUFFIXES[0]}")
        library = ctypes.CDLL(str(path))
        for routine in declared():
            assert hasattr(library, routine), (name, routine)


def run_with(build: str, *command: str) -> str:
    """What Python prints when it runs ``command`` with the routines of ``build``."""
    if build not in native.usable_builds():
        pytest.skip(f"this processor cannot run {build}")
    capability = "avx512" if build == "avx512_vnni" else "avx2"
    environment = {**os.environ, "MIXFT_NATIVE": build, "ATEN_CPU_CAPABILITY": capability, "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@built_here
@pytest.mark.parametrize("build", native.BUILDS)
def test_every_build_passes_the_self_test(build):
    report = json.loads(
        run_with(build, "-c", "from mixft.cli import main; raise SystemExit(main(['doctor', '--json']))")
    )
    assert report["cpu"]["compiled_routines"] == f"for {build}"
    assert report["passed"]


@built_here
@pytest.mark.parametrize("build", native.BUILDS)
def test_what_is_written_for_each_instruction_set_is_right_in_every_build(build):
    if build == native.build():
        pytest.skip("it serves here by itself, so that the file tests it")
    names = ("int8_layer", "int8_input_gradient", "int8_matmul", "optimizer_state", "weight_only")
    files = [f"tests/test_{name}.py" for name in names]
    assert "passed" in run_with(build, "-m", "pytest", "-k", "not (interpreter or torch or opcheck)", *files)


@built_here
@pytest.mark.parametrize("build", native.BUILDS)
def test_no_build_touches_memory_beyond_its_operands(build):
    called = run_with(build, str(ROOT / "tests" / "operands_at_the_edge.py")).split()
    assert called == sorted(declared())


def unavailable(monkeypatch, tmp_path) -> str:
    """Why the library of ``tmp_path`` is not to be had."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.raises(native.Unavailable) as error:
        native.load.__wrapped__()
    return str(error.value)


def test_the_reason_is_told_where_they_are_missing(monkeypatch, tmp_path):
    assert "not built" in unavailable(monkeypatch, tmp_path)


def test_the_reason_is_told_where_they_do_not_load(monkeypatch, tmp_path):
    for name in native.LIBRARIES.values():
        (tmp_path / f"{name}.so").write_bytes(b"not a library")
    assert "not loadable" in unavailable(monkeypatch, tmp_path)


def test_the_library_of_another_python_is_left_alone(monkeypatch, tmp_path):
    for name in native.LIBRARIES.values():
        (tmp_path / f"{name}.cpython-30-x86_64-linux-gnu.so").write_bytes(b"out of date")
    assert "not built" in unavailable(monkeypatch, tmp_path)


@built_here
def test_a_library_that_its_sources_have_moved_on_from_is_left_alone(monkeypatch, tmp_path):
    package = tmp_path / "mixft" / "cpu"
    package.mkdir(parents=True)
    shutil.copytree(ROOT / "native", tmp_path / "native")
    for name in native.LIBRARIES.values():
        (path,) = INSTALLED.glob(f"{name}{EXTENSION_SUFFIXES[0]}")
        shutil.copy(path, package)
    monkeypatch.setattr(native, "__file__", str(package / "native.py"))
    assert native.load.__wrapped__()
    shutil.copy(ROOT / "setup.py", tmp_path)
    assert native.load.__wrapped__()
    with open(tmp_path / "native" / "grad.c", "a") as file:
        file.write("\n")
    with pytest.raises(native.Unavailable, match="built from other sources"):
        native.load.__wrapped__()


def test_the_reason_is_told_on_another_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "DEFAULT" in unavailable(monkeypatch, tmp_path)


@pytest.mark.parametrize("build", ["avx1024", "avx512_vnni"])
def test_a_build_that_this_processor_cannot_run_is_named(monkeypatch, tmp_path, build):
    monkeypatch.setattr(native, "usable_builds", lambda: ("avx_vnni", "avx2"))
    monkeypatch.setenv("MIXFT_NATIVE", build)
    assert f"{build!r}; on this processor it can be 0, avx_vnni, avx2" in unavailable(monkeypatch, tmp_path)


def test_a_build_that_is_asked_for_in_vain_is_warned_of(monkeypatch):
    monkeypatch.setenv("MIXFT_NATIVE", "avx1024")
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    with pytest.warns(UserWarning, match="MIXFT_NATIVE is 'avx1024'; .* torch's operators serve"):
        assert "avx1024" in native.why_unavailable.__wrapped__()


def test_they_can_be_switched_off(monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("MIXFT_NATIVE", "0")
    assert "MIXFT_NATIVE" in unavailable(monkeypatch, tmp_path)
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    assert "MIXFT_NATIVE" in native.why_unavailable.__wrapped__()
    assert not recwarn.list


def build(tmp_path: Path, compiler: str, *options: str) -> list[Path]:
    """The libraries that an installation with ``compiler`` gives."""
    for name in ("setup.py", "pyproject.toml", "README.md", "native"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built", "--build-temp", "temporary", *options]
    environment = {**os.environ, "CC": compiler, "LDSHARED": f"{compiler} -shared"}
    built = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return sorted(tmp_path.glob("built/**/*.so"))


def test_an_installation_without_a_compiler_goes_on(tmp_path):
    assert not build(tmp_path, "no-such-compiler")


# Its object files hold the command that made them, its libraries their object files.
NOTING_COMPILER = """#!/bin/sh
for word; do
    [ "$previous" = -o ] && out=$word
    case $word in *.o) objects="$objects $word" ;; esac
    previous=$word
done
case " $* " in *" -c "*) echo "$@" > "$out" ;; *) cat $objects > "$out" ;; esac
"""


@built_here
def test_a_parallel_build_mixes_no_instruction_sets(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(NOTING_COMPILER)
    compiler.chmod(0o755)
    libraries = build(tmp_path, str(compiler), "--parallel", "2")
    assert [path.name.partition(".")[0] for path in libraries] == sorted(native.LIBRARIES.values())
    for library in libraries:
        made = library.read_text().splitlines()
        assert len(made) == len(list((ROOT / "native").glob("*.c")))
        assert all(("-mavx512f" in command) == ("avx512" in library.name) for command in made)


def test_scratch_memory_is_a_threads_own_and_large_enough():
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(native.scratch, 10).result()
        assert other.submit(native.scratch, 20).result() is theirs
    assert native.scratch(10) is native.scratch(native.SCRATCH)
    assert native.scratch(10) is not theirs
    assert native.scratch(native.SCRATCH + 1).nbytes > native.SCRATCH


@pytest.mark.usefixtures("without_interpreter")
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype, one_thread):
    sizes = (100_003, 7, 0, 250_001)
    grads = [torch.randn(size).to(dtype) for size in sizes]
    grads[0][5] = torch.inf
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        buffers, found = [torch.ones(size) for size in sizes], torch.zeros(1)
        counts = torch.zeros(len(sizes), dtype=torch.int64)
        accumulate_gradients_(grads, buffers, torch.tensor(0.3), found, counts, False, False)
        squares, nonfinite = gradient_statistics(grads)
        assert counts.tolist() == nonfinite.tolist() == [1, 0, 0, 0]
        results.append([*buffers, squares])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def test_a_tensor_without_memory_is_refused_and_an_empty_one_taken():
    freed, empty = without_memory(torch.ones(3)), torch.ones(0)
    lists = [lambda tensor, of=of: of([torch.ones(1), tensor]) for of in (native.addresses, launched_addresses)]
    for get in (native.address, native.typed, *lists):
        with pytest.raises(ValueError, match=r"a Tensor of shape \(3,\) on cpu has no memory of its own"):
            get(freed)
        get(empty)


@pytest.mark.usefixtures("without_interpreter")
def test_a_tensor_that_stands_for_another_reaches_the_dispatcher():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), options=None):
            inner = [value.inner if isinstance(value, cls) else value for value in arguments]
            return function(*inner, **options or {})

    x, weight, scale, bias = torch.randn(2, 8), torch.ones(5, 8).to(torch.int8), torch.rand(5, 1), torch.rand(5)
    for op in (dynamic_int8_linear, weight_only_matmul):
        expected = op(x, weight, scale, bias)
        for position in range(1, 4):
            arguments = [x, weight, scale, bias]
            arguments[position] = Wrapper(arguments[position])
            assert torch.equal(op(*arguments), expected)
    with pytest.raises(ValueError, match="a Wrapper of shape"):
        gradient_statistics([bias, Wrapper(bias)])


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_what_is_kept_from_inference_serves_in_training(compiled):
    # In a process of its own, whose caches are empty.
    script = """
import torch
from mixft.ops import training_int8_linear, quantize
x, weight = torch.randn(70, 1000), torch.randn(30, 1000)
with torch.inference_mode():
    training_int8_linear(x, weight)
for tensor in (x, weight):
    tensor.requires_grad_()
training_int8_linear(x, weight, stochastic=True).sum().backward()
quantize(x, symmetric=False, dim=0)
print(bool(weight.grad.any()))
"""
    environment = {**os.environ, "MIXFT_NATIVE": compiled, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout == "True\n"


@built_here
@pytest.mark.usefixtures("without_interpreter")
def test_scratch_memory_is_not_given_back_before_its_use(monkeypatch):
    made, alive = [], []

    def scratch(size: int) -> torch.Tensor:
        room = torch.empty(size, dtype=torch.uint8)
        made.append(weakref.ref(room))
        return room

    call = native.Routine.__call__

    def checked(routine: native.Routine, *arguments) -> None:
        alive.extend(room() is not None for room in made)
        made.clear()
        # Rather an error below than a crash here.
        if all(alive):
            call(routine, *arguments)

    monkeypatch.setattr(native, "scratch", scratch)
    monkeypatch.setattr(native.Routine, "__call__", checked)
    x, weight, scale = torch.randn(3, 40), torch.ones(24, 40).to(torch.int8), torch.rand(24, 1)
    weight_only_matmul(x, weight, scale)
    gradient_statistics([x])
    dynamic_int8_linear(x.requires_grad_(), weight, scale, backward="int8").sum().backward()
    assert len(alive) >= (4 if serves(3) else 2)
    assert all(alive)
