"""The errors of bad input: each says what was expected, what came instead, and a remedy.

The command makes one line of them; all other errors are bugs.
"""


class InputError(ValueError):
    """Input that cannot be used."""


class InputTypeError(InputError, TypeError):
    """Input of a type that cannot be used."""


class MissingPackageError(InputError, ImportError):
    """A package of an extra that is not installed."""
