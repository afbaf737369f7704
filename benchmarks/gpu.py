"""``make gpu``: everything that only a GPU can show, in one command, one JSON file and a bounded time.

Needs no network: torch, Triton, pytest and what the command line needs must be there. Runs as a script, before mixft is
installed, on Python's own library alone. Each stage is a process of its own with a share of the time that is left: one
that crashes or is cut off leaves what it had, and the next one runs. All that a test run printed lies in a ``.log``
beside the file unless every test passed. The file is written anew after every stage:

    {"environment": {...}, "device", "date", "stages": [{"name", "status", "seconds", "exit_code", "output"}],
     "recording": a recording of ``mixft bench`` or null, "tuning": the record of ``mixft tune`` or null}

A status is "done", "failed", "cut off" or "skipped". Exit code: 0 when no stage failed and the tests were not cut off.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-c"]
MIXFT = [*PYTHON, "import sys; from mixft.cli import main; sys.exit(main())"]
INVENTORY = """
import json, sys, torch
from fnmatch import fnmatchcase
from itertools import chain, zip_longest
from mixft.benchmarks import registry, revision
from mixft.cli.environment import environment
device, quick, patterns = torch.device(sys.argv[1]), sys.argv[2] == "quick", sys.argv[3:]
families = {}
for case in registry.cases_for(device):
    if any(fnmatchcase(case.name, pattern) for pattern in patterns) and not (case.long and quick):
        families.setdefault(case.family, []).append(case.name)
# One of each family in turn: a run that is cut off has some of every kind.
cases = [name for name in chain.from_iterable(zip_longest(*families.values())) if name]
print(json.dumps({"environment": {**environment(device), "commit": revision.commit()}, "cases": cases}))
"""
SUMMARY = """
import json, sys
from mixft.benchmarks import tables
recording = json.load(open(sys.argv[1]))["recording"]
print(tables.machine(recording), tables.summary(recording), sep="\\n")
"""
# Shares of the time, in the order that the stages run. The first two are part of every run: without them there is no
# other, so theirs are several times what compiling and a first import of torch take; what they leave is the others'.
SHARES = {"install": 120, "inventory": 90, "doctor": 120, "tests": 160, "bench": 200, "tune": 80}
GRACE = 8.0  # seconds that a process has to write what it has, after it was asked to stop
OUTPUT = 20000  # characters of a stage's output that are kept, from its end
NO_TESTS = 5  # pytest's exit code when nothing was collected, as on a machine without a GPU
HUNG = 120  # seconds after which a test is taken to hang


@dataclass
class Outcome:
    """How a stage ended; ``exit_code`` is None where it was cut off or did not run."""

    name: str
    status: str
    seconds: float
    exit_code: int | None
    output: str


def run_stage(
    name: str, command: list[str], limit: float, fine: tuple[int, ...] = (0,), whole: Path | None = None
) -> Outcome:
    """Run ``command`` from the checkout for at most ``limit`` seconds; exit codes in ``fine`` mean that it is done.

    All that it printed goes to the file ``whole``, if one is given, unless it is done.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background job ignores Ctrl-C, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            code = process.wait(timeout=limit - min(GRACE, limit / 4))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
        status = "cut off" if code is None else "done" if code in fine else "failed"
        if whole is not None and status != "done":
            log.seek(0)
            whole.write_bytes(log.read())
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4 * OUTPUT))
        output = log.read().decode(errors="replace")[-OUTPUT:]
    return Outcome(name, status, round(time.monotonic() - start, 1), code, output)


def _stop(process: subprocess.Popen) -> None:
    """End the process and all that it started: Ctrl-C first, so that each writes what it has."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    # Also after a crash: what a process leaves behind would hold the GPU.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Session:
    """One run of ``make gpu``: the time that is left, and the file that every stage adds to."""

    def __init__(self, path: Path, device: str, budget: float, stages: Sequence[str] = tuple(SHARES)):
        self.path = path
        self.device = device
        self.stages = stages
        self.deadline = time.monotonic() + budget
        self.document = {
            "environment": None,
            "device": device,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "stages": [],
            "recording": None,
            "tuning": None,
        }

    def limit(self, name: str) -> float:
        """Seconds for a stage: its share of the time left, the shares of those after it kept back."""
        names = list(SHARES)
        ahead = sum(SHARES[later] for later in names[names.index(name) :] if later in self.stages)
        return max(0.0, self.deadline - time.monotonic()) * SHARES[name] / ahead

    def add(self, outcome: Outcome) -> Outcome:
        """Show how a stage ended, and write the file."""
        last = "\n".join(outcome.output.strip().splitlines()[-12:])
        print(f"== {outcome.name}: {outcome.status} after {outcome.seconds:.0f} s\n{last}", flush=True)
        self.document["stages"].append(asdict(outcome))
        self.write()
        return outcome

    def write(self) -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path)

    def stage(self, name: str, command: list[str], fine: tuple[int, ...] = (0,), whole: Path | None = None) -> None:
        if name in self.stages:
            self.add(run_stage(name, command, self.limit(name), fine, whole))

    def skip(self, name: str, reason: str) -> None:
        self.add(Outcome(name, "skipped", 0.0, None, reason))

    def failed(self) -> bool:
        return any(
            stage["status"] == "failed" or (stage["status"] == "cut off" and stage["name"] == "tests")
            for stage in self.document["stages"]
        )


def benchmark(session: Session, cases: list[str], options: list[str]) -> None:
    """Run the cases; after a crash go on behind the case that crashed, which is named in the stage's output."""
    part = session.path.with_name(f"{session.path.stem}-part.json")
    limit = time.monotonic() + session.limit("bench")
    while cases:
        command = [*MIXFT, "bench", *cases, "--device", session.device, "--json", str(part), *options]
        # Exit code 1 with every case in the recording says that some provider's output was wrong, which has its row.
        try:
            outcome = run_stage("bench", command, limit - time.monotonic(), fine=(0, 1))
        finally:
            # When this run is asked to end, too: what has been measured belongs into its file.
            measured = collect(session.document, part)
            session.write()
        left = [case for case in cases if case not in measured]
        if left and outcome.status != "cut off":
            outcome.status = "failed"
            outcome.output += f"\n{left[0]} ended the process with exit code {outcome.exit_code}"
        session.add(outcome)
        if outcome.status == "cut off" or limit - time.monotonic() < 2 * GRACE:
            return
        cases = left[1:]


def collect(document: dict, part: Path) -> set[str]:
    """Move the rows of a part into the document's recording; returns the names of the cases that they are of."""
    if not part.exists():
        return set()
    found = json.loads(part.read_text(encoding="utf-8"))
    part.unlink()
    if document["recording"] is None:
        document["recording"] = found
    else:
        document["recording"]["rows"] += found["rows"]
    return {row["case"] for row in found["rows"]}


def tune(session: Session) -> None:
    """Sweep the launch configurations; the shipped files stay as they are until ``mixft tune --from`` takes these."""
    part = session.path.with_name(f"{session.path.stem}-tuning.json")
    seconds = max(1, session.limit("tune") - 3 * GRACE)
    command = [*MIXFT, "tune", "--device", session.device, "--seconds", f"{seconds:.0f}", "--json", str(part)]
    outcome = run_stage("tune", command, session.limit("tune"))
    if part.exists():
        session.document["tuning"] = json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    session.add(outcome)


def run_all(session: Session, quick: bool, patterns: Sequence[str] = ("*",)) -> int:
    """Every stage in order, with the cases whose names match ``patterns``; returns the exit code."""
    on_gpu = session.device.startswith("cuda")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
    session.stage("install", pip)
    what = [*PYTHON, INVENTORY, session.device, "quick" if quick else "all", *patterns]
    inventory = run_stage("inventory", what, session.limit("inventory"))
    found = {"environment": None, "cases": []}
    if inventory.status == "done":
        # Beside it there may be what torch or Python prints at the end.
        found = json.loads(next(line for line in reversed(inventory.output.splitlines()) if line.startswith("{")))
        inventory.output = f"{len(found['cases'])} cases"
    session.document["environment"] = found["environment"]
    session.add(inventory)
    session.stage("doctor", [*MIXFT, "doctor"])
    # Most of the time goes into compiling, a kernel on one processor; each process holds half a gigabyte of the GPU.
    count = min(16, os.cpu_count() or 1)
    workers = ["-n", str(count)] if on_gpu and importlib.util.find_spec("xdist") else []
    # Else each process would start as many threads as the machine has processors, and they would wait for each other.
    threads = ["env", f"OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // count)}"] if workers else []
    # A file that cannot be imported here is an error of its own, and a process that hangs in the driver is ended.
    robust = ["--continue-on-collection-errors", f"--timeout={HUNG}", "--timeout-method=thread"]
    tests = [*threads, sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=short", *robust, *workers]
    session.stage("tests", tests, (0,) if on_gpu else (0, NO_TESTS), session.path.with_suffix(".log"))
    if "bench" in session.stages and found["cases"]:
        benchmark(session, found["cases"], ["--quick"] if quick else [])
    elif "bench" in session.stages:
        session.skip("bench", "the stage inventory found no case")
    if "tune" in session.stages and on_gpu:
        tune(session)
    elif "tune" in session.stages:
        session.skip("tune", f"launch configurations are measured on a GPU, and --device is {session.device}")
    if session.document["recording"] is not None:
        print(run_stage("summary", [*PYTHON, SUMMARY, str(session.path)], 3 * GRACE).output)
    print(session.path)
    return 1 if session.failed() else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description="Everything that only a GPU can show.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--budget", type=float, default=530, help="seconds in all; default 530")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases of the benchmarks")
    parser.add_argument("--stages", default=",".join(SHARES), help="some of them, with commas; default all")
    parser.add_argument("--cases", default="*", help="patterns of benchmark cases, with commas; default all")
    given = parser.parse_args(arguments)
    stages = [*list(SHARES)[:2], *given.stages.split(",")]
    unknown = [stage for stage in stages if stage not in SHARES]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(SHARES)}")
    given.results.mkdir(parents=True, exist_ok=True)
    name = f"{given.device.replace(':', '')}-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    session = Session(given.results.resolve() / name, given.device, given.budget, stages)
    # A machine that is taken away says so with SIGTERM: stop as for Ctrl-C, with the file as it is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_all(session, given.quick, given.cases.split(","))
    except KeyboardInterrupt:
        print(f"stopped; what there is: {session.path}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
