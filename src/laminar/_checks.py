"""Checks of arguments that classes all over the package share."""

from laminar._errors import InputError


def check_sizes(owner: str, cond_dim: int = 0, /, **sizes: int) -> None:
    """Refuse sizes below one and a negative length of the condition, naming the argument.

    Raises:
        InputError: If there is one.
    """
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{owner}: {name} must be at least 1, not {value}.")
    if cond_dim < 0:
        raise InputError(f"{owner}: cond_dim must be 0 or more, not {cond_dim}.")
