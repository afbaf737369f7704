"""A folder that appears under its name when it is whole, or not at all."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mixft.cli.errors import InputError
from mixft.cli.stored_weights import is_int8_folder


@contextlib.contextmanager
def new_folder(out: Path, source: Path, overwrite: bool, size: int) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its name at the end; gone where the block fails.

    One that a killed process left there goes first.

    Args:
        out: the folder to make.
        source: the model, which ``out`` must not touch.
        overwrite: replace an ``out`` that holds an int8 model.
        size: bytes that will be written.

    Raises:
        InputError: ``out`` is there and is not to be or must not be replaced, lies in the source or around it, cannot
            be made, or the disk has no room for it.
    """
    _check_free(out, source, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise InputError(f"OUT {out} cannot be made: {error.strerror or error}; name another folder") from error
    try:
        with _held(draft):
            room = shutil.disk_usage(draft).free
            if room < size:
                raise InputError(f"OUT {out} takes {size:,} bytes, and its disk has {room:,} left; name another folder")
            draft.chmod(0o777 & ~_umask())
            yield draft
        aside = draft.with_suffix(".replaced")
        if out.exists():
            out.rename(aside)
        try:
            draft.rename(out)
        except OSError:
            if aside.exists():
                aside.rename(out)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _held(draft: Path) -> Iterator[bool]:
    """Lock ``draft``, as long as this process lives at most; False where another process has, or locks are not kept."""
    handle = os.open(draft, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(out: Path) -> None:
    for draft in out.parent.glob(f".{glob.escape(out.name)}.{'?' * 8}.part"):
        with _held(draft) as abandoned:
            if abandoned:
                shutil.rmtree(draft, ignore_errors=True)


def _check_free(out: Path, source: Path, overwrite: bool) -> None:
    mine, theirs = out.resolve(), source.resolve()
    if mine == theirs or mine.is_relative_to(theirs) or theirs.is_relative_to(mine):
        raise InputError(f"OUT {out} and the model in {source} lie in one another; name a folder apart")
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not is_int8_folder(out):
        raise InputError(f"OUT {out} is there and no int8 model of mixft; name another folder")
    if not overwrite:
        raise InputError(f"OUT {out} has an int8 model in it; --overwrite replaces it")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
