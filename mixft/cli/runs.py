"""The runs of one ``mixft finetune``, one after another, and the report on them."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from mixft.cli import report
from mixft.cli.environment import environment
from mixft.cli.job import Job
from mixft.cli.output_folder import CURVES, OldRuns
from mixft.cli.process import RunFailed, run_in_process
from mixft.cli.progress import RunProgress
from mixft.cli.run_folder import failed_log
from mixft.cli.tasks import Task


def run_all(jobs: list[Job], task: Task, folder: Path, old_runs: OldRuns) -> int:
    """Run every job, write the report after each, and print the comparison. The old runs go once one has finished.

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
            ending, code = f"{failure}; its log is {failed_log(Path(job.output))}", 1
        except KeyboardInterrupt:
            ending, code = f"stopped during {job.name}, of which nothing is kept", 130
        if code:
            print(f"mixft: {ending}{_what_else(folder, finished, old_runs.restore())}", file=sys.stderr)
            break
        old_runs.discard()
        report.write_report(folder, machine, described, finished)
    if finished:
        report.draw_curves(finished, folder / CURVES)
        Console().print(report.comparison(finished))
        for line in report.inference(finished) + report.switches(finished):
            print(line)
        print(f"report, curves and models: {folder}")
    return code


def _what_else(folder: Path, finished: list[dict], brought_back: list[str]) -> str:
    """What ``folder`` has beside the run that did not finish."""
    if finished:
        return f"; what finished before it is in {folder}"
    if brought_back:
        return f"; {folder} has back what was to be replaced: {', '.join(brought_back)}"
    return ""
