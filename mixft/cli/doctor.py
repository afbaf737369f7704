"""``mixft doctor``: what this machine has, which code serves each op, and whether the ops compute the right values."""

from dataclasses import dataclass
from json import dumps
from typing import TYPE_CHECKING, Annotated

import typer

from mixft.cli.environment import compiled_routines, cpu_features, devices, versions

if TYPE_CHECKING:
    import torch

    from mixft.cli.self_test import Case

VERDICTS = {True: "[green]ok[/]", False: "[bold red]WRONG[/]", None: "none"}


@dataclass(frozen=True)
class Row:
    """One op and dtype on one device: the code that serves it and what the self-test found.

    Where nothing serves it, ``served_by``, ``error`` and ``passed`` are None, and that is no failure.
    """

    device: str
    op: str
    dtype: str
    served_by: str | None
    error: float | None
    bound: float
    failure: str | None
    passed: bool | None


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False) -> None:
    """Say what this machine supports, and test every op against FP64; exit code 1 when one is wrong."""
    rows = diagnose()
    passed = not any(row.passed is False for row in rows)
    if json:
        report = {
            "versions": versions(),
            "devices": devices(),
            "cpu": {**cpu_features(), "compiled_routines": compiled_routines()},
            "ops": [vars(row) for row in rows],
            "passed": passed,
        }
        print(dumps(report, indent=1))
    else:
        _print(rows)
    raise typer.Exit(0 if passed else 1)


def diagnose() -> list[Row]:
    """Run the self-test on the CPU and on every GPU, with a bar on a terminal: a GPU compiles each kernel first."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from mixft.cli.self_test_cases import CASES

    console = Console(stderr=True)
    checks = [(case, torch.device(entry["device"])) for entry in devices() for case in CASES]
    hidden = not console.is_terminal
    return [_check(*check) for check in track(checks, "testing", console=console, transient=True, disable=hidden)]


def _check(case: "Case", device: "torch.device") -> Row:
    from mixft.cli.self_test import run_case
    from mixft.cli.serving import served_by

    dtype = str(case.dtype).removeprefix("torch.")
    code = served_by(case.op, case.dtype, device)
    if code is None:
        return Row(str(device), case.op, dtype, None, None, case.bound, None, None)
    found = run_case(case, device)
    return Row(str(device), case.op, dtype, code, found.error, case.bound, found.failure, found.passed)


def _print(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(", ".join(f"{name} {version or 'not installed'}" for name, version in versions().items()))
    for entry in devices():
        console.print(", ".join(f"{key} {value}" for key, value in entry.items()))
    features = cpu_features()
    present = [name for name, has in features["instruction_sets"].items() if has]
    missing = [name for name, has in features["instruction_sets"].items() if not has]
    console.print(f"cpu {features['capability']}: has {', '.join(present) or 'none'}; lacks {', '.join(missing)}")
    console.print(f"compiled CPU routines: {compiled_routines()}", markup=False)

    for device in dict.fromkeys(row.device for row in rows):
        title = f"ops on {device}: largest error against FP64, relative to the largest value"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("op", "dtype", "served by"):
            table.add_column(column, no_wrap=column == "op")
        for column in ("error", "bound", ""):
            table.add_column(column, justify="right")
        for row in (row for row in rows if row.device == device):
            error = "" if row.error is None else f"{row.error:.1e}"
            table.add_row(row.op, row.dtype, row.served_by or "-", error, f"{row.bound:.1e}", VERDICTS[row.passed])
        console.print(table)
    for row in rows:
        if row.failure:
            console.print(f"{row.op} {row.dtype} on {row.device}: {row.failure}", markup=False, style="red")
    verdicts = [row.passed for row in rows]
    console.print(
        f"{verdicts.count(True)} checks passed, {verdicts.count(False)} failed, {verdicts.count(None)} not supported"
    )
