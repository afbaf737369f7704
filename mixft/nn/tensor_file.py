"""Safetensors files written one tensor at a time, each tensor with a checksum.

The safetensors package writes a file from a dictionary that holds all of its tensors. Here a file is begun with the
names, dtypes and shapes alone, so that a model larger than memory can pass through. The metadata entry ``sha256`` is a
JSON object of one digest a tensor, over its name, dtype, shape and bytes. It finds damage, and bytes that were changed;
it is no signature: who can rewrite the file can rewrite the digests too. Hashing runs at one to two GB/s.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUMS = "sha256"
ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor as a file's header has it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def checksum(self, content: memoryview) -> str:
        """SHA-256 of name, dtype, shape and ``content``."""
        digest = hashlib.sha256(f"{self.name}\n{NAMES[self.dtype]}\n{list(self.shape)}\n".encode())
        digest.update(content)
        return digest.hexdigest()


def storage_order(entries: Iterable[Entry]) -> list[Entry]:
    """Every tensor at a multiple of its element's size, as mapping it asks: first those that keep the alignment, in
    their order, then the others, wide elements first."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize if entry.nbytes % ALIGNMENT else -ALIGNMENT - 1)


def write_tensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> dict[str, str]:
    """Write a safetensors file, and flush it to the disk.

    Args:
        path: the file, replaced where it exists.
        entries: in `storage_order`.
        tensors: their values, in the same order, on any device; one is held at a time.
        metadata: the file's own, to which the checksums are added.

    Returns:
        The checksum of every tensor, by its name.

    Raises:
        ValueError: a tensor is not of its entry's dtype and shape, or of a dtype that safetensors files lack.
    """
    for entry in entries:
        if entry.dtype not in NAMES:
            raise ValueError(f"tensor {entry.name!r} is {entry.dtype}, which a safetensors file cannot hold")
    checksums = {entry.name: "0" * 64 for entry in entries}
    with path.open("wb") as file:
        file.write(_header(entries, metadata, checksums))
        for entry, tensor in zip(entries, tensors, strict=True):
            if Entry.of(entry.name, tensor) != entry:
                raise ValueError(f"tensor {entry.name!r} is {tensor.dtype} {tuple(tensor.shape)}, announced as {entry}")
            content = content_of(tensor)
            checksums[entry.name] = entry.checksum(content)
            file.write(content)
        file.seek(0)
        file.write(_header(entries, metadata, checksums))  # of the same length, as all digests are
        file.flush()
        os.fsync(file.fileno())
    return checksums


def content_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; copied only where it is strided or on another device."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """An open safetensors file. A context manager.

    Raises:
        ValueError: the file is truncated or no safetensors file, or has a tensor of an unknown dtype.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Let the system unmap what no tensor needs any more."""
        self._file.__exit__(None, None, None)

    def metadata(self) -> dict[str, str]:
        """The file's own metadata, without its tensors."""
        return self._file.metadata() or {}

    def entries(self) -> dict[str, Entry]:
        """Every tensor's entry by its name, read from the header."""
        return {name: self._entry(name) for name in self._file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """One tensor; with safetensors 0.8 and newer, pages of the file that the system may drop again."""
        return self._file.get_tensor(name)

    def _entry(self, name: str) -> Entry:
        part = self._file.get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise ValueError(
                f"tensor {name!r} in {self.path} is of dtype {part.get_dtype()}, which mixft does not read"
            )
        return Entry(name, DTYPES[part.get_dtype()], tuple(part.get_shape()))


def _header(entries: Sequence[Entry], metadata: dict[str, str], checksums: dict[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {**metadata, CHECKSUMS: json.dumps(checksums)}}
    start = 0
    for entry in entries:
        end = start + entry.nbytes
        fields[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
