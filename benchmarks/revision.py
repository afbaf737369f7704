"""Which revision of mixft runs."""

import subprocess
from pathlib import Path

import mixft


def checkout() -> Path | None:
    """The git checkout that mixft is imported from; None where it is an installed copy."""
    folder = Path(mixft.__file__).resolve().parent.parent
    return folder if (folder / ".git").exists() else None


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" where tracked files differ from it; None where there is no checkout."""
    folder = checkout()
    if folder is None:
        return None
    described = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None
