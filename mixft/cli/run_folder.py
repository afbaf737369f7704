"""The folder of one run of ``mixft finetune``: there under its name once the run has finished, or not at all."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

RUN = r"[a-z0-9]+-seed\d+"
DRAFT = re.compile(rf"\.{RUN}\.\w+\.part")


@contextlib.contextmanager
def run_folder(place: Path) -> Iterator[Path]:
    """A folder to fill, in a hidden one beside ``place``; it moves to ``place`` at the end, and goes where that fails.

    That of a process which is killed stays, under a name that `DRAFT` matches.
    """
    with tempfile.TemporaryDirectory(
        prefix=f".{place.name}.", suffix=".part", dir=place.parent, ignore_cleanup_errors=True
    ) as hidden:
        draft = Path(hidden) / place.name
        draft.mkdir()
        yield draft
        draft.rename(place)


def failed_log(place: Path) -> Path:
    """Where the log is of a run that failed and has no folder: the last such run's, until one of its name finishes."""
    return place.with_name(f"{place.name}.failed.log")
