"""Start a run's process, hand it its job, pass its progress on, and end it when the command ends."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mixft.cli.errors import InputError
from mixft.cli.job import LOG, Job
from mixft.cli.run_folder import failed_log, run_folder

# Not -m, which would look for mixft in the current folder first, where a checkout of that name may lie.
CHILD = "import sys; sys.path[:] = filter(None, sys.path); from mixft.cli.training import main; main()"

# For runs that save memory: blocks of so many bytes are given back to the system when they are freed,
MAPPED = 2**20
# and of smaller ones glibc keeps so many bytes.
KEPT = 2**26


class RunFailed(Exception):
    """A run's process ended without a result."""


def run_in_process(job: Job, on_event: Callable[[dict], None]) -> dict:
    """Train in a process of its own; the job's output folder appears when it has finished, with its log as ``LOG``.

    Returns:
        The run's entry in ``report.json``.

    Raises:
        RunFailed: the process ended before its result; the message has the last line of its log, which is the
            `failed_log` of the output folder.
        InputError: it found that what the user gave does not load.
    """
    place = Path(job.output)
    with run_folder(place) as draft:
        try:
            result = _train(replace(job, output=str(draft)), draft / LOG, on_event)
        except RunFailed:
            os.replace(draft / LOG, failed_log(place))
            raise
    failed_log(place).unlink(missing_ok=True)
    return result


def _train(job: Job, log: Path, on_event: Callable[[dict], None]) -> dict:
    result = refusal = None
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", **_memory_settings(job)},
        )
        try:
            _hand_over(process, job)
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "result":
                    result = event["run"]
                elif event["event"] == "refused":
                    refusal = event["reason"]
                else:
                    on_event(event)
            process.wait()
        finally:
            _end(process)
    if refusal is not None:
        raise InputError(refusal)
    if result is None or process.returncode != 0:
        raise RunFailed(f"the run {job.name} failed: {_reason(process.returncode, log)}")
    return result


def _memory_settings(job: Job) -> dict[str, str]:
    """How glibc deals with freed memory, as environment variables.

    Adapters are trained to save memory, so large blocks are given back; glibc would keep those of up to 32 MiB. (Giving
    back small ones too would spend half of the run's time on page faults.) Other runs keep all that they free, since
    each step asks for the same again: that saves a twelfth of the processor's time, and the peak is no higher.
    """
    if job.recipe.lora is not None:
        settings = {"MALLOC_MMAP_THRESHOLD_": MAPPED, "MALLOC_TRIM_THRESHOLD_": KEPT, "MALLOC_ARENA_MAX": 1}
        return {name: str(value) for name, value in settings.items()}
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def _hand_over(process: subprocess.Popen, job: Job) -> None:
    try:
        with process.stdin as stream:
            stream.write(job.to_json())
    except BrokenPipeError:
        pass  # it died before it read its job: the exit code and the log say why


def _end(process: subprocess.Popen) -> None:
    """Stop the process where it still runs, as after Ctrl-C."""
    process.stdout.close()
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(returncode: int, log: Path) -> str:
    if returncode < 0:
        hint = ", perhaps for want of memory" if returncode == -9 else ""
        return f"its process was ended by signal {-returncode}{hint}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"its process exited with code {returncode}"
