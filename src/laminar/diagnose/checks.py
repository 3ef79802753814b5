"""Check a flow: does it invert, is its log-det the Jacobian's, does its density integrate to one.

Every check is a number and a budget. The budgets, by the precision of the flow's parameters:

| check | float32 | float64 | the number |
|---|---|---|---|
| round trips | 1e-3 | 1e-6 | worst error of an entry, relative to its size plus the spread |
| log-det both ways | 1e-3 | 1e-6 | worst sum of the two log-dets, per dimension |
| log-det against the Jacobian | 1e-3 | 1e-6 | worst difference of a step, per dimension |
| two ways to the density | 1e-3 | 1e-6 | worst difference in nats, per dimension |
| integral, D = 1, 2, 3 | 1e-3, 3e-3, 1e-2, plus ε | same | distance from one; ε: cubature's error |
| integral, D > 3 | 2e-3 + 4 σ | same | distance from one; σ: standard error |
| samples follow the density | 5.5 | 5.5 | worst difference of a mean in standard errors |
| gradients | 0 | 0 | how many entries are not finite |

Rounding is not a fault of a flow: where a map magnifies a small relative change of its input, or a
Jacobian is ill-conditioned, errors are divided by that magnification, measured at the same point.
"""

import math
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from laminar._errors import InputError, ShapeError
from laminar._typing import ArrayLike, Condition, PRNGKeyArray
from laminar.bijections.path import step_names
from laminar.density import AbstractDistribution
from laminar.diagnose import probes
from laminar.diagnose.integrate import Scale
from laminar.diagnose.measure import NAMES, Measure, badness
from laminar.diagnose.report import CheckReport, Line
from laminar.flow import Flow

_BUDGETS = {8: 1e-6, 4: 1e-3, 2: 1e-1}
"""Relative budget by bytes of a number."""
_ON_THE_EDGE = 0.01
"""Share of samples that rounding may put on the edge of a bounded support."""
_MAX_JACOBIAN = 4096
_MAX_INTEGRAL = 512


def check(
    flow: AbstractDistribution,
    *,
    key: PRNGKeyArray,
    n: int = 512,
    data: ArrayLike | None = None,
    condition: Condition = None,
) -> CheckReport:
    """Check the mathematics of a flow, or of any distribution, at its present parameters.

    - Round trips: data → latent → data and latent → data → latent.
    - The log-dets of the two directions are each other's negatives.
    - The log-det of every step is that of its Jacobian by automatic differentiation, at 64 points
      or fewer (4096 / D), and their sum is the whole map's.
    - `log_prob` agrees with `sample_and_log_prob` on the latter's samples.
    - The density integrates to one: by adaptive cubature over the whole space in 1–3 dimensions,
      otherwise by importance sampling from a wider proposal, in data space or carried through the
      flow, whichever is more effective. Where neither is, the line says so and does not count.
    - Samples of `sample` follow that density: means of the log-density and of bounded functions of
      every coordinate agree between samples and the integral.
    - Gradients of the density with respect to inputs and parameters are finite, also a hundred
      spreads away, and so are those of sampling.

    Round trips, log-dets and gradients are checked at samples and, if given, at rows of data.

    Args:
        flow: The flow.
        key: Random key for samples and choices.
        n: How many samples, and at most how many rows of data, to check at.
        data: Rows ``(N, *shape)`` as the flow takes them.
        condition: For a conditional flow: one condition ``cond_shape``, or several
            ``(M, *cond_shape)``; with data, one for each row. The integral is taken at two of them.

    Returns:
        The report. The budgets are in the first lines of this module.

    Raises:
        InputError: If a needed condition is missing, or data are not finite.
        ShapeError: If shapes do not fit.
    """
    if not isinstance(flow, AbstractDistribution):
        raise InputError(
            f"check takes a flow or another distribution, not {type(flow).__name__}; of a "
            "TableFlow give its .flow."
        )
    if n < 2:
        raise InputError(f"check needs at least 2 samples, not n={n}.")
    return _Check(flow, key, n, data, condition).run()


class _Check:
    """The state of one check: the flow, its samples and rows, and the lines so far."""

    def __init__(self, flow: AbstractDistribution, key, n, data, condition):
        self.flow = flow
        self.n = n
        self.dim = max(1, math.prod(flow.shape))
        self.dtype = flow.dtype
        self.eps = float(jnp.finfo(self.dtype).eps)
        self.budget = _BUDGETS[self.dtype.itemsize]
        self.lines: list[Line] = []
        self.exact = flow.exactness == "exact"
        names = ("sample", "choice", "far", "gradient", "integral", "estimate", "noise")
        self.keys = dict(zip(names, jr.split(key, len(names)), strict=True))
        self.estimate_key = None if self.exact else self.keys["estimate"]
        self.conditions, self.count = _rows_of_condition(flow, condition)
        choice_key, data_key = jr.split(self.keys["choice"])
        pick = jr.choice(choice_key, self.count, (n,)) if self.count else None
        self.x, self.log_p = self.sample(self.keys["sample"], pick)
        self.rows, self.row_pick = self.choose_rows(data, data_key)
        self.pick = pick

    def choose_rows(self, data, key):
        """Up to n random rows of data, and the rows of their conditions."""
        if data is None:
            return None, None
        rows, batch = self.flow._check_event(data, self.flow.shape, "data")
        rows = rows.reshape((math.prod(batch), *self.flow.shape))
        bad = int((~jnp.isfinite(rows.reshape(len(rows), -1)).all(1)).sum())
        if len(rows) == 0 or bad:
            raise InputError(
                f"check: {bad} rows of data have NaN or infinity; remove them."
                if bad
                else "check: data have no rows."
            )
        if self.count not in (0, 1, len(rows)):
            raise ShapeError(
                f"check: data have {len(rows)} rows and there are {self.count} conditions; give "
                "one condition for each row, or one for all."
            )
        chosen = jr.permutation(key, len(rows))[: self.n]
        pick = None if not self.count else chosen if self.count > 1 else jnp.zeros_like(chosen)
        return rows[chosen], pick

    def at(self, pick) -> Condition:
        """The conditions of some rows."""
        if pick is None:
            return None
        return jtu.tree_map(lambda c: c[pick], self.conditions)

    def sample(self, key, pick):
        """Samples with their density, one for each chosen condition."""
        shape = (self.n,) if pick is None else ()
        return self.flow.sample_and_log_prob(key, shape, self.at(pick))

    def add(self, name: str, value: float, budget: float, detail: str = "") -> None:
        """Add a line; a value that is NaN fails."""
        value = float(value)
        self.lines.append(Line(name, value, float(budget), bool(value <= budget), detail))

    def skip(self, name: str, why: str) -> None:
        """Add a line for a check that could not be made."""
        self.lines.append(Line(name, math.nan, math.nan, None, why))

    def run(self) -> CheckReport:
        """All checks, in the order of the report."""
        gradients = self.gradients_at(self.x, self.pick)
        if isinstance(self.flow, Flow):
            self.trips()
        self.agreement(gradients)
        self.integral()
        self.gradients(gradients)
        event = "scalar" if self.flow.shape == () else f"shape {self.flow.shape}"
        rows = "" if self.rows is None else f", {len(self.rows)} rows of data"
        subject = f"{self.flow.name} of {event}, {self.dtype.name}, {self.n} samples{rows}"
        return CheckReport(subject, tuple(self.lines))

    # --- The map ----------------------------------------------------------------------------------

    def trips(self) -> None:
        """Round trips and log-dets, at samples and at rows of data."""
        parts = [(self.x, self.pick, "samples")]
        if self.rows is not None:
            parts.append((self.rows, self.row_pick, "data"))
        x = jnp.concatenate([part for part, _, _ in parts])
        pick = None if self.pick is None else jnp.concatenate([p for _, p, _ in parts])  # type: ignore
        flow, condition = probes.encode(self.flow, self.at(pick), x.shape[:1])
        x = jnp.moveaxis(x, 0, -1)
        step = math.sqrt(self.eps)
        trip = probes.trip(flow._map, x, condition, self.keys["noise"], step, self.estimate_key)
        trip = jtu.tree_map(lambda a: np.asarray(a, np.float64), trip)
        sampled = np.arange(x.shape[-1]) < self.n
        outside = (trip.log_dets[:2] == -np.inf).any(0)
        share = outside[sampled].mean()
        found = [
            f"{outside[~sampled].sum()} of {(~sampled).sum()} rows of data outside the support"
        ]
        note = found[0] if outside[~sampled].any() else ""
        if share > _ON_THE_EDGE:
            note = f"{share:.0%} of the samples are outside the support of the inverse"
        inside = ~outside
        fatal = math.inf if share > _ON_THE_EDGE or not inside.any() else 0.0

        def worst(values):
            where = values[..., inside]
            return max(fatal, float(where.max())) if where.size else fatal

        self.add("data → latent → data", worst(trip.data_error), self.budget, note)
        self.add("latent → data → latent", worst(trip.latent_error), self.budget)
        if not self.exact:
            self.skip("log-det both ways", f"the log-det is {self.flow.exactness}, not exact")
            self.skip("log-det is the Jacobian's", f"the log-det is {self.flow.exactness}")
            return
        self.add("log-det both ways", worst(trip.asymmetry) / self.dim, self.budget)
        self.jacobians(flow, trip.latent, condition, inside, sampled)

    def jacobians(self, flow, latent, condition, inside, sampled) -> None:
        """The log-det of every step against that of its Jacobian."""
        name = "log-det is the Jacobian's"
        size = math.prod(flow._map.in_shape)
        if size != math.prod(flow._map.out_shape):
            return self.skip(name, "the two spaces differ in size")
        if self.dim > _MAX_JACOBIAN:
            return self.skip(name, f"a Jacobian of {self.dim} rows is too large")
        m = max(1, min(64, _MAX_JACOBIAN // self.dim))
        own, theirs = np.flatnonzero(inside & sampled), np.flatnonzero(inside & ~sampled)
        chosen = np.concatenate([own[: max(1, m - len(theirs[: m // 2]))], theirs[: m // 2]])
        if not len(chosen):
            return self.add(name, math.inf, self.budget, "no sample is inside the support")
        z = jnp.asarray(latent[..., chosen], self.dtype)
        condition = None if condition is None else condition[..., chosen]
        points, _ = probes.points_of(flow._map, z, condition)
        worst, where, total, slack = 0.0, "", np.zeros(len(chosen)), np.zeros(len(chosen))
        unit = self.eps / self.budget
        steps, names = flow._map.steps(), step_names(flow._map)
        for k, (step, at) in enumerate(zip(steps, [z, *points[:-1]], strict=True)):
            exact, excess, log_det = probes.jacobian_log_det(step, at, condition, unit)
            total, slack = total + exact, slack + excess
            error = (np.abs(log_det - exact) / (self.dim + excess)).max()
            if not error <= worst:
                worst, where = float(error), f"worst in step {k + 1} of {len(steps)}, {names[k]}"
        whole = np.asarray(probes.log_det_of(flow._map, z, condition), np.float64)
        error = (np.abs(whole - total) / (self.dim * len(steps) + slack)).max()
        if not error <= max(worst, self.budget):
            worst, where = float(error), "the whole is not the sum of its steps"
        return self.add(name, worst, self.budget, where if len(steps) > 1 else "")

    # --- The density ------------------------------------------------------------------------------

    def agreement(self, gradients) -> None:
        """The density that comes with samples, and that of `log_prob` at the same points."""
        name = "log_prob is sample_and_log_prob's"
        if not self.exact:
            return self.skip(name, f"the density is {self.flow.exactness}, not exact")
        again = np.asarray(gradients.log_p, np.float64)
        first = np.asarray(self.log_p, np.float64)
        edge = (again == -np.inf) & np.isfinite(first)
        x, slope = (np.asarray(a, np.float64).reshape(self.n, -1) for a in (self.x, gradients.x))
        # What one rounding of the point itself may change.
        scale = Scale.of(x).spread + np.abs(x)
        rounding = np.nan_to_num(np.abs(slope) * scale).sum(1) * 10 * self.eps / self.budget
        error = np.abs(first - again) / (self.dim + rounding)
        detail = ""
        if edge.any():
            detail = f"{edge.mean():.1%} of the samples have density 0"
            error = error[~edge] if edge.mean() <= _ON_THE_EDGE else np.array([math.inf])
        return self.add(name, error.max(), self.budget, detail)

    def integral(self) -> None:
        """The integral of the density, and samples against it, at one or two conditions."""
        if not self.exact or self.dim > _MAX_INTEGRAL:
            for name in NAMES:
                why = f"{self.dim} dimensions are too many"
                self.skip(name, why if self.exact else f"the density is {self.flow.exactness}")
            return
        picks: list[Any] = [None] if not self.count else [0, self.count - 1][: self.count]
        keys = jr.split(self.keys["integral"], len(picks))
        found = [
            Measure(self.flow, self.at(pick), key).lines()
            for pick, key in zip(picks, keys, strict=True)
        ]
        for lines in zip(*found, strict=True):
            # The worst of the conditions; one that could not be measured counts last.
            self.lines.append(max(lines, key=badness))

    # --- Gradients --------------------------------------------------------------------------------

    def gradients_at(self, x, pick) -> probes.Gradients:
        """The density at points, with its gradients."""
        return probes.gradients(self.flow, x, self.at(pick), self.estimate_key)

    def gradients(self, own: probes.Gradients) -> None:
        """Count gradients that are not finite: at samples and data, far outside, of sampling."""
        near = [own]
        if self.rows is not None:
            near.append(self.gradients_at(self.rows, self.row_pick))
        flat = np.asarray(self.x, np.float64).reshape(self.n, -1)
        scale = Scale.of(flat)
        away = np.asarray(jr.normal(self.keys["far"], flat.shape)) * 100 * scale.spread
        far = jnp.asarray(scale.centre + away, self.dtype).reshape(self.x.shape)
        self.count_bad("gradients of inputs", [g.x for g in near])
        self.count_bad("gradients of parameters", [g.params for g in near])
        outside = self.gradients_at(far, self.pick)
        self.count_bad("gradients far outside", [outside.x, outside.params])
        if bad := int(np.isnan(outside.log_p).sum()):
            self.lines[-1] = Line(
                "gradients far outside", bad, 0.0, False, "the density is NaN 100 spreads away"
            )
        key, conditions = self.keys["gradient"], self.at(self.pick)
        sampled = probes.sampling_gradient(self.flow, key, self.n, conditions)
        self.count_bad("gradients of sampling", [sampled])

    def count_bad(self, name: str, trees: list[Any]) -> None:
        """A line with the number of entries that are not finite, and the first place."""
        bad, where = 0, ""
        for tree in trees:
            for path, leaf in jtu.tree_leaves_with_path(tree):
                count = int((~np.isfinite(np.asarray(leaf, np.float64))).sum())
                if count and not where and path:
                    where = f"first in flow{jtu.keystr(path)}"
                bad += count
        self.add(name, bad, 0.0, where)


def _rows_of_condition(flow: AbstractDistribution, condition: Condition) -> tuple[Any, int]:
    """Conditions with one leading axis, and how many: (None, 0) where the flow takes none."""
    cast, batch = flow._check_condition(condition)
    if flow.cond_shape is None:
        return None, 0
    count = math.prod(batch)
    if count == 0:
        raise InputError("check: there are no conditions.")
    return jtu.tree_map(lambda c: c.reshape((count, *c.shape[len(batch) :])), cast), count
