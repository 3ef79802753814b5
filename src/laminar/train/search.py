"""The search of `fit_density` among densities that need no gradient, and what is kept of it.

Under a time limit the clock cuts the search, so a run that is resumed might find something else,
which flows that were trained beside the first find would not fit. What was found is therefore saved
with the checkpoint, and so is the time that was given to each flow.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np

from laminar._errors import InputError, ModelFileError
from laminar._files import atomic_write, checksum, pack, unpack
from laminar._typing import PRNGKeyArray
from laminar.preset import Preset
from laminar.train import mixtures, shallow
from laminar.train.checkpoint import Checkpoint
from laminar.train.table import Table

_MOST_SEARCH = 4_000  # rows that candidates are compared on: ranks are stable from there on
MOST_REFIT = 20_000
_KIND = "search"
_VERSION = 1


class Found(NamedTuple):
    """Mixtures kept by the search: their weights, the score of each and of all, and the seed."""

    specs: list[shallow.Spec]
    shares: np.ndarray
    scores: list[float]
    score: float
    seed: int

    def fit(self, table: Table, rows: np.ndarray) -> shallow.Shallow:
        """Fit them again to some of the rows."""
        rows = rows[:MOST_REFIT]
        return shallow.refit(
            self.specs,
            self.shares,
            table.joint[rows],
            table.at("weights", rows),
            seed=self.seed,
            given=table.given,
        )


def search(table: Table, chosen: Preset, seed: int, out_of_time: Callable[[], bool]) -> Found:
    """Compare the candidates that need no gradient and keep the best."""
    folds = _folds(table, chosen.folds, seed)
    joint = table.joint
    widths = () if table.given else chosen.kernel_widths
    paths = shallow.candidates(joint.shape[1], chosen.components, widths, chosen.priors)
    specs, logs, held = shallow.search(
        joint,
        table.weights,
        folds,
        paths,
        seed=seed,
        given=table.given,
        out_of_time=out_of_time,
    )
    w = table.at("weights", held)
    keep, shares = shallow.prune(specs, logs, w, chosen.parts)
    means = [float(np.average(logs[:, i], weights=w)) for i in keep]
    whole = mixtures.log_sum(logs[:, keep] + np.log(shares))
    return Found([specs[i] for i in keep], shares, means, float(np.average(whole, weights=w)), seed)


def _folds(table: Table, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    if count < 2:
        return [(table.fit[:_MOST_SEARCH], table.held[:_MOST_SEARCH])]
    order = np.random.default_rng(seed).permutation(len(table.x))
    parts = np.array_split(order, count)
    return [
        (np.concatenate([p for j, p in enumerate(parts) if j != i]), part)
        for i, part in enumerate(parts)
    ]


@dataclasses.dataclass
class Plan:
    """What a run of `fit_density` must know to go on where another one was.

    Attributes:
        found: What the search found.
        seconds: How long it took.
        time_limit: The seconds that the run had in all, or None.
        limits: Those given to each flow that was begun, by the kind of its base.
    """

    found: Found
    seconds: float
    time_limit: float | None
    limits: dict[str, float] = dataclasses.field(default_factory=dict)

    def save(self, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
        """Write it to the checkpoint's own file, beside those of the flows."""
        found = self.found
        arrays = {name: np.asarray(getattr(found, name)) for name in ("shares", "scores", "score")}
        body = {
            "settings": settings,
            "specs": [list(spec) for spec in found.specs],
            "seed": found.seed,
            "seconds": self.seconds,
            "time_limit": self.time_limit,
            "limits": self.limits,
        }
        atomic_write(checkpoint.path, pack(arrays, body, kind=_KIND, version=_VERSION))


def settings_of(key: PRNGKeyArray, table: Table, chosen: Preset) -> dict[str, Any]:
    """What decides the result of a search."""
    typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    arrays = (table.joint, table.loc, table.scale, table.weights, table.held)
    return {
        "key": np.asarray(jr.key_data(key) if typed else key).tolist(),
        "data": checksum(*(np.ascontiguousarray(a).tobytes() for a in arrays if a is not None)),
        "components": list(chosen.components),
        "priors": None if chosen.priors is None else list(chosen.priors),
        "kernel_widths": list(chosen.kernel_widths),
        "folds": chosen.folds,
        "parts": chosen.parts,
    }


def load_plan(
    checkpoint: Checkpoint, settings: dict[str, Any], time_limit: float | None
) -> Plan | None:
    """The plan of the run to go on from, or None if there is nothing to go on from.

    Times given to flows hold only under the same time limit.

    Raises:
        InputError: If flows were trained in a run of other settings.
        ModelFileError: If the file is damaged, foreign or newer.
    """
    if not checkpoint.exists:
        return None
    body, arrays = unpack(checkpoint.path, kind=_KIND, version=_VERSION)
    try:
        written = body["settings"]
        specs = [shallow.Spec(*spec) for spec in body["specs"]]
        shares, scores = np.array(arrays["shares"]), arrays["scores"].tolist()
        found = Found(specs, shares, scores, arrays["score"].item(), body["seed"])
        plan = Plan(found, body["seconds"], time_limit)
        if body["time_limit"] == time_limit:
            plan.limits = dict(body["limits"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{checkpoint.path} lacks a part of what a search leaves behind: {error}."
        ) from error
    different = [name for name in settings if written.get(name) != settings[name]]
    if not different:
        return plan
    if len(checkpoint.files()) == 1:
        # Only the search would be lost.
        return None
    raise InputError(
        f"{checkpoint.path} was written by a run with other {different[0]}; resume with the same "
        "data and settings, or start anew without resume."
    )
