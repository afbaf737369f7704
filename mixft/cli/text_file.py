"""A text file that the user named: there, of a known ending, UTF-8, and without what no text has."""

import contextlib
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from mixft.cli.errors import InputError


def require_file(path: Path, wanted: str) -> None:
    """Raise InputError unless ``path`` is a file; ``wanted`` says in the message what would do."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        fault = "does not exist"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    else:
        if stat.S_ISREG(mode):
            return
        fault = "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
    raise InputError(f"{path} {fault}; give {wanted}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises InputError where the block that reads ``path`` cannot, or meets what is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def without_nul(lines: Iterable[str], path: Path) -> Iterator[str]:
    """The ``lines`` of ``path``. A NUL is the sign of UTF-16, every second byte of which is one in English.

    Raises:
        InputError: a NUL character; the message has its line.
    """
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise InputError(f"{path}, line {number}: a NUL character, which no text has; save the file as UTF-8")
        yield line
