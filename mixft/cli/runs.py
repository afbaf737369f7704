"""The runs of one ``mixft finetune``, one after another, and the report on them."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from mixft.cli import report
from mixft.cli.environment import environment
from mixft.cli.job import LOG, Job
from mixft.cli.output_folder import CURVES, OldRuns
from mixft.cli.process import RunFailed, run_in_process
from mixft.cli.progress import RunProgress
from mixft.cli.tasks import Task


def run_all(jobs: list[Job], task: Task, folder: Path, old_runs: OldRuns) -> int:
    """Run every job, write the report after each, and print the comparison. The old runs go with the first report.

    Returns:
        The exit code: 0, 1 where a run failed, 130 where Ctrl-C or SIGTERM stopped one.
    """
    recipe = jobs[0].recipe
    machine = environment(torch.device(recipe.device))
    described = {
        **asdict(recipe),
        **task.description(jobs[0].seed),
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
            place = Path(job.output)
            log = old_runs.restore().get(place, place) / LOG
            print(f"mixft: {failure}; its log is {log}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            print(f"mixft: stopped during {job.name}; what finished before it is in {folder}", file=sys.stderr)
            code = 130
        if code:
            break
        report.write_report(folder, machine, described, finished)
        old_runs.discard()
    if finished:
        report.draw_curves(finished, folder / CURVES)
        Console().print(report.comparison(finished))
        for line in report.inference(finished) + report.switches(finished):
            print(line)
        print(f"report, curves and models: {folder}")
    return code
