"""``mixft doctor``: what this machine has, which code serves each op, and whether the ops compute the right values."""

import importlib.metadata
import platform
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

PACKAGES = ("mixft", "torch", "triton", "numpy", "safetensors")

# The CPU instruction sets that decide a routine's speed: torch's probes under its names for them, or Linux's flag.
INSTRUCTION_SETS = {
    "avx2": (("_is_avx2_supported",), "avx2"),
    "avx512": (("_is_avx512_supported",), "avx512f"),
    "avx512_vnni": (("_is_vnni_supported", "_is_avx512_vnni_supported"), "avx512_vnni"),
    "avx512_bf16": (("_is_avx512_bf16_supported",), "avx512_bf16"),
    "amx_tile": (("_is_amx_tile_supported",), "amx_tile"),
    "amx_fp16": (("_is_amx_fp16_supported",), "amx_fp16"),
}

VERDICTS = {True: "[green]ok[/]", False: "[bold red]WRONG[/]", None: "none"}


@dataclass(frozen=True)
class Row:
    """One op and dtype on one device: the code that serves it and what the self-test found.

    Where nothing serves it, ``served_by``, ``error`` and ``passed`` are None, and that is no failure.
    """

    device: str
    op: str
    dtype: str
    served_by: str | None
    error: float | None
    bound: float
    failure: str | None
    passed: bool | None


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False) -> None:
    """Say what this machine supports, and test every op against FP64; exit code 1 when one is wrong."""
    rows = diagnose()
    passed = not any(row.passed is False for row in rows)
    if json:
        report = {
            "versions": versions(),
            "devices": devices(),
            "cpu": cpu(),
            "ops": [vars(row) for row in rows],
            "passed": passed,
        }
        print(dumps(report, indent=1))
    else:
        _print(rows)
    raise typer.Exit(0 if passed else 1)


def versions() -> dict[str, str | None]:
    """The version of Python and of every package that bears on the ops; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[dict]:
    """The CPU and every GPU that torch sees, with its architecture; None for one without mixft kernels."""
    import torch

    found: list[dict] = [{"device": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}]
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


def cpu() -> dict:
    """torch's name of the CPU's vector level, and which of ``INSTRUCTION_SETS`` it has."""
    import torch

    flags = set(_cpuinfo("flags").split())
    found = {}
    for name, (probes, flag) in INSTRUCTION_SETS.items():
        known = [getattr(torch.cpu, probe) for probe in probes if hasattr(torch.cpu, probe)]
        found[name] = any(probe() for probe in known) if known else flag in flags
    return {"capability": torch.backends.cpu.get_cpu_capability(), "instruction_sets": found}


def diagnose() -> list[Row]:
    """Run the self-test on the CPU and on every GPU."""
    import torch

    from mixft.cli.self_test import run_case
    from mixft.cli.self_test_cases import CASES
    from mixft.cli.serving import served_by

    rows = []
    for entry in devices():
        device = torch.device(entry["device"])
        for case in CASES:
            dtype = str(case.dtype).removeprefix("torch.")
            code = served_by(case.op, case.dtype, device)
            if code is None:
                rows.append(Row(entry["device"], case.op, dtype, None, None, case.bound, None, None))
                continue
            found = run_case(case, device)
            rows.append(
                Row(entry["device"], case.op, dtype, code, found.error, case.bound, found.failure, found.passed)
            )
    return rows


def _print(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(", ".join(f"{name} {version or 'not installed'}" for name, version in versions().items()))
    for entry in devices():
        console.print(", ".join(f"{key} {value}" for key, value in entry.items()))
    features = cpu()
    present = [name for name, has in features["instruction_sets"].items() if has]
    missing = [name for name, has in features["instruction_sets"].items() if not has]
    console.print(f"cpu {features['capability']}: has {', '.join(present) or 'none'}; lacks {', '.join(missing)}")

    for device in dict.fromkeys(row.device for row in rows):
        title = f"ops on {device}: largest error against FP64, relative to the largest value"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
        for column in ("op", "dtype", "served by"):
            table.add_column(column)
        for column in ("error", "bound", ""):
            table.add_column(column, justify="right")
        for row in (row for row in rows if row.device == device):
            error = "" if row.error is None else f"{row.error:.1e}"
            table.add_row(row.op, row.dtype, row.served_by or "-", error, f"{row.bound:.1e}", VERDICTS[row.passed])
        console.print(table)
    for row in rows:
        if row.failure:
            console.print(f"{row.op} {row.dtype} on {row.device}: {row.failure}", markup=False, style="red")
    verdicts = [row.passed for row in rows]
    console.print(
        f"{verdicts.count(True)} checks passed, {verdicts.count(False)} failed, {verdicts.count(None)} not supported"
    )


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """The first value of ``key`` in Linux's description of the CPU; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")
