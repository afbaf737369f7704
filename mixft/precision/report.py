"""What a precision policy did to each module, as a table."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class ModulePrecision:
    """What one module with parameters of its own got.

    Attributes:
        name: the module's qualified name.
        kind: its class.
        dtype: of its inputs and parameters.
        pattern: the rule that decided; empty where none matched and the module was left as it was.
        parameters: elements of its own parameters.
        parameter_dtype: of its parameters: FP32 for a layer with running statistics, whatever its inputs are.
    """

    name: str
    kind: str
    dtype: torch.dtype
    pattern: str
    parameters: int
    parameter_dtype: torch.dtype


@dataclass(frozen=True)
class PolicyReport:
    """What :meth:`mixft.PrecisionPolicy.apply` did; ``print`` shows it as a table."""

    modules: list[ModulePrecision] = field(default_factory=list)

    def __str__(self) -> str:
        columns = ("module", "class", "dtype", "rule", "parameters")
        rows = [
            (row.name or "(the model)", row.kind, _dtypes(row), repr(row.pattern) if row.pattern else "none", row)
            for row in self.modules
        ]
        widths = [max((len(row[place]) for row in rows), default=0) for place in range(4)]
        widths = [max(width, len(column)) for width, column in zip(widths, columns, strict=False)]

        def line(texts, count: str) -> str:
            return "  ".join([*(f"{text:{width}}" for text, width in zip(texts, widths, strict=True)), f"{count:>12}"])

        lines = [line(columns[:4], columns[4])]
        lines += [line(row[:4], f"{row[4].parameters:,}") for row in rows]
        for dtype in dict.fromkeys(row.parameter_dtype for row in self.modules):
            count = sum(row.parameters for row in self.modules if row.parameter_dtype == dtype)
            lines.append(f"{_name(dtype)}: {count:,} parameters")
        return "\n".join(lines)


def _dtypes(row: ModulePrecision) -> str:
    if row.dtype == row.parameter_dtype:
        return _name(row.dtype)
    return f"{_name(row.dtype)}, parameters {_name(row.parameter_dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
