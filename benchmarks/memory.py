"""How much memory a provider takes: torch's allocator on a GPU, the resident set of a fresh process on a CPU."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .case import Case, Missing, Refused
from .peers import PEERS, peer

STATUS = Path("/proc/self/status")
# A call makes its state; the next one is as all later ones.
CALLS = 2

# What is measured, and not the sum of tensors, and how tables name it.
MEASURED = {"resident": "measured afterwards", "peak": "measured peak"}


def measure_memory(case: Case, provider: str, device: torch.device) -> dict[str, int] | None:
    """Bytes by component, as the tensors held after two calls, and, above what the inputs take, "resident" and "peak".

    "resident" is what stays after the calls: copies that no tensor list shows, such as a packed weight, are in it.

    Returns:
        None on a system that does not tell a process's peak.
    """
    if device.type == "cuda":
        return _on_gpu(case, provider, device)
    if not STATUS.exists():
        return None
    # Forked from a server that has imported torch and done nothing else: fresh, and there at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixft.benchmarks.registry", "transformers"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_on_cpu, case.name, provider, torch.get_num_threads()).result()


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _on_gpu(case: Case, provider: str, device: torch.device) -> dict[str, int]:
    torch.manual_seed(0)
    inputs = case.inputs(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = _run(case, provider, inputs, lambda: torch.cuda.memory_allocated(device) - before)
    return found | {"peak": torch.cuda.max_memory_allocated(device) - before}


def _on_cpu(name: str, provider: str, threads: int) -> dict[str, int]:
    from .registry import find

    torch.set_num_threads(threads)
    case = find(name)
    _load_lazy_code(provider)
    torch.manual_seed(0)
    inputs = case.inputs(torch.device("cpu"))
    before = _settled()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    return _run(case, provider, inputs, lambda: _settled() - before) | {"peak": _resident("VmHWM") - before}


def _settled() -> int:
    """The resident set without what the C library keeps of freed memory, where it can be told to give it back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _resident("VmRSS")


def _run(case: Case, provider: str, inputs, resident: Callable[[], int]) -> dict[str, int]:
    call = case.providers[provider](inputs)
    for _ in range(CALLS):
        call.run()
    gc.collect()
    return (call.held() if call.held else {}) | {"resident": resident()}


def _load_lazy_code(provider: str) -> None:
    """Code that is loaded when it is first used would count as what the provider holds."""
    package = provider.partition("+")[0]
    if package in PEERS:
        with contextlib.suppress(Missing, Refused):
            peer(package)
    layer = torch.nn.Linear(64, 64)
    layer(torch.randn(64, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def _resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
