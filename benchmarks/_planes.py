"""Eight densities of the plane that flows are looked at with, each about two deviations wide."""

from collections.abc import Callable

import numpy as np

Draw = Callable[[np.random.Generator, int], np.ndarray]


def eight_normals(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight narrow normal laws on a circle."""
    angle = 0.25 * np.pi * rng.integers(0, 8, n)
    return 2 * _polar(angle) + 0.2 * rng.normal(size=(n, 2))


def pinwheel(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five bent arms."""
    radius = 1 + 0.3 * rng.normal(size=n)
    across = 0.1 * rng.normal(size=n)
    angle = 0.4 * np.pi * rng.integers(0, 5, n) + 0.75 * np.exp(radius)
    along, side = _polar(angle), _polar(angle + 0.5 * np.pi)
    return 1.2 * (radius[:, None] * along + across[:, None] * side)


def two_spirals(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two spirals, one the other turned by half a circle."""
    angle = 3 * np.pi * np.sqrt(rng.random(n))
    sign = rng.choice([-1.0, 1.0], n)
    points = (sign * angle / 4)[:, None] * _polar(angle)
    return points + 0.08 * rng.normal(size=(n, 2))


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """The dark squares of a board of four by four."""
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    return np.stack([column, row], 1) - 2 + rng.random((n, 2))


def rings(rng: np.random.Generator, n: int) -> np.ndarray:
    """Four rings, all of one density along their length."""
    radii = np.array([0.6, 1.2, 1.8, 2.4])
    radius = rng.choice(radii, n, p=radii / radii.sum()) + 0.06 * rng.normal(size=n)
    return radius[:, None] * _polar(2 * np.pi * rng.random(n))


def moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two half circles that reach into one another."""
    angle = np.pi * rng.random(n)
    upper = rng.random(n) < 0.5
    arc = _polar(angle)
    points = np.where(upper[:, None], arc, [1.0, 0.5] - arc)
    return 1.5 * (points - [0.5, 0.25]) + 0.1 * rng.normal(size=(n, 2))


def swiss_roll(rng: np.random.Generator, n: int) -> np.ndarray:
    """One spiral, rolled up one and a half times."""
    angle = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return (angle / 6)[:, None] * _polar(angle) + 0.08 * rng.normal(size=(n, 2))


def wave(rng: np.random.Generator, n: int) -> np.ndarray:
    """A cosine with noise."""
    x = 5 * rng.random(n) - 2.5
    return np.stack([x, 2 * np.cos(2 * x) + 0.2 * rng.normal(size=n)], 1)


def _polar(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], 1)


PLANES: dict[str, Draw] = {
    "eight normals": eight_normals,
    "pinwheel": pinwheel,
    "two spirals": two_spirals,
    "checkerboard": checkerboard,
    "rings": rings,
    "moons": moons,
    "swiss roll": swiss_roll,
    "wave": wave,
}


def rows(name: str, n: int, seed: int) -> np.ndarray:
    """Rows ``(n, 2)`` of one of them, float32."""
    return PLANES[name](np.random.default_rng([17, seed]), n).astype(np.float32)
