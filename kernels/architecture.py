"""The GPU architectures that kernels are compiled for, and the limits that a launch configuration must keep."""

import functools
from dataclasses import dataclass

import torch


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
    """

    name: str
    backend: str
    capability: int | str
    warp_size: int
    shared_memory: int
    tensor_cores: bool


# Shared memory: CUDA C++ programming guide, "technical specifications per compute capability"; AMD CDNA3 ISA guide.
ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("sm_75", "cuda", 75, 32, 64 * 1024, False),
        Architecture("sm_80", "cuda", 80, 32, 163 * 1024, True),
        Architecture("sm_86", "cuda", 86, 32, 99 * 1024, True),
        Architecture("sm_89", "cuda", 89, 32, 99 * 1024, True),
        Architecture("sm_90", "cuda", 90, 32, 227 * 1024, True),
        Architecture("sm_100", "cuda", 100, 32, 227 * 1024, True),
        Architecture("sm_120", "cuda", 120, 32, 99 * 1024, True),
        Architecture("gfx942", "hip", "gfx942", 64, 64 * 1024, True),
    )
}


@functools.cache
def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a CUDA or ROCm ``device``; for a CPU (the interpreter) the one with the smallest limits.

    A newer minor revision is served by the highest listed architecture of the same major number.

    Raises:
        RuntimeError: the device is older than every listed architecture.
    """
    if device.type == "cpu":
        return ARCHITECTURES["sm_86"]
    if torch.version.hip:
        return ARCHITECTURES["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    fitting = [
        arch
        for arch in ARCHITECTURES.values()
        if arch.backend == "cuda" and arch.capability // 10 == major and arch.capability <= 10 * major + minor
    ]
    if not fitting:
        raise RuntimeError(
            f"mixft has no kernels for compute capability {major}.{minor}; it supports "
            + ", ".join(name for name in ARCHITECTURES)
        )
    return max(fitting, key=lambda arch: arch.capability)
