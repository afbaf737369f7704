"""Each kernel of the matrix product on its own, with every epilogue, and which one serves what."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON, SERVERS, assert_rounded_once, assert_within_budget

from mixft.benchmarks.case import Refused, complaint
from mixft.benchmarks.cases.linear import linear
from mixft.kernels import matmul, matmul_persistent, matmul_split_k, matmul_tiles
from mixft.kernels.architecture import ARCHITECTURES, architecture_of
from mixft.kernels.configuration import configuration, substitute
from mixft.kernels.matmul import PlainMatmulConfig
from mixft.kernels.matmul_epilogue import Product
from mixft.kernels.matmul_persistent import PersistentMatmulConfig, has_descriptors
from mixft.kernels.matmul_tiles import MatmulConfig, bucket
from mixft.kernels.torch_matmul import SETTINGS, full_precision_sums, plain_product_
from mixft.ops.registration import launcher

TILES = MatmulConfig(16, 32, 16, 2, num_warps=4, num_stages=2)
WALKING = PersistentMatmulConfig(16, 32, 16, 2, EPILOGUE_PARTS=2, PROGRAMS=1, num_warps=4, num_stages=2)
KERNELS = {
    "tiles": lambda product: matmul_tiles.launch(product, TILES),
    "split": lambda product: matmul_split_k.launch(product, TILES, 3),
    "persistent, 1 part": lambda product: matmul_persistent.launch(product, replace(WALKING, EPILOGUE_PARTS=1), 3),
    "persistent, 2 parts": lambda product: matmul_persistent.launch(product, WALKING, 3),
    "persistent, 4 parts": lambda product: matmul_persistent.launch(
        product, replace(WALKING, BLOCK_N=64, EPILOGUE_PARTS=4), 2
    ),
}
if not has_descriptors():
    KERNELS = {name: launch for name, launch in KERNELS.items() if not name.startswith("persistent")}

HALF = [torch.float16, torch.bfloat16]
SLOPES = {
    "none": lambda x: torch.ones_like(x),
    "relu": lambda x: (x > 0).double(),
    "gelu": lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)) + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5,
    "silu": lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))),
}
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@pytest.fixture(params=[server for server in SERVERS if server not in ("cpu", "torch")])
def device(request) -> torch.device:
    launcher("matmul", "compute")  # makes the interpreter right for BF16
    return torch.device("cpu" if request.param == "interpreter" else "cuda")


@pytest.fixture(params=KERNELS)
def compute(request):
    return KERNELS[request.param]


def half(*shape: int, device, dtype=torch.float16):
    return torch.randn(shape, device=device).to(dtype)


def assert_is_product(out, a, b, added=None):
    """Hold the FP32 product to the error of torch's own, of the same values in FP32."""
    truth, own = a.double() @ b.double(), a.cpu().float() @ b.cpu().float()
    if added is not None:
        truth, own = truth + added.double(), own + added.cpu()
    assert_within_budget(out, truth, own, EPSILON[torch.float32])


def poisoned(M: int, N: int, device, dtype):
    """An output whose every element is NaN, with a margin of sentinels behind it."""
    storage = torch.full((M * N + 64,), float("nan"), device=device, dtype=dtype)
    storage[M * N :] = 7.0
    return storage[: M * N].view(M, N), storage[M * N :]


LAYOUTS = {
    "forward": lambda a, b: (a, b.t().contiguous().t()),
    "grad_a": lambda a, b: (a, b),
    "grad_b": lambda a, b: (a.t().contiguous().t(), b),
    "both transposed": lambda a, b: (a.t().contiguous().t(), b.t().contiguous().t()),
    "rows of a wider tensor": lambda a, b: (F.pad(a, (16, 16))[:, 16:-16], F.pad(b, (16, 16))[:, 16:-16]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(48, 64, 80), (32, 16, 112)])
def test_layouts(device, compute, shape, layout):
    M, N, K = shape
    a, b = LAYOUTS[layout](half(M, K, device=device), half(K, N, device=device))
    out, sentinels = poisoned(M, N, device, torch.float32)
    compute(Product(a, b, out))
    assert_is_product(out, a, b)
    assert (sentinels == 7).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_forward_epilogue(device, compute, dtype, activation, out_dtype):
    """Ragged rows; the sum over K ends inside a block, and with it a part of a split sum."""
    M, N, K = 35, 48, 104
    a, b = half(M, K, device=device, dtype=dtype), half(N, K, device=device, dtype=dtype).t() / 8
    bias, residual = half(N, device=device, dtype=dtype), half(M, N, device=device, dtype=out_dtype)
    out, sentinels = poisoned(M, N, device, out_dtype)
    kept, others = poisoned(M, N, device, dtype)
    compute(Product(a, b, out, activation, bias, residual, kept))
    (total, truth), (own_total, own) = (
        (sums, ACTIVATIONS[activation](sums) + residual.to(sums.dtype))
        for sums in (torch.addmm(*(x.to(real) for x in (bias, a, b))) for real in (torch.float64, torch.float32))
    )
    assert_rounded_once(out, truth, own)
    assert_rounded_once(kept, total, own_total)
    assert (sentinels == 7).all()
    assert (others == 7).all()


@pytest.mark.parametrize("activation", SLOPES)
def test_derivative_epilogue_and_column_sums(device, compute, activation):
    M, N, K = 67, 48, 56
    a, b = half(M, K, device=device), half(K, N, device=device) / 8
    kept = half(M, N, device=device)
    out, sentinels = poisoned(M, N, device, torch.float32)
    partials = compute(Product(a, b, out, activation, kept=kept, column_sum=True))
    truth = (a.double() @ b.double()) * SLOPES[activation](kept.double())
    own = (a.float() @ b.float()) * SLOPES[activation](kept.double()).float()
    assert_within_budget(out, truth, own, EPSILON[torch.float32])
    assert_within_budget(partials.sum(0), truth.sum(0), own.sum(0), EPSILON[torch.float32])
    assert (sentinels == 7).all()


def test_rows_past_the_end_are_no_part_of_column_sums(device, compute):
    a, b = torch.zeros(17, 16, device=device).half(), torch.zeros(16, 32, device=device).half()
    b[3, 5] = float("inf")
    a[:, 3] = 1
    kept = torch.ones(17, 32, device=device).half()
    out = torch.empty(17, 32, device=device)
    partials = compute(Product(a, b, out, "relu", kept=kept, column_sum=True))
    assert partials.sum(0)[5].isposinf()


def test_result_added_to_what_is_there(device, compute):
    M, N, K = 40, 64, 48
    a, b = half(K, M, device=device).t(), half(K, N, device=device)
    out = torch.randn(M, N, device=device)
    before = out.clone()
    compute(Product(a, b, out, residual=out))
    assert_is_product(out, a, b, before)


def test_same_bits_on_every_run(device, compute):
    a, b = half(50, 136, device=device), half(136, 48, device=device)
    outs = [torch.empty(50, 48, device=device) for _ in range(2)]
    for out in outs:
        compute(Product(a, b, out))
    assert torch.equal(*outs)


def test_nan_and_inf(device, compute):
    a, b = half(33, 64, device=device), half(64, 32, device=device)
    a[3, 4], a[5, 6], a[32, 8] = float("nan"), float("inf"), float("-inf")
    out = torch.empty(33, 32, device=device)
    compute(Product(a, b, out))
    truth = a.double() @ b.double()
    assert torch.equal(out.isnan().cpu(), truth.isnan().cpu())
    assert torch.equal(out.isposinf().cpu(), truth.isposinf().cpu())


def test_many_tiles_a_program(device):
    """Ragged in both dimensions, three programs for 24 tiles."""
    if not has_descriptors():
        assert not matmul_persistent.variants(ARCHITECTURES["sm_90"])
        return
    a, b = half(124, 40, device=device), half(40, 88, device=device)
    out = torch.full((124, 88), float("nan"), device=device)
    matmul_persistent.launch(Product(a, b, out), WALKING, 3)
    assert_is_product(out, a, b)


def matrix(rows: int, columns: int, first: int = 0, dtype=torch.float16):
    return torch.empty(rows * columns + first, dtype=dtype)[first:].view(rows, columns)


def product_of(a, b, **options):
    return Product(a, b, matrix(a.shape[0], b.shape[1]), **options)


def test_descriptors_take_what_they_can_describe():
    def takes(a, b, out=None):
        return matmul_persistent.serves(Product(a, b, matrix(a.shape[0], b.shape[1]) if out is None else out))

    if not has_descriptors():
        assert not takes(matrix(64, 64), matrix(64, 64))
        return
    assert takes(matrix(63, 64), matrix(64, 72))
    assert takes(matrix(64, 64).t(), matrix(64, 64).t())
    assert takes(matrix(40, 64).t(), matrix(40, 64))  # any number of tokens in the product of a weight's gradient
    assert not takes(matrix(64, 60), matrix(60, 64))  # rows of 120 bytes
    assert not takes(matrix(64, 64, first=1), matrix(64, 64))
    assert not takes(matrix(64, 64), matrix(64, 68))
    assert takes(matrix(64, 64), matrix(64, 64).t(), matrix(64, 64, dtype=torch.float32))
    assert not takes(matrix(1, 64).expand(64, 64), matrix(64, 64))
    assert not takes(matrix(64, 128)[:, ::2], matrix(64, 64))
    assert not takes(matrix(64, 0), matrix(0, 64))


def test_split_only_where_the_gpu_has_too_few_tiles():
    config = MatmulConfig(64, 128, 64, 8, 4, 4)

    def splits(M, N, K):
        return matmul_split_k.split_count(product_of(matrix(M, K), matrix(K, N)), config, 132)

    assert splits(384, 384, 8192) == 7  # 18 tiles
    assert splits(64, 128, 8192) == 32  # one tile, of 128 blocks of K
    assert splits(512, 4096, 4096) == 1
    assert splits(512, 1152, 8192) == 1  # 72 tiles
    assert splits(64, 128, 511) == 1
    assert splits(64, 128, 512) == 2
    assert splits(64, 128, 0) == 1


@pytest.mark.parametrize(
    ("shape", "served"),
    [
        ((64, 256, 96), "persistent"),
        ((64, 40, 96), "persistent"),
        ((64, 41, 96), "tiles"),
        ((16, 256, 96), "tiles"),
        ((16, 256, 2048), "split"),
        ((64, 256, 2048), "split"),
    ],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_which_kernel_serves(monkeypatch, shape, served, arch):
    if served == "persistent" and (arch == "sm_80" or not has_descriptors()):
        served = "tiles"
    called = []
    for name, module in (
        ("tiles", matmul_tiles),
        ("split", matmul_split_k),
        ("persistent", matmul_persistent),
    ):
        monkeypatch.setattr(module, "launch", lambda *args, name=name: called.append(name))
    M, N, K = shape
    matmul.compute(product_of(matrix(M, K), matrix(K, N)), ARCHITECTURES[arch])
    assert called == [served]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_plain_product_goes_to_torch_where_the_data_says_so(monkeypatch, arch):
    arch = ARCHITECTURES[arch]
    monkeypatch.setattr(matmul, "architecture_of", lambda device: arch)
    taken = []
    monkeypatch.setattr(matmul, "plain_product_", lambda *args: (taken.append(1), plain_product_(*args)))
    monkeypatch.setattr(matmul, "compute", lambda *args: taken.append(0))
    a, b, bias = (torch.randn(shape).half() for shape in ((64, 64), (64, 64), (64,)))

    def plain(device_type):
        monkeypatch.setattr(matmul, "is_interpreted", lambda product: device_type == "cpu")
        taken.clear()
        out, _ = matmul.matmul_forward(a, b, bias, "none", torch.float16, False, None)
        assert taken == [0] or torch.equal(out, F.linear(a, b.t(), bias))
        assert taken == [0] or torch.equal(
            matmul.matmul_forward(a, b, None, "none", torch.float16, False, None)[0], a @ b
        )
        return taken[:1]

    assert plain("cuda") == [1]
    assert plain("cpu") == [0]
    with substitute("plain_matmul", PlainMatmulConfig("mixft"), arch, "medium"):
        assert plain("cuda") == [0]
    plain("cuda")
    taken.clear()
    for options in ({"activation": "relu"}, {"out_dtype": torch.float32}, {"bias": bias.float()}, {"residual": a}):
        arguments = {
            "bias": bias,
            "activation": "none",
            "out_dtype": torch.float16,
            "keep_preactivation": False,
            "residual": None,
        }
        matmul.matmul_forward(a, b, **{**arguments, **options})
    assert taken == [0, 0, 0, 0]


def test_the_benchmark_times_the_kernel_beside_torch_s_product(monkeypatch, device):
    case = linear(40, 48, 64, torch.float16)
    inputs = case.inputs(device)
    monkeypatch.setattr(matmul, "is_interpreted", lambda product: True)
    with pytest.raises(Refused, match="the row of mixft is this kernel"):
        case.providers["mixft kernel"](inputs)
    monkeypatch.setattr(matmul, "is_interpreted", lambda product: False)
    call = case.providers["mixft kernel"](inputs)
    assert complaint(call.run(), case.exact(inputs), case.bound) is None


def test_sums_of_torch_s_products_stay_in_fp32():
    backend = torch.backends.cuda.matmul
    names = [name for name in SETTINGS if name.endswith("reduction")]
    before = [getattr(backend, name) for name in names]

    def fail():
        with full_precision_sums():
            assert not any(getattr(backend, name) for name in names)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [getattr(backend, name) for name in names] == before == [True, True]


def test_buckets():
    def of(m, k, n, first=0, **options):
        return bucket(product_of(matrix(m, k, first), matrix(n, k).t(), **options))

    assert of(8, 64, 64) == "small"
    assert of(33, 64, 64) == "medium"
    assert of(2048, 64, 1040) == "wide"
    assert of(2049, 64, 1040, activation="gelu") == "large"
    assert of(2049, 64, 1040, residual=matrix(2049, 1040)) == "large"
    assert {of(33, 64, 65), of(33, 63, 64), of(33, 64, 64, first=1)} == {"unaligned"}


def test_every_architecture_with_tensor_cores_has_every_bucket():
    for arch in ARCHITECTURES.values():
        if arch.tensor_cores:
            for size in ("small", "medium", "large", "wide", "unaligned"):
                assert configuration("matmul", MatmulConfig, arch, size)
                if size != "large":
                    assert configuration("plain_matmul", PlainMatmulConfig, arch, size).SERVED_BY in ("torch", "mixft")
    assert architecture_of(torch.device("cpu")).tensor_cores
