"""Every launch from the call to the CUDA driver, without a GPU: that it gets there, and is one that is compiled.

The interpreter shows what a kernel computes and ``test_compile.py`` what becomes of its code; between a launcher and
the code lie Triton's binder, its specialization of arguments and its launcher in C, which ``launch_recorder.py`` runs.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import recorded_launches
import triton
import triton.language as tl
from conftest import HAS_GPU
from test_compile import kernels_of

from mixft.kernels import compilation
from mixft.kernels.architecture import ARCHITECTURES
from mixft.kernels.compilation import can_compile, kernel_modules
from mixft.kernels.matmul_persistent import has_descriptors

pytestmark = pytest.mark.skipif(HAS_GPU, reason="where there is a GPU the other tests launch on it")

HERE = Path(__file__).parent
HOPPER = ARCHITECTURES["sm_90"]


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory) -> Path:
    """The folder of a ``libcuda.so.1`` for a GPU that is not there."""
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wl,-soname,libcuda.so.1"]
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, *flags, f"-I{headers}", HERE / "fake_libcuda.c", "-o", library], check=True)
    # Triton 3.2 links by the other name.
    (folder / "libcuda.so").symlink_to(library)
    return folder


@pytest.fixture(scope="module")
def records(fake_driver) -> dict:
    """What ``launch_recorder.py`` writes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = {"TRITON_LIBCUDA_PATH": fake_driver, "LD_LIBRARY_PATH": fake_driver, "TRITON_CACHE_DIR": fake_driver}
    environment |= {name: str(folder) for name, folder in places.items()}
    written = fake_driver / "records.json"
    command = [sys.executable, HERE / "launch_recorder.py", written, "every_launch", "faulty_launches"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(written.read_text())


@pytest.fixture(scope="module")
def recorded(records) -> dict:
    return records["every_launch"]


@pytest.fixture(scope="module")
def faulty(records) -> dict:
    return records["faulty_launches"]


def faults(launch: dict) -> list[str]:
    """What is wrong with a launch that nothing refused, one sentence a fault."""
    x, y, z, *_ = (*launch["grid"], 1, 1)
    found = []
    if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
        found.append(f"has a grid of {launch['grid']}")
    elif "threads" in launch and launch["threads"] != 32 * launch["num_warps"]:
        found.append(f"has {launch['threads']} threads of {launch['num_warps']} warps")
    return found


def kind(argument: str) -> str:
    """Of an argument's type or constant, what makes another kernel of a launch: no dtype and no value."""
    if argument.startswith("tensordesc"):
        return argument[argument.index("[") : -1]
    return {"*": "pointer", "N": "None"}.get(argument[0], "number")


def form(kernel: str, arguments: dict[str, str], num_warps: int, num_stages: int) -> str:
    kinds = ", ".join(f"{name}: {kind(argument)}" for name, argument in arguments.items())
    return f"{kernel}({kinds}), {num_warps} warps, {num_stages} stages"


def forms_of(*modules) -> dict[str, str]:
    """The forms and the constants of the modules' variants, each with the name of one."""
    found = {}
    for variant in (variant for module in modules for variant in module.variants(HOPPER)):
        parameters = inspect.signature(variant.function.fn).parameters.values()
        annotated = {item.name for item in parameters if item.annotation is tl.constexpr}
        kernel, given = variant.function.__name__, variant.constexprs | variant.signature
        arguments = {item.name: str(given[item.name]) for item in parameters if item.name not in annotated}
        found[form(kernel, arguments, variant.num_warps, variant.num_stages)] = variant.name
        found |= {f"{kernel}: {name} {given[name]}": variant.name for name in annotated}
    return found


def launched_forms(recorded: dict) -> dict[str, str]:
    """The forms and the constants of the launches, each with a case."""
    found = {}
    for launch in recorded["launches"]:
        kernel, case = launch["kernel"], launch["case"]
        found[form(kernel, launch["types"], launch["num_warps"], launch["num_stages"])] = case
        found |= {f"{kernel}: {name} {value}": case for name, value in launch["constexprs"].items()}
    return found


def listed(found: dict[str, str]) -> str:
    return "\n".join(f"{each}, as in {source!r}" for each, source in found.items())


def test_everything_is_launched(recorded):
    assert not recorded["failures"]
    assert not {launch["case"]: found for launch in recorded["launches"] if (found := faults(launch))}


def test_every_kernel_is_launched(recorded):
    sources = [path.read_text() for path in Path(compilation.__file__).parent.glob("*.py")]
    absent = set() if has_descriptors() else {"persistent_matmul_kernel"}
    assert {launch["kernel"] for launch in recorded["launches"]} == kernels_of(sources) - absent, (
        "every_launch.py has a call that launches each kernel"
    )


def test_every_launch_is_of_a_form_that_is_compiled(recorded):
    """By ``test_compile.py``: which arguments are None, the tiles of descriptors, the options, and each constant."""
    compiled = forms_of(*kernel_modules().values(), recorded_launches)
    unknown = {found: case for found, case in launched_forms(recorded).items() if found not in compiled}
    assert not unknown, "no variant and no call in recorded_launches.py has:\n" + listed(unknown)


def test_every_form_that_ships_is_launched(recorded):
    shipped, launched = forms_of(*kernel_modules().values()), launched_forms(recorded)
    unused = {found: name for found, name in shipped.items() if found not in launched}
    assert not unused, "no call in every_launch.py launches:\n" + listed(unused)


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        pytest.param(
            *("argument hidden by Triton", "Error"),
            marks=pytest.mark.skipif(not can_compile(), reason="Triton 3.2 hides no argument"),
        ),
        ("constexpr left out", "BLOCK"),
        ("unknown option", "warps"),
        ("too many programs", "OverflowError"),
        ("too many programs in y", "invalid argument"),
    ],
)
def test_a_launch_that_a_gpu_refuses_is_reported(faulty, case, complaint):
    assert complaint in faulty["failures"][case]


def test_a_launch_of_nothing_is_reported(faulty):
    wrong = {launch["case"]: found for launch in faulty["launches"] if (found := faults(launch))}
    assert set(wrong) == {"no program"}


def test_what_is_recorded(faulty):
    launches = {launch["case"]: launch for launch in faulty["launches"]}
    assert launches["sound"] == {
        "case": "sound",
        "kernel": "fill",
        "types": {"values": "*fp32", "number": "fp32"},
        "constexprs": {"BLOCK": "64"},
        "num_warps": 4,
        "num_stages": 3,
        "grid": [2, 1, 1],
        "threads": 128,
        "shared": 0,
    }
    assert launches["another number"] == launches["sound"] | {"case": "another number", "grid": [3, 1, 1]}
    other = launches["another block"]
    assert (other["constexprs"], other["num_warps"], other["grid"]) == ({"BLOCK": "32"}, 1, [1, 2, 1])
