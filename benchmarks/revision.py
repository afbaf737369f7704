"""Another revision of mixft beside this one: a git worktree of it, and a process of each that take turns."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import mixft
from mixft.cpu import native

from .case import OURS, Case
from .machine import Machine
from .recording import Row
from .run import case_row, first_line, timed_row, too_large
from .timing import Effort, take_turns

# The folder comes first, so that its mixft is the one imported.
WORKER = "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; import mixft.benchmarks.revision_worker"


def checkout() -> Path | None:
    """The git checkout that mixft is imported from; None where it is an installed copy, or git is not there."""
    folder = Path(mixft.__file__).resolve().parent.parent
    return folder if (folder / ".git").exists() and shutil.which("git") else None


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" where tracked files differ from it; None where there is no checkout."""
    folder = checkout()
    if folder is None:
        return None
    described = _git(folder, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")
    return described.stdout.strip() or None


def provider_name(base: str) -> str:
    """The provider's name of mixft at the revision ``base``."""
    return f"{OURS} {base}"


@contextlib.contextmanager
def worktree(reference: str) -> Iterator[Path]:
    """A checkout of ``reference`` in a temporary folder, to import mixft from, with this revision's benchmarks.

    Raises:
        ValueError: mixft does not run from a git checkout, the checkout has no such revision, or the revision's CPU
            routines do not compile here while this one's are there.
    """
    here = checkout()
    if here is None:
        raise ValueError(f"{reference!r} needs git, and a git checkout that mixft is imported from; one is not there")
    with tempfile.TemporaryDirectory(prefix="mixft-bench-") as folder:
        there = Path(folder) / "mixft-base"
        added = _git(here, "worktree", "add", "--detach", str(there), reference)
        if added.returncode != 0:
            raise ValueError(f"{reference!r} is no revision of {here}: {added.stderr.strip().splitlines()[-1]}")
        try:
            # As an installation lays them out; and cases that both sides know.
            _link(there / "mixft" / "kernels", there / "kernels")
            _link(there / "mixft" / "benchmarks", Path(__file__).parent)
            if native.available() and (there / "native").is_dir():
                _compile(there, reference)
            yield there
        finally:
            _git(here, "worktree", "remove", "--force", str(there))


def _compile(folder: Path, reference: str) -> None:
    """Build the CPU routines of a checkout; without them torch's operators would be what this revision is held to."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if not any((folder / "mixft" / "cpu").glob("_native_*")):
        last = (built.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"the CPU routines of {reference!r} do not compile, {last}; MIXFT_NATIVE=0 does without them")


class Worker:
    """A process that runs the mixft of a folder: it prepares a case, then takes a sample of it when asked."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder = folder
        self.device = device
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(self.folder), str(self.device), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def _stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.terminate()
        self.process.wait()

    def prepare(self, case: Case) -> tuple[str, str] | None:
        """Make the case ready; the status and the reason where that failed, even by the end of the process."""
        if self.process.poll() is not None:  # an earlier case ended it
            self._stop()
            self._start()
        try:
            excuse = self._ask(case.name)
        except RuntimeError as failure:
            return "refused", first_line(failure)
        return None if excuse is None else (excuse[0], excuse[1])

    def sample(self) -> float:
        """Seconds of a call of the case that is ready."""
        return self._ask("")

    def _ask(self, question: str):
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading finds that too
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of a revision ended with exit code {self.process.wait()}")
        return json.loads(answer)


def compare(case: Case, workers: Sequence[Worker], base: str, effort: Effort, machine: Machine) -> list[Row]:
    """A row of this revision and one of the base, whose ``speedup`` is the base's time over this one's."""
    by_name = dict(zip((OURS, base), workers, strict=True))
    if reason := too_large(case, workers[0].device):
        return [case_row(case, name, "refused", reason) for name in by_name]
    excuses = {name: worker.prepare(case) for name, worker in by_name.items()}
    ready = {name: by_name[name].sample for name, excuse in excuses.items() if excuse is None}
    samples, failures = take_turns(ready, effort, (RuntimeError,))
    excuses |= {name: ("refused", first_line(failure)) for name, failure in failures.items()}
    return [
        timed_row(case, name, samples, machine) if excuse is None else case_row(case, name, *excuse)
        for name, excuse in excuses.items()
    ]


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)


def _link(path: Path, target: Path) -> None:
    if not path.exists():
        path.symlink_to(target, target_is_directory=True)
