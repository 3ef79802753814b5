"""The errors a user can meet, each one sentence that says what to do about it."""


class LaminarError(Exception):
    """Base of every error that laminar raises on purpose.

    The command line prints the message and exits with status 2; anything else is a bug and keeps
    its traceback.
    """


class InputError(LaminarError, ValueError):
    """A value, file, column or option given by the user cannot be used."""


class ShapeError(InputError):
    """Shapes do not fit; the message names the part and prints both shapes."""


class ModelFileError(InputError):
    """A file is not a laminar model, or is truncated, corrupted or from a newer version."""


class TrainingError(LaminarError, RuntimeError):
    """Training cannot go on: it stays non-finite after every rollback, or has no data to use."""


class MissingExtraError(LaminarError, ImportError):
    """An optional dependency is needed for what was asked."""

    def __init__(self, package: str, extra: str, what: str):
        super().__init__(f"{what} needs {package}: pip install 'laminar[{extra}]'.")
