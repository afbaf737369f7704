"""Every shipped kernel variant, compiled to machine code for every architecture, without a GPU."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions

from mixft.kernels import compilation
from mixft.kernels.architecture import ARCHITECTURES
from mixft.kernels.compilation import can_compile, compile_variant, faults, kernel_modules
from mixft.kernels.configuration import configurations
from mixft.kernels.matmul_persistent import PersistentMatmulConfig, has_descriptors
from mixft.kernels.parallel_compilation import Outcome, compile_all, jobs_of
from mixft.kernels.variant import Elementwise, MatrixProduct, Variant

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_compile(), reason="Triton 3.2 does not compile for a GPU that is not there"),
]

MODULES = sorted(kernel_modules())
# Bytes an element beyond the floor and its twentieth.
EXCESS = {
    "quantize_resident[fp16,row 4096,factor]": 4,  # every row reads the factors again, from a cache
    # Every tile of 64 by 64 does so, and reads the magnitudes.
    "gradient_ranges[bf16]": 0.1,
    "round_gradient[bf16]": 0.2,
    "round_gradient[fp32,stochastic]": 0.1,
}
LAUNCHED_ON = ("sm_86", "sm_90", "gfx942")
# A value put aside once in a kernel without a loop: eight bytes of its tile's thousands.
SPILLS_ONCE = {("sm_90", "odd rows, 1: dequantize_kernel")}
# Bytes that ptxas 12, which Triton has for Blackwell before 3.7, puts aside to have one more program resident: a bound
# on the registers, without which it does not, costs a quarter to half of the programs.
BLACKWELL = ("sm_100", "sm_120")
PUT_ASIDE = 8 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0


def outcomes_of(modules: list[str]) -> list[Outcome]:
    return list(compile_all([job for module in modules for arch in ARCHITECTURES for job in jobs_of(module, arch)]))


def complaints(outcome: Outcome) -> list[str]:
    """What is wrong with one variant, one sentence a fault."""
    if outcome.failure is not None:
        return [f"does not compile: {outcome.failure}"]
    return faults(outcome.compiled, ARCHITECTURES[outcome.job.architecture])


def without_put_aside(outcome: Outcome) -> Outcome:
    """The outcome, with no spill where its spill is no more than ``PUT_ASIDE``."""
    if outcome.failure is not None or outcome.compiled.spilled_bytes > PUT_ASIDE:
        return outcome
    return replace(outcome, compiled=replace(outcome.compiled, spilled_bytes=0))


def matrix_instructions(arch: str, dot: str) -> set[str]:
    """The instructions that a tile product with the accumulator ``dot``, such as "128x256xf32", may become."""
    rows, _, accumulator = dot.split("x")
    if arch == "gfx942":
        return {"mfma"}
    # A warp group multiplies at least 64 rows; smaller tiles keep the instruction of a single warp.
    if arch == "sm_90" and int(rows) >= 64:
        return {"wgmma"}
    if arch == "sm_100" and int(rows) >= 64:
        # The fifth-generation instruction takes int8 operands from Triton 3.9 on.
        return {"tcgen05.mma"} if accumulator == "f32" else {"tcgen05.mma", "mma.sync"}
    return {"mma.sync"}


@pytest.fixture(scope="module")
def shipped() -> list[Outcome]:
    return outcomes_of([f"mixft.kernels.{name}" for name in MODULES])


@pytest.fixture(scope="module")
def faulty() -> dict[tuple[str, str], Outcome]:
    return {(outcome.job.variant, outcome.job.architecture): outcome for outcome in outcomes_of(["faulty_kernels"])}


@pytest.fixture(scope="module")
def launched() -> list[Outcome]:
    return list(compile_all([job for arch in LAUNCHED_ON for job in jobs_of("recorded_launches", arch)]))


def select(shipped: list[Outcome], module: str, arch: str) -> list[Outcome]:
    return [
        outcome
        for outcome in shipped
        if outcome.job.module == f"mixft.kernels.{module}" and outcome.job.architecture == arch
    ]


def kernels_of(sources: list[str]) -> set[str]:
    """The jit functions of these modules that no other one calls: what a launcher can launch."""
    defined, called = set(), set()
    for source in sources:
        for node in ast.parse(source).body:
            decorators = map(ast.unparse, getattr(node, "decorator_list", []))
            if any(decorator.startswith("triton.jit") for decorator in decorators):
                defined.add(node.name)
                called |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} - {node.name}
    return defined - called


def test_every_kernel_ships_variants():
    sources = [path.read_text() for path in Path(compilation.__file__).parent.glob("*.py")]
    shipped = {
        variant.function.__name__
        for module in kernel_modules().values()
        for arch in ARCHITECTURES.values()
        for variant in module.variants(arch)
    }
    without = kernels_of(sources) - shipped
    assert not without, "no variants() lists these, so nothing compiles them; those of their module should"


@pytest.mark.parametrize("module", MODULES)
def test_no_argument_has_a_name_of_triton_s_own(module):
    """At a launch Triton writes a function with a kernel's argument names in it beside its own, which would hide them;
    and it takes a keyword that is an option for one."""
    names = {"params", "specialization", "options", "backend", "specialize_impl", "grid", "warmup"}
    options = set(CUDAOptions.__dataclass_fields__) | set(HIPOptions.__dataclass_fields__)
    for variant in kernel_modules()[module].variants(ARCHITECTURES["sm_90"]):
        assert not (names | options) & set(variant.function.arg_names), variant.name


def test_a_kernel_is_told_from_its_helpers():
    helper = "@triton.jit\ndef square(x):\n    return x * x\n"
    kernel = "@triton.jit(do_not_specialize=['n'])\ndef kernel(x, n):\n    square(x)\n"
    assert kernels_of([helper, kernel, "def launch():\n    kernel[1](0, 1)\n"]) == {"kernel"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_shipped_variants(shipped, module, arch):
    outcomes = select(shipped, module, arch)
    names = [variant.name for variant in kernel_modules()[module].variants(ARCHITECTURES[arch])]
    assert sorted(outcome.job.variant for outcome in outcomes) == sorted(names)
    assert len(set(names)) == len(names), "variant names must be unique"
    if arch in BLACKWELL:
        outcomes = [without_put_aside(outcome) for outcome in outcomes]
    wrong = {outcome.job.variant: found for outcome in outcomes if (found := complaints(outcome))}
    assert not wrong


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_a_program_fits_and_moves_what_it_must(shipped, module, arch):
    """An elementwise kernel moves no more than its floor and a twentieth for scales, or ``EXCESS`` says why."""
    for outcome in select(shipped, module, arch):
        found, name = outcome.compiled, outcome.job.variant
        assert found.occupancy.programs >= 1, name
        if isinstance(found.work, Elementwise):
            allowed = found.work.floor_bytes * 1.05 + EXCESS.get(name, 0)
            assert found.work.floor_bytes <= found.bytes_per_element <= allowed, name
        assert isinstance(found.work, MatrixProduct) == bool(found.dots), name


@pytest.mark.parametrize("arch", [arch.name for arch in ARCHITECTURES.values() if arch.tensor_cores])
@pytest.mark.parametrize("module", MODULES)
def test_tile_products_use_the_architecture_s_matrix_instruction(shipped, module, arch):
    wrong = {
        found.name: (found.dots, found.matrix_instructions)
        for found in (outcome.compiled for outcome in select(shipped, module, arch))
        if not all(matrix_instructions(arch, dot) & set(found.matrix_instructions) for dot in found.dots)
    }
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_a_kernel_supports_every_architecture_or_only_lacks_the_one_without_tensor_cores(module):
    supported = {name for name, arch in ARCHITECTURES.items() if kernel_modules()[module].variants(arch)}
    if module == "matmul_persistent":
        assert supported == ({"sm_90", "sm_100"} if has_descriptors() else set())
    else:
        assert supported >= set(ARCHITECTURES) - {"sm_75"}


@pytest.mark.skipif(not has_descriptors(), reason="this Triton has no tensor descriptors")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_the_persistent_product_copies_tiles_by_descriptor(shipped, arch):
    """Pointers read the bias and write column sums, and nothing else."""
    for outcome in select(shipped, "matmul_persistent", arch):
        found = outcome.compiled
        assert found.tile_copies >= 3, found.name
        assert found.matrix_instructions == (("wgmma",) if arch == "sm_90" else ("tcgen05.mma",))
        assert bool(found.loads) == ("forward" in found.name), found.name
        assert bool(found.stores) == ("slope" in found.name), found.name


@pytest.mark.skipif(not has_descriptors(), reason="this Triton has no tensor descriptors")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_as_many_persistent_programs_are_resident_as_are_launched(shipped, arch):
    table = configurations("matmul_persistent", PersistentMatmulConfig)
    for outcome in select(shipped, "matmul_persistent", arch):
        bucket = outcome.job.variant.partition("[")[2].partition(",")[0]
        assert outcome.compiled.occupancy.programs >= table[arch, bucket].PROGRAMS, outcome.job.variant


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
    sound = faulty["sound", "sm_80"]
    plain = replace(sound, compiled=replace(sound.compiled, matrix_instructions=()))
    assert "multiplies tiles without tensor cores" in complaints(plain)


@pytest.mark.parametrize("arch", LAUNCHED_ON)
def test_what_launchers_launch(launched, arch):
    """Integers of 1, single rows, ragged and odd sizes: no spills, and wide accesses wherever they are possible."""
    outcomes = [outcome for outcome in launched if outcome.job.architecture == arch]
    assert len(outcomes) > 40
    wrong = {outcome.job.variant: found for outcome in outcomes if (found := complaints(outcome))}
    assert {(arch, name) for name in wrong} <= SPILLS_ONCE, wrong
    for found in (outcome.compiled for outcome in outcomes):
        # A range is a few values a program; all else writes as many as it reads.
        if found.wide_loads and "partial_ranges" not in found.name:
            assert max(found.stores) == 16, found.name


def test_interpreted_kernels_are_refused():
    from faulty_kernels import double

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_variant(Variant("double", double, {}, {}), ARCHITECTURES["sm_80"])
