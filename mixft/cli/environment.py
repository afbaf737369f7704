"""The machine and the versions on it, as far as they bear on time and accuracy."""

import datetime
import importlib.metadata
import platform
from pathlib import Path

PACKAGES = ("mixft", "torch", "triton", "transformers", "numpy", "safetensors")

# The CPU instruction sets that decide a routine's speed: torch's probes under its names for them, or Linux's flag.
INSTRUCTION_SETS = {
    "avx2": (("_is_avx2_supported",), "avx2"),
    "avx_vnni": ((), "avx_vnni"),
    "avx512": (("_is_avx512_supported",), "avx512f"),
    "avx512_vnni": (("_is_vnni_supported", "_is_avx512_vnni_supported"), "avx512_vnni"),
    "avx512_bf16": (("_is_avx512_bf16_supported",), "avx512_bf16"),
    "amx_tile": (("_is_amx_tile_supported",), "amx_tile"),
    "amx_fp16": (("_is_amx_fp16_supported",), "amx_fp16"),
}


def environment(device) -> dict:
    """What a report of figures taken on a ``torch.device`` says of where they were taken."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        **versions(),
        "torch": torch.__version__,  # with its build, which the package's version may lack
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str | None]:
    """The version of Python and of each of ``PACKAGES``; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[dict]:
    """The CPU with its threads, then every GPU that torch sees with its compute capability and memory."""
    import torch

    found: list[dict] = [{"device": "cpu", "name": cpu_name(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def cpu_features() -> dict:
    """torch's name of the CPU's vector level, and which of ``INSTRUCTION_SETS`` it has."""
    import torch

    flags = set(_cpuinfo("flags").split())
    found = {}
    for name, (probes, flag) in INSTRUCTION_SETS.items():
        known = [getattr(torch.cpu, probe) for probe in probes if hasattr(torch.cpu, probe)]
        found[name] = any(probe() for probe in known) if known else flag in flags
    return {"capability": torch.backends.cpu.get_cpu_capability(), "instruction_sets": found}


def compiled_routines() -> str:
    """The build of mixft's compiled CPU routines that is used, or why torch's operators serve instead."""
    from mixft.cpu import native

    reason = native.why_unavailable()
    return f"for {native.build()}" if reason is None else f"none, {reason}"


def cpu_name() -> str:
    """The CPU's model name, or its architecture where the system does not tell.

    On a virtual machine it may be no more than a brand; family and model then tell its generations apart.
    """
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    is_a_brand = family and model and not any(map(str.isdigit, name))
    return f"{name} family {family} model {model}" if is_a_brand else name


def _cpuinfo(key: str) -> str:
    """The first value of ``key`` in Linux's description of the CPU; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")
