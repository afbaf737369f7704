"""Which of torch's CPU fast paths this processor runs at speed; asked once, at the first call that needs to know."""

import functools
from pathlib import Path

import torch


def _supports(*names: str) -> bool:
    """Whether the processor has one of these, all of which come with AVX-512, and torch is not held to less.

    ``ATEN_CPU_CAPABILITY=avx2`` holds it, so that one processor shows what another would do.
    """
    in_use = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return in_use and any(getattr(torch.cpu, name, bool)() for name in names)


@functools.cache
def has_avx512() -> bool:
    return _supports("_is_avx512_supported")


@functools.cache
def has_int8_dot() -> bool:
    """Whether oneDNN multiplies int8 with dot-product instructions (AVX512-VNNI or AMX)."""
    return torch.backends.mkldnn.is_available() and (has_avx512_vnni() or has_amx())


@functools.cache
def has_bf16_dot() -> bool:
    """Whether oneDNN multiplies BF16 with dot-product instructions (AVX512-BF16 or AMX)."""
    return torch.backends.mkldnn.is_available() and _supports("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@functools.cache
def has_avx512_vnni() -> bool:
    """Whether the processor has dot-product instructions for int8 in the registers of AVX-512."""
    return _supports("_is_vnni_supported", "_is_avx512_vnni_supported")


@functools.cache
def has_avx_vnni() -> bool:
    """Whether it has them for the registers of AVX2, as Intel's laptops do from 2021 on; Linux tells."""
    try:
        information = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx_vnni" in information.split()


@functools.cache
def has_amx() -> bool:
    """Whether oneDNN multiplies int8 by tiles (AMX)."""
    return torch.backends.mkldnn.is_available() and _supports("_is_amx_tile_supported")
