"""``mixft bench``: the benchmark cases, each against torch in the same run, and what the machine itself reaches."""

import os
from dataclasses import asdict
from fnmatch import fnmatchcase
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from mixft.cli.errors import InputError

ROUNDS, QUICK_ROUNDS = 31, 7


def bench(
    cases: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Names or patterns; else all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds: a look, not a figure to quote.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the results to FILE.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default the GPU if there is one.")] = None,
) -> None:
    """Time mixft against torch; exit code 1 when a provider's output is wrong, which then gets no time."""
    # Here, so that --help does not wait for torch.
    import torch
    from rich.console import Console

    from mixft.benchmarks.registry import CASES
    from mixft.benchmarks.run import run_case
    from mixft.benchmarks.timing import measure_machine
    from mixft.cli.device import choose_device
    from mixft.cli.environment import environment

    chosen = select([case.name for case in CASES], cases or ["*"])
    if json is not None and (json.is_dir() or not os.access(json.parent, os.W_OK)):
        raise InputError(f"--json {json} cannot be written; a file in a folder that exists would do")
    where = torch.device(choose_device(device))
    rounds = QUICK_ROUNDS if quick else ROUNDS
    console = Console()
    load = os.getloadavg()[0]
    if load > os.cpu_count() / 2:
        console.print(f"other work keeps this machine busy (load {load:.1f}): not figures to quote", style="yellow")
    machine = measure_machine(where, rounds)
    console.print(
        f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {rounds} interleaved rounds"
        f"\ncopy {machine.copy_bytes_per_second / 1e9:.1f} GB/s, "
        f"matmul {machine.matmul_operations_per_second / 1e12:.2f} T operations/s; "
        "floor: the least time at these two rates, as a share of the time taken"
    )
    console.print(f"{'case':<28}{'provider':<15}{'ms':>9}{'torch / mixft':>15}{'floor':>8}", style="bold")
    results = []
    for case in CASES:
        if case.name in chosen:
            for result in run_case(case, where, rounds, machine):
                results.append(result)
                console.print(_line(result), style="red" if result.complaint else None, markup=False)
    if json is not None:
        report = {
            "environment": environment(where),
            "machine": asdict(machine),
            "load_average": load,
            "rounds": rounds,
            "results": [asdict(result) for result in results],
        }
        json.write_text(dumps(report, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(1 if any(result.complaint for result in results) else 0)


def select(names: list[str], patterns: list[str]) -> set[str]:
    """The case names that a pattern matches, as a whole or as a family.

    Raises:
        InputError: a pattern matches none.
    """
    chosen = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")}
        if not found:
            families = dict.fromkeys(name.split("/")[0] for name in names)
            raise InputError(f"no case is named {pattern!r}; there are {', '.join(families)}, each with /* sizes")
        chosen |= found
    return chosen


def _line(result) -> str:
    line = f"{result.case:<28}{result.provider:<15}"
    if result.complaint:
        return f"{line} WRONG: {result.complaint}"
    ratio = f"{result.speedup:.2f}" if result.speedup is not None and result.provider != "mixft" else ""
    return f"{line}{result.seconds * 1e3:>9.3f}{ratio:>15}{result.floor_fraction:>8.0%}"
