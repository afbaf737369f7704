"""Small tables that the host makes and kernels read: cached on the device, and usable in a captured CUDA graph.

A table is copied without waiting, so it is ready for the launches of one stream only, and the stream is part of its
key. A capture takes a table from any stream, as everything before a capture is done when it begins. A table that is
made during a capture is copied by every replay: its source is then pinned memory set aside before, because pinned
memory cannot be allocated during a capture, and it is kept for good, as is every table that a graph reads: a graph
does not say when it is gone.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .recently_used import RecentlyUsed

# Bytes of tables; one for every parameter apart, as where each is stepped alone, takes a kilobyte or two.
LIMIT = 1 << 25
# What torch's allocator on a GPU gives a tensor at least.
SMALLEST = 512
# Bytes of pinned memory set aside, at least; a table of a thousand parameters takes about a tenth of it.
RESERVE = 1 << 20

_entries = RecentlyUsed(LIMIT)
_kept_for_graphs: list[Any] = []
_reserved: dict[str, Tensor] = {}


def cached(make: Callable[[Any, torch.device], Any], key: Hashable, device: torch.device) -> Any:
    """``make(key, device)``, a tensor or a tuple with some, or what it gave the last time on this stream."""
    full_key = (make, key, device, _stream(device))
    value = _entries.get(full_key)
    if value is not None:
        if capturing(device):
            _kept_for_graphs.append(value)
        return value
    if capturing(device):
        same = [value for other, value in _entries.items() if other[:3] == full_key[:3]]
        value = same[0] if same else make(key, device)
        # Not put into the cache: what a graph copies is there only after a replay.
        _kept_for_graphs.append(value)
        return value
    value = make(key, device)
    _entries.add(full_key, value, _size(value))
    return value


def capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` is being captured in a graph."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of ``host`` on ``device``, in order with the current stream's launches; ``host`` itself for a CPU."""
    if device.type != "cuda":
        return host
    if not capturing(device):
        _set_aside(host.nbytes)
        return host.pin_memory().to(device, non_blocking=True)
    source = _take(host.nbytes).view(host.dtype).view(host.shape).copy_(host)
    _kept_for_graphs.append(source)
    return source.to(device, non_blocking=True)


def _size(value: Any) -> int:
    parts = value if isinstance(value, tuple) else (value,)
    return sum(max(SMALLEST, part.nbytes) for part in parts if isinstance(part, Tensor))


def _set_aside(size: int) -> None:
    """Have pinned memory for at least eight tables of ``size`` bytes."""
    if "pinned" not in _reserved or _reserved["pinned"].nbytes < 8 * size:
        _reserved["pinned"] = _pinned(max(RESERVE, 16 * size))


def _take(size: int) -> Tensor:
    # A multiple of 16 bytes keeps every part aligned for any dtype.
    rounded = -(-size // 16) * 16
    if "pinned" not in _reserved or _reserved["pinned"].nbytes < rounded:
        raise RuntimeError("this step needs new tables in a CUDA graph; take one step like it before the capture")
    memory = _reserved["pinned"]
    _reserved["pinned"] = memory[rounded:]
    return memory[:size]


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
