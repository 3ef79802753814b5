"""The families of flows that `catalogue.py` compares, each as its builder makes it by default."""

from collections.abc import Callable
from typing import NamedTuple

from laminar import zoo
from laminar.bijections.residual import with_log_det
from laminar.matching import flow_matching
from laminar.objectives import nll

EXACT_UP_TO = 4
"""Columns up to which a residual flow is trained with its exact log-det, which costs D passes."""


class Family(NamedTuple):
    """How a family is built, trained, and made ready for its exact density."""

    build: Callable
    objective: Callable = nll
    exact: Callable = lambda flow: flow


def _residual(dim: int, *, key):
    return zoo.residual(dim, key=key, log_det="exact" if dim <= EXACT_UP_TO else "roulette")


FAMILIES = {
    "realnvp": Family(zoo.realnvp),
    "maf": Family(zoo.maf),
    "nsf coupling": Family(lambda dim, *, key: zoo.nsf(dim, key=key, coupling=True)),
    "nsf": Family(zoo.nsf),
    "naf": Family(zoo.naf),
    "bnaf": Family(zoo.bnaf),
    "residual": Family(_residual, exact=lambda flow: with_log_det(flow, "exact")),
    "cnf": Family(zoo.cnf, objective=flow_matching()),
    "gaussianization": Family(zoo.gaussianization),
}
COMPILED = FAMILIES | {
    "nice": Family(zoo.nice),
    "iaf": Family(zoo.iaf),
    "planar": Family(lambda dim, *, key: zoo.planar(dim, key=key, fast="log_prob")),
    "radial": Family(lambda dim, *, key: zoo.radial(dim, key=key, fast="log_prob")),
    "sylvester": Family(lambda dim, *, key: zoo.sylvester(dim, key=key, fast="log_prob")),
}
"""Those whose first calls are timed."""
