"""int8 products: the bare product, layers for inference and for decoding, and the layer that trains."""

import copy
import warnings

import torch
from torch import Tensor, nn

import mixft
from mixft.benchmarks.case import Call, Case, Provider, Refused, compiled, each
from mixft.benchmarks.peers import peer
from mixft.benchmarks.recording import Sweep

from .linear import layer_and_input, traffic
from .shapes import SHORT

# What torchao sets for the whole process, given to torch.compile for its layers alone.
TORCHAO_COMPILE = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
}
# Both operands are rounded to 8 bits, each number to within half of 1/127 of its row's largest.
BOUND = 0.03


def int8_matmul(rows: int, inner: int, columns: int, out_dtype: torch.dtype, **options) -> Case:
    """int8 [M, K] by [N, K] with a scale a row of each, against ``torch._int_mm`` and the scales after it."""

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        a, b = (torch.randint(-127, 128, (size, inner), dtype=torch.int8) for size in (rows, columns))
        scales = (torch.rand(size, 1) / inner for size in (rows, columns))
        return tuple(tensor.to(device) for tensor in (a, b, *scales))

    def plain(inputs):
        a, b, a_scale, b_scale = inputs
        return [(torch._int_mm(a, b.t()).float() * a_scale * b_scale.t()).to(out_dtype)]

    def bitsandbytes(inputs):
        functional = peer("bitsandbytes", "functional")
        a, b, a_scale, b_scale = inputs
        a_stats, b_stats = a_scale.view(-1) * 127, b_scale.view(-1) * 127

        def run(_):
            return [functional.int8_mm_dequant(functional.int8_linear_matmul(a, b), a_stats, b_stats)]

        return each(run)(inputs)

    def exact(inputs):
        a, b, a_scale, b_scale = (tensor.double() for tensor in inputs)
        return [a @ b.t() * a_scale * b_scale.t()]

    return Case(
        f"int8_matmul/{rows}x{inner}x{columns}-{SHORT[out_dtype]}",
        inputs=inputs,
        exact=exact,
        providers={
            "mixft": each(lambda inputs: [mixft.ops.int8_matmul(*inputs, out_dtype=out_dtype)]),
            "torch": each(plain),
            "torch.compile": compiled(plain),
            "bitsandbytes": bitsandbytes,
        },
        bound=2e-3,
        bytes=inner * (rows + columns) + out_dtype.itemsize * rows * columns,
        operations=2 * rows * inner * columns,
        rate="int8",
        **options,
    )


def int8_linear(rows: int, inner: int, columns: int, dtype: torch.dtype, mode: str = "dynamic", **options) -> Case:
    """An int8 layer for inference against the layer in ``dtype`` and the same scheme of other packages."""

    def ours(inputs):
        if mode != "static":
            return _layer(mixft.nn.QuantLinear.from_linear(inputs[0], mode), inputs)
        model = nn.Sequential(mixft.nn.QuantLinear.from_linear(inputs[0], "dynamic"))
        mixft.calibrate(model, [inputs[1]])
        return _layer(model[0], inputs)

    providers = {"mixft": ours, **_float_layers()}
    for name, scheme in SCHEMES[mode].items():
        providers[name] = lambda inputs, scheme=scheme: _layer(scheme(copy.deepcopy(inputs[0])), inputs)

    def compiled_torchao(inputs):
        return _layer(torch.compile(_torchao(mode)(inputs[0]), dynamic=False, options=TORCHAO_COMPILE), inputs)

    if mode != "static":
        providers["torchao+compile"] = compiled_torchao
    family = {"dynamic": "int8_linear", "static": "int8_static", "weight_only": "int8_weight_only"}[mode]
    if mode == "weight_only" and rows <= DECODED_ROWS:
        family = "int8_decode"
    return Case(
        f"{family}/{rows}x{inner}x{columns}-{SHORT[dtype]}",
        inputs=layer_and_input(rows, inner, columns, dtype),
        exact=lambda inputs: [copy.deepcopy(inputs[0]).double()(inputs[1].double())],
        providers=providers,
        bound=BOUND,
        bytes=traffic(rows, inner, columns, dtype, weight_bytes=1),
        operations=2 * rows * inner * columns,
        rate="int8" if mode != "weight_only" else SHORT[dtype],
        **options,
    )


def int8_training(rows: int, inner: int, columns: int, dtype: torch.dtype, backward: str = "int8", **options) -> Case:
    """Forward and backward with int8 products, against the layer in ``dtype`` and torchao's int8 training."""

    def ours(layer: nn.Linear) -> nn.Module:
        return mixft.nn.QuantLinear.from_linear(layer, "train", backward=backward)

    def gradients(layer: nn.Module):
        def run(inputs):
            y = layer(inputs[1])
            return [y.detach(), *torch.autograd.grad(y, (inputs[1], layer.weight), inputs[2])]

        return run

    def make(device):
        layer, x = layer_and_input(rows, inner, columns, dtype, trains=True)(device)
        return layer, x, torch.randn(rows, columns, device=device).to(dtype)

    def torchao(inputs):
        training = peer("torchao", "prototype.quantized_training")
        quantize_ = peer("torchao", "quantization").quantize_
        model = nn.Sequential(copy.deepcopy(inputs[0]))
        quantize_(model, training.Int8MixedPrecisionTrainingConfig())
        return model[0]

    def exact(inputs):
        layer, x, grad = inputs
        return gradients(copy.deepcopy(layer).double())((None, x.detach().double().requires_grad_(), grad.double()))

    return Case(
        f"int8_training/{rows}x{inner}x{columns}-{SHORT[dtype]}" + ("" if backward == "int8" else f"-{backward}"),
        inputs=make,
        exact=exact,
        providers={
            "mixft": lambda inputs: each(gradients(ours(inputs[0])))(inputs),
            "torch": lambda inputs: each(gradients(inputs[0]))(inputs),
            "torch.compile": lambda inputs: compiled(gradients(inputs[0]))(inputs),
            "torchao": lambda inputs: each(gradients(torchao(inputs)))(inputs),
            # Forward and backward, which is how it is meant to be used.
            "torchao+compile": lambda inputs: each(gradients(torch.compile(torchao(inputs), dynamic=False)))(inputs),
        },
        bound=BOUND,
        bytes=traffic(rows, inner, columns, dtype)
        + dtype.itemsize * (rows * columns + 2 * rows * inner + 2 * inner * columns),
        operations=6 * rows * inner * columns,
        rate="int8",
        **options,
    )


def _layer(layer: nn.Module, inputs: tuple) -> Call:
    return each(lambda inputs: [layer(inputs[1])])(inputs)


def _float_layers() -> dict[str, Provider]:
    return {
        "torch": lambda inputs: _layer(inputs[0], inputs),
        "torch.compile": lambda inputs: _layer(torch.compile(inputs[0], dynamic=False), inputs),
    }


def _torch_dynamic(layer: nn.Linear) -> nn.Module:
    """torch's own quantized layer, for FP32 on a CPU."""
    if layer.weight.is_cuda or layer.weight.dtype != torch.float32:
        raise Refused("torch.ao's quantized layer is for FP32 on a CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and what CPU users have
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)


def _torchao(mode: str):
    def convert(layer: nn.Linear) -> nn.Module:
        quantization = peer("torchao", "quantization")
        config = {
            "dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
            "weight_only": quantization.Int8WeightOnlyConfig,
        }[mode]
        model = nn.Sequential(copy.deepcopy(layer))
        quantization.quantize_(model, config(set_inductor_config=False))
        return model

    return convert


def bitsandbytes_layer(layer: nn.Linear) -> nn.Module:
    """LLM.int8() without outlier columns."""
    bitsandbytes = peer("bitsandbytes")
    columns, inner = layer.weight.shape
    has_bias = layer.bias is not None
    quantized = bitsandbytes.nn.Linear8bitLt(inner, columns, has_bias, has_fp16_weights=False, threshold=0.0)
    quantized.load_state_dict(layer.state_dict())
    return quantized.to(layer.weight.device)


def gemlite_layer(processor: str):
    """A function that makes a layer of its ``processor``."""

    def convert(layer: nn.Linear) -> nn.Module:
        helper = peer("gemlite", "helper")
        return getattr(helper, processor)(device=layer.weight.device, dtype=layer.weight.dtype).from_linear(layer)

    return convert


SCHEMES = {
    "dynamic": {
        "torch.ao": _torch_dynamic,
        "torchao": _torchao("dynamic"),
        "bitsandbytes": bitsandbytes_layer,
        "gemlite": gemlite_layer("A8W8_int8_dynamic"),
    },
    # Nobody else has a static layer without a graph to convert; this is the one that CPU users have instead.
    "static": {"torch.ao": _torch_dynamic},
    "weight_only": {
        "torchao": _torchao("weight_only"),
        "gemlite": gemlite_layer("A16W8_INT8"),
    },
}
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
CPU, GPU = {"devices": ("cpu",)}, {"devices": ("cuda",)}
FLOATS = "mixft keeps the precision of FP32"
DECODED_ROWS = 16
INT_MM = "both multiply by torch._int_mm, which takes most of the time"
COARSE = "torch.ao gives the whole input one scale, where mixft gives each row its own; small layers are mostly calls"

CASES = (
    int8_matmul(512, 768, 3072, SINGLE, **CPU, reason_if_slower=INT_MM),
    int8_matmul(128, 768, 3072, HALF, **CPU, reason_if_slower=INT_MM),
    int8_matmul(4096, 4096, 4096, HALF, **GPU),
    int8_matmul(8192, 4096, 14336, BRAIN, **GPU),
    *(int8_linear(rows, 384, 1536, SINGLE, **CPU, reason_if_slower=COARSE) for rows in (1, 16, 128, 512)),
    *(
        int8_linear(rows, 768, 3072, SINGLE, **CPU, reason_if_slower=COARSE, sweep=Sweep("int8_linear", "rows", rows))
        for rows in (1, 4, 16, 64, 128, 256, 512)
    ),
    *(int8_linear(rows, 4096, 4096, SINGLE, **CPU, reason_if_slower=COARSE) for rows in (1, 16, 128)),
    int8_linear(512, 4096, 4096, SINGLE, **CPU, reason_if_slower=COARSE, long=True),
    *(
        int8_linear(rows, 4096, 4096, HALF, **GPU, sweep=Sweep("int8_linear", "rows", rows))
        for rows in (16, 64, 256, 1024, 4096, 8192)
    ),
    *(int8_linear(rows, 4096, 4096, SINGLE, "weight_only", **CPU, reason_if_slower=FLOATS) for rows in (1, 4, 16)),
    int8_linear(512, 384, 1536, SINGLE, "weight_only", **CPU, reason_if_slower=FLOATS),
    int8_linear(128, 768, 3072, SINGLE, "weight_only", **CPU, reason_if_slower=FLOATS),
    *(int8_linear(rows, 4096, 14336, HALF, "weight_only", **GPU) for rows in (1, 2, 4, 8, 16)),
    *(int8_linear(rows, 768, 3072, SINGLE, "static", **CPU, reason_if_slower=COARSE) for rows in (1, 128, 512)),
    int8_linear(4096, 4096, 4096, HALF, "static", **GPU),
    int8_training(256, 768, 3072, SINGLE, **CPU),
    int8_training(1024, 384, 1536, SINGLE, **CPU),
    int8_training(1024, 384, 1536, SINGLE, "weight_grad_16bit", **CPU),
    int8_training(8192, 4096, 4096, BRAIN, **GPU),
    int8_training(8192, 4096, 14336, BRAIN, **GPU),
    int8_training(8192, 4096, 14336, BRAIN, "weight_grad_16bit", **GPU),
)
