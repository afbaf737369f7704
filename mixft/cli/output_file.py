"""A file that the user asked for: found writable before the work starts, and written whole or not at all."""

import os
from pathlib import Path

from mixft.cli.errors import InputError


def check_writable(option: str, file: Path | None) -> None:
    """Raise InputError where ``file`` is given, by ``option``, and could not be written."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise InputError(f"{option} {file} cannot be written; a file in a folder that exists would do")


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` as UTF-8 under a hidden name and rename that, so that a reader never finds half of it.

    A link stays one, to a new file; into a pipe or a device, such as /dev/stdout, the text is written as it is.
    """
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    file = file.resolve()
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)
