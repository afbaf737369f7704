"""A shipped kernel variant: what the compiler needs to build one jit function as a launcher would launch it."""

from dataclasses import dataclass, field
from typing import Any


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
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    wide_loads: bool = True
