"""``mixft tune``: measure launch configurations on this GPU and put the fastest sound ones into the files that ship."""

import importlib.util
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mixft.cli.device import choose_device
from mixft.cli.errors import InputError
from mixft.cli.output_file import check_writable


def tune(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Of kernels/configs; else all.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="Time for all sweeps, else 300; what it does not reach is said.", show_default=False),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write every trial to FILE.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the choices into the shipped files.")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Ship what FILE has measured; no sweep.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cuda:N.")] = None,
) -> None:
    """Sweep launch configurations with checked outputs; exit code 1 when a shipped one is not sound."""
    # Here, so that --help does not wait for torch.
    import torch
    from rich.console import Console

    from mixft.cli.environment import environment

    console = Console(soft_wrap=True, highlight=False)
    if source is not None:
        if ops or seconds or json or write or device:
            raise InputError("--from takes what was measured and sweeps nothing; leave the other options out")
        _ship(console, _read(source))
        return
    where = torch.device(choose_device(device))
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if where.type == "cpu" and (write or not interprets):
        raise InputError(
            f"mixft tune measures on a GPU, and this would run on {where}; --from FILE ships what another machine has "
            "measured, and TRITON_INTERPRET=1 rehearses a sweep without --write"
        )
    if importlib.util.find_spec("triton") is None:
        raise InputError("mixft tune launches Triton kernels, and Triton is not here; pip install triton (Linux)")
    from mixft.benchmarks import revision, tuning, tuning_files, tuning_spaces

    spaces = [space for space in _select(tuning_spaces.SPACES, ops or []) if tuning.ships(space, where)]
    check_writable("--json", json)
    measured_on = {**environment(where), "commit": revision.commit()}
    sweeps = []
    deadline = time.monotonic() + (seconds or 300)
    for left, space in zip(range(len(spaces), 0, -1), spaces, strict=True):
        found = tuning.sweep(space, where, max(1.0, deadline - time.monotonic()) / left, compiles=not interprets)
        sweeps.append(asdict(found))
        console.print(_line(found), markup=False)
        if json is not None:
            tuning_files.write(tuning_files.record(measured_on, sweeps), json)
    if write:
        _ship(console, tuning_files.record(measured_on, sweeps))
    raise typer.Exit(1 if any(found["speedup"] is None for found in sweeps) else 0)


def _select(spaces, ops: list[str]) -> list:
    known = list(dict.fromkeys(space.op for space in spaces))
    for op in ops:
        if op not in known:
            raise InputError(f"no op to tune is named {op!r}; there are {', '.join(known)}")
    return [space for space in spaces if not ops or space.op in ops]


def _read(source: Path) -> dict:
    from mixft.benchmarks import tuning_files

    try:
        return tuning_files.read(source)
    except (OSError, ValueError) as error:
        raise InputError(f"--from {source} cannot be used: {error}") from error


def _ship(console, found: dict) -> None:
    from mixft.benchmarks import tuning_files
    from mixft.kernels import configuration

    folder = Path(configuration.__file__).parent / "configs"
    try:
        lines = tuning_files.ship(found, folder)
    except (OSError, ValueError) as error:
        raise InputError(f"the files in {folder} stay as they are: {error}") from error
    for line in lines or ["what ships is the fastest; no file changes"]:
        console.print(line, markup=False)


def _line(found) -> str:
    where = f"{found.op}, {found.bucket}, {found.architecture}, {found.case}: "
    discarded = [trial for trial in found.trials if trial.discarded]
    tried = f"{len(found.trials)} tried, {len(discarded)} discarded, {found.untried} not reached"
    if found.speedup is None:
        return f"{where}the shipped configuration is not sound: {discarded[0].discarded}"
    if found.chosen == found.shipped:
        return f"{where}what ships is the fastest ({tried})"
    config = ", ".join(f"{name} {value}" for name, value in found.chosen.items())
    return f"{where}{found.speedup:.2f}x with {config} ({tried})"
