"""How many programs of a kernel one multiprocessor holds at a time, and what limits them.

Each resource allows a number of programs, and the least of them counts. Registers are given to a warp, in units, out of
its own partition's; shared memory to a program, in units, beside what the system reserves (NVIDIA: cuda_occupancy.h of
the CUDA toolkit; AMD: the same sums over the vector registers of a SIMD, as LLVM's AMDGPU target does them).
"""

from dataclasses import dataclass

from .architecture import Architecture


@dataclass(frozen=True)
class Occupancy:
    """Programs that run at the same time on one multiprocessor.

    Attributes:
        programs: how many; 0 where not even one fits.
        warps: their warps together.
        fraction: ``warps`` of the most that the multiprocessor holds.
        limits: the resources that allow no more: ``"warps"``, ``"programs"``, ``"registers"``, ``"shared memory"`` or
            ``"tensor memory"``.
    """

    programs: int
    warps: int
    fraction: float
    limits: tuple[str, ...]


def occupancy(
    arch: Architecture, num_warps: int, registers: int, shared_memory: int, tensor_memory: int = 0
) -> Occupancy:
    """The occupancy of a kernel.

    Args:
        arch: where it runs.
        num_warps: warps a program.
        registers: 32-bit registers a thread.
        shared_memory: bytes a program.
        tensor_memory: columns of tensor memory a program.
    """
    shared = arch.multiprocessor
    allowed = {"warps": shared.warps // num_warps, "programs": shared.programs}
    if registers:
        warps_a_partition = shared.registers // _round_up(registers * arch.warp_size, shared.register_unit)
        allowed["registers"] = warps_a_partition * shared.partitions // num_warps
    if shared_memory + shared.shared_memory_reserved:
        taken = _round_up(shared_memory + shared.shared_memory_reserved, shared.shared_memory_unit)
        allowed["shared memory"] = shared.shared_memory // taken
    if tensor_memory:
        allowed["tensor memory"] = shared.tensor_memory // tensor_memory
    programs = min(allowed.values())
    return Occupancy(
        programs=programs,
        warps=programs * num_warps,
        fraction=programs * num_warps / shared.warps,
        limits=tuple(name for name, number in allowed.items() if number == programs),
    )


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
