"""Tables that need no file: real ones that ship inside scikit-learn, and generated ones.

The generated sets have 10,000 rows of two columns, drawn from a fixed seed, and so are the same on
every machine.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from laminar._errors import InputError
from laminar.tables.table import Table, array_table, unknown_column

GENERATED_ROWS = 10_000
_SEED = 20_150_706


@dataclass(frozen=True)
class BuiltIn:
    """What there is to know about a built-in set without loading it.

    Attributes:
        rows: Number of rows.
        columns: Number of columns given unasked.
        about: One line for the list.
        extra: A column that is given only when it is named, as ``--given target``.
    """

    rows: int
    columns: int
    about: str
    extra: str | None = None


BUILTIN: dict[str, BuiltIn] = {
    "breast_cancer": BuiltIn(569, 30, "cell nuclei of breast masses (WDBC)", "target"),
    "wine": BuiltIn(178, 13, "chemical analysis of Italian wines", "target"),
    "diabetes": BuiltIn(442, 10, "patients' measurements, unscaled", "target"),
    "iris": BuiltIn(150, 4, "sepals and petals of irises", "target"),
    "digits": BuiltIn(1797, 64, "handwritten digits, 8 × 8 pixels of 17 greys", "target"),
    "two_moons": BuiltIn(GENERATED_ROWS, 2, "two interleaved half circles, noise 0.08"),
    "pinwheel": BuiltIn(GENERATED_ROWS, 2, "five bent arms"),
    "checkerboard": BuiltIn(GENERATED_ROWS, 2, "uniform on the dark fields of a 4 × 4 board"),
    "rings": BuiltIn(GENERATED_ROWS, 2, "four concentric rings, noise 0.08"),
    "eight_gaussians": BuiltIn(GENERATED_ROWS, 2, "eight normals of sd 0.3 on a circle of 4"),
    "spirals": BuiltIn(GENERATED_ROWS, 2, "two spirals of one and a half turns"),
}
"""Every built-in set by name."""


def load_builtin(name: str, wanted: Sequence[str] | None = None, also: Sequence[str] = ()) -> Table:
    """A built-in set as a table.

    Args:
        name: One of `BUILTIN`.
        wanted: The columns wanted, or None for all but the extra one.
        also: Columns wanted besides.

    Raises:
        InputError: When there is no such set or column; the message lists those there are.
    """
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.6)
        hint = f"did you mean builtin:{near[0]}?" if near else f"there are {', '.join(BUILTIN)}."
        raise InputError(f"There is no built-in table {name!r}; {hint}")
    source = f"builtin:{name}"
    if name in GENERATORS:
        points = GENERATORS[name](np.random.default_rng(_SEED), GENERATED_ROWS)
        table = array_table(points, ("x", "y"), source)
    else:
        table = _sklearn(name, source)
    extra = BUILTIN[name].extra
    shown = [column for column in table.names if column != extra]
    names = shown if wanted is None else list(wanted)
    names = list(dict.fromkeys([*names, *also]))
    for column in names:
        if column not in table.names:
            raise unknown_column(column, table.names, source)
    return table.select(names)


def _sklearn(name: str, source: str) -> Table:
    from sklearn import datasets

    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(**options)
    names = [str(column) for column in bunch.feature_names]
    values = np.column_stack([bunch.data, bunch.target])
    return array_table(values, [*names, "target"], source)


# ---------------------------------------------------------------- generators: (rng, n) -> (n, 2)


def two_moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two half circles of radius one that reach into each other, with normal noise of sd 0.08."""
    angle = rng.uniform(0.0, np.pi, n)
    upper = rng.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1.0 - np.cos(angle))
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
    return np.stack([x, y], axis=1) + 0.08 * rng.standard_normal((n, 2))


def pinwheel(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five normal arms, sd 0.3 along and 0.1 across, turned by 0.25 radians per e-fold."""
    arms, rate, radial, tangential = 5, 0.25, 0.3, 0.1
    points = rng.standard_normal((n, 2)) * (radial, tangential) + (1.0, 0.0)
    arm = rng.integers(0, arms, n)
    angle = 2 * np.pi * arm / arms + rate * np.exp(points[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    x = cos * points[:, 0] - sin * points[:, 1]
    y = sin * points[:, 0] + cos * points[:, 1]
    return 2.0 * np.stack([x, y], axis=1)


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """Uniform on the eight dark fields of a 4 × 4 board on [−4, 4]²: density 1/32 there."""
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    corner = np.stack([column, row], axis=1).astype(np.float64)
    return 2.0 * (corner + rng.random((n, 2))) - 4.0


def rings(rng: np.random.Generator, n: int) -> np.ndarray:
    """Four circles of radius 1, 2, 3, 4, equally likely, with normal noise of sd 0.08."""
    radius = rng.integers(1, 5, n).astype(np.float64)
    angle = rng.uniform(0.0, 2 * np.pi, n)
    circle = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return circle + 0.08 * rng.standard_normal((n, 2))


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight normals of sd 0.3, equally likely, with centres on a circle of radius 4."""
    angle = 2 * np.pi * rng.integers(0, 8, n) / 8
    centre = 4.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centre + 0.3 * rng.standard_normal((n, 2))


def spirals(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two spirals r = t/3, t up to 3π, one the other's half turn, with normal noise of sd 0.1."""
    t = 3 * np.pi * np.sqrt(rng.random(n))
    sign = np.where(rng.random(n) < 0.5, 1.0, -1.0)
    curve = (sign * t / 3.0)[:, None] * np.stack([-np.cos(t), np.sin(t)], axis=1)
    return curve + 0.1 * rng.standard_normal((n, 2))


GENERATORS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "two_moons": two_moons,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
    "rings": rings,
    "eight_gaussians": eight_gaussians,
    "spirals": spirals,
}
"""Functions (generator, n) → points (n, 2), for more or other rows than the built-in sets have."""
