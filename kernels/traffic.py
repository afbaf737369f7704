"""What a kernel asks of global memory, counted in its compiled code, and the least time that its work can take.

Bytes are counted in Triton's own intermediate code (TTIR): it has every load and store once, whatever loops the
back end unrolls later, and a back end neither adds accesses to it nor drops any. Times follow from a GPU's published
rates alone; they are floors, not measurements.
"""

import math
import re
from dataclasses import dataclass

from .architecture import Gpu
from .variant import Elementwise, MatrixProduct

ELEMENTS = 100_000_000
TENSOR_ACCESS = re.compile(r"tt\.(?:load|store) .*tensor<(?P<shape>[\dx]+)x!tt\.ptr<(?P<type>\w+)>")
LOCATION = re.compile(r" loc\(#\w*\)$")
BITS = re.compile(r"\d+$")


def bytes_per_element(ttir: str, elements: int) -> float:
    """Bytes of global memory that a kernel's main loop reads and writes for each of its ``elements``.

    The main loop is the innermost one that moves anything, the one that moves the most where several are as deep, and
    the whole kernel where it has no such loop; of the branches inside it, the one that moves the most counts. Accesses
    of a single value are left out.
    """
    _, moved = max(region for region in _regions(ttir) if region[1])
    return moved / elements


def _regions(ttir: str) -> list[tuple[int, int]]:
    """(depth, bytes moved) of the function's body and of one iteration of each of its loops, inner loops left out."""
    finished = []
    # One entry a nested region: whether it is a loop, its bytes, and those of an if's first branch.
    stack = [[True, 0, 0]]
    for line in ttir.splitlines():
        text = LOCATION.sub("", line.strip())
        if access := TENSOR_ACCESS.search(text):
            stack[-1][1] += _bytes(access["shape"], access["type"])
        if text.startswith("} do"):  # the body of a loop, after its condition
            continue
        if text.startswith("} else"):
            stack[-1][1:] = [0, stack[-1][1]]
            continue
        if text.startswith("}") and len(stack) > 1:
            is_loop, moved, other_branch = stack.pop()
            if is_loop:
                finished.append((sum(region[0] for region in stack), moved))
            else:
                stack[-1][1] += max(moved, other_branch)
        if text.endswith("{"):
            stack.append([bool(re.search(r"\b(scf\.for|scf\.while|tt\.func)\b", text)), 0, 0])
    return finished


def _bytes(shape: str, kind: str) -> int:
    elements = 1
    for extent in shape.split("x"):
        elements *= int(extent)
    return elements * max(int(BITS.search(kind)[0]) // 8, 1)


@dataclass(frozen=True)
class Estimate:
    """What a stated problem costs at the least, at a GPU's published rates.

    Attributes:
        problem: elements, or (M, N, K).
        seconds: the least time, the larger of the two below.
        memory_seconds: time to read each operand once and write the result once.
        compute_seconds: time of the operations on the matrix instructions; 0 for an elementwise kernel.
    """

    problem: int | tuple[int, int, int]
    seconds: float
    memory_seconds: float
    compute_seconds: float


def estimate(work: Elementwise | MatrixProduct, gpu: Gpu) -> Estimate:
    """The floor under ``ELEMENTS`` elements of an elementwise kernel, or under the product that ``work`` names."""
    if isinstance(work, Elementwise):
        memory = ELEMENTS * work.floor_bytes / gpu.bandwidth
        return Estimate(ELEMENTS, memory, memory, 0.0)
    M, N, K = work.shape
    left, right, result = work.operand_bytes
    memory = (M * K * left + N * K * right + M * N * result) / gpu.bandwidth
    compute = 2 * M * N * K / (gpu.int8_rate if work.int8 else gpu.float16_rate)
    return Estimate(work.shape, max(memory, compute), memory, compute)


@dataclass(frozen=True)
class Tiling:
    """How a product's tiles use a GPU.

    Attributes:
        intensity: operations a byte that a program reads for its tile.
        programs: tiles of the stated product.
        waves: rounds in which all of the GPU's multiprocessors together work through them; a fraction fills no round.
        busy: share of the multiprocessors that have work, on average over the rounds.
    """

    intensity: float
    programs: int
    waves: float
    busy: float


def tiling(work: MatrixProduct, gpu: Gpu, programs_a_multiprocessor: int) -> Tiling:
    """The tiles of ``work`` on ``gpu``, whose every multiprocessor holds so many programs."""
    rows, columns, _ = work.tile
    left, right, _ = work.operand_bytes
    M, N, _ = work.shape
    programs = -(-M // rows) * -(-N // columns)
    waves = programs / (gpu.multiprocessors * max(programs_a_multiprocessor, 1))
    return Tiling(
        intensity=2 * rows * columns / (rows * left + columns * right),
        programs=programs,
        waves=waves,
        # Less than a round is spread over the multiprocessors, one program each, before any gets a second.
        busy=waves / math.ceil(waves) if waves > 1 else min(programs / gpu.multiprocessors, 1.0),
    )
