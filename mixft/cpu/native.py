"""The compiled CPU routines of native/: one pass over memory where torch's operators take several.

They are built at installation by a C compiler, for x86-64 on Linux, once for each of ``LIBRARIES``, and use the OpenMP
threads of torch. Without them, torch's operators serve. ``MIXFT_NATIVE=0`` does without them on purpose;
``MIXFT_NATIVE=avx2`` and its like takes that one.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import threading
import warnings
from array import array
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from .instruction_set import has_avx512_vnni, has_avx_vnni

# The codes of native/floats.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# The builds by what the processor must have, the fastest first, and their libraries: INSTRUCTION_SETS of setup.py.
BUILDS = ("avx512_vnni", "avx_vnni", "avx2")
LIBRARIES = {build: f"_native_{build}" for build in BUILDS}

# Bytes of scratch memory that each thread keeps.
SCRATCH = 1 << 24
local = threading.local()


class Unavailable(Exception):
    """Why there are no compiled routines here."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled routines for this processor; raises Unavailable."""
    chosen = os.environ.get("MIXFT_NATIVE")
    if chosen == "0":
        raise Unavailable("switched off by MIXFT_NATIVE=0")
    builds = usable_builds()
    if not builds:
        raise Unavailable(f"not written for this processor ({torch.backends.cpu.get_cpu_capability()})")
    if chosen is not None and chosen not in builds:
        raise Unavailable(f"MIXFT_NATIVE is {chosen!r}; on this processor it can be 0, {', '.join(builds)}")
    builds = builds if chosen is None else (chosen,)
    # Only libraries built for this Python: beside them an editable installation may have outdated ones of another.
    names = [LIBRARIES[build] + suffix for build in builds for suffix in EXTENSION_SUFFIXES]
    found = [path for path in map(Path(__file__).parent.joinpath, names) if path.is_file()]
    if not found:
        raise Unavailable("not built, which takes gcc at installation on x86-64 Linux")
    try:
        # RTLD_NOW shows a missing symbol here and not in a later call. The OpenMP functions are those of the library
        # that torch has loaded.
        library = ctypes.CDLL(str(found[0]), os.RTLD_NOW)
    except OSError as error:
        raise Unavailable(f"not loadable: {error}") from None
    if _is_outdated(library):
        raise Unavailable("built from other sources than those of native/ now; pip install -e . builds them again")
    return library


def build() -> str:
    """Which of ``BUILDS`` serves; raises Unavailable."""
    return next(name for name in BUILDS if Path(load()._name).name.startswith(f"{LIBRARIES[name]}."))


def usable_builds() -> tuple[str, ...]:
    """Those of ``BUILDS`` that this processor can run, the fastest first."""
    usable = {
        "avx512_vnni": has_avx512_vnni,
        "avx_vnni": has_avx_vnni,
        "avx2": lambda: torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"),
    }
    return tuple(name for name in BUILDS if usable["avx2"]() and usable[name]())


def _is_outdated(library: ctypes.CDLL) -> bool:
    """Whether ``library`` was built from other sources than this checkout has now, as after a pull.

    Its functions may then take other arguments than Python passes. Outside of a checkout there is nothing to compare.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / "setup.py").is_file():
        return False
    files = sorted((checkout / "native").glob("*.[ch]"))
    checksum = hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()
    return (ctypes.c_char * len(checksum)).in_dll(library, "mixft_sources").value.decode() != checksum


@functools.cache
def why_unavailable() -> str | None:
    """Why torch's operators serve; None where the compiled routines do. Warns where ``MIXFT_NATIVE`` asks for these."""
    try:
        load()
    except Unavailable as reason:
        if os.environ.get("MIXFT_NATIVE", "0") != "0":
            warnings.warn(f"no compiled CPU routines: {reason}. torch's operators serve, more slowly.", stacklevel=2)
        return str(reason)
    return None


def available() -> bool:
    return why_unavailable() is None


@functools.cache
def constant(name: str) -> int:
    """A ``const int32_t`` of the library."""
    return c_int32.in_dll(load(), name).value


class Routine:
    """A compiled function that returns nothing, found in the library at its first call."""

    def __init__(self, name: str, *types: type) -> None:
        self.name, self.types = name, types

    @functools.cached_property
    def function(self):
        function = getattr(load(), self.name)
        function.argtypes, function.restype = self.types, None
        return function

    def __call__(self, *arguments) -> None:
        self.function(*arguments)


def scratch(size: int) -> Tensor:
    """So many bytes, this thread's own where they suffice: new pages would cost more than the pass that fills them."""
    if size > SCRATCH:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    if not hasattr(local, "buffer"):
        # Pages of its own, of which only those in use take memory: an allocator's may all be in use from before.
        pages = mmap.mmap(-1, SCRATCH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        local.buffer = torch.frombuffer(pages, dtype=torch.uint8)
    return local.buffer


def address(tensor: Tensor | None) -> int | None:
    """Where the elements of ``tensor`` begin, null for None; raises ValueError where they have no memory."""
    if tensor is None:
        return None
    start = tensor.data_ptr()
    if not start:
        _refuse_missing_memory(tensor)
    return start


def typed(tensor: Tensor | None) -> tuple[int | None, int]:
    """The address of ``tensor`` and the code of its dtype; where there is none, a null and a code that is not read."""
    return (None, 0) if tensor is None else (address(tensor), DTYPES[tensor.dtype])


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    """As ``starts``, for a compiled routine."""
    return pointers(starts(tensors))


def starts(tensors: Sequence[Tensor]) -> list[int]:
    """Where the elements of each begin; raises ValueError where some have no memory."""
    begin = list(map(Tensor.data_ptr, tensors))
    if not all(begin):
        for tensor in tensors:
            if not tensor.data_ptr():
                _refuse_missing_memory(tensor)
    return begin


def _refuse_missing_memory(tensor: Tensor) -> None:
    # Nothing is read of an empty tensor, and its address is a null too.
    if tensor.numel():
        raise ValueError(
            f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} on {tensor.device} has no memory of its own: "
            "its storage was freed, as sharding does between uses, or it stands for other tensors; pass it when and "
            "as what it holds its elements"
        )


def sizes_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The number of elements of each; a list that has them as ``sizes`` is taken at its word."""
    known = getattr(tensors, "sizes", None)
    return tuple(map(Tensor.numel, tensors)) if known is None else known


def dtypes_of(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """As ``sizes_of``, with ``dtypes``."""
    known = getattr(tensors, "dtypes", None)
    return tuple(map(attrgetter("dtype"), tensors)) if known is None else known


def sizes(tensors: Sequence[Tensor]) -> ctypes.Array:
    return integers(c_int64, sizes_of(tensors))


def dtypes(tensors: Sequence[Tensor]) -> ctypes.Array:
    return dtype_codes(dtypes_of(tensors))


def pointers(values: Sequence[int]) -> ctypes.Array:
    return integers(c_void_p, values)


def dtype_codes(dtypes: Sequence[torch.dtype]) -> ctypes.Array:
    return integers(c_int32, [DTYPES[dtype] for dtype in dtypes])


def integers(kind: type, values: Sequence[int]) -> ctypes.Array:
    # Through array, which converts a list in half the time of ctypes; models have thousands of tensors.
    return (kind * len(values)).from_buffer(array("i" if kind is c_int32 else "q", values))
