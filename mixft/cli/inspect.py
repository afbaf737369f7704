"""``mixft inspect``: what the compiler makes of every shipped kernel for a GPU, without that GPU."""

import importlib.util
from dataclasses import asdict
from fnmatch import fnmatchcase
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixft.cli.errors import InputError
from mixft.cli.output_file import check_writable, write_whole
from mixft.kernels.variant import kernel_of

if TYPE_CHECKING:
    from mixft.kernels.parallel_compilation import Job, Outcome

DEFAULT_ARCHITECTURE = "sm_90"


def inspect(
    kernels: Annotated[
        list[str] | None, typer.Argument(metavar="[KERNEL]...", help="Names or patterns; else an overview of all.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="sm_90, gfx942, ... with commas; default this machine's GPU, else sm_90.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write everything to FILE.")] = None,
) -> None:
    """Compile the kernels and print registers, occupancy, instructions, traffic and the time that they imply.

    No GPU is needed and none is used. Exit code 1 when a kernel does not compile, spills or breaks another limit.
    """
    # Here, so that --help does not wait for torch.
    from rich.console import Console

    from mixft.cli.environment import versions
    from mixft.cli.inspect_table import WIDTH, print_report
    from mixft.kernels.architecture import ARCHITECTURES

    if importlib.util.find_spec("triton") is None:
        raise InputError("mixft inspect compiles kernels with Triton, which is not here; pip install triton (Linux)")
    check_writable("--json", json)
    architectures = choose_architectures(arch)
    names = choose_kernels(kernels or ["*"])
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    outcomes = _compile(jobs(architectures, names), console)
    for name in architectures:
        found = [outcome for outcome in outcomes if outcome.job.architecture == name]
        missing = [kernel for kernel in names if kernel not in {kernel_of(outcome.job.variant) for outcome in found}]
        print_report(console, ARCHITECTURES[name], found, missing, overview=not kernels)
    if json is not None:
        report = {
            "versions": versions(),
            "architectures": {name: asdict(ARCHITECTURES[name]) for name in architectures},
            "kernels": [_record(outcome) for outcome in outcomes],
        }
        write_whole(json, dumps(report, indent=1) + "\n")
    raise typer.Exit(1 if any(complaints(outcome) for outcome in outcomes) else 0)


def choose_architectures(text: str | None) -> list[str]:
    """The names in ``text``, or this machine's architecture, or ``DEFAULT_ARCHITECTURE`` on one without a GPU.

    Raises:
        InputError: a name is unknown, or the GPU here is older than every listed architecture.
    """
    import torch

    from mixft.kernels.architecture import ARCHITECTURES, architecture_of

    if text is None:
        if not torch.cuda.is_available():
            return [DEFAULT_ARCHITECTURE]
        try:
            return [architecture_of(torch.device("cuda", torch.cuda.current_device())).name]
        except RuntimeError as error:
            raise InputError(f"{error}; --arch takes any of them") from error
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise InputError(f"--arch {unknown[0]!r} is not an architecture; there are {', '.join(ARCHITECTURES)}")
    return names


def choose_kernels(patterns: list[str]) -> list[str]:
    """The kernels whose own name a pattern matches; where it matches none, all of the modules whose name it does.

    Raises:
        InputError: a pattern matches none.
    """
    modules = _modules()
    chosen = set()
    for pattern in patterns:
        found = {kernel for kernel in modules if fnmatchcase(kernel, pattern)}
        found = found or {kernel for kernel, module in modules.items() if fnmatchcase(module, pattern)}
        if not found:
            raise InputError(f"no kernel is named {pattern!r}; there are {', '.join(modules)}")
        chosen |= found
    return [kernel for kernel in modules if kernel in chosen]


def _modules() -> dict[str, str]:
    """The module of each kernel; a kernel's name is that of its variants before the bracket."""
    from mixft.kernels.architecture import ARCHITECTURES
    from mixft.kernels.compilation import kernel_modules

    return {
        kernel_of(variant.name): name
        for name, module in kernel_modules().items()
        for arch in ARCHITECTURES.values()
        for variant in module.variants(arch)
    }


def jobs(architectures: list[str], kernels: list[str]) -> "list[Job]":
    """Every variant of the kernels on the architectures, in the order of the modules."""
    from mixft.kernels.parallel_compilation import jobs_of

    return [
        job
        for arch in architectures
        for module in dict.fromkeys(_modules().values())
        for job in jobs_of(f"mixft.kernels.{module}", arch)
        if kernel_of(job.variant) in kernels
    ]


def _compile(jobs: "list[Job]", console) -> "list[Outcome]":
    """The outcomes of ``jobs`` in their order, with a bar on a terminal while they are compiled."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from mixft.kernels.parallel_compilation import compile_all

    outcomes = {}
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(jobs))
        for outcome in compile_all(jobs):
            outcomes[outcome.job] = outcome
            progress.update(task, advance=1, description=outcome.job.variant)
    return [outcomes[job] for job in jobs]


def complaints(outcome: "Outcome") -> list[str]:
    """Why ``outcome`` is not what may be shipped; empty where it is."""
    from mixft.kernels.architecture import ARCHITECTURES
    from mixft.kernels.compilation import faults

    if outcome.failure is not None:
        return [" ".join(outcome.failure.split())]
    return faults(outcome.compiled, ARCHITECTURES[outcome.job.architecture])


def _record(outcome: "Outcome") -> dict:
    return {
        **outcome.job._asdict(),
        "compiled": None if outcome.compiled is None else asdict(outcome.compiled),
        "complaints": complaints(outcome),
    }
