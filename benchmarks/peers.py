"""The packages that mixft is compared with, imported where a case asks for one.

``pip install '.[peers]'`` installs them.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from .case import Missing, Refused

# The provider's name, which is the package's, and the module it is imported as.
PEERS = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "liger-kernel": "liger_kernel",
    "gemlite": "gemlite",
    "flashoptim": "flashoptim",
    "peft": "peft",
}


def peer(name: str, submodule: str = "") -> ModuleType:
    """The peer's module, or a submodule of it.

    Raises:
        Missing: it is not installed.
        Refused: it is installed, and its import fails here, as some do without a GPU.
    """
    module = PEERS[name]
    if importlib.util.find_spec(module) is None:
        raise Missing(f"{name} is not installed")
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(f"{module}.{submodule}" if submodule else module)
    except (AssertionError, AttributeError, ImportError, OSError, RuntimeError) as failure:
        reason = next(iter(str(failure).splitlines()), type(failure).__name__)
        raise Refused(f"its import fails here: {reason}") from failure


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What packages log and warn while they are imported or compile is about themselves."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def installed() -> dict[str, str | None]:
    """The version of every peer; None for one that is not installed."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
