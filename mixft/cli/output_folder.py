"""The output folder of ``mixft finetune``: which old runs are in it, and what becomes of them.

``--overwrite`` sets old runs aside under a hidden name. They go once a new run has finished, and come back where none
does. A command that is killed leaves them there; the next one names them, or with ``--overwrite`` replaces them too.
What else it leaves, the folder of its unfinished run or a part of what it was deleting, goes with the next command.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from mixft.cli.errors import InputError
from mixft.cli.job import LOG
from mixft.cli.run_folder import DRAFT, RUN

REPORT = "report.json"
CURVES = "loss.png"
RUN_FOLDER = re.compile(RUN)
ASIDE = ".replaced"
SET_ASIDE = re.compile(rf"{re.escape(ASIDE)}-\d+")
DISCARDED = ".discarded"
ABANDONED = re.compile(rf"{re.escape(DISCARDED)}-\d+|{DRAFT.pattern}")


class OldRuns:
    """What new runs replace.

    Args:
        folder: the output folder.
        paths: what in it is to be replaced, set aside at once.

    Raises:
        OSError: something cannot be moved; all is then where it was.
    """

    def __init__(self, folder: Path, paths: list[Path]):
        self.folder = folder
        self.aside = None
        if not paths:
            return
        self.aside = _unused(folder, ASIDE)
        self.aside.mkdir()
        try:
            for path in paths:
                path.rename(self.aside / path.name)
        except BaseException:
            self.restore()
            raise

    def discard(self) -> None:
        """Delete them."""
        aside, self.aside = self.aside, None
        if aside is None:
            return
        # Renamed first, so that half of them are never taken for runs which somebody may want back.
        discarded = aside.rename(_unused(self.folder, DISCARDED))
        shutil.rmtree(discarded)

    def restore(self) -> list[str]:
        """Bring them back; where a new run has an old one's place, which it has only once it is whole, both stay.

        Returns:
            The names of what is back.
        """
        if self.aside is None:
            return []
        waiting = sorted(path.name for path in self.aside.iterdir())
        back = [name for name in waiting if not os.path.lexists(self.folder / name)]
        for name in back:
            (self.aside / name).rename(self.folder / name)
        if back == waiting:
            self.aside.rmdir()
            self.aside = None
        return back


@contextlib.contextmanager
def claim(folder: Path, names: list[str], inputs: list[Path], overwrite: bool) -> Iterator[OldRuns]:
    """Have ``folder`` for runs in its subfolders ``names``, and for no other command.

    At the end old runs come back that were not discarded, and a folder that was made and stayed empty goes.

    Args:
        folder: the output folder, made where there is none.
        names: of the folders that the new runs will fill.
        inputs: what the new runs read, which ``overwrite`` must not take away.
        overwrite: replace the runs in it; all else in it stays.

    Raises:
        InputError: it is a file or cannot be written to, another command is at work in it, it has runs in it without
            ``overwrite``, has an input in a run that would go, or has something else where a run is to be. Nothing is
            changed then.
    """
    with contextlib.ExitStack() as stack:
        try:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder))
            old = _replaceable(folder, names, inputs, overwrite)
            with tempfile.TemporaryFile(dir=folder):
                _remove_abandoned(folder)
                old_runs = OldRuns(folder, old)
        except OSError as error:
            raise InputError(
                f"--output {folder} cannot be used: {error.strerror or error}; name another folder"
            ) from error
        try:
            yield old_runs
        finally:
            old_runs.restore()
            _remove_abandoned(folder)
            if made and not any(folder.iterdir()):
                folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of ``folder``, as long as this process lives at most.

    Raises:
        InputError: another one is in it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--output {folder} is in use by another mixft finetune; wait for it, or name another folder"
            ) from error
        except OSError:
            pass  # its file system knows no locks
        yield
    finally:
        os.close(handle)


def _replaceable(folder: Path, names: list[str], inputs: list[Path], overwrite: bool) -> list[Path]:
    """The old runs in ``folder``, with their report; InputError where they may not be replaced."""
    found = sorted(folder.iterdir())
    old = [path for path in found if _of_a_run(path)]
    if old and not overwrite:
        killed = next((path.name for path in old if SET_ASIDE.fullmatch(path.name)), None)
        if killed is not None:
            raise InputError(
                f"--output {folder} has old runs in {killed}, set aside by an --overwrite that was killed; move "
                "them back, or --overwrite replaces them too"
            )
        raise InputError(f"--output {folder} has a run in it ({old[0].name}); --overwrite replaces it")
    for path in old:
        for given in inputs:
            if _leads_through(given, path):
                raise InputError(f"--overwrite would remove {path}, from which {given} is read; name another --output")
    for path in found:
        if path.name in (*names, REPORT, CURVES) and path not in old:
            raise InputError(f"{path} is not of mixft finetune; move it away or name another --output")
    return old


def _remove_abandoned(folder: Path) -> None:
    for path in folder.iterdir():
        if ABANDONED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _of_a_run(path: Path) -> bool:
    if path.is_dir():
        of_one = RUN_FOLDER.fullmatch(path.name) is not None and (path / LOG).is_file()
        return of_one or SET_ASIDE.fullmatch(path.name) is not None
    return path.name in (REPORT, CURVES)


def _leads_through(given: Path, old: Path) -> bool:
    """True where reading ``given`` passes ``old``, by its name or by links."""
    target = old.resolve()
    return any(step.resolve().is_relative_to(target) for step in (given, *given.absolute().parents))


def _unused(folder: Path, name: str) -> Path:
    candidates = (folder / f"{name}-{number}" for number in count(1))
    return next(path for path in candidates if not os.path.lexists(path))
