"""Few lengths for many: arrays padded to them share their compiled programs."""

import math


def bucket(count: int, least: int, *, factor: int = 2, doubled: float = math.inf) -> int:
    """The smallest of least, least · factor, least · factor², … that is not below a count.

    Args:
        count: How many there are.
        least: The first length.
        factor: From one length to the next.
        doubled: Above it three quarters of a length are lengths too.
    """
    length = least
    while length < count:
        length *= factor
    quarters = 3 * length // 4
    return quarters if length > doubled and count <= quarters else length
