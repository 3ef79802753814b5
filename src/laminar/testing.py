"""The contract of a bijection as a test that runs on any class, your own included.

    from laminar.testing import check_bijection
    print(check_bijection(MyMap(…), key=jr.key(0)))

Give it random parameters of order one: an identity passes everything.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from laminar._errors import InputError, LaminarError
from laminar._params import partition
from laminar._typing import Array, PRNGKeyArray
from laminar.bijections.base import AbstractTransform, Direction, call

Interval = tuple[float, float]
_REALS: Interval = (-math.inf, math.inf)
_EDGES = (0.0, 1e-30, -1e-30, 1e6, -1e6)
_BATCH = (2, 3)


class ContractError(LaminarError, AssertionError):
    """A bijection breaks its contract; the message names the check, the size and the budget."""


class Budget(NamedTuple):
    """Largest error allowed in one precision.

    Attributes:
        value: Of points, relative to 1 + |point|.
        log_det: Of log-dets, relative to the event's size.
    """

    value: float
    log_det: float


BUDGETS = {"float32": Budget(1e-4, 1e-4), "float64": Budget(1e-9, 1e-9)}


class Check(NamedTuple):
    """One finding: what was measured, in which precision, against which budget."""

    name: str
    dtype: str
    error: float
    budget: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget; NaN is not."""
        return self.error <= self.budget


class Report(NamedTuple):
    """All findings on one bijection; prints as a table."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        rows = [f"{self.subject}: {'kept' if self.passed else 'BROKEN'}"]
        rows += [
            f"  {'ok  ' if c.passed else 'FAIL'} {c.dtype:8} {c.name:34} "
            f"{c.error:9.2e}  of {c.budget:.0e}"
            for c in self.checks
        ]
        return "\n".join(rows)


def check_bijection(
    bijection: AbstractTransform,
    *,
    key: PRNGKeyArray,
    other: AbstractTransform | None = None,
    domain: Interval = _REALS,
    image: Interval = _REALS,
    edges: Sequence[float] = (),
    float64: bool = True,
    slack: float = 1.0,
    throw: bool = True,
) -> Report:
    """Run the contract of a bijection.

    Checked are, in float32 and float64: round trips both ways; the log-det against the Jacobian's
    by forward and by reverse differentiation; that forward and inverse log-dets cancel; that
    compiled, eager and batch-last evaluation agree; that one condition can be shared by a batch;
    that gradients in the point and in every trained parameter are finite at 0, ±1e-30, ±1e6, the
    ends of the intervals and beyond; that points outside give a finite image and −inf; that NaN
    stays NaN; and that one compiled program serves two instances.

    Args:
        bijection: What to check, at random parameters of order one.
        key: Draws the points and conditions.
        other: Another instance made alike; by default a copy with changed parameters.
        domain: Where inputs of ``forward`` are valid, the same interval for every element.
        image: Likewise for ``inverse``.
        edges: Further values at which gradients must be finite, such as knots.
        float64: Whether to check in float64 too (JAX's x64 mode is switched on for that part only).
        slack: Factor on the budgets.
        throw: Whether to raise at the first failure rather than only report it.

    Returns:
        The report.

    Raises:
        ContractError: If a check fails and `throw` is set.
        InputError: If the transform does not claim to be exact.
    """
    if bijection.exactness != "exact":
        raise InputError(
            f"check_bijection checks exact bijections; {bijection.name} is declared "
            f"{bijection.exactness!r}."
        )
    if other is None:
        other = _changed(bijection)
    found: list[Check] = []
    for dtype in ("float32", "float64") if float64 else ("float32",):
        with jax.enable_x64(dtype == "float64"):
            pair = [_cast(b, dtype) for b in (bijection, other)]
            inputs = _draw(bijection, key, domain, image, edges, dtype)
            found += _findings(pair, inputs, dtype, slack)
    report = Report(bijection.name, tuple(found))
    for check in report.checks:
        if throw and not check.passed:
            raise ContractError(
                f"{bijection.name}: {check.name} failed in {check.dtype}: {check.error:.3g} "
                f"against a budget of {check.budget:.1g}. {check.detail}".rstrip()
            )
    return report


class _Side(NamedTuple):
    """Points on one side of the bijection, events with the batch last."""

    points: Array
    edges: Array
    outside: Array
    missing: Array


def _cast(bijection, dtype):
    return jtu.tree_map(
        lambda x: jnp.asarray(x, dtype) if eqx.is_inexact_array(x) else x, bijection
    )


def _changed(bijection):
    trained, rest = partition(bijection)
    return eqx.combine(jtu.tree_map(lambda x: 0.9 * x, trained), rest)


def _draw(bijection, key, domain, image, edges, dtype):
    """Everything the compiled function is run on, as NumPy-made arrays of one dtype."""
    x_key, y_key, cond_key = jr.split(key, 3)
    shape = bijection.cond_shape
    condition = None
    if shape is not None:
        condition = jr.normal(cond_key, (*shape, math.prod(_BATCH)), dtype)

    def side(key, event, interval):
        lo, hi = interval
        u = jr.normal(key, (*event, math.prod(_BATCH)), dtype)
        if math.isfinite(lo) and math.isfinite(hi):
            points = lo + (hi - lo) * jax.nn.sigmoid(u)
        elif math.isfinite(lo):
            points = lo + jnp.exp(u)
        elif math.isfinite(hi):
            points = hi - jnp.exp(u)
        else:
            points = 1.5 * u
        ends = [end for end in interval if math.isfinite(end)]
        beyond = [lo - 1] * math.isfinite(lo) + [hi + 1] * math.isfinite(hi)
        outside = [*beyond, -math.inf, math.inf] if ends else []

        def fill(values):
            return jnp.broadcast_to(jnp.asarray(values, dtype), (*event, len(values)))

        missing = points[..., :1]
        missing = missing.reshape(-1).at[0].set(jnp.nan).reshape(missing.shape)
        return _Side(points, fill([*_EDGES, *ends, *beyond, *edges]), fill(outside), missing)

    return (
        side(x_key, bijection.in_shape, domain),
        side(y_key, bijection.out_shape, image),
        condition,
    )


def _one_way(bijection, direction: Direction, side: _Side, condition, forward_mode: bool):
    """All that is measured in one direction."""
    back: Direction = "inverse" if direction == "forward" else "forward"
    cond_axis = None if condition is None else -1
    shared = None if condition is None else condition[..., 0]

    def single(direction, x, condition):
        return getattr(bijection, direction)(x, condition)

    def over(f, *args, axes):
        return jax.vmap(f, in_axes=axes, out_axes=-1)(*args)

    def there(x, condition):
        return single(direction, x, condition)

    x = side.points
    y, log_det = over(there, x, condition, axes=(-1, cond_axis))
    returned, log_det_back = over(
        lambda y, c: single(back, y, c), y, condition, axes=(-1, cond_axis)
    )
    diff = jax.jacfwd if forward_mode else jax.jacrev
    size = math.prod(bijection.in_shape)
    jacobian = jax.vmap(diff(lambda x, c: there(x, c)[0]), in_axes=(-1, cond_axis))(x, condition)
    out = {
        "value": y,
        "log_det": log_det,
        "first": (y[..., 0], log_det[..., 0]),
        "returned": returned,
        "log_det_back": log_det_back,
        "jacobian": jnp.linalg.slogdet(jacobian.reshape(-1, size, size))[1],
    }
    # Two trailing batch axes, and one condition for all.
    tail = _BATCH

    def fold(v):
        return v.reshape(*v.shape[:-1], *tail)

    folded = call(bijection, direction, fold(x), None if condition is None else fold(condition))
    out["batched"] = tuple(v.reshape(*v.shape[:-2], -1) for v in folded)
    out["shared"] = call(bijection, direction, x, shared)
    out["shared_single"] = over(there, x, shared, axes=(-1, None))

    trained, rest = partition(bijection)

    def total(trained, x):
        y, log_det = getattr(eqx.combine(trained, rest), direction)(x, shared)
        return y.sum() + log_det

    def finite(x):
        grads = jax.grad(total, argnums=(0, 1))(trained, x)
        return jnp.stack([jnp.isfinite(g).all() for g in jtu.tree_leaves(grads)]).all()

    out["finite"] = over(finite, side.edges, axes=(-1,))
    if side.outside.shape[-1]:
        out["outside"] = over(there, side.outside, shared, axes=(-1, None))
    out["missing"] = over(there, side.missing, shared, axes=(-1, None))
    return out


def _findings(pair, inputs, dtype, slack) -> list[Check]:
    traces = 0

    @eqx.filter_jit
    def measure(bijection, x_side, y_side, condition):
        nonlocal traces
        traces += 1
        return (
            _one_way(bijection, "forward", x_side, condition, True),
            _one_way(bijection, "inverse", y_side, condition, False),
        )

    bijection = pair[0]
    x_side, y_side, condition = inputs
    results = measure(bijection, x_side, y_side, condition)
    measure(pair[1], x_side, y_side, condition)
    budget = Budget(*(slack * b for b in BUDGETS[dtype]))
    found: list[Check] = []
    for direction, side, out in zip(("forward", "inverse"), inputs, results, strict=False):
        out = jax.device_get(out)
        found += _judge(bijection, direction, side, out, dtype, budget)
        found.append(_eager(bijection, direction, side, condition, out, dtype, budget))
    found.append(
        Check("one trace", dtype, traces - 1, 0, "Two instances made alike were compiled twice.")
    )
    return found


def _gap(a, b) -> float:
    """Largest difference, relative to 1 + |b|; equal infinities agree; NaN only with NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return math.inf
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.where(same, 0, np.abs(np.where(same, 0, a) - np.where(same, 0, b)) / (1 + np.abs(b)))
    return float(np.where(np.isnan(gap), np.inf, gap).max(initial=0))


def _judge(bijection, direction, side, out, dtype, budget) -> list[Check]:
    """Compare what one direction gave with what the contract says."""
    size = max(math.prod(bijection.in_shape), 1)
    values, log_dets = budget.value, budget.log_det * size
    expected = bijection.out_shape if direction == "forward" else bijection.in_shape
    found: list[Check] = []

    def add(name, error, limit: float = 0, detail=""):
        found.append(Check(f"{direction}: {name}", dtype, float(error), limit, detail))

    def gaps(a, b):
        return max(_gap(a[0], b[0]) / values, _gap(a[1], b[1]) / log_dets) * values

    batch = math.prod(_BATCH)
    shapes = (out["value"].shape, out["log_det"].shape)
    add(
        "shapes",
        shapes != ((*expected, batch), (batch,)),
        detail=f"An event and log-det of shapes {shapes[0][:-1]} and {shapes[1][:-1]}.",
    )
    dtypes = {str(out["value"].dtype), str(out["log_det"].dtype)}
    add("dtype", dtypes != {dtype}, detail=f"It returned {', '.join(sorted(dtypes))}.")
    add("round trip", _gap(out["returned"], side.points), values)
    add("log-det is the Jacobian's", _gap(out["log_det"], out["jacobian"]), log_dets)
    add("log-dets cancel", _gap(-out["log_det_back"], out["log_det"]), log_dets)
    single = (out["value"], out["log_det"])
    add("batch-last = single events", gaps(out["batched"], single), values)
    add("shared condition", gaps(out["shared"], out["shared_single"]), values)
    bad = np.asarray(side.edges).reshape(-1, side.edges.shape[-1])[0][~out["finite"]]
    add("finite gradients", len(bad), detail=f"They are not at {', '.join(map(str, bad))}.")
    if "outside" in out:
        image, log_det = out["outside"]
        wrong = (~np.isfinite(image)).sum() + (log_det != -np.inf).sum()
        add("outside is −inf", wrong, detail="A finite point and a log-det of −inf are asked for.")
    image, log_det = out["missing"]
    lost = not (np.isnan(image).any() or np.isnan(log_det).any())
    add("NaN stays NaN", lost, detail="A NaN came back as a number.")
    return found


def _eager(bijection, direction, side, condition, out, dtype, budget) -> Check:
    """The same event without compilation."""
    first: Any = None if condition is None else condition[..., 0]
    value, log_det = getattr(bijection, direction)(side.points[..., 0], first)
    error = max(_gap(value, out["first"][0]), _gap(log_det, out["first"][1]))
    return Check(f"{direction}: eager = compiled", dtype, error, budget.value)
