"""Compile a shipped kernel variant for any architecture, without a GPU, and read what the compiler made of it.

Run this in a process without ``TRITON_INTERPRET``: a jit function made under the interpreter cannot be compiled.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .architecture import Architecture
from .occupancy import Occupancy, occupancy
from .traffic import Estimate, Tiling, bytes_per_element, estimate, tiling
from .variant import Elementwise, MatrixProduct, Variant

# The path inside Triton's wheel, as not every supported release has a module that tells it.
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Before it ASTSource took a kernel's arguments in another form, and there was no target newer than Hopper.
OLDEST_TRITON = (3, 3)


@dataclass(frozen=True)
class CompiledVariant:
    """What the compiler made of one ``Variant``.

    Attributes:
        name: the variant's name.
        architecture: the name of the architecture.
        num_warps: warps a program.
        num_stages: software pipeline stages.
        registers: registers a thread (CUDA), vector registers a lane (HIP).
        spilled_bytes: bytes a thread keeps in local memory for want of registers.
        shared_memory: bytes of shared memory a program.
        tensor_memory: columns of tensor memory a program; 0 but on sm_100.
        occupancy: programs that run at a time, and what limits them.
        dots: the tile products (``tl.dot``) of the source, each by its accumulator, such as ``"128x256xf32"``.
        matrix_instructions: the kinds in use, of ``"mma.sync"``, ``"wgmma"``, ``"tcgen05.mma"`` and ``"mfma"``.
        loads: ``{bytes a thread and instruction: instructions}`` from global memory.
        stores: the same, to global memory.
        tile_copies: copies of whole tiles by tensor descriptor, to and from global memory.
        wide_loads: the variant's own claim.
        work: what it moves and computes, as the variant says.
        bytes_per_element: of an elementwise kernel, counted in its compiled code; None for others.
        tiling: of a matrix product; None for others.
        estimate: the least time of a stated problem; None where the variant states no work.
    """

    name: str
    architecture: str
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_memory: int
    tensor_memory: int
    occupancy: Occupancy
    dots: tuple[str, ...]
    matrix_instructions: tuple[str, ...]
    loads: dict[int, int]
    stores: dict[int, int]
    tile_copies: int
    wide_loads: bool
    work: Elementwise | MatrixProduct | None
    bytes_per_element: float | None
    tiling: Tiling | None
    estimate: Estimate | None


def kernel_modules() -> dict[str, ModuleType]:
    """Every module of this package that ships kernels, that is, has ``variants``, by its short name."""
    package = importlib.import_module(__package__)
    modules = {
        entry.name: importlib.import_module(f"{__package__}.{entry.name}")
        for entry in pkgutil.iter_modules(package.__path__)
    }
    return {name: module for name, module in modules.items() if hasattr(module, "variants")}


def can_compile() -> bool:
    """Whether this release of Triton is one that :func:`compile_variant` works with."""
    return tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST_TRITON


def compile_variant(variant: Variant, arch: Architecture) -> CompiledVariant:
    """Compile ``variant`` for ``arch``.

    Raises:
        RuntimeError: the process runs under ``TRITON_INTERPRET=1``, or Triton is older than 3.3.
        ValueError: an argument of the jit function has neither a type nor a value in ``variant``.
        triton.TritonError: the code does not compile for that architecture.
    """
    if not isinstance(variant.function, triton.JITFunction):
        raise RuntimeError(f"{variant.name} was defined under TRITON_INTERPRET=1; unset it to compile kernels")
    if not can_compile():
        raise RuntimeError(f"compiling without a GPU needs Triton 3.3 or newer; this is {triton.__version__}")
    kernel = triton.compile(
        _source(variant, arch),
        target=GPUTarget(arch.backend, arch.capability, arch.warp_size),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    ttir, work = kernel.asm["ttir"], variant.work
    resources = _hip_resources(kernel) if arch.backend == "hip" else _cuda_resources(kernel)
    tensor_memory = getattr(kernel.metadata, "tmem_size", 0)
    resident = occupancy(arch, variant.num_warps, resources["registers"], resources["shared_memory"], tensor_memory)
    return CompiledVariant(
        name=variant.name,
        architecture=arch.name,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        tensor_memory=tensor_memory,
        occupancy=resident,
        dots=tuple(re.findall(r"tt\.dot .*-> tensor<(\w+)>", ttir)),
        wide_loads=variant.wide_loads,
        work=work,
        bytes_per_element=bytes_per_element(ttir, work.elements) if isinstance(work, Elementwise) else None,
        tiling=tiling(work, arch.gpu, resident.programs) if isinstance(work, MatrixProduct) else None,
        estimate=estimate(work, arch.gpu) if work else None,
        **resources,
    )


def faults(compiled: CompiledVariant, arch: Architecture) -> list[str]:
    """What no shipped kernel may do, one sentence a fault."""
    found = []
    if compiled.spilled_bytes:
        found.append(f"spills {compiled.spilled_bytes} bytes a thread")
    if compiled.shared_memory > arch.shared_memory:
        found.append(f"needs {compiled.shared_memory} bytes of shared memory of {arch.shared_memory}")
    if compiled.dots and arch.tensor_cores and not compiled.matrix_instructions:
        found.append("multiplies tiles without tensor cores")
    if compiled.wide_loads and not compiled.dots and max(compiled.loads, default=16) < 16:
        found.append(f"loads at most {max(compiled.loads)} bytes an instruction")
    return found


def attributes_of(variant: Variant, arch: Architecture) -> dict[tuple[int], list]:
    """What a launch tells the compiler of its arguments beside their types, by their places."""
    attributes = {name: [["tt.divisibility", 16]] for name in variant.divisible_by_16}
    if arch.backend == "hip":
        # Offsets into a tensor that takes less than 2 GiB have 32 bits.
        for name in (name for name, kind in variant.signature.items() if kind.startswith("*")):
            attributes.setdefault(name, []).append(["tt.pointer_range", 32])
    return {(variant.function.arg_names.index(name),): found for name, found in attributes.items()}


def _source(variant: Variant, arch: Architecture) -> ASTSource:
    names = variant.function.arg_names
    missing = [name for name in names if name not in variant.signature and name not in variant.constexprs]
    unknown = [name for name in (*variant.signature, *variant.constexprs) if name not in names]
    if missing or unknown:
        raise ValueError(f"{variant.name}: arguments without type or value {missing}, unknown arguments {unknown}")
    signature = {name: "constexpr" if name in variant.constexprs else variant.signature[name] for name in names}
    return ASTSource(variant.function, signature, variant.constexprs, attributes_of(variant, arch))


def _cuda_resources(kernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [str(CUOBJDUMP), "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = kernel.asm["ptx"]
    loads = _ptx_widths(ptx, "ld")
    # cp.async names its bytes as the third operand.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], \[[^\]]*\], (0x\w+|\d+)", ptx)
    loads.update(int(size, 0) for size in copies)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_memory": kernel.metadata.shared,
        "matrix_instructions": tuple(sorted(set(re.findall(r"\b(mma\.sync|wgmma(?=\.mma_async)|tcgen05\.mma)", ptx)))),
        "loads": dict(loads),
        "stores": dict(_ptx_widths(ptx, "st")),
        "tile_copies": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
    }


def _ptx_widths(ptx: str, instruction: str) -> Counter[int]:
    accesses = re.findall(rf"\b{instruction}\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in accesses)


_HIP_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _hip_resources(kernel) -> dict:
    code = kernel.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"^\s+\.{key}:\s*(\d+)", code, re.MULTILINE)[1])

    accesses = {"load": Counter(), "store": Counter()}
    pattern = r"\b(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dwordx[234]|dword)"
    for direction, size in re.findall(pattern, code):
        accesses[direction][_HIP_BYTES[size]] += 1
    spilled = 4 * (metadata("vgpr_spill_count") + metadata("sgpr_spill_count"))
    return {
        "registers": metadata("vgpr_count"),
        "spilled_bytes": max(spilled, metadata("private_segment_fixed_size")),
        # Triton asks for its shared memory at launch; the group segment holds what is fixed at compile time.
        "shared_memory": max(kernel.metadata.shared, metadata("group_segment_fixed_size")),
        "matrix_instructions": ("mfma",) if "v_mfma_" in code else (),
        "loads": dict(accesses["load"]),
        "stores": dict(accesses["store"]),
        "tile_copies": 0,
    }
