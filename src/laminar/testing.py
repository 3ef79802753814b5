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

from laminar._errors import InputError, LaminarError, ShapeError
from laminar._params import partition
from laminar._typing import Array, PRNGKeyArray
from laminar.bijections.base import AbstractTransform, Direction, call, check_transform
from laminar.bijections.compose import Chain
from laminar.bijections.elementwise import Affine, Exp, Sigmoid
from laminar.diagnose import estimates
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.spaces import dimension, log_units, restrict

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
    """All findings on one bijection; prints as a table.

    Attributes:
        subject: The name of the bijection.
        checks: The findings in order; each has its name, dtype, error, budget and detail.
    """

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
    by forward and by reverse differentiation, on manifolds between tangent spaces and in the
    measures declared (`laminar.spaces`); that forward and inverse log-dets cancel; that
    compiled, eager and batch-last evaluation agree; that one condition can be shared by a batch;
    that gradients in the point and in every trained parameter are finite at 0, ±1e-30, ±1e6, the
    ends of the intervals and beyond; that points outside, as all off a manifold are, give a finite
    image and −inf; that NaN
    stays NaN; and that one compiled program serves two instances.

    A transform whose log-det is an estimate or a bound gets the same, under random keys, with what
    its label claims in place of the Jacobian's log-det. An ``"unbiased"`` one is compared with the
    Jacobian in the mean over 400 keys, in standard errors, of which 5.5 are allowed: a right one
    fails by chance less than once in a hundred thousand runs. The bias of a ``"biased"`` one is
    told, without a budget. A ``"bound"`` is put over a standard normal base, and its mass compared
    with that of samples (see `laminar.diagnose.estimates.overstatement`); it needs no round trip.

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
    """
    check_transform("check_bijection", bijection)
    if other is None:
        other = _changed(bijection)
    found: list[Check] = []
    for dtype in ("float32", "float64") if float64 else ("float32",):
        with jax.enable_x64(dtype == "float64"):
            pair = [_cast(b, dtype) for b in (bijection, other)]
            inputs = _draw(bijection, key, domain, image, edges, dtype)
            try:
                if bijection.exactness == "exact":
                    found += _findings(pair, inputs, dtype, slack)
                else:
                    found += _estimate_findings(pair, inputs, dtype, slack, domain)
            except ShapeError as error:
                found.append(Check("batch-last = single events", dtype, 1, 0, str(error)))
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

    def side(key, event, interval, space):
        lo, hi = interval
        noise = event if space is None else (space.noise,)
        u = jr.normal(key, (*noise, math.prod(_BATCH)), dtype)
        if space is not None:
            points = space.place(u)
        elif math.isfinite(lo) and math.isfinite(hi):
            points = lo + (hi - lo) * jax.nn.sigmoid(u)
        elif math.isfinite(lo):
            points = lo + jnp.exp(u)
        elif math.isfinite(hi):
            points = hi - jnp.exp(u)
        else:
            points = 1.5 * u
        ends = [end for end in interval if math.isfinite(end)]
        beyond = [lo - 1] * math.isfinite(lo) + [hi + 1] * math.isfinite(hi)
        beyond = beyond if space is None else [-2.0, 2.0]
        outside = [*beyond, -math.inf, math.inf] if beyond else []

        def fill(values):
            return jnp.broadcast_to(jnp.asarray(values, dtype), (*event, len(values)))

        missing = points[..., :1]
        missing = missing.reshape(-1).at[0].set(jnp.nan).reshape(missing.shape)
        return _Side(points, fill([*_EDGES, *ends, *beyond, *edges]), fill(outside), missing)

    return (
        side(x_key, bijection.in_shape, domain, bijection.in_space),
        side(y_key, bijection.out_shape, image, bijection.out_space),
        condition,
    )


def _both_ways(bijection, x_side: _Side, y_side: _Side, condition):
    """All that is measured, with as few calls of the bijection as give it: compiling them is slow.

    Each side's events go through together: the points, the same under the first condition alone,
    those outside, and one with NaN.
    """
    cond_axis = None if condition is None else -1

    def single(direction, x, condition):
        def one(x, condition):
            return getattr(bijection, direction)(x, condition)

        return jax.vmap(one, in_axes=(-1, cond_axis), out_axes=-1)(x, condition)

    def together(side):
        parts = [side.points, side.points, side.outside, side.missing]
        return jnp.concatenate(parts, -1), _follow(condition, parts)

    x_all, x_condition = together(x_side)
    y_all, y_condition = together(y_side)
    n = math.prod(_BATCH)
    y, log_det_y = single("forward", x_all, x_condition)
    joined = None
    if condition is not None and y_condition is not None:
        joined = jnp.concatenate([y_condition, condition], -1)
    x, log_det_x = single("inverse", jnp.concatenate([y_all, y[..., :n]], -1), joined)
    m = y_all.shape[-1]
    out_f = _parts(x_side, y, log_det_y) | {"returned": x[..., m:], "log_det_back": log_det_x[m:]}
    out_i = _parts(y_side, x[..., :m], log_det_x[:m])
    out_i["returned"], out_i["log_det_back"] = single("forward", x[..., :n], condition)
    return (
        out_f | _one_way(bijection, "forward", x_side, condition),
        out_i | _one_way(bijection, "inverse", y_side, condition),
    )


def _follow(condition, parts):
    """Conditions for points that go through together: each its own, then the first for all."""
    if condition is None:
        return None
    count = sum(part.shape[-1] for part in parts[1:])
    first = condition[..., :1]
    return jnp.concatenate([condition, jnp.repeat(first, count, axis=-1)], -1)


def _one_way(bijection, direction: Direction, side: _Side, condition) -> dict[str, Any]:
    """What cannot share a call with other things."""
    folded = call(
        bijection,
        direction,
        side.points.reshape(*side.points.shape[:-1], *_BATCH),
        None if condition is None else condition.reshape(*condition.shape[:-1], *_BATCH),
        key=jr.key(0),  # which an exact map must not use
    )
    out = _derivatives(bijection, direction, side, condition)
    out["batched"] = tuple(v.reshape(*v.shape[: -len(_BATCH)], -1) for v in folded)
    if condition is not None:
        out["shared"] = call(bijection, direction, side.points, condition[..., 0])
    return out


def _parts(side: _Side, value, log_det):
    """Take apart what went through together."""
    n, k = math.prod(_BATCH), side.outside.shape[-1]
    # Nothing of no size: where the map does not depend on it, that aborts jaxlib's compiler.
    cuts = {
        "single": slice(0, n),
        "single_shared": slice(n, 2 * n),
        "outside": slice(2 * n, 2 * n + k),
        "missing": slice(2 * n + k, None),
    }
    if not k:
        del cuts["outside"]
    return {name: (value[..., cut], log_det[..., cut]) for name, cut in cuts.items()}


def _derivatives(bijection, direction: Direction, side: _Side, condition) -> dict[str, Any]:
    """The Jacobians, and where gradients are finite.

    Forward is differentiated in forward mode and inverse in reverse mode, so that both are tried.
    """
    cond_axis = None if condition is None else -1
    shared = None if condition is None else condition[..., 0]
    sizes = [math.prod(shape) for shape in (bijection.in_shape, bijection.out_shape)]
    sizes = sizes[::-1] if direction == "forward" else sizes
    diff = jax.jacfwd if direction == "forward" else jax.jacrev
    jacobian = jax.vmap(
        diff(lambda x, c: getattr(bijection, direction)(x, c)[0]), in_axes=(-1, cond_axis)
    )(side.points, condition)
    trained, rest = partition(bijection)

    def total(trained, x):
        y, log_det = getattr(eqx.combine(trained, rest), direction)(x, shared)
        return y.sum() + log_det

    def finite(x):
        grads = jax.grad(total, argnums=(0, 1))(trained, x)
        return jnp.stack([jnp.isfinite(g).all() for g in jtu.tree_leaves(grads)]).all()

    return {
        "jacobian": jacobian.reshape(-1, *sizes),
        "finite": jax.vmap(finite, in_axes=-1)(side.edges),
    }


def _findings(pair, inputs, dtype, slack) -> list[Check]:
    traces = 0

    def run(bijection, x_side, y_side, condition):
        nonlocal traces
        traces += 1
        return _both_ways(bijection, x_side, y_side, condition)

    # Compiling takes nearly all the time, and code run once need not be fast.
    options: dict[str, Any] = {"compiler_options": {"xla_backend_optimization_level": 0}}
    measure = eqx.filter_jit(run, **options)
    bijection = pair[0]
    x_side, y_side, condition = inputs
    found = _signatures(bijection, x_side, y_side, condition, dtype)
    if not all(check.passed for check in found):
        return found  # the rest would only fail in obscure ways
    results = measure(bijection, x_side, y_side, condition)
    measure(pair[1], x_side, y_side, condition)
    budget = Budget(*(slack * b for b in BUDGETS[dtype]))
    for direction, side, out in zip(("forward", "inverse"), inputs, results, strict=False):
        out = jax.device_get(out)
        found += _judge(bijection, direction, side, out, dtype, budget)
        if dtype == "float32":
            found.append(_eager(bijection, direction, side, condition, out, dtype, budget))
    found.append(
        Check("one trace", dtype, traces - 1, 0, "Two instances made alike were compiled twice.")
    )
    return found


def _signatures(bijection, x_side, y_side, condition, dtype) -> list[Check]:
    """Shapes and dtypes of what one event gives, without computing anything."""
    first = None if condition is None else condition[..., 0]
    dims = [
        dimension(bijection.in_space, bijection.in_shape),
        dimension(bijection.out_space, bijection.out_shape),
    ]
    detail = f"The spaces of its two sides have {dims[0]} and {dims[1]} dimensions."
    gap = 0 if bijection.exactness == "bound" else abs(dims[0] - dims[1])
    found = [Check("dimensions", dtype, gap, 0, detail)]
    sides = (("forward", x_side, bijection.out_shape), ("inverse", y_side, bijection.in_shape))
    for direction, side, expected in sides:
        method = getattr(bijection, direction)
        if bijection.exactness == "exact":
            try:
                value, log_det = eqx.filter_eval_shape(method, side.points[..., 0], first)
            except InputError as error:
                return [Check(f"{direction}: needs no key", dtype, 1, 0, str(error))]
        else:
            one, key = side.points[..., 0], jr.key(0)
            value, log_det = eqx.filter_eval_shape(method, one, first, key=key)
        shapes = jnp.shape(value), jnp.shape(log_det)
        detail = (
            f"The image of one event has shape {shapes[0]} and should have {expected}; its log-det "
            f"has {shapes[1]} and should have (), summed over the entries."
        )
        found.append(
            Check(f"{direction}: shapes", dtype, float(shapes != (expected, ())), 0, detail)
        )
        kinds = [str(getattr(v, "dtype", type(v).__name__)) for v in (value, log_det)]
        wrong = set(kinds) != {dtype}
        detail = f"It gives {kinds[0]} and {kinds[1]}; both should be arrays of {dtype}."
        found.append(Check(f"{direction}: dtype", dtype, float(wrong), 0, detail))
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
    found: list[Check] = []

    def add(name, error, limit: float = 0, detail=""):
        found.append(Check(f"{direction}: {name}", dtype, float(error), limit, detail))

    def gaps(a, b):
        return max(_gap(a[0], b[0]) / values, _gap(a[1], b[1]) / log_dets) * values

    _, log_det = out["single"]
    inner, outer = bijection.in_space, bijection.out_space
    inner, outer = (inner, outer) if direction == "forward" else (outer, inner)
    points = np.moveaxis(np.asarray(side.points), -1, 0)
    square = restrict(out["jacobian"], inner, points.reshape((len(points), -1)))
    jacobian = np.linalg.slogdet(square)[1] + log_units(inner, outer)
    add("round trip", _gap(out["returned"], side.points), values)
    add("log-det is the Jacobian's", _gap(log_det, jacobian), log_dets)
    add("log-dets cancel", _gap(-out["log_det_back"], log_det), log_dets)
    add("batch-last = single events", gaps(out["batched"], out["single"]), values)
    if "shared" in out:
        add("shared condition", gaps(out["shared"], out["single_shared"]), values)
    bad = np.asarray(side.edges).reshape(-1, side.edges.shape[-1])[0][~out["finite"]]
    add("finite gradients", len(bad), detail=f"They are not at {', '.join(map(str, bad))}.")
    if side.outside.shape[-1]:
        image, log_det = out["outside"]
        wrong = (~np.isfinite(image)).sum() + (log_det != -np.inf).sum()
        add("outside is −inf", wrong, detail="A finite point and a log-det of −inf are asked for.")
    image, log_det = out["missing"]
    lost = not (np.isnan(image).any() or np.isnan(log_det).any())
    add("NaN stays NaN", lost, detail="A NaN came back as a number.")
    return found


def _estimate_findings(pair, inputs, dtype, slack, domain) -> list[Check]:
    """What holds of estimates and bounds, under random keys."""
    traces = 0

    def run(bijection, x_side, y_side, condition, key):
        nonlocal traces
        traces += 1
        return (
            _under_keys(bijection, "forward", x_side, condition, key),
            _under_keys(bijection, "inverse", y_side, condition, key),
        )

    measure = eqx.filter_jit(run)
    bijection, (x_side, y_side, condition) = pair[0], inputs
    found = _signatures(bijection, x_side, y_side, condition, dtype)
    if not all(check.passed for check in found):
        return found
    results = jax.device_get(measure(bijection, x_side, y_side, condition, jr.key(1)))
    measure(pair[1], x_side, y_side, condition, jr.key(1))
    budget = Budget(*(slack * b for b in BUDGETS[dtype]))
    for direction, side, out in zip(("forward", "inverse"), inputs, results, strict=False):
        found += _judge_estimate(bijection, direction, side, out, condition, dtype, budget)
    if bijection.exactness == "bound":
        score, detail = _overstatement(bijection, condition, domain)
        found.append(Check("the bound holds", dtype, score, estimates.Z_SCORE, detail))
    detail = "Two instances made alike were compiled twice."
    return [*found, Check("one trace", dtype, traces - 1, 0, detail)]


def _under_keys(bijection, direction: Direction, side: _Side, condition, key) -> dict[str, Any]:
    """Images under two keys, gradients, and for estimates the way back and the Jacobian."""
    first, second = jr.split(key)
    shared = None if condition is None else condition[..., 0]
    trained, rest = partition(bijection)

    def total(trained, x):
        y, log_det = call(eqx.combine(trained, rest), direction, x, shared, key=first)
        return y.sum() + log_det

    def finite(x):
        grads = jax.grad(total, argnums=(0, 1))(trained, x)
        return jnp.stack([jnp.isfinite(g).all() for g in jtu.tree_leaves(grads)]).all()

    folded = side.points.reshape(*side.points.shape[:-1], *_BATCH)
    out = {
        "one": call(bijection, direction, side.points, condition, key=first),
        "two": call(bijection, direction, side.points, condition, key=second),
        "missing": call(bijection, direction, side.missing, shared, key=first),
        "batched": call(bijection, direction, folded, shared, key=first),
        "finite": jax.vmap(finite, in_axes=-1)(side.edges),
    }
    if bijection.exactness == "bound":
        if side.outside.shape[-1]:
            out["outside"] = call(bijection, direction, side.outside, shared, key=first)
        return out
    other: Direction = "inverse" if direction == "forward" else "forward"
    out["returned"], _ = call(bijection, other, out["one"][0], condition, key=second)
    size = math.prod(bijection.in_shape)

    def image(x, condition):
        return call(bijection, direction, x, condition, key=first)[0]

    cond_axis = None if condition is None else -1
    diff = jax.jacfwd if direction == "forward" else jax.jacrev
    jacobian = jax.vmap(diff(image), in_axes=(-1, cond_axis))(side.points, condition)
    out["jacobian"] = jnp.linalg.slogdet(jacobian.reshape(-1, size, size))[1]
    return out


def _judge_estimate(bijection, direction, side, out, condition, dtype, budget) -> list[Check]:
    """Compare what one direction gave under keys with what the label claims."""
    found: list[Check] = []

    def add(name, error, limit: float = 0, detail=""):
        found.append(Check(f"{direction}: {name}", dtype, float(error), limit, detail))

    bad = np.asarray(side.edges).reshape(-1, side.edges.shape[-1])[0][~out["finite"]]
    add("finite gradients", len(bad), detail=f"They are not at {', '.join(map(str, bad))}.")
    image, log_det = out["missing"]
    add("NaN stays NaN", not (np.isnan(image).any() or np.isnan(log_det).any()))
    shapes = (out["batched"][0].shape[-2:], out["batched"][1].shape)
    add("batch axes", shapes != (_BATCH, _BATCH), detail=f"They are {shapes} for {_BATCH}.")
    if bijection.exactness == "bound":
        if side.outside.shape[-1] and direction == "inverse":
            image, log_det = out["outside"]
            add("outside is −inf", (~np.isfinite(image)).sum() + (log_det != -np.inf).sum())
        return found
    add("the image keeps to the point", _gap(out["one"][0], out["two"][0]), budget.value)
    add("round trip", _gap(out["returned"], side.points), budget.value)
    truth = np.asarray(out["jacobian"], np.float64)
    found_bias = estimates.bias(bijection, direction, side.points, condition, truth, jr.key(2))
    if bijection.exactness == "unbiased":
        allowed = budget.log_det * max(math.prod(bijection.in_shape), 1)
        add("log-det is unbiased", found_bias.score(allowed), estimates.Z_SCORE)
    else:
        worst = float(np.abs(found_bias.gap).max())
        add("bias of the log-det", worst, math.inf, "No budget is set.")
    return found


def _overstatement(bijection, condition, domain: Interval) -> tuple[float, str]:
    """The mass of a bound over a normal base, squashed into its domain, against samples."""
    shape = bijection.in_shape
    flow = Flow(Normal(shape), Chain([*_into(domain, shape), bijection]))
    first = None if condition is None else condition[..., 0]
    sample_key, key = jr.split(jr.key(3))
    samples = np.asarray(flow.sample(sample_key, (4096,), first), np.float64).reshape(4096, -1)
    return estimates.overstatement(flow, first, samples, np.random.default_rng(0), key)


def _into(domain: Interval, shape) -> list:
    """Maps from all numbers into an interval."""
    low, high = domain
    if math.isfinite(low) and math.isfinite(high):
        return [Sigmoid(shape), Affine(low, high - low, shape=shape)]
    if math.isfinite(low) or math.isfinite(high):
        end, sign = (low, 1.0) if math.isfinite(low) else (high, -1.0)
        return [Exp(shape), Affine(end, sign, shape=shape)]
    return []


def _eager(bijection, direction, side, condition, out, dtype, budget) -> Check:
    """The same event without compilation."""
    first: Any = None if condition is None else condition[..., 0]
    value, log_det = getattr(bijection, direction)(side.points[..., 0], first)
    value_c, log_det_c = (v[..., 0] for v in out["single"])
    error = max(_gap(value, value_c), _gap(log_det, log_det_c))
    return Check(f"{direction}: eager = compiled", dtype, error, budget.value)
