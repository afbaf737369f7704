"""The GPU architectures that kernels are compiled for, and the limits that a launch configuration must keep."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one streaming multiprocessor (NVIDIA) or compute unit (AMD) share.

    Attributes:
        warps: most warps at a time.
        programs: most programs (thread blocks, work groups) at a time.
        shared_memory: bytes of shared memory.
        shared_memory_unit: bytes that a program's share is rounded up to.
        shared_memory_reserved: bytes that the system adds to every program's share.
        registers: 32-bit registers in each partition; vector registers times lanes on AMD.
        register_unit: registers that a warp's share is rounded up to.
        partitions: schedulers, each with its own registers and an equal part of the warps.
        tensor_memory: columns of tensor memory; 0 where there is none.
    """

    warps: int
    programs: int
    shared_memory: int
    shared_memory_unit: int = 128
    shared_memory_reserved: int = 1024
    registers: int = 16384
    register_unit: int = 256
    partitions: int = 4
    tensor_memory: int = 0


@dataclass(frozen=True)
class Gpu:
    """A product of an architecture, as its maker's published figures have it; none of them is a measurement.

    Attributes:
        name: the product.
        multiprocessors: streaming multiprocessors or compute units.
        bandwidth: of its memory, bytes a second.
        float16_rate: FP16 or BF16 operations a second with FP32 accumulation, dense, on matrix instructions.
        int8_rate: int8 operations a second, dense, on matrix instructions.
        source: where the figures are published.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    float16_rate: float
    int8_rate: float
    source: str


@dataclass(frozen=True)
class Architecture:
    """One GPU architecture.

    Attributes:
        name: ``sm_90`` style for CUDA, the gfx name for HIP.
        backend: ``"cuda"`` or ``"hip"``, Triton's name of the backend.
        capability: Triton's target: 90 for sm_90, the gfx name for HIP.
        warp_size: threads a warp.
        shared_memory: bytes of shared memory that one program may use.
        tensor_cores: whether current Triton lowers ``tl.dot`` on 16-bit and int8 operands to matrix instructions.
        multiprocessor: what programs that run at the same time share.
        gpu: the product that stands for the architecture where time is estimated without a device.
    """

    name: str
    backend: str
    capability: int | str
    warp_size: int
    shared_memory: int
    tensor_cores: bool
    multiprocessor: Multiprocessor
    gpu: Gpu


# NVIDIA: CUDA C++ programming guide, "technical specifications per compute capability", and the allocation units of
# cuda_occupancy.h. AMD: CDNA3 ISA guide; LLVM's AMDGPU target for the units and for the most waves and work groups.
KIB = 1024
TURING = Multiprocessor(32, 16, 64 * KIB, shared_memory_unit=256, shared_memory_reserved=0)
AMPERE = Multiprocessor(64, 32, 164 * KIB)
AMPERE_CONSUMER = Multiprocessor(48, 16, 100 * KIB)
ADA = Multiprocessor(48, 24, 100 * KIB)
HOPPER = Multiprocessor(64, 32, 228 * KIB)
BLACKWELL = Multiprocessor(64, 32, 228 * KIB, tensor_memory=512)
BLACKWELL_CONSUMER = Multiprocessor(48, 24, 100 * KIB)
CDNA3 = Multiprocessor(
    32, 16, 64 * KIB, shared_memory_unit=512, shared_memory_reserved=0, registers=512 * 64, register_unit=8 * 64
)

T4 = Gpu("T4", 40, 0.320e12, 65e12, 130e12, "NVIDIA T4 product page; Turing architecture white paper")
A100 = Gpu("A100 80GB SXM", 108, 2.039e12, 312e12, 624e12, "NVIDIA A100 data sheet")
RTX_3090 = Gpu("RTX 3090", 82, 0.936e12, 71e12, 284e12, "NVIDIA Ampere GA102 architecture white paper")
RTX_4090 = Gpu("RTX 4090", 128, 1.008e12, 165.2e12, 660.6e12, "NVIDIA Ada architecture white paper")
H100 = Gpu("H100 SXM", 132, 3.35e12, 989.4e12, 1978.9e12, "NVIDIA H100 data sheet; Hopper architecture white paper")
B200 = Gpu(
    "B200", 148, 7.7e12, 2250e12, 4500e12, "NVIDIA Blackwell data sheet, HGX B200; multiprocessors as CUDA reports"
)
RTX_5090 = Gpu("RTX 5090", 170, 1.792e12, 209.5e12, 838e12, "NVIDIA RTX Blackwell architecture white paper")
MI300X = Gpu("MI300X", 304, 5.3e12, 1307.4e12, 2614.9e12, "AMD Instinct MI300X data sheet")

ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("sm_75", "cuda", 75, 32, 64 * KIB, False, TURING, T4),
        Architecture("sm_80", "cuda", 80, 32, 163 * KIB, True, AMPERE, A100),
        Architecture("sm_86", "cuda", 86, 32, 99 * KIB, True, AMPERE_CONSUMER, RTX_3090),
        Architecture("sm_89", "cuda", 89, 32, 99 * KIB, True, ADA, RTX_4090),
        Architecture("sm_90", "cuda", 90, 32, 227 * KIB, True, HOPPER, H100),
        Architecture("sm_100", "cuda", 100, 32, 227 * KIB, True, BLACKWELL, B200),
        Architecture("sm_120", "cuda", 120, 32, 99 * KIB, True, BLACKWELL_CONSUMER, RTX_5090),
        Architecture("gfx942", "hip", "gfx942", 64, 64 * KIB, True, CDNA3, MI300X),
    )
}


@functools.cache
def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a CUDA or ROCm ``device``; for a CPU (the interpreter) sm_86, which
    has the smallest limits of those with tensor cores.

    On CUDA a newer minor revision is served by the highest listed architecture of the same major number.

    Raises:
        RuntimeError: the device is of no listed architecture and of no such revision.
    """
    if device.type == "cpu":
        return ARCHITECTURES["sm_86"]
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if name not in ARCHITECTURES:
            raise RuntimeError(f"mixft has no kernels for {name}; it supports {', '.join(ARCHITECTURES)}")
        return ARCHITECTURES[name]
    major, minor = torch.cuda.get_device_capability(device)
    fitting = [
        arch
        for arch in ARCHITECTURES.values()
        if arch.backend == "cuda" and arch.capability // 10 == major and arch.capability <= 10 * major + minor
    ]
    if not fitting:
        raise RuntimeError(
            f"mixft has no kernels for compute capability {major}.{minor}; it supports {', '.join(ARCHITECTURES)}"
        )
    return max(fitting, key=lambda arch: arch.capability)


@functools.cache
def multiprocessors_of(device: torch.device, arch: Architecture) -> int:
    """Streaming multiprocessors or compute units of ``device``; for a CPU (the interpreter) those of ``arch``'s GPU."""
    if device.type == "cpu":
        return arch.gpu.multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count
