"""A shipped kernel variant: what the compiler needs to build one jit function as a launcher would launch it."""

from dataclasses import dataclass
from typing import Any

# Of an element, by Triton's name of its type.
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Elementwise:
    """The work of a kernel that memory bandwidth bounds.

    Attributes:
        elements: elements that one program covers in one iteration of its main loop, or at once where it has no loop.
        floor_bytes: bytes an element that no implementation of the same launch can do without: each operand read or
            written once, at its own width.
    """

    elements: int
    floor_bytes: float


@dataclass(frozen=True)
class MatrixProduct:
    """The work of a kernel that multiplies [M, K] by [K, N].

    Attributes:
        tile: (rows, columns, depth) of the product of one iteration of a program's loop.
        operand_bytes: bytes an element of the left operand, the right one and the result.
        shape: (M, N, K) of a product that this variant serves, for which times are stated.
        int8: whether the matrix instructions take int8 operands.
    """

    tile: tuple[int, int, int]
    operand_bytes: tuple[int, int, int]
    shape: tuple[int, int, int] = (4096, 4096, 4096)
    int8: bool = False


@dataclass(frozen=True)
class Variant:
    """One (jit function, types, configuration) that a launcher can launch.

    Every kernel module has ``variants(arch: Architecture) -> list[Variant]``; an architecture that the kernel does not
    support gives an empty list.

    Attributes:
        name: unique within its module, for example ``"matmul[fp16,gelu,large]"``.
        function: the ``triton.jit`` function.
        signature: ``{argument: Triton type}`` such as ``"*fp16"``, ``"i32"``; constexpr arguments are left out.
        constexprs: ``{argument: value}``.
        divisible_by_16: names of pointer and integer arguments that the launcher's inputs usually have divisible by 16.
        num_warps: warps a program.
        num_stages: software pipeline stages.
        wide_loads: whether its data is aligned for 128-bit loads, so that the compiled code must have some.
        work: what it moves and computes, from which ``mixft inspect`` works out traffic and time; None where neither
            matters, as in a launch over a few values.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 1
    wide_loads: bool = True
    work: Elementwise | MatrixProduct | None = None


def elementwise_variant(
    function: Any,
    label: str,
    types: dict[str, str],
    constexprs: dict[str, Any],
    indivisible: tuple[str, ...],
    **options,
) -> Variant:
    """The variant ``label`` of ``function``, each of whose arguments is in ``constexprs``, in ``types`` or an i32.

    Args:
        indivisible: arguments that are not usually divisible by 16, as all others are.
        options: of Variant.
    """
    names = function.arg_names
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    signature = {name: types.get(name, "i32") for name in names if name not in constexprs}
    divisible = tuple(name for name in signature if name not in indivisible)
    name = function.__name__.removesuffix("_kernel")
    return Variant(f"{name}[{label}]", function, signature, constexprs, divisible, **options)


def kernel_of(variant: str) -> str:
    """The name of the kernel in a variant's name, the part before the bracket."""
    return variant.partition("[")[0]
