"""What libraries raise over a file that they cannot read, as the one line that a user gets."""

import pickle
import struct

from safetensors import SafetensorError

from mixft.cli.errors import InputError

DAMAGED = (
    AttributeError,
    EOFError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
)
WRONG_TYPE = "StrictDataclassError"  # huggingface_hub's, of a setting; its older releases have none to import


class Loading:
    """A context manager, within which a library's exception over a damaged file becomes an `InputError`.

    Args:
        what: loads, for the message.
    """

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback) -> None:
        if kind is None:
            return
        # tokenizers raises Exception itself, whatever it cannot read.
        damaged = kind is Exception or issubclass(kind, DAMAGED)
        if damaged or any(base.__name__ == WRONG_TYPE for base in kind.__mro__):
            raise InputError(f"{self.what} does not load: {str(error) or kind.__name__}") from error
