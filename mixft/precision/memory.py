"""How much memory is left on a device."""

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")


def free_share(device: torch.device) -> float | None:
    """The share of the device's memory that a new tensor could still take; None where nothing tells.

    On a GPU what torch has reserved and does not use counts as free. On a CPU it is Linux's ``MemAvailable``.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) / total
    if device.type == "cpu" and MEMINFO.exists():
        lines = (line.split() for line in MEMINFO.read_text().splitlines())
        sizes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
        if "MemAvailable" in sizes:
            return sizes["MemAvailable"] / sizes["MemTotal"]
    return None
