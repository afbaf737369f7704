"""The device that a command runs on, and the option that names it."""

from typing import Annotated

import typer

from mixft.cli.errors import InputError

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default the GPU if there is one.")]


def choose_device(given: str | None) -> str:
    """The device named by ``--device``; where none is, the GPU if there is one.

    Raises:
        InputError: no such device, or none of a kind that mixft serves.
    """
    # Here, so that --help does not wait for it.
    import torch

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {given!r}; cpu, cuda or cuda:N would do")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        present = f"{count} GPUs" if count else "no GPU"
        raise InputError(f"--device is {given!r}, and torch {torch.__version__} sees {present}; cpu would do")
    return str(device)
