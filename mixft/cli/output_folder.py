"""The output folder of ``mixft finetune``: which old runs are in it, and what becomes of them.

``--overwrite`` sets old runs aside under a hidden name. They go once a new run has finished, and come back where none
does. A command that is killed leaves them there; the next one names them, or with ``--overwrite`` replaces them too.
"""

import os
import re
import shutil
import tempfile
from itertools import count
from pathlib import Path

from mixft.cli.errors import InputError
from mixft.cli.job import LOG

REPORT = "report.json"
CURVES = "loss.png"
RUN_FOLDER = re.compile(r"[a-z0-9]+-seed\d+")
ASIDE = ".replaced"
SET_ASIDE = re.compile(rf"{re.escape(ASIDE)}-\d+")


class OldRuns:
    """What new runs replace. A context manager: left before ``discard``, it brings everything back.

    Args:
        folder: the output folder.
        paths: what in it is to be replaced, set aside at once.
        made: whether the folder was made for the new runs, so that it goes when they left nothing in it.

    Raises:
        OSError: something cannot be moved; all is then where it was.
    """

    def __init__(self, folder: Path, paths: list[Path], made: bool):
        self.folder = folder
        self.made = made
        self.aside = None
        if not paths:
            return
        self.aside = _unused(folder, ASIDE)
        self.aside.mkdir()
        try:
            for path in paths:
                path.rename(self.aside / path.name)
        except OSError:
            self.restore()
            raise

    def __enter__(self) -> "OldRuns":
        return self

    def __exit__(self, *exception) -> None:
        self.restore()
        if self.made and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def discard(self) -> None:
        """Delete them."""
        aside, self.aside = self.aside, None
        if aside is not None:
            shutil.rmtree(aside)

    def restore(self) -> dict[Path, Path]:
        """Bring them back.

        Returns:
            Where the unfinished new run is now whose place an old one had, by that place.
        """
        moved = {}
        if self.aside is None:
            return moved
        for path in list(self.aside.iterdir()):
            place = self.folder / path.name
            if os.path.lexists(place):
                moved[place] = _unused(self.folder, f"{path.name}.failed")
                place.rename(moved[place])
            path.rename(place)
        self.aside.rmdir()
        self.aside = None
        return moved


def claim(folder: Path, names: list[str], inputs: list[Path], overwrite: bool) -> OldRuns:
    """Make ``folder`` ready for runs in its subfolders ``names``.

    Args:
        folder: the output folder, made where there is none.
        names: of the folders that the new runs will fill.
        inputs: what the new runs read, which ``overwrite`` must not take away.
        overwrite: replace the runs in it; all else in it stays.

    Raises:
        InputError: it is a file or cannot be written to, has runs in it without ``overwrite``, has an input in a run
            that would go, or has something else where a run is to be. Nothing is changed then.
    """
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
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
                    raise InputError(
                        f"--overwrite would remove {path}, from which {given} is read; name another --output"
                    )
        for path in found:
            if path.name in (*names, REPORT, CURVES) and path not in old:
                raise InputError(f"{path} is not of mixft finetune; move it away or name another --output")
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return OldRuns(folder, old, made)
    except OSError as error:
        raise InputError(f"--output {folder} cannot be used: {error.strerror or error}; name another folder") from error


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
