"""Launch configurations: frozen dataclasses, kept as JSON in ``configs/``, picked in Python by (arch, bucket).

A file ``configs/<op>.json`` holds ``provenance`` (Triton version, device and date of the measurement, or ``null`` for a
device when the choice was made from compiled code alone) and ``entries``, each with ``architectures``, ``bucket`` and
the fields of the op's dataclass under ``config``. An entry that ``mixft tune`` chose has ``measured`` too: Triton
version, device, date and the speed-up over the configuration before.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from .architecture import ARCHITECTURES, Architecture

Config = TypeVar("Config")


@functools.cache
def configurations(op: str, kind: type[Config]) -> dict[tuple[str, str], Config]:
    """Every shipped configuration of ``op`` as ``{(architecture name, bucket): configuration}``."""
    document = json.loads((Path(__file__).parent / "configs" / f"{op}.json").read_text())
    table = {}
    for entry in document["entries"]:
        for arch in entry["architectures"]:
            if arch not in ARCHITECTURES:
                raise ValueError(f"configs/{op}.json names the unknown architecture {arch!r}")
            table[arch, entry["bucket"]] = kind(**entry["config"])
    return table


def configuration(op: str, kind: type[Config], arch: Architecture, bucket: str) -> Config:
    """The configuration of ``op`` for ``arch`` and shape ``bucket``.

    Raises:
        RuntimeError: none is shipped for that architecture.
    """
    try:
        return configurations(op, kind)[arch.name, bucket]
    except KeyError:
        raise RuntimeError(
            f"mixft ships no {bucket!r} configuration of {op} for {arch.name}; supported: "
            + ", ".join(sorted({name for name, _ in configurations(op, kind)}))
        ) from None


@contextlib.contextmanager
def substitute(op: str, config: Config, arch: Architecture, bucket: str) -> Iterator[None]:
    """Within the block ``config`` is what launchers and ``variants`` get in this process: how a tuner tries one.

    Raises:
        RuntimeError: ``op`` has no such bucket for that architecture.
    """
    shipped = configuration(op, type(config), arch, bucket)
    table = configurations(op, type(config))
    table[arch.name, bucket] = config
    try:
        yield
    finally:
        table[arch.name, bucket] = shipped
