"""int8 quantization, its axes and both formulas, and dequantization."""

import torch
from torch import Tensor

import mixft
from mixft.benchmarks.case import Case, compiled, each
from mixft.benchmarks.peers import peer

from .shapes import SHORT

AXES = {"row": -1, "column": 0, "tensor": None, "group": -1}
GROUP = 128


def quantize(rows: int, columns: int, dtype: torch.dtype, axis: str = "row", symmetric: bool = True, **options) -> Case:
    """A matrix with one scale a row, a column, 128 elements of a row or the matrix, against the formula in torch."""
    group_size = GROUP if axis == "group" else None
    dim = AXES[axis]

    def ours(x):
        return mixft.ops.quantize(x, dim=dim, group_size=group_size, symmetric=symmetric)

    def plain(x):
        x = x.view(rows, -1, GROUP) if group_size else x
        axes = (0, 1) if dim is None else dim
        if symmetric:
            scale = x.abs().amax(axes, keepdim=True).float() / 127
            return (x.float() / scale).round_().clamp_(-127, 127).to(torch.int8), scale, None
        low, high = x.amin(axes, keepdim=True).float().clamp(max=0), x.amax(axes, keepdim=True).float().clamp(min=0)
        scale = (high - low) / 255
        zero_point = (-128 - low / scale).round()
        return (x.float() / scale + zero_point).round_().clamp_(-128, 127).to(torch.int8), scale, zero_point

    def torchao(x):
        primitives = peer("torchao", "quantization.quant_primitives")
        block = {"row": (1, columns), "column": (rows, 1), "tensor": (rows, columns), "group": (1, GROUP)}[axis]
        mapping = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
        limits = {"quant_min": -127 if symmetric else -128, "quant_max": 127}

        def run(x):
            scale, zero_point = primitives.choose_qparams_affine(
                x, mapping, block, torch.int8, **limits, scale_dtype=torch.float32
            )
            values = primitives.quantize_affine(x, block, scale, zero_point, torch.int8, **limits)
            return values, scale, zero_point

        return each(run, restored)(x)

    def bitsandbytes(x):
        functional = peer("bitsandbytes", "functional")

        def run(x):
            values, row_stats, _ = functional.int8_vectorwise_quant(x)
            return values, row_stats / 127, None

        return each(run, restored)(x)

    def restored(outputs) -> list[Tensor]:
        """Formats differ; the numbers that they stand for must not."""
        values, scale, zero_point = outputs
        steps = values.double().view(rows, columns)
        if zero_point is not None:
            steps = steps - spread(zero_point)
        return [steps * spread(scale)]

    def spread(parameter: Tensor) -> Tensor:
        """A scale or zero point, in whatever shape it came, as a factor of every value."""
        shape = {"row": (rows, 1), "column": (1, columns), "tensor": (1, 1), "group": (rows, columns // GROUP)}[axis]
        parameter = parameter.double().view(shape)
        return parameter.repeat_interleave(GROUP, 1) if group_size else parameter

    providers = {
        "mixft": each(ours, restored),
        "torch": each(plain, restored),
        "torch.compile": compiled(plain, restored),
        "torchao": torchao,
    }
    if axis == "row" and symmetric:
        providers["bitsandbytes"] = bitsandbytes
    formula = "" if symmetric else "-affine"
    return Case(
        f"quantize/{axis}{formula}-{rows}x{columns}-{SHORT[dtype]}",
        inputs=lambda device: torch.randn(rows, columns, device=device).to(dtype),
        exact=lambda x: [x.double()],
        providers=providers,
        # Half a step of the widest group, and the other neighbour at a tie.
        bound=1.1 / 127,
        bytes=rows * columns * (dtype.itemsize + 1),
        **options,
    )


def dequantize(rows: int, columns: int, dtype: torch.dtype, **options) -> Case:
    """int8 with a scale a row back to ``dtype``."""

    def plain(inputs):
        values, scale = inputs
        return [(values.float() * scale).to(dtype)]

    def inputs(device):
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return values.to(device), torch.rand(rows, 1).to(device)

    return Case(
        f"dequantize/{rows}x{columns}-{SHORT[dtype]}",
        inputs=inputs,
        exact=lambda inputs: [inputs[0].double() * inputs[1].double()],
        providers={
            "mixft": each(lambda inputs: [mixft.ops.dequantize(*inputs, dtype=dtype)]),
            "torch": each(plain),
            "torch.compile": compiled(plain),
        },
        bound=1e-6 if dtype == torch.float32 else 1e-2,
        bytes=rows * columns * (dtype.itemsize + 1),
        **options,
    )


CASES = (
    quantize(1024, 384, torch.float32),
    quantize(512, 4096, torch.float16),
    quantize(512, 4096, torch.float32, "column"),
    quantize(512, 4096, torch.float32, "tensor"),
    quantize(512, 4096, torch.float32, "group"),
    quantize(512, 4096, torch.float32, "row", symmetric=False),
    quantize(512, 4096, torch.float32, "column", symmetric=False),
    quantize(512, 4096, torch.float32, "tensor", symmetric=False),
    quantize(512, 4096, torch.float32, "group", symmetric=False),
    quantize(8192, 8192, torch.bfloat16, devices=("cuda",)),
    quantize(8192, 8192, torch.bfloat16, "column", devices=("cuda",)),
    dequantize(512, 4096, torch.float32),
    dequantize(512, 4096, torch.float16),
)
