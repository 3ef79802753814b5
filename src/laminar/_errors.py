"""The errors a user can meet, each one sentence that says what to do about it."""

from collections.abc import Iterable, Sequence


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
    """Training cannot go on: it stays non-finite after every rollback, or has no data to use.

    Attributes:
        rows: The rows that the message names: indices into the data handed to the function that
            raised it, in ascending order. Empty where no rows are to blame, or where those of a
            stream are, which have no numbers.
    """

    def __init__(self, message: str, rows: Iterable[int] = ()):
        super().__init__(message)
        self.rows = tuple(sorted({int(row) for row in rows}))

    def renumbered(self, numbers: Sequence[int]) -> "TrainingError":
        """The same error for a caller whose row ``numbers[i]`` is our row i, message included."""
        rows = [int(numbers[row]) for row in self.rows]
        message = str(self)
        if rows:
            message = message.replace(f"for {list_rows(self.rows)}", f"for {list_rows(rows)}", 1)
        return TrainingError(message, rows)


def list_rows(rows: Iterable[int]) -> str:
    """Some row numbers in words: ``row 3``, or ``rows 1, 2, 3, 4, 5 and 7 more``."""
    numbers = sorted({int(row) for row in rows})
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:5]))}{more}"


class MissingExtraError(LaminarError, ImportError):
    """An optional dependency is needed for what was asked."""

    def __init__(self, package: str, extra: str, what: str):
        super().__init__(f"{what} needs {package}: pip install 'laminar[{extra}]'.")
