"""A table of every kind of column whose density is known, whole and in part."""

from typing import NamedTuple

import numpy as np
from scipy.special import expit, logsumexp
from scipy.stats import norm, poisson

from laminar.tables.cells import Cells
from laminar.tables.table import Table

MISSING = 0.2
REGIONS, GRADES = ("east", "north", "south", "west"), ("low", "mid", "high")
ZERO = 0.3  # of those who spend nothing, where they are no members

CELLS = {
    "region": Cells("text", REGIONS),
    "member": Cells("boolean"),
    "grade": Cells("text", GRADES, ordered=True),
    "visits": Cells("integer"),
    "since": Cells("datetime", unit="D", origin=19_000),
    "spend": Cells(),
    "share": Cells(),
    "temperature": Cells(),
}
KINDS = {"share": "bounded:0:1"}


class Law(NamedTuple):
    """The law of the other columns given region r and member m, both arrays of shape (8,)."""

    weight: np.ndarray
    region: np.ndarray
    member: np.ndarray

    def terms(self, name: str, x: np.ndarray) -> np.ndarray:
        """ln p(x | r, m) at values (N, 1), of shape (N, 8)."""
        r, m = self.region, self.member
        with np.errstate(divide="ignore", invalid="ignore"):
            if name == "region":
                return np.where(x == r, 0.0, -np.inf)
            if name == "member":
                return np.where(x == m, 0.0, -np.inf)
            if name == "grade":
                cuts = np.stack(
                    [0 * r - np.inf, 0.3 - 0.5 * r + m, 1.5 - 0.5 * r + m, 0 * r + np.inf]
                )
                k = x.astype(int)[:, 0]
                return np.log(expit(cuts[k + 1]) - expit(cuts[k]))
            if name == "visits":
                return poisson.logpmf(x, 2 + 2 * r + 4 * m)
            if name == "since":
                middle, spread = 300 + 120 * r, 60 + 40 * m
                high, low = (x + 0.5 - middle) / spread, (x - 0.5 - middle) / spread
                # On the side where the distribution function is small it keeps its digits.
                near, far = np.where(low > 0, -low, high), np.where(low > 0, -high, low)
                return norm.logcdf(near) + np.log1p(-np.exp(norm.logcdf(far) - norm.logcdf(near)))
            if name == "spend":
                none = np.where(m == 1, 0.05, ZERO)
                some = norm.logpdf(np.log(x), 3 + 0.4 * r, 0.8) - np.log(x)
                return np.where(x == 0, np.log(none), np.log1p(-none) + some)
            if name == "share":
                return norm.logpdf(np.log(x / (1 - x)), m - 0.5 * r, 0.7) - np.log(x * (1 - x))
            near = norm.logpdf(x, 10 + 3 * r, 1.0) + np.log(0.7)
            return np.logaddexp(near, norm.logpdf(x, 22 - 2 * m, 2.0) + np.log(0.3))

    def log_prob(self, values: np.ndarray) -> np.ndarray:
        """ln p of what is there, (N,): a sum over the regions and memberships that may be."""
        total = np.log(self.weight)[None]
        for column, name in zip(values.T, CELLS, strict=True):
            there = ~np.isnan(column)
            terms = self.terms(
                name, np.where(there, column, 0.5 if name == "share" else 1)[:, None]
            )
            total = total + np.where(there[:, None], terms, 0.0)
        gone = np.isnan(values).sum(axis=1)
        mask = gone * np.log(MISSING) + (values.shape[1] - gone) * np.log1p(-MISSING)
        return logsumexp(total, axis=1) + mask


def law() -> Law:
    region, member = (a.ravel() for a in np.meshgrid(np.arange(4), np.arange(2), indexing="ij"))
    share = np.array([0.4, 0.3, 0.2, 0.1])[region]
    chance = expit(region - 1.0)
    return Law(share * np.where(member == 1, chance, 1 - chance), region, member)


def draw(rows: int, seed: int) -> Table:
    """Rows with a fifth of the cells missing at random."""
    rng = np.random.default_rng(seed)
    known = law()
    k = rng.choice(8, rows, p=known.weight)
    r, m = known.region[k], known.member[k]
    noise = rng.logistic(size=rows)
    grade = (noise > 0.3 - 0.5 * r + m).astype(int) + (noise > 1.5 - 0.5 * r + m)
    none = rng.random(rows) < np.where(m == 1, 0.05, ZERO)
    other = rng.random(rows) < 0.3
    columns = {
        "region": r,
        "member": m,
        "grade": grade,
        "visits": rng.poisson(2 + 2 * r + 4 * m),
        "since": np.round(rng.normal(300 + 120 * r, 60 + 40 * m)),
        "spend": np.where(none, 0.0, np.exp(rng.normal(3 + 0.4 * r, 0.8))),
        "share": expit(rng.normal(m - 0.5 * r, 0.7)),
        "temperature": np.where(other, rng.normal(22 - 2 * m, 2.0), rng.normal(10 + 3 * r, 1.0)),
    }
    values = np.column_stack([columns[name] for name in CELLS]).astype(float)
    values[rng.random(values.shape) < MISSING] = np.nan
    return Table(tuple(CELLS), values, "the table", cells=tuple(CELLS.values()))
