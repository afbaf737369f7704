"""Every launch from the call to the GPU's driver, without a GPU: that it gets there, and is one that is compiled.

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
from triton._C.libtriton import amd

from mixft.kernels import compilation
from mixft.kernels.architecture import ARCHITECTURES, Architecture
from mixft.kernels.compilation import attributes_of, can_compile, kernel_modules
from mixft.kernels.matmul_persistent import has_descriptors

pytestmark = pytest.mark.skipif(HAS_GPU, reason="where there is a GPU the other tests launch on it")

HERE = Path(__file__).parent
HOPPER = ARCHITECTURES["sm_90"]
# Older releases of Triton have no linker of their own for AMD.
LAUNCHED_ON = (HOPPER, ARCHITECTURES["gfx942"]) if hasattr(amd, "link_hsaco") else (HOPPER,)
# The driver's library of each backend, and its headers' folder.
LIBRARIES = {"cuda": ("libcuda.so.1", "nvidia"), "hip": ("libamdhip64.so", "amd")}
# Triton 3.2 links the library by another name.
OTHER_NAME = "libcuda.so"


@pytest.fixture(scope="module")
def drivers(tmp_path_factory) -> Path:
    """The folder of drivers for GPUs that are not there."""
    folder = tmp_path_factory.mktemp("drivers")
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    for name, backend in LIBRARIES.values():
        headers = Path(triton.__file__).parent / "backends" / backend / "include"
        source = HERE / f"fake_{name.partition('.')[0]}.c"
        command = [os.environ.get("CC", "gcc"), *flags, f"-Wl,-soname,{name}", f"-I{headers}", source]
        subprocess.run([*command, "-o", folder / name], check=True)
    (folder / OTHER_NAME).symlink_to(LIBRARIES["cuda"][0])
    return folder


@pytest.fixture(scope="module")
def records(drivers) -> dict:
    """What ``launch_recorder.py`` writes, by architecture."""
    places = {"TRITON_LIBCUDA_PATH": drivers, "TRITON_LIBHIP_PATH": drivers / LIBRARIES["hip"][0]}
    places |= {"LD_LIBRARY_PATH": drivers, "TRITON_CACHE_DIR": drivers / "cache"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {name: str(place) for name, place in places.items()}
    runs = {}
    for arch in LAUNCHED_ON:
        written = drivers / f"{arch.name}.json"
        command = [sys.executable, HERE / "launch_recorder.py", arch.name, written, "every_launch", "faulty_launches"]
        runs[written] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for run in runs.values():
        _, complaints = run.communicate()
        assert run.returncode == 0, complaints
    return {written.stem: json.loads(written.read_text()) for written in runs}


@pytest.fixture(params=LAUNCHED_ON, ids=lambda arch: arch.name)
def arch(request) -> Architecture:
    return request.param


@pytest.fixture
def recorded(records, arch) -> dict:
    return records[arch.name]["every_launch"]


@pytest.fixture
def faulty(records) -> dict:
    return records[HOPPER.name]["faulty_launches"]


def faults(launch: dict, arch: Architecture) -> list[str]:
    """What is wrong with a launch that nothing refused, one sentence a fault."""
    x, y, z, *_ = (*launch["grid"], 1, 1)
    found = []
    if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
        found.append(f"has a grid of {launch['grid']}")
    elif "threads" in launch and launch["threads"] != arch.warp_size * launch["num_warps"]:
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


def forms_of(arch: Architecture, *modules) -> dict[str, str]:
    """The forms and the constants of the modules' variants, each with the name of one."""
    found = {}
    for variant in (variant for module in modules for variant in module.variants(arch)):
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


def test_everything_is_launched(recorded, arch):
    assert not recorded["failures"]
    assert not {launch["case"]: found for launch in recorded["launches"] if (found := faults(launch, arch))}


def test_every_kernel_is_launched(recorded, arch):
    sources = [path.read_text() for path in Path(compilation.__file__).parent.glob("*.py")]
    absent = set() if arch is HOPPER and has_descriptors() else {"persistent_matmul_kernel"}
    assert {launch["kernel"] for launch in recorded["launches"]} == kernels_of(sources) - absent, (
        "every_launch.py has a call that launches each kernel"
    )


def test_every_launch_is_of_a_form_that_is_compiled(recorded, arch):
    """By ``test_compile.py``: which arguments are None, the tiles of descriptors, the options, and each constant."""
    compiled = forms_of(arch, *kernel_modules().values(), recorded_launches)
    unknown = {found: case for found, case in launched_forms(recorded).items() if found not in compiled}
    assert not unknown, "no variant and no call in recorded_launches.py has:\n" + listed(unknown)


def test_every_form_that_ships_is_launched(recorded, arch):
    shipped, launched = forms_of(arch, *kernel_modules().values()), launched_forms(recorded)
    unused = {found: name for found, name in shipped.items() if found not in launched}
    assert not unused, "no call in every_launch.py launches:\n" + listed(unused)


@pytest.mark.skipif(not can_compile(), reason="Triton 3.2 has other attributes")
def test_launches_have_the_attributes_that_are_compiled(recorded, arch):
    variants = [variant for module in kernel_modules().values() for variant in module.variants(arch)]
    compiled = {name for each in variants for given in attributes_of(each, arch).values() for name, _ in given}
    assert {name for launch in recorded["launches"] for name in launch["attributes"]} == compiled


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
    wrong = {launch["case"]: found for launch in faulty["launches"] if (found := faults(launch, HOPPER))}
    assert set(wrong) == {"no program"}


def test_forms_tell_kernels_apart_and_not_their_data():
    arguments = ["*fp16", "None", "i32", "tensordesc<fp16[128, 64]>"]
    assert [kind(argument) for argument in arguments] == ["pointer", "None", "number", "[128, 64]"]
    assert [kind(argument) for argument in ("*i64", "1", "fp32")] == ["pointer", "number", "number"]
    forms = {form("fill", {"values": "*fp16"}, *options) for options in ((4, 1), (8, 1), (4, 2))}
    assert len(forms) == 3


def test_what_is_recorded(faulty):
    launches = {launch["case"]: launch for launch in faulty["launches"]}
    assert launches["sound"] == {
        "case": "sound",
        "kernel": "fill",
        "types": {"values": "*fp32", "number": "fp32"},
        "constexprs": {"BLOCK": "64"},
        "attributes": ["tt.divisibility"] if can_compile() else [],
        "num_warps": 4,
        "num_stages": 3,
        "grid": [2, 1, 1],
        "threads": 128,
        "shared": 0,
    }
    assert launches["another number"] == launches["sound"] | {"case": "another number", "grid": [3, 1, 1]}
    other = launches["another block"]
    assert (other["constexprs"], other["num_warps"], other["grid"]) == ({"BLOCK": "32"}, 1, [1, 2, 1])
