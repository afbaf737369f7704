"""One set of tensors as one safetensors file or several with an index, named as Hugging Face names them.

``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on beside ``model.safetensors.index.json``, whose
``weight_map`` says which file holds which tensor.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .tensor_file import CHECKSUMS, Entry, TensorFile, content_of, storage_order, write_tensors

INDEX = ".index.json"
# A file is opened anew after so many bytes were read of it, or this part of it where that is more: what was read stays
# mapped until then, and to open one takes time for every tensor that it has.
SMALLEST_WINDOW, WINDOWS = 2**24, 128
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SIZE = re.compile(r"(\d+(?:\.\d+)?) *([A-Za-z]*)")


def parse_size(given: int | str) -> int:
    """Bytes in ``given``: a whole number, or text such as "5GB" (10^9 bytes each) or "512MiB" (2^20).

    Raises:
        ValueError: it is no size above zero.
    """
    match = SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
    if isinstance(given, int) and not isinstance(given, bool):
        size = given
    elif match and match[2].upper() in UNITS:
        size = int(float(match[1]) * UNITS[match[2].upper()])
    else:
        size = 0
    if size < 1:
        raise ValueError(f"{given!r} is no size; a number of bytes, or text such as '5GB' or '512MiB', would do")
    return size


def split(entries: Iterable[Entry], max_shard_size: int | None) -> list[list[Entry]]:
    """Entries in groups of at most ``max_shard_size`` bytes, in order; a larger tensor is a group of its own."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if max_shard_size is not None and groups[-1] and size + entry.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    return [storage_order(group) for group in groups]


def write_shards(
    path: Path,
    groups: list[list[Entry]],
    tensor: Callable[[str], Tensor],
    metadata: dict[str, str],
    on_written: Callable[[str], None] = lambda name: None,
) -> None:
    """Write ``path``, or its shards and their index where there are several groups; the whole set appears, or none.

    Files are written into a hidden folder beside ``path`` first. Then the files of the same name that were there are
    taken away, index first, and the new ones renamed into place, index last; whatever fails before that puts the old
    ones back. A process that is killed meanwhile leaves no index, so that nobody loads half a set.

    Args:
        path: the single file's name, from which those of shards and index are made.
        groups: from `split`.
        tensor: gives the tensor of a name when its turn comes.
        metadata: of the single file, or of the index.
        on_written: told the name of each tensor as it is asked for.
    """

    def asked_for(group: list[Entry]):
        for entry in group:
            yield tensor(entry.name)
            on_written(entry.name)

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as name:
        staging = Path(name)
        if len(groups) == 1:
            write_tensors(staging / path.name, groups[0], asked_for(groups[0]), metadata)
            _commit(staging, [path.name], path)
            return
        weight_map, checksums = {}, {}
        for number, group in enumerate(groups, start=1):
            shard = f"{path.stem}-{number:05}-of-{len(groups):05}{path.suffix}"
            checksums |= write_tensors(staging / shard, group, asked_for(group), {"format": "pt"})
            weight_map |= {entry.name: shard for entry in group}
        total = sum(entry.nbytes for group in groups for entry in group)
        header = {"total_size": total, **metadata, CHECKSUMS: json.dumps(checksums)}
        index = f"{path.name}{INDEX}"
        (staging / index).write_text(
            json.dumps({"metadata": header, "weight_map": weight_map}, indent=1, sort_keys=True) + "\n",
            encoding="utf-8",
        )
        _commit(staging, [*dict.fromkeys(weight_map.values()), index], path)


def _commit(staging: Path, names: list[str], path: Path) -> None:
    """Move the files ``names`` from ``staging`` beside ``path`` in place of the set that is there."""
    folder, aside = path.parent, staging / "replaced"
    if names == [path.name] and not (folder / f"{path.name}{INDEX}").exists():
        os.replace(staging / path.name, path)  # one step, so that a file is there at any time
        return
    aside.mkdir()
    moved: list[str] = []
    placed: list[str] = []
    try:
        for name in _present(path):
            os.replace(folder / name, aside / name)
            moved.append(name)
        for name in names:
            os.replace(staging / name, folder / name)
            placed.append(name)
    except BaseException:
        for name in placed:
            (folder / name).unlink()
        for name in reversed(moved):
            os.replace(aside / name, folder / name)
        raise
    shutil.rmtree(aside)


def _present(path: Path) -> list[str]:
    """Names of the files of the set that ``path`` stands for, the index first."""
    index = path.with_name(f"{path.name}{INDEX}")
    shard = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    found = [file.name for file in sorted(path.parent.iterdir()) if shard.fullmatch(file.name)]
    return [file.name for file in (index, path) if file.is_file()] + found


@dataclass
class TensorSet:
    """The tensors of one file, or of the shards that an index names.

    Attributes:
        source: the single file or the index, for messages.
        metadata: of the single file or the index.
        entries: every tensor's name, dtype and shape.
        files: the file that holds each tensor.
    """

    source: Path
    metadata: dict
    entries: dict[str, Entry]
    files: dict[str, Path]
    _open: TensorFile | None = field(default=None, init=False, repr=False)
    _bytes_left: int = field(default=0, init=False, repr=False)

    def tensor(self, name: str) -> Tensor:
        """One tensor. Those read before, once dropped, leave the memory within a window's bytes."""
        path = self.files[name]
        if self._open is None or self._open.path != path or self._bytes_left <= 0:
            if self._open is not None:
                self._open.close()
            self._open = TensorFile(path)
            self._bytes_left = max(SMALLEST_WINDOW, path.stat().st_size // WINDOWS)
        self._bytes_left -= self.entries[name].nbytes
        return self._open.tensor(name)

    def checksums(self) -> dict[str, str] | None:
        """The checksum of every tensor as `write_shards` left it; None where there are none.

        Raises:
            ValueError: they are damaged.
        """
        if CHECKSUMS not in self.metadata:
            return None
        try:
            found = json.loads(self.metadata[CHECKSUMS])
            return {name: found[name] for name in self.entries}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.source} has damaged checksums: {error!r}") from error

    def verified(self, name: str, checksum: str) -> Tensor:
        """`tensor`, held to its checksum.

        Raises:
            ValueError: it has another.
        """
        tensor = self.tensor(name)
        if self.entries[name].checksum(content_of(tensor)) != checksum:
            raise ValueError(
                f"tensor {name!r} in {self.files[name]} is not what was saved: it does not have its checksum; "
                "the file is damaged, changed, or of another save"
            )
        return tensor


def open_tensors(path: Path) -> TensorSet:
    """Read the headers of the file ``path``, or of all files of the index that is ``path`` or has its name.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: a file is truncated or no safetensors file, the index is damaged, a shard is missing, or a tensor is
            not in the shard that the index says.
    """
    index = path if path.name.endswith(INDEX) else path.with_name(f"{path.name}{INDEX}")
    if path.is_file() and path != index:
        with TensorFile(path) as file:
            entries = file.entries()
            return TensorSet(path, file.metadata(), entries, dict.fromkeys(entries, path))
    if not index.is_file():
        raise FileNotFoundError(f"path {str(path)!r} is not a file, and there is no {index.name} beside it")
    metadata, weight_map = _read_index(index)
    files = {name: index.parent / shard for name, shard in weight_map.items()}
    entries: dict[str, Entry] = {}
    for shard in dict.fromkeys(files.values()):
        mapped = {name for name, file in files.items() if file == shard}
        if not shard.is_file():
            raise ValueError(f"{index} names the file {shard.name!r}, which is not there; it has {sorted(mapped)[0]!r}")
        with TensorFile(shard) as file:
            found = file.entries()
        for name in sorted(mapped ^ found.keys()):
            lacking, having = (shard, index) if name in mapped else (index, shard)
            raise ValueError(f"{lacking} has no tensor {name!r}, which {having.name} has")
        entries |= found
    return TensorSet(index, metadata, entries, files)


def _read_index(index: Path) -> tuple[dict, dict[str, str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        metadata, weight_map = content.get("metadata") or {}, content["weight_map"]
        if not isinstance(metadata, dict):
            raise TypeError("its metadata is no object")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"tensor {name!r} is in {shard!r}, which is no file name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is a damaged index: {error}") from error
    return metadata, weight_map
