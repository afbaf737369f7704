"""Which code serves a test's tensors, and the error budget that values are held to.

Without a GPU the process runs with ``TRITON_INTERPRET=1``, set before any kernel is imported, so that the Triton code
itself is what the ``interpreter`` cases run; the ``cpu`` cases switch the variable off and get the CPU routines. On a
GPU machine ``pytest -m gpu`` runs the same tests on the device.
"""

import importlib.util
import os

import pytest
import torch

from mixft.cpu import native

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    # Triton's own library functions are interpretable only when first imported in this mode.
    import triton.language  # noqa: F401

# A GPU machine without a network may lack these libraries; anywhere else their tests fail to import, as they should.
LIBRARIES = {
    "accelerate": ["test_amp_accelerate.py", "test_optim_trainer.py"],
    "peft": ["test_huggingface*.py", "test_readme.py"],
    "onnxruntime": ["test_onnx.py"],
    "transformers": [
        "test_attention.py",
        "test_conv1d.py",
        "test_export.py",
        "test_huggingface*.py",
        "test_onnx.py",
        "test_readme.py",
    ],
}
if HAS_GPU:
    collect_ignore_glob = [
        pattern
        for name, patterns in LIBRARIES.items()
        if importlib.util.find_spec(name) is None
        for pattern in patterns
    ]

SERVERS = [
    "cpu",
    *([] if HAS_GPU else ["torch"]),
    *([] if HAS_GPU else ["interpreter"]),
    *([pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else []),
]


def pytest_collection_modifyitems(items):
    """On a GPU the tests of the kernels go before those of what calls them: a run that is cut off has had them."""
    if HAS_GPU:
        items.sort(key=lambda item: "native_device" in item.fixturenames)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """After an illegal access a GPU serves its process no more: end it at the test that did it, which has reported.

    A worker of pytest-xdist goes at once, and another one takes over the tests that it has left.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as failure:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{nodeid} has broken the GPU for this process: {failure}", returncode=1)


@pytest.fixture(params=SERVERS)
def device(request, monkeypatch) -> torch.device:
    """A device to make tensors on; the parameter decides which code serves them."""
    if request.param == "cuda":
        return torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param == "interpreter" else "0")
    if request.param == "torch":
        # As where the compiled routines are not built: torch's operators serve.
        monkeypatch.setattr(native, "available", lambda: False)
    return torch.device("cpu")


@pytest.fixture(params=[server for server in SERVERS if server != "interpreter"])
def native_device(request, monkeypatch) -> torch.device:
    """As ``device``, without the interpreter: for the Python around kernels that have tests of their own."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def without_interpreter(monkeypatch):
    """CPU tensors are served by the CPU routines, in child processes too."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def one_thread():
    """For models so small that more threads only lose time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """Every ``torch.empty`` starts as NaN, or the largest integer, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error of ``actual`` against the FP64 tensor ``exact``; infinite when NaN patterns differ."""
    actual = actual.detach().double().cpu()
    exact = exact.detach().cpu()
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if not torch.equal(actual.isnan(), exact.isnan()):
        return float("inf")
    difference = torch.where(actual == exact, 0.0, (actual - exact).abs()).nan_to_num(nan=0.0, posinf=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


# Of the largest magnitude: half a unit in the last place, where a value is rounded to the other side than torch's. Sums
# that torch adds in another order differ by more than that in FP32: four units.
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-21}


def budget_of(exact: torch.Tensor, torch_result: torch.Tensor, epsilon: float) -> float:
    """torch's own error plus ``epsilon`` of the largest exact magnitude."""
    finite = exact[exact.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return error(torch_result, exact) + epsilon * scale


def assert_within_budget(actual: torch.Tensor, exact: torch.Tensor, torch_result: torch.Tensor, epsilon: float) -> None:
    """Hold ``actual`` to torch's own error at the same dtype plus ``epsilon`` of the largest exact magnitude."""
    budget = budget_of(exact, torch_result, epsilon)
    measured = error(actual, exact)
    assert measured <= budget, f"error {measured:.3e} exceeds the budget {budget:.3e}"


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor, fp32_result: torch.Tensor) -> None:
    """Hold every element to half a unit in its own last place, on top of the budget that FP32 arithmetic has."""
    budget = budget_of(exact, fp32_result, EPSILON[torch.float32])
    info = torch.finfo(actual.dtype)
    half_unit = info.eps / 2 * (exact.abs() + budget).clamp(min=info.smallest_normal)
    excess = (actual.double() - exact).abs() - half_unit - budget
    assert (excess <= 0).all(), f"{excess.max().item():.3e} beyond half a unit in the last place"
