"""``mixft bench``: the benchmark cases, each beside its peers and the floor of this machine, outputs checked first."""

import contextlib
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mixft.cli.device import Device, choose_device
from mixft.cli.errors import InputError
from mixft.cli.output_file import check_writable

WIDTH = 120  # of what is not a terminal


def bench(
    cases: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Names or patterns; else all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds and cases: a look, not figures to quote.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the results to FILE.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the ratios, .png or .svg.")] = None,
    base: Annotated[str | None, typer.Option(metavar="REF", help="Time that git revision of mixft instead.")] = None,
    device: Device = None,
) -> None:
    """Time mixft beside torch and other packages; exit code 1 when an output is wrong, which then gets no time."""
    # Here, so that --help does not wait for torch.
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from mixft.benchmarks import machine, peers, registry, revision, timing
    from mixft.benchmarks.recording import Recording
    from mixft.benchmarks.run import failed
    from mixft.cli import bench_table
    from mixft.cli.environment import environment

    where = torch.device(choose_device(device))
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    effort = timing.QUICK if quick else timing.FULL
    available = {case.name: case for case in registry.cases_for(where)}
    selected = [available[name] for name in select(list(available), cases or ["*"])]
    chosen = [case for case in selected if effort.long or not case.long or cases]
    for option, file in (("--json", json), ("--plot", plot)):
        check_writable(option, file)
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console = Console(soft_wrap=True, highlight=False, width=WIDTH)
    with contextlib.ExitStack() as stack:
        measure = measurement(stack, base, where, effort)
        load = os.getloadavg()[0]
        if load > os.cpu_count() / 2:
            console.print(f"other work keeps this machine busy (load {load:.1f}): not figures to quote", style="yellow")
        recording = Recording(
            environment={**environment(where), "commit": revision.commit(), "peers": peers.installed()},
            machine=machine.measure_machine(where, effort),
            load_average=load,
            rounds=effort.rounds,
            quick=quick,
        )
        console.print(bench_table.preface(recording))
        width = max((len(case.name) for case in chosen), default=0)
        console.print(bench_table.heading(width))
        progress = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            rows = measure(case, machine=recording.machine)
            recording.rows.extend(rows)
            console.print(bench_table.case_line(rows, width, console.width))
            progress.advance(task)
            if json is not None:
                recording.write(json)  # after every case: a run cut short leaves what it has
    console.print()
    console.print(bench_table.summary(recording.rows))
    for line in bench_table.remarks(recording.rows, base):
        console.print(line, markup=False)
    if left := len(selected) - len(chosen):
        console.print(f"{left} cases that take longer: without --quick")
    if plot is not None:
        from mixft.benchmarks.plots import ratio_bars

        ratio_bars(recording.to_dict(), plot)
    raise typer.Exit(1 if failed(recording.rows) else 0)


def measurement(stack: contextlib.ExitStack, base: str | None, device, effort) -> Callable:
    """What makes the rows of a case: all of its providers, or with ``base`` mixft at this revision and at that one.

    Args:
        stack: ends the processes that two revisions run in.

    Raises:
        InputError: there is no such revision, or no checkout to have it from.
    """
    from mixft.benchmarks import revision
    from mixft.benchmarks.run import run_case

    if base is None:
        return partial(run_case, device=device, effort=effort)
    try:
        folder = stack.enter_context(revision.worktree(base))
    except ValueError as error:
        raise InputError(f"--base {error}; a commit, tag or branch would do, in a git checkout of mixft") from error
    workers = [stack.enter_context(revision.Worker(root, device)) for root in (revision.checkout(), folder)]
    return partial(revision.compare, workers=workers, base=revision.provider_name(base), effort=effort)


def select(names: list[str], patterns: list[str]) -> list[str]:
    """The case names that a pattern matches, as a whole or as a family, in the order of the patterns.

    Raises:
        InputError: a pattern matches none.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")]
        if not found:
            families = dict.fromkeys(name.split("/")[0] for name in names)
            raise InputError(f"no case is named {pattern!r}; there are {', '.join(families)}, each with /* sizes")
        chosen |= dict.fromkeys(found)
    return list(chosen)
