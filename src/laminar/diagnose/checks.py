"""Check a flow: does it invert, is its log-det the Jacobian's, does its density integrate to one.

Every check is a number and a budget. The budgets, by the precision of the flow's parameters:

| check | float32 | float64 | the number |
|---|---|---|---|
| round trips | 1e-3 | 1e-6 | worst error of an entry, relative to its size plus the spread |
| log-det both ways | 1e-3 | 1e-6 | worst sum of the two log-dets, per dimension |
| log-det against the Jacobian | 1e-3 | 1e-6 | worst difference of a step, per dimension |
| two ways to the density | 1e-3 | 1e-6 | worst difference in nats, per dimension |
| integral, D = 1, 2, 3 | 1e-3, 3e-3, 1e-2, plus ε | same | distance from one; ε: cubature's error |
| integral, D > 3 or on a manifold | 2e-3 + 4 σ | same | distance from one; σ: standard error |
| samples follow the density | 5.5 | 5.5 | worst difference of a mean in standard errors |
| estimates are unbiased | 5.5 | 5.5 | worst difference of a mean log-det in standard errors |
| the bound holds | 5.5 | 5.5 | worst excess of the bound's mass in standard errors |
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
from laminar.density import AbstractDistribution
from laminar.diagnose import estimates, probes
from laminar.diagnose.integrate import Scale
from laminar.diagnose.measure import NAMES, Measure, badness
from laminar.diagnose.report import CheckReport, Line
from laminar.flow import Flow
from laminar.mixtures import Mixture
from laminar.spaces import dimension

_BUDGETS = {8: 1e-6, 4: 1e-3, 2: 1e-1}
"""Relative budget by bytes of a number."""
_ON_THE_EDGE = 0.01
"""Share of samples that rounding may put on the edge of a bounded support."""
_INNER_SAMPLES = 128
_MAX_JACOBIAN = 4096
_MAX_INTEGRAL = 512
_ESTIMATED_POINTS = 16
_ROUND_TRIP, _JACOBIAN = "data → latent → data", "log-det is the Jacobian's"
_ESTIMATES, _BOUND = "log-det estimates are unbiased", "log_prob is a lower bound"


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
    - The same for every flow inside the base or a mixture, at its own samples.
    - The log-det of every step is that of its Jacobian by automatic differentiation, at 64 points
      or fewer (4096 / D), and their sum is the whole map's.
    - `log_prob` agrees with `sample_and_log_prob` on the latter's samples.
    - The density integrates to one: by adaptive cubature over the whole space in 1–3 dimensions,
      otherwise by importance sampling from a wider proposal, in data space or carried through the
      flow, whichever is more effective. Where neither is, the line says so and does not count. On a
      manifold the integral is the mean over uniform points, times the whole measure.
    - Samples of `sample` follow that density: means of the log-density and of bounded functions of
      every coordinate agree between samples and the integral.
    - A log-det declared unbiased is the Jacobian's in the mean over 400 keys, at 16 points; of one
      declared biased the bias is told. A density declared a bound has no more mass than samples
      anywhere that a few bounded functions look; its integral is told. One declared exact needs no
      key.
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
        sample_key, self.gradient_key, self.integral_key, estimate_key, *rest = jr.split(key, 6)
        seed_key, self.inner_key = rest
        # Choices are made on the host: every random function of JAX would be compiled first.
        self.rng = np.random.default_rng(np.asarray(jr.key_data(seed_key)))
        self.estimate_key = None if self.exact else estimate_key
        self.conditions, self.count = _rows_of_condition(flow, condition)
        self.pick = self.rng.integers(0, self.count, n) if self.count else None
        shape = () if self.count else (n,)
        self.x, self.log_p = flow.sample_and_log_prob(sample_key, shape, self.at(self.pick))
        self.rows, self.row_pick = self.choose_rows(data)

    def choose_rows(self, data: ArrayLike | None):
        """Up to n random rows of data, and the rows of their conditions."""
        if data is None:
            return None, None
        cast, batch = self.flow._check_event(data, self.flow.shape, "data")
        rows = np.asarray(cast).reshape((math.prod(batch), *self.flow.shape))
        if not len(rows):
            raise InputError("check: data have no rows.")
        bad = int((~np.isfinite(rows.reshape(len(rows), -1)).all(1)).sum())
        if bad:
            raise InputError(f"check: {bad} rows of data have NaN or infinity; remove them.")
        if self.count not in (0, 1, len(rows)):
            raise ShapeError(
                f"check: data have {len(rows)} rows and there are {self.count} conditions; give "
                "one condition for each row, or one for all."
            )
        chosen = self.rng.permutation(len(rows))[: self.n]
        pick = None if not self.count else chosen if self.count > 1 else np.zeros_like(chosen)
        return rows[chosen], pick

    def at(self, pick) -> Condition:
        """The conditions of some rows."""
        if pick is None:
            return None
        return jtu.tree_map(lambda c: c[pick], self.conditions)

    def add(self, name: str, value: float, budget: float, detail: str = "") -> None:
        """Add a line; a value that is NaN fails."""
        value = float(value)
        self.lines.append(Line(name, value, float(budget), bool(value <= budget), detail))

    def skip(self, name: str, why: str) -> None:
        """Add a line for a check that could not be made."""
        self.lines.append(Line(name, math.nan, math.nan, None, why))

    def run(self) -> CheckReport:
        """All checks, in the order of the report."""
        try:
            gradients = self.gradients_at(self.x, self.pick)
        except InputError as error:
            if not self.exact:
                raise
            # It claims to be exact, and asks for a key all the same.
            self.lines.append(Line("an exact density needs no key", 1.0, 0.0, False, str(error)))
            return self.report()
        if isinstance(self.flow, Flow):
            self.trips()
        self.components()
        self.agreement(gradients)
        self.integral()
        self.gradients(gradients)
        return self.report()

    def report(self) -> CheckReport:
        """The lines so far."""
        event = "scalar" if self.flow.shape == () else f"shape {self.flow.shape}"
        rows = "" if self.rows is None else f", {len(self.rows)} rows of data"
        subject = f"{self.flow.name} of {event}, {self.dtype.name}, {self.n} samples{rows}"
        return CheckReport(subject, tuple(self.lines))

    # --- The map ----------------------------------------------------------------------------------

    def trips(self) -> None:
        """Round trips and log-dets, at samples and at rows of data."""
        x, pick = np.asarray(self.x), self.pick
        if self.rows is not None:
            x = np.concatenate([x, self.rows])
            if pick is not None and self.row_pick is not None:
                pick = np.concatenate([pick, self.row_pick])
        flow, condition = probes.encode(self.flow, self.at(pick), x.shape[:1])
        x = np.moveaxis(x, 0, -1)
        sampled = np.arange(x.shape[-1]) < self.n

        def image(direction, points, key=self.estimate_key):
            signs = self.rng.choice([-1.0, 1.0], points.shape)
            points = points.astype(x.dtype)
            return probes.image(flow._map, direction, points, condition, signs, key)

        z = image("inverse", x)
        bound = flow._map.exactness == "bound"
        drawn = bound  # what is drawn does not come back
        try:
            x_again = image("forward", z.points)
        except InputError:  # a surjection, whose density is exact though its samples are drawn
            if not self.exact:
                raise
            drawn, x_again = True, image("forward", z.points, self.inner_key)
        z_again = image("inverse", x_again.points)
        inside = (z.log_det != -np.inf) & (x_again.log_det != -np.inf)
        lost, share = int((~inside[~sampled]).sum()), (~inside[sampled]).mean()
        note = f"{lost} of {(~sampled).sum()} rows of data are outside the support" if lost else ""
        broken = share > _ON_THE_EDGE
        if broken:
            note = f"{share:.0%} of the samples are outside the support of the inverse"

        def worst(values):
            return math.inf if broken else values[inside].max()

        if drawn:
            self.skip(_ROUND_TRIP, "the map draws")
        else:
            self.add(_ROUND_TRIP, worst(probes.error(x, x_again)), self.budget, note)
        if bound:
            self.skip("latent → data → latent", "the map draws")
        else:
            self.add("latent → data → latent", worst(probes.error(z.points, z_again)), self.budget)
        if drawn or flow._map.exactness != "exact":
            why = "the map draws" if drawn else f"the log-det is {flow._map.exactness}, not exact"
            self.skip("log-det both ways", why)
            if drawn:
                self.skip(_JACOBIAN, why)
            else:
                self.jacobians(flow, z.points, x_again.log_det, condition, inside, sampled)
            return
        down = worst(probes.asymmetry(z, x_again, self.dim))
        up = worst(probes.asymmetry(x_again, z_again, self.dim))
        self.add("log-det both ways", np.maximum(down, up), self.budget)
        self.jacobians(flow, z.points, x_again.log_det, condition, inside, sampled)

    def jacobians(self, flow, latent, whole, condition, inside, sampled) -> None:
        """The log-det of every step against that of its Jacobian."""
        name = _JACOBIAN
        inner, outer = (
            dimension(space, shape)
            for space, shape in (
                (flow._map.in_space, flow._map.in_shape),
                (flow._map.out_space, flow._map.out_shape),
            )
        )
        if inner != outer:
            return self.skip(name, "the two spaces differ in size")
        if self.dim > _MAX_JACOBIAN:
            return self.skip(name, f"a Jacobian of {self.dim} rows is too large")
        whole_exact = flow._map.exactness == "exact"
        most = 64 if whole_exact else _ESTIMATED_POINTS
        m = max(1, min(most, _MAX_JACOBIAN // self.dim))
        own, theirs = np.flatnonzero(inside & sampled), np.flatnonzero(inside & ~sampled)
        chosen = np.concatenate([own[: max(1, m - len(theirs[: m // 2]))], theirs[: m // 2]])
        at = jnp.asarray(latent[..., chosen], self.dtype)
        condition = None if condition is None else condition[..., chosen]
        steps = probes.pieces(flow._map)
        worst, where, total, slack = 0.0, "", np.zeros(len(chosen)), np.zeros(len(chosen))
        estimated = _Estimated()
        for k, step in enumerate(steps):
            place = f"step {k + 1} of {len(steps)}, {step.name}"
            unit = self.eps / self.budget
            found = probes.differentiate(step, at, condition, unit, self.estimate_key)
            before, at = at, found.points
            total, slack = total + found.exact, slack + found.excess
            if step.exactness != "exact":
                allowed = self.budget * (self.dim + found.excess)
                sides = ("forward", before, found.exact), ("inverse", at, -found.exact)
                for direction, points, truth in sides:
                    where_to = (step, direction, points, condition, truth, self.inner_key)
                    estimated.add(*where_to, allowed, f"{place}, {direction}")
                continue
            error = (np.abs(found.log_det - found.exact) / (self.dim + found.excess)).max()
            if not error <= worst:
                worst, where = float(error), f"worst in {place}"
            if math.isnan(worst):
                return self.add(name, worst, self.budget, where if len(steps) > 1 else "")
        if not whole_exact:
            if worst > 0:
                self.add(name, worst, self.budget, where)
            else:
                self.skip(name, f"the log-det is {flow._map.exactness}, not exact")
            return estimated.tell(self)
        error = (np.abs(whole[chosen] - total) / (self.dim * len(steps) + slack)).max()
        if not error <= max(worst, self.budget):
            worst, where = float(error), "the whole is not the sum of its steps"
        return self.add(name, worst, self.budget, where if len(steps) > 1 else "")

    def components(self) -> None:
        """The maps of the flows inside a base or a mixture, each at its own samples.

        They take the place of the lines so far where they are worse, and are named there.
        """
        flow, given = self.flow, self.at(self.pick)
        if given is not None:
            flow, given = flow._encode(given, (self.n,), None)
        n = min(self.n, _INNER_SAMPLES)
        for name, inner in _inner_flows(flow):
            condition = None
            if inner.cond_shape is not None:
                condition = jtu.tree_map(lambda c: c[:n], given)
            own = _Check(inner, self.inner_key, n, None, condition)
            own.trips()
            for line in own.lines:
                line = line._replace(detail=f"in {name}{': ' if line.detail else ''}{line.detail}")
                places = [i for i, kept in enumerate(self.lines) if kept.name == line.name]
                if not places:
                    self.lines.append(line)
                elif badness(line) > badness(self.lines[places[0]]):
                    self.lines[places[0]] = line

    # --- The density ------------------------------------------------------------------------------

    def agreement(self, gradients) -> None:
        """The density that comes with samples, and that of `log_prob` at the same points."""
        name = "log_prob is sample_and_log_prob's"
        if not self.exact:
            return self.skip(name, f"the density is {self.flow.exactness}, not exact")
        again = np.asarray(gradients.log_p, np.float64)
        first = np.asarray(self.log_p, np.float64)
        edge = again == -np.inf
        x, slope = (np.asarray(a, np.float64).reshape(self.n, -1) for a in (self.x, gradients.x))
        with np.errstate(invalid="ignore", over="ignore"):
            # What one rounding of the point itself may change.
            change = np.abs(slope) * (Scale.of(x).spread + np.abs(x))
            rounding = np.nan_to_num(change, posinf=0).sum(1) * 10 * self.eps / self.budget
            error = np.abs(first - again) / (self.dim + rounding)
        detail = ""
        if edge.any():
            detail = f"{edge.mean():.1%} of the samples have density 0"
            error = error[~edge] if edge.mean() <= _ON_THE_EDGE else np.array([math.inf])
        return self.add(name, error.max(), self.budget, detail)

    def integral(self) -> None:
        """The integral of the density, and samples against it, at one or two conditions."""
        if not self.exact or self.dim > _MAX_INTEGRAL:
            if self.flow.exactness == "bound" and self.dim <= _MAX_INTEGRAL:
                self.bound()
            elif self.flow.exactness == "bound":
                self.skip(_BOUND, f"{self.dim} dimensions are too many")
            for name in NAMES:
                why = f"{self.dim} dimensions are too many"
                self.skip(name, why if self.exact else f"the density is {self.flow.exactness}")
            return
        picks: list[Any] = [None] if not self.count else [0, self.count - 1][: self.count]
        keys = jr.split(self.integral_key, len(picks))
        found = [
            Measure(self.flow, self.at(pick), key).lines()
            for pick, key in zip(picks, keys, strict=True)
        ]
        for lines in zip(*found, strict=True):
            # The worst of the conditions; one that could not be measured counts last.
            self.lines.append(max(lines, key=badness))

    def bound(self) -> None:
        """A lower bound against samples, at the worst of one or two conditions."""
        picks: list[Any] = [None] if not self.count else [0, self.count - 1][: self.count]
        found = []
        for pick, key in zip(picks, jr.split(self.integral_key, len(picks)), strict=True):
            condition = self.at(pick)
            measure = Measure(self.flow, condition, key)
            samples = measure.samples, measure.rng
            found.append(estimates.overstatement(self.flow, condition, *samples, self.inner_key))
        # What could not be measured counts last.
        score, detail = max(found, key=lambda one: -math.inf if math.isnan(one[0]) else one[0])
        if math.isnan(score):
            self.skip(_BOUND, detail)
        else:
            self.add(_BOUND, score, estimates.Z_SCORE, detail)

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
        away = 100 * scale.spread * self.rng.standard_normal(flat.shape)
        far = jnp.asarray(scale.centre + away, self.dtype).reshape(self.x.shape)
        self.count_bad("gradients of inputs", [g.x for g in near])
        self.count_bad("gradients of parameters", [g.params for g in near])
        outside = self.gradients_at(far, self.pick)
        self.count_bad("gradients far outside", [outside.x, outside.params])
        if bad := int(np.isnan(outside.log_p).sum()):
            self.lines[-1] = Line(
                "gradients far outside", bad, 0.0, False, "the density is NaN 100 spreads away"
            )
        key, conditions = self.gradient_key, self.at(self.pick)
        sampled = probes.sampling_derivative(self.flow, key, self.n, conditions)
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


class _Estimated:
    """What is found of the steps whose log-det is an estimate."""

    def __init__(self):
        self.score, self.where = -1.0, ""
        self.bias, self.biased = 0.0, ""

    def add(self, step, direction, at, condition, truth, key, allowed, place) -> None:
        """Measure one direction of a step at batch-last points."""
        if step.cond_shape is None:
            condition = None
        found = estimates.bias(step, direction, at, condition, truth, key)
        if step.exactness == "biased":
            if np.abs(found.gap).max() >= self.bias:
                self.bias, self.biased = float(np.abs(found.gap).max()), place
        elif not found.score(allowed) <= self.score:
            self.score, self.where = found.score(allowed), f"worst in {place}"

    def tell(self, check: _Check) -> None:
        """Add the line."""
        if self.biased:
            check.skip(_ESTIMATES, f"off by {self.bias:.1e} in the mean at most, in {self.biased}")
        else:
            check.add(_ESTIMATES, self.score, estimates.Z_SCORE, self.where)


def _inner_flows(dist: AbstractDistribution, name: str = "") -> list[tuple[str, Flow]]:
    """The flows inside a distribution, with where they stand."""
    if isinstance(dist, Flow):
        inner = [(f"{name}base", dist._base)]
    elif isinstance(dist, Mixture):
        inner = [(f"{name}component {i}", part) for i, part in enumerate(dist.parts())]
    else:
        return []
    found: list[tuple[str, Flow]] = []
    for place, part in inner:
        if isinstance(part, Flow):
            found.append((place, part))
        found += _inner_flows(part, f"{place}, ")
    return found


def _rows_of_condition(flow: AbstractDistribution, condition: Condition) -> tuple[Any, int]:
    """Conditions with one leading axis, and how many: (None, 0) where the flow takes none."""
    cast, batch = flow._check_condition(condition)
    if flow.cond_shape is None:
        return None, 0
    count = math.prod(batch)
    if count == 0:
        raise InputError("check: there are no conditions.")
    return jtu.tree_map(lambda c: c.reshape((count, *c.shape[len(batch) :])), cast), count
