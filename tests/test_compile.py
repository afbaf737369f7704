"""Every shipped kernel variant, compiled to machine code for every architecture, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixft.kernels.architecture import ARCHITECTURES
from mixft.kernels.compilation import compile_variant, kernel_modules
from mixft.kernels.variant import Variant

pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).parent
MODULES = sorted(kernel_modules())
SHIPPED = {"adamw", "grad", "int8_matmul", "matmul", "quantize"}
PROCESSES = 2


def compile_all(modules: list[str]) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "compile_worker.py"), str(share), str(PROCESSES), *modules],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in range(PROCESSES)
    ]
    records = []
    for worker in workers:
        output, log = worker.communicate()
        assert worker.returncode == 0, log[-4000:]
        records += [json.loads(line) for line in output.splitlines()]
    return records


def complaints(record: dict) -> list[str]:
    """What is wrong with one compiled variant, one sentence a fault."""
    if record["failure"]:
        return [f"does not compile: {record['failure']}"]
    arch = ARCHITECTURES[record["architecture"]]
    found = []
    if record["spilled_bytes"]:
        found.append(f"spills {record['spilled_bytes']} bytes a thread")
    if record["shared_memory"] > arch.shared_memory:
        found.append(f"needs {record['shared_memory']} bytes of shared memory of {arch.shared_memory}")
    if record["dots"] and arch.tensor_cores and not record["matrix_instructions"]:
        found.append("multiplies tiles without tensor cores")
    if record["wide_loads"] and not record["dots"] and max(map(int, record["loads"]), default=16) < 16:
        found.append(f"loads at most {max(map(int, record['loads']))} bytes an instruction")
    return found


def matrix_instruction(arch: str, dot: str) -> str:
    """The instruction that a tile product with the accumulator ``dot``, such as "128x256xf32", must become."""
    rows, _, accumulator = dot.split("x")
    if arch == "gfx942":
        return "mfma"
    # A warp group multiplies at least 64 rows; smaller tiles keep the instruction of a single warp.
    if arch == "sm_90" and int(rows) >= 64:
        return "wgmma"
    # The fifth-generation instruction takes no int8 operands in Triton.
    if arch == "sm_100" and int(rows) >= 64 and accumulator == "f32":
        return "tcgen05.mma"
    return "mma.sync"


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return compile_all([f"mixft.kernels.{name}" for name in MODULES])


@pytest.fixture(scope="module")
def faulty() -> dict[tuple[str, str], dict]:
    records = compile_all(["faulty_kernels"])
    return {(record["name"], record["architecture"]): record for record in records}


def select(compiled: list[dict], module: str, arch: str) -> list[dict]:
    return [
        record
        for record in compiled
        if record["module"] == f"mixft.kernels.{module}" and record["architecture"] == arch
    ]


def test_every_op_ships_variants():
    assert set(MODULES) >= SHIPPED


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_shipped_variants(compiled, module, arch):
    records = select(compiled, module, arch)
    names = [variant.name for variant in kernel_modules()[module].variants(ARCHITECTURES[arch])]
    assert sorted(record["name"] for record in records) == sorted(names)
    assert len(set(names)) == len(names), "variant names must be unique"
    faults = {record["name"]: found for record in records if (found := complaints(record))}
    assert not faults


@pytest.mark.parametrize("arch", [arch.name for arch in ARCHITECTURES.values() if arch.tensor_cores])
@pytest.mark.parametrize("module", MODULES)
def test_tile_products_use_the_architecture_s_matrix_instruction(compiled, module, arch):
    wrong = {
        record["name"]: (record["dots"], record["matrix_instructions"])
        for record in select(compiled, module, arch)
        if not {matrix_instruction(arch, dot) for dot in record["dots"]} <= set(record["matrix_instructions"])
    }
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_a_kernel_supports_every_architecture_or_only_lacks_the_one_without_tensor_cores(module):
    supported = {name for name, arch in ARCHITECTURES.items() if kernel_modules()[module].variants(arch)}
    assert supported >= set(ARCHITECTURES) - {"sm_75"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("spilling", "spills"),
        ("oversized", "shared memory"),
        ("scalar", "loads at most 4 bytes"),
        ("failing", "name_that_no_tensor_has"),
    ],
)
def test_a_faulty_kernel_is_reported(faulty, arch, name, complaint):
    assert any(complaint in found for found in complaints(faulty[name, arch]))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["sound", "aligned"])
def test_a_sound_kernel_is_not_reported(faulty, arch, name):
    assert complaints(faulty[name, arch]) == []


def test_a_tile_product_without_tensor_cores_is_reported(faulty):
    assert "multiplies tiles without tensor cores" in complaints(faulty["sound", "sm_80"] | {"matrix_instructions": []})


def test_interpreted_kernels_are_refused():
    from faulty_kernels import double

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_variant(Variant("double", double, {}, {}), ARCHITECTURES["sm_80"])
