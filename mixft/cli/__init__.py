"""The command line. A command's module loads when that command is asked for, and no other."""

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator

from mixft.cli.errors import InputError

COMMANDS = ("finetune", "predict", "quantize", "doctor", "bench", "inspect", "tune")
EXTRA = ("typer", "rich", "matplotlib", "transformers", "peft")


def main(arguments: list[str] | None = None) -> int:
    """Run ``mixft <arguments>``; ``sys.argv`` where none are given.

    Returns:
        The exit code: 0 done, 1 failed while running, 2 bad input, 130 stopped by Ctrl-C or SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _ended_as_by_ctrl_c():
            return _run(arguments or ["--help"])
    except KeyboardInterrupt:
        return 130  # before a command was loaded, which reports it itself
    except InputError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        return _refuse(f"this command needs {package}, which is not here; pip install '.[cli]' in mixft's checkout")
    except ImportError as error:
        if error.name not in EXTRA:
            raise
        return _refuse(str(error))  # there, but too old


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, by which schedulers and containers end a process, lets a command tidy up as Ctrl-C does.

    Where it is not ignored or handled already; only the main thread may handle it.
    """
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    import typer

    asked = arguments[0]
    app = typer.Typer(add_completion=False, help="Mixed-precision fine-tuning.")
    app.callback()(lambda: None)
    for name in [asked] if asked in COMMANDS else COMMANDS:
        app.command(name)(getattr(importlib.import_module(f"mixft.cli.{name}"), name))
    usage_error = typer.BadParameter.__base__  # typer gives the base of its usage errors no name of its own
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="mixft", standalone_mode=False)
    except usage_error as error:
        where = f"mixft {asked} --help" if asked in COMMANDS else "mixft --help"
        return _refuse(f"{error.format_message()} ({where} lists what there is)")
    except typer.Abort:
        return 130
    return code or 0


def _refuse(message: str) -> int:
    print("mixft:", " ".join(message.split()), file=sys.stderr)
    return 2
