"""What ``mixft tune`` sweeps: for each (op, shape bucket) a benchmark case that it serves and the candidates.

Candidates come in the order in which they are tried, the likeliest first, for a sweep that runs out of time. The lists
hold what is good on at least one architecture; a candidate that spills or does not fit the one at hand is discarded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from mixft.kernels import matmul_persistent, matmul_tiles
from mixft.kernels.architecture import architecture_of, multiprocessors_of
from mixft.kernels.configuration import configuration
from mixft.kernels.matmul import PlainMatmulConfig
from mixft.kernels.matmul_epilogue import Product
from mixft.kernels.matmul_persistent import PersistentMatmulConfig
from mixft.kernels.matmul_tiles import MatmulConfig
from mixft.kernels.multi_tensor import MultiTensorConfig
from mixft.kernels.quantize_tiles import QuantizeConfig

from .case import OURS, Case, each
from .cases.gradients import grad_stats
from .cases.int8 import int8_linear, int8_matmul
from .cases.linear import linear
from .cases.optimizer_step import optimizer_step
from .cases.quantizers import quantize


@dataclass(frozen=True)
class Space:
    """One sweep.

    Attributes:
        op: the name of the file in ``kernels/configs``.
        bucket: the shape bucket in it.
        module: the kernel module whose ``variants`` use it.
        case: the work that is timed, whose first provider, mixft's, launches with the configuration of that bucket.
        candidates: configurations to try beside the shipped one.
    """

    op: str
    bucket: str
    module: str
    case: Case
    candidates: Sequence[Any]


def tiles(kind: type, *shapes: tuple[int, int, int, int, int], group: int = 8) -> list:
    """Configurations of a product from (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    return [kind(m, n, k, group, num_warps=warps, num_stages=stages) for m, n, k, warps, stages in shapes]


def by_kernel(launch: Callable[[Product], Any], case: Case, activation: str = "none") -> Case:
    """A ``case`` of ``linear``, computed by one kernel of the matmul, whichever the launcher would take."""

    def run(inputs):
        layer, x = inputs
        out = x.new_empty(x.shape[0], layer.weight.shape[0])
        launch(Product(x, layer.weight.t(), out, activation, layer.bias))
        return [out]

    return replace(case, providers={OURS: each(run)})


def tiles_space(bucket: str, case: Case, *shapes: tuple[int, int, int, int, int], activation="none", group=8) -> Space:
    """A sweep of the kernel that computes one tile a program."""

    def launch(asked: Product) -> None:
        arch = architecture_of(asked.a.device)
        matmul_tiles.launch(asked, configuration("matmul", MatmulConfig, arch, bucket))

    candidates = tiles(MatmulConfig, *shapes, group=group)
    return Space("matmul", bucket, "matmul_tiles", by_kernel(launch, case, activation), candidates)


def persistent_space(bucket: str, case: Case, *shapes: tuple[int, int, int, int, int], activation="none") -> Space:
    """A sweep of the persistent kernel: each tile shape with two or four groups of columns in the epilogue."""

    def launch(asked: Product) -> None:
        device = asked.a.device
        arch = architecture_of(device)
        config = configuration("matmul_persistent", PersistentMatmulConfig, arch, bucket)
        matmul_persistent.launch(asked, config, multiprocessors_of(device, arch))

    programs = 2 if bucket == "medium" else 1
    candidates = [
        PersistentMatmulConfig(m, n, k, 8, parts, programs, num_warps=warps, num_stages=stages)
        for (m, n, k, warps, stages), parts in product(shapes, (2, 4))
    ]
    case = by_kernel(launch, case, activation)
    return Space("matmul_persistent", bucket, "matmul_persistent", case, candidates)


def plain_space(bucket: str, rows: int, inner: int, columns: int) -> Space:
    """Whether torch or mixft computes a product with nothing fused; no compiled code depends on it."""
    candidates = [PlainMatmulConfig("torch"), PlainMatmulConfig("mixft")]
    return Space("plain_matmul", bucket, "matmul_tiles", linear(rows, inner, columns, HALF), candidates)


def multi_tensor() -> list[MultiTensorConfig]:
    """Chunks of 4 to 16 blocks: fewer programs, or more of them for a model of few elements."""
    return [
        MultiTensorConfig(chunk, block, num_warps)
        for chunk, (block, num_warps) in product((16384, 8192, 32768), ((1024, 4), (1024, 8), (2048, 8), (512, 4)))
    ]


LARGE = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 256, 32, 8, 4),
    (128, 128, 32, 4, 4),
    (64, 256, 64, 4, 4),
)
MEDIUM = (
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (64, 64, 128, 4, 3),
    (32, 128, 64, 4, 4),
)
SMALL = (
    (32, 32, 128, 4, 5),
    (16, 64, 128, 4, 4),
    (16, 64, 256, 4, 4),
    (16, 32, 256, 4, 4),
    (16, 128, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (16, 32, 256, 2, 5),
    (16, 16, 512, 4, 3),
)
INT8_LARGE = (
    (128, 128, 128, 8, 4),
    (128, 256, 128, 8, 3),
    (128, 128, 128, 4, 4),
    (256, 128, 128, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 4),
    (64, 256, 128, 4, 4),
)
HALF = torch.float16

SPACES = (
    tiles_space("wide", linear(4096, 4096, 4096, HALF), *LARGE),
    tiles_space("large", linear(4096, 4096, 4096, HALF, "gelu"), *LARGE, activation="gelu"),
    tiles_space("medium", linear(512, 768, 3072, HALF), *MEDIUM),
    tiles_space("small", linear(16, 4096, 4096, HALF), *SMALL, group=1),
    persistent_space("wide", linear(4096, 4096, 4096, HALF), *LARGE),
    persistent_space("large", linear(4096, 4096, 4096, HALF, "gelu"), *LARGE, activation="gelu"),
    persistent_space("medium", linear(512, 768, 3072, HALF), *MEDIUM),
    # After the kernels have their configurations.
    plain_space("wide", 4096, 4096, 4096),
    plain_space("medium", 512, 768, 3072),
    plain_space("small", 16, 4096, 4096),
    plain_space("unaligned", 4095, 4095, 4095),
    Space(
        "int8_matmul",
        "large",
        "int8_matmul",
        int8_matmul(4096, 4096, 4096, HALF),
        tiles(MatmulConfig, *INT8_LARGE),
    ),
    Space(
        "int8_matmul",
        "small",
        "int8_matmul",
        int8_matmul(32, 4096, 4096, HALF),
        tiles(MatmulConfig, *SMALL, group=1),
    ),
    Space(
        "weight_only_matmul",
        "small",
        "int8_matmul",
        int8_linear(16, 4096, 4096, HALF, "weight_only"),
        tiles(MatmulConfig, *SMALL, group=1),
    ),
    Space(
        "weight_only_matmul",
        "large",
        "int8_matmul",
        int8_linear(1024, 4096, 4096, HALF, "weight_only"),
        tiles(MatmulConfig, *LARGE),
    ),
    Space("optimizer_step", "fp32 state", "adamw", optimizer_step("adamw", HALF), multi_tensor()),
    Space(
        "optimizer_step",
        "8-bit state",
        "adamw",
        optimizer_step("adamw", torch.bfloat16, "split", torch.int8),
        multi_tensor(),
    ),
    Space(
        "optimizer_step",
        "bf16 state",
        "adamw",
        optimizer_step("adamw", torch.bfloat16, "split", torch.bfloat16),
        multi_tensor(),
    ),
    Space("grad", "all", "grad", grad_stats(HALF), multi_tensor()),
    Space(
        "quantize",
        "all",
        "quantize",
        quantize(4096, 4096, HALF),
        [
            QuantizeConfig(elements, 16384, 64, per_thread, programs)
            for elements, per_thread, programs in product((4096, 2048, 8192), (16, 32, 8), (1024,))
        ],
    ),
)
