"""The error that every command reports as one line and exit code 2."""


class InputError(Exception):
    """Something the user gave cannot be used; the message names what was given and what would do."""
