"""The output folder of ``mixft finetune``, and the runs that fill it one after another."""

import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from mixft.cli import report
from mixft.cli.dataset import Dataset
from mixft.cli.errors import InputError
from mixft.cli.job import Job
from mixft.cli.process import RunFailed, run_in_process
from mixft.cli.progress import RunProgress

RUN_FOLDER = re.compile(r"[a-z0-9]+-seed\d+")


def claim(folder: Path, overwrite: bool) -> None:
    """Make ``folder`` ready for new runs; with ``overwrite`` the runs in it go and all else in it stays.

    Raises:
        InputError: it is a file, cannot be made, or has runs in it without ``overwrite``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = [path for path in folder.iterdir() if _of_a_run(path)]
        if present and not overwrite:
            raise InputError(f"--output {folder} has a run in it ({present[0].name}); --overwrite replaces it")
        for path in present:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise InputError(f"--output {folder} cannot be used: {error.strerror}; name another folder") from error


def run_all(jobs: list[Job], data: Dataset, folder: Path) -> int:
    """Run every job, write the report after each, and print the comparison.

    Returns:
        The exit code: 0, 1 where a run failed, 130 where Ctrl-C stopped one.
    """
    recipe = jobs[0].recipe
    environment = report.environment(torch.device(recipe.device))
    fitted, held_out = data.split(jobs[0].seed)
    task = {
        **asdict(recipe),
        "labels": data.labels,
        "train_examples": len(fitted),
        "eval_examples": len(held_out),
        "precisions": list(dict.fromkeys(job.precision for job in jobs)),
        "seeds": list(dict.fromkeys(job.seed for job in jobs)),
    }
    console = Console(stderr=True)
    finished: list[dict] = []
    code = 0
    for job in jobs:
        try:
            with RunProgress(console, job.name) as progress:
                finished.append(run_in_process(job, progress.on_event))
        except RunFailed as failure:
            print(f"mixft: {failure}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            print(f"mixft: stopped during {job.name}; what finished before it is in {folder}", file=sys.stderr)
            code = 130
        if code:
            break
        report.write_report(folder, environment, task, finished)
    if finished:
        report.draw_curves(finished, folder / report.CURVES)
        Console().print(report.comparison(finished))
        print(f"report, curves and models: {folder}")
    return code


def _of_a_run(path: Path) -> bool:
    if path.is_dir():
        return RUN_FOLDER.fullmatch(path.name) is not None
    return path.name in (report.REPORT, report.CURVES)
