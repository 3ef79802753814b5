"""Checks of arguments that classes all over the package share."""

from laminar._errors import InputError


def check_sizes(owner: str, **sizes: int) -> None:
    """Refuse a number of things that is not positive, naming the argument.

    Raises:
        InputError: If there is one.
    """
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{owner}: {name} must be at least 1, not {value}.")
