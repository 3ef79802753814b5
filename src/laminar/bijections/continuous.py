r"""Continuous normalizing flows: the map of an ordinary differential equation (Chen et al. 2018).

    dz/dt = v(t, z, c),    d log_det/dt = tr ∂v/∂z,    from t = 0 (latent) to t = 1 (data)

`Continuous` integrates the two together with Diffrax, backwards for the inverse. Any v that is
Lipschitz gives a bijection, so its network is free. What is computed are numerical solutions: with
adaptive steps round trips and log-dets are exact up to the tolerance, and so are the log-det and
the Jacobian of the computed map; a number of fixed steps has whatever error it has.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from laminar._checks import check_sizes
from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, expand
from laminar._typing import Array, Condition, Direction, PRNGKeyArray, Shape
from laminar.bijections.base import Exactness
from laminar.bijections.frames import AbstractSameShape, AbstractTwoWay, as_shape, needed
from laminar.nn.conv import ConvNet
from laminar.nn.mlp import MLP, Activation, joined, time_features

Divergence = Literal["exact", "hutchinson"]
Probe = Literal["rademacher", "normal"]
Adjoint = Literal["checkpoint", "direct", "backsolve"]

_SOLVERS = {
    "euler": diffrax.Euler,
    "midpoint": diffrax.Midpoint,
    "heun": diffrax.Heun,
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}
_TOLERANCES = {"float32": 1e-6, "float64": 1e-10}


class VelocityField(eqx.Module):
    """A residual network v(t, z, c) whose blocks time and condition modulate (FiLM).

    Its head starts at zero, so a flow of it starts as the identity. Time enters as `time_features`,
    which come back after two units: keep `Continuous.times` within a span of less than that.

    Args:
        shape: Shape of one event; with a `kernel` it is ``(channels, *space)``.
        key: Draws the weights.
        width: Hidden units, or channels.
        depth: Residual blocks, at least one.
        cond_dim: Length of the condition, or 0 for none.
        frequencies: Of the time features; the highest is 2^(frequencies − 1) half turns.
        activation: A smooth function of `jax.nn` or its name.
        kernel: Odd length of the kernels of a convolutional network, a `ConvNet`; None for one of
            the whole event, an `MLP`.

    Raises:
        InputError: If a size is not positive, or the kernel even.
        ShapeError: If there is a kernel and no axis of space.
    """

    net: MLP | ConvNet
    shape: Shape = eqx.field(static=True)
    frequencies: int = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape | int,
        *,
        key: PRNGKeyArray,
        width: int = 128,
        depth: int = 2,
        cond_dim: int = 0,
        frequencies: int = 4,
        activation: str | Activation = "silu",
        kernel: int | None = None,
    ):
        if depth < 1 or frequencies < 1:
            raise InputError(
                f"VelocityField: depth and frequencies must be at least 1; got depth={depth} and "
                f"frequencies={frequencies}."
            )
        self.shape = as_shape(shape)
        self.frequencies = frequencies
        enters = 2 * frequencies + cond_dim
        if kernel is None:
            self.net = MLP(
                math.prod(self.shape),
                self.shape,
                key=key,
                width=width,
                depth=depth,
                cond_dim=enters,
                activation=activation,
                film=True,
            )
            return
        if len(self.shape) < 2:
            raise ShapeError(
                f"VelocityField: with a kernel an event is (channels, *space), not {self.shape}."
            )
        self.net = ConvNet(
            self.shape,
            self.shape[:1],
            key=key,
            width=width,
            depth=depth,
            kernel=kernel,
            cond_shape=(enters,),
            activation=activation,
        )

    def __call__(self, t: Array, z: Array, condition: Array | None = None) -> Array:
        """The velocity, ``shape + batch``.

        Args:
            t: ``()`` or ``batch``.
            z: ``shape + batch``.
            condition: ``(cond_dim,)`` or ``(cond_dim, *batch)``.
        """
        batch = z.shape[len(self.shape) :]
        features = time_features(t, self.frequencies, 2.0 ** (self.frequencies - 1))
        if condition is not None:
            features = joined(features, condition, batch=batch)
        if isinstance(self.net, ConvNet):
            return self.net(z, features)
        return self.net(z.reshape((math.prod(self.shape), *batch)), features)


def velocity(
    field: Callable | Frozen,
    t: Array,
    z: Array,
    condition: Condition,
    shape: Shape,
    method: str = "__call__",
) -> Any:
    """Apply any field to events of a shape with trailing batch axes.

    A field with an attribute ``batch_last = True`` takes the batch itself; any other is a function
    of one event, ``field(t, z)`` or ``field(t, z, condition)``, and is mapped over the batch.

    Args:
        field: The field.
        t: ``()`` or ``batch``.
        z: ``shape + batch``.
        condition: Of one event, or with the batch as its last axes, or None.
        shape: Shape of one event.
        method: Which method of the field, such as one that gives the divergence too.
    """
    if isinstance(field, Frozen):
        return velocity(field.value, t, z, condition, shape, method)
    batch = z.ndim - len(shape)
    if batch == 0 or getattr(field, "batch_last", False):
        one = getattr(field, method)
        return one(t, z) if condition is None else one(t, z, condition)
    # A condition is a vector; with one axis more than that it has the batch.
    axes = (-1 if t.ndim else None, -1, None if condition is None or condition.ndim == 1 else -1)
    one = functools.partial(velocity, field, shape=shape, method=method)
    return jax.vmap(one, in_axes=axes, out_axes=-1)(t, z, condition)


class Energies(NamedTuple):
    """What a solution gathers on its way; each has the batch's shape.

    Attributes:
        log_det: ∫ tr ∂v/∂z dt.
        kinetic: ∫ ‖v‖² dt.
        jacobian: ∫ ‖∂v/∂z‖² dt, of the Frobenius norm.
    """

    log_det: Array
    kinetic: Array
    jacobian: Array


def _as_times(times: int | Sequence[float]) -> tuple[float, ...]:
    """Increasing times; for a number K those of K equal intervals of [0, 1]."""
    if isinstance(times, int):
        check_sizes("Continuous", times=times)
        return tuple(k / times for k in range(times + 1))
    given = tuple(float(t) for t in times)
    if len(given) < 2 or not all(a < b for a, b in itertools.pairwise(given)):
        raise InputError(f"Continuous: times must be two or more and increase; got {given}.")
    return given


class Continuous(AbstractSameShape, AbstractTwoWay):
    r"""The flow of dz/dt = v(t, z, c) from the first of some times to the last.

        forward:  y = z(t_K) with z(t_0) = x,    log_det = ∫ tr ∂v/∂z dt

    With ``divergence="exact"`` the trace takes D derivatives along the basis, all at once, so it
    suits few dimensions, unless the field has a method ``with_divergence(t, z[, condition])`` that
    gives v and tr ∂v/∂z, as a `laminar.nn.potential.PotentialField` has. ``"hutchinson"`` estimates
    it without bias by εᵀ (∂v/∂z) ε, with one ε for the whole solution (Grathwohl et al. 2019); the
    log-det is then unbiased and needs a key. Points alone, as `laminar.flow.Flow.sample` asks for,
    need no divergence.

    A batch takes its steps together. Adaptive ones keep the tolerance for the worst event, so
    numbers depend on the batch, within the tolerance.

    Args:
        field: v, called with ``(t, z)`` or ``(t, z, condition)``; see `VelocityField` and
            `velocity`. In a `Frozen` it is not trained.
        in_shape: Shape of one event.
        cond_shape: ``(C,)`` for a field that takes a condition, None for one that takes none.
        divergence: ``"exact"`` or ``"hutchinson"``.
        probe: The law of ε, ``"rademacher"`` or ``"normal"``.
        probes: How many ε are averaged.
        solver: "euler", "midpoint", "heun", "bosh3", "tsit5", "dopri5" or "dopri8"; by default
            "tsit5" in float32 and "dopri8" in float64.
        fixed_steps: A number of equal steps between the first time and the last; each interval of
            the path rounds its share up, so 20 of them make 24 in eight intervals. Their error is
            that of the solver at this step size, whatever it is: no tolerance bounds it, neither in
            the log-det nor in a round trip (`laminar.check` measures both). None for adaptive
            steps.
        tolerance: Of adaptive steps, relative and absolute; by default 1e-6 in float32 and 1e-10 in
            float64.
        adjoint: How a solution is differentiated. ``"checkpoint"`` goes back through steps that are
            computed again. ``"direct"`` keeps them all; adaptive steps can be differentiated in
            forward mode only so, fixed ones always. ``"backsolve"``, for adaptive steps, solves the
            adjoint equation: constant memory, and gradients up to the tolerance.
        times: Increasing times of the path, from the start to the end; a number K for K equal
            intervals of [0, 1].
        max_steps: The most adaptive steps; a solution that needs more is NaN.

    Raises:
        InputError: If an option is unknown, or a key is missing.
        ShapeError: If a condition is not a vector, or missing.
    """

    field: Callable | Frozen
    in_shape: Shape = eqx.field(static=True, converter=tuple)
    cond_shape: Shape | None = eqx.field(static=True, default=None)
    divergence: Divergence = eqx.field(static=True, default="exact", kw_only=True)
    probe: Probe = eqx.field(static=True, default="rademacher", kw_only=True)
    probes: int = eqx.field(static=True, default=1, kw_only=True)
    solver: str | None = eqx.field(static=True, default=None, kw_only=True)
    fixed_steps: int | None = eqx.field(static=True, default=None, kw_only=True)
    tolerance: float | None = eqx.field(static=True, default=None, kw_only=True)
    adjoint: Adjoint = eqx.field(static=True, default="checkpoint", kw_only=True)
    times: Any = eqx.field(static=True, default=8, kw_only=True, converter=_as_times)
    max_steps: int = eqx.field(static=True, default=4096, kw_only=True)

    def __check_init__(self):
        for name, known in (
            ("divergence", get_args(Divergence)),
            ("probe", get_args(Probe)),
            ("adjoint", get_args(Adjoint)),
            ("solver", (None, *_SOLVERS)),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"Continuous: {name} is {getattr(self, name)!r}; choose one of {known}."
                )
        sizes = {name: getattr(self, name) for name in ("probes", "fixed_steps", "max_steps")}
        check_sizes("Continuous", **{name: n for name, n in sizes.items() if n is not None})
        if self.fixed_steps is not None and self.adjoint == "backsolve":
            raise InputError(
                "Continuous: adjoint='backsolve' is for adaptive steps; leave out fixed_steps, or "
                "take 'checkpoint'."
            )
        if self.fixed_steps is None and self.solver == "euler":
            raise InputError("Continuous: the solver 'euler' needs fixed_steps=….")
        if self.cond_shape is not None and len(self.cond_shape) != 1:
            raise ShapeError(
                f"Continuous: a condition is a vector (C,), and cond_shape is {self.cond_shape}."
            )

    @property
    def exactness(self) -> Exactness:
        """``"exact"``, up to the solver's error, or ``"unbiased"`` with Hutchinson's estimate."""
        return "exact" if self.divergence == "exact" else "unbiased"

    @property
    def name(self) -> str:
        """With the first and the last time, unless they are 0 and 1."""
        first, last = self.times[0], self.times[-1]
        return "Continuous" if (first, last) == (0, 1) else f"Continuous[{first:g}, {last:g}]"

    def _run(self, direction, x, condition, key):
        y, gathered = self._solve(direction, x, condition, key, 1)
        return y[-1], gathered[-1][0]

    def points(self, direction, x, condition=None, *, key=None):
        """The solution alone, without divergence and so without a key."""
        return self._solve(direction, x, condition, None, 0)[0][-1]

    def trajectory(self, direction, x, condition=None, *, key=None):
        """One solution that is kept at all `times`."""
        points, gathered = self._solve(direction, x, condition, key, 1, keep=True)
        ends = [part[0] for part in gathered]
        return points, ends[:1] + [b - a for a, b in itertools.pairwise(ends)]

    def energies(
        self,
        direction: Direction,
        x: Array,
        condition: Condition = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Array, Energies]:
        """The image, and with the log-det the energies that Finlay et al. (2020) keep small.

        Args:
            direction: ``"forward"`` or ``"inverse"``.
            x: ``in_shape + batch``.
            condition: ``(C,)`` or ``(C, *batch)``.
            key: Needed by Hutchinson's estimate, which then serves the Jacobian's norm too.
        """
        points, gathered = self._solve(direction, x, condition, key, 3)
        log_det, kinetic, jacobian = gathered[-1]
        sign = 1 if direction == "forward" else -1
        return points[-1], Energies(log_det, sign * kinetic, sign * jacobian)

    def velocity(self, t: Array, z: Array, condition: Condition = None) -> Array:
        """V at times ``()`` or ``batch`` and points ``in_shape + batch``."""
        condition = None if self.cond_shape is None else condition
        return velocity(self.field, t, z, condition, self.in_shape)

    def steps(self):
        """The flow from each of the `times` to the next."""
        if len(self.times) == 2:
            return (self,)
        counts = self._counts() if self.fixed_steps is not None else [None] * len(self.times)
        return tuple(
            dataclasses.replace(self, times=pair, fixed_steps=count)
            for pair, count in zip(itertools.pairwise(self.times), counts, strict=False)
        )

    def between(self, first, last):
        """The flow from one of the `times` to another, by one solution with the same steps."""
        counts = None if self.fixed_steps is None else self._counts()[first:last]
        total = None if counts is None else sum(counts)
        part = dataclasses.replace(self, times=self.times[first : last + 1], fixed_steps=total)
        return part if counts is None or part._counts() == counts else None

    def row_cost(self, direction):
        """That of all directions in which v is differentiated."""
        size = math.prod(self.in_shape)
        tangents = size if self.divergence == "exact" else self.probes
        return 8 * max(size * (1 + tangents), 64)

    def _counts(self) -> list[int]:
        """The number of fixed steps in each interval."""
        span = self.times[-1] - self.times[0]
        share = ((b - a) / span for a, b in itertools.pairwise(self.times))
        return [max(1, math.ceil((self.fixed_steps or 1) * part - 1e-9)) for part in share]

    def _solve(
        self,
        direction: Direction,
        x: Array,
        condition: Condition,
        key: PRNGKeyArray | None,
        gather: int,
        keep: bool = False,
    ) -> tuple[list[Array], list[Array]]:
        """The solution at the end, or at all times: points, and the first of the `Energies`."""
        condition, probe = needed(self, condition), None
        if gather and self.divergence == "hutchinson":
            if key is None:
                raise InputError(f"{self.name} estimates its log-det, so it needs a key: key=….")
            draw = jr.rademacher if self.probe == "rademacher" else jr.normal
            probe = draw(key, (self.probes, *x.shape), x.dtype)
        event = tuple(range(len(self.in_shape)))
        sound = jnp.isfinite(x).all(event)
        # Steps are shared, so a missing value must not reach those of the others.
        start = jnp.where(sound, x, 0), jnp.zeros((gather, *sound.shape), x.dtype)
        if condition is not None:
            known = jnp.isfinite(condition)
            condition = jnp.where(known, condition, 0)
            sound = sound & expand(known.all(0), sound.ndim)
        args = (self.field, condition, probe)
        # Compared by its contents, so that calls outside a compiled function compile once too.
        term = diffrax.ODETerm(eqx.Partial(_derivative, self.in_shape, gather))
        solve = self._adaptive if self.fixed_steps is None else self._fixed
        points, gathered = solve(term, start, args, direction, keep)
        points = [jnp.where(sound, z, jnp.nan) for z in points]
        return points, [jnp.where(sound, g, jnp.nan) for g in gathered]

    def _fixed(self, term, start, args, direction: Direction, keep: bool):
        """Steps of a grid, as a scan over those of the solver."""
        counts = self._counts()
        pieces = [
            np.linspace(a, b, n + 1)[1:]
            for (a, b), n in zip(itertools.pairwise(self.times), counts, strict=True)
        ]
        grid = np.concatenate([[self.times[0]], *pieces])
        if direction == "inverse":
            grid, counts = grid[::-1], counts[::-1]
        ts = jnp.asarray(grid, start[0].dtype)
        stages = _stages(self._solver(start[0].dtype))

        def step(y, pair):
            y = _runge_kutta_step(term, stages, pair[0], pair[1], y, args)
            return y, (y if keep else None)

        body = jax.checkpoint(step) if self.adjoint == "checkpoint" else step
        (z, gathered), kept = lax.scan(body, start, (ts[:-1], ts[1:]))
        if kept is None:
            return [z], [gathered]
        ends = [int(i) - 1 for i in np.cumsum(counts)]
        return [kept[0][i] for i in ends], [kept[1][i] for i in ends]

    def _adaptive(self, term, start, args, direction: Direction, keep: bool):
        """Steps that keep the tolerance."""
        dtype = start[0].dtype
        tolerance = self.tolerance or _TOLERANCES.get(dtype.name, 1e-2)
        times = jnp.asarray(self.times[:: 1 if direction == "forward" else -1], dtype)
        controller: Any = diffrax.PIDController(tolerance, tolerance, norm=_worst)
        if keep and len(self.times) > 2:
            # So that what is kept are ends of steps, which interpolation is not as accurate as.
            controller = diffrax.ClipStepSizeController(controller, step_ts=times[1:-1])
        adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint()
        if self.adjoint == "direct":
            adjoint = diffrax.DirectAdjoint()
        elif self.adjoint == "backsolve":
            back = diffrax.PIDController(tolerance, tolerance, norm=diffrax.adjoint_rms_seminorm)
            adjoint = diffrax.BacksolveAdjoint(stepsize_controller=back)
        solution = diffrax.diffeqsolve(
            term,
            self._solver(dtype),
            times[0],
            times[-1],
            None,
            start,
            args,
            saveat=diffrax.SaveAt(ts=times[1:]) if keep else diffrax.SaveAt(t1=True),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=self.max_steps,
            throw=False,
        )
        done = solution.result == diffrax.RESULTS.successful
        points, gathered = (jnp.where(done, y, jnp.nan) for y in solution.ys)  # pyright: ignore
        return list(points), list(gathered)

    def _solver(self, dtype) -> diffrax.AbstractSolver:
        return _SOLVERS[self.solver or ("dopri8" if dtype == jnp.float64 else "tsit5")]()


def _stages(solver: diffrax.AbstractSolver) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nodes c, the matrix a and the weights b of an explicit Runge–Kutta method."""
    if isinstance(solver, diffrax.Euler):
        return np.zeros(1), np.zeros((1, 1)), np.ones(1)
    tableau = solver.tableau  # pyright: ignore[reportAttributeAccessIssue]
    count = len(tableau.b_sol)
    while tableau.b_sol[count - 1] == 0:  # stages that only the error or the next step needs
        count -= 1
    matrix = np.zeros((count, count))
    for i, row in enumerate(tableau.a_lower[: count - 1]):
        matrix[i + 1, : i + 1] = row
    return np.append(0.0, tableau.c)[:count], matrix, np.asarray(tableau.b_sol)[:count]


def _runge_kutta_step(term: diffrax.ODETerm, stages, t, t_next, y, args):
    """y(t) → y(t_next), with a scan over stages, which differentiates in both modes.

    Diffrax's own step has a loop that does so in one mode, chosen beforehand.
    """
    dtype = y[0].dtype
    h = t_next - t
    nodes, matrix, weights = (jnp.asarray(part, dtype) for part in stages)

    def combine(row, slopes):
        return tuple(
            v + h * jnp.tensordot(row, k, 1, precision=lax.Precision.HIGHEST)
            for v, k in zip(y, slopes, strict=True)
        )

    def stage(slopes, i):
        slope = term.vf(t + h * nodes[i], combine(matrix[i], slopes), args)
        return tuple(k.at[i].set(new) for k, new in zip(slopes, slope, strict=True)), None

    none = tuple(jnp.zeros((len(nodes), *v.shape), dtype) for v in y)
    slopes, _ = lax.scan(stage, none, jnp.arange(len(nodes)))
    return combine(weights, slopes)


def _derivative(shape: Shape, gather: int, t: Any, state: tuple[Array, Array], args: Any):
    """dz/dt, and the integrands of the first `gather` of the `Energies`."""
    z, gathered = state
    field, condition, probe = args
    t = jnp.asarray(t, z.dtype)

    def v(z):
        # A GPU would round products to TF32, whose noise is far above the tolerance.
        with jax.default_matmul_precision("highest"):
            return velocity(field, t, z, condition, shape)

    if not gather:
        return v(z), gathered
    if probe is None and gather == 1 and _knows_divergence(field):
        with jax.default_matmul_precision("highest"):
            dz, trace = velocity(field, t, z, condition, shape, "with_divergence")
        return dz, trace[None]
    size, batch = math.prod(shape), z.shape[len(shape) :]
    dz, push = jax.linearize(v, z)
    if probe is None:
        basis = expand(jnp.eye(size, dtype=z.dtype), 2 + len(batch))
        tangents = jnp.broadcast_to(basis, (size, size, *batch)).reshape((size, *z.shape))
    else:
        tangents = probe
    images = jax.vmap(push)(tangents)
    axes = tuple(range(1, 1 + len(shape)))

    def mean(values):
        """Over probes; over the basis it is a sum."""
        total = values.sum(axes).sum(0)
        return total if probe is None else total / len(probe)

    integrands = [mean(tangents * images)]
    if gather > 1:
        event = tuple(range(len(shape)))
        integrands += [(dz * dz).sum(event), mean(images * images)]
    return dz, jnp.stack(integrands)


def _knows_divergence(field: Callable | Frozen) -> bool:
    return hasattr(field.tree if isinstance(field, Frozen) else field, "with_divergence")


def _worst(state: tuple[Array, Array]) -> Array:
    """The largest among the events of a batch of the root mean square of their errors.

    An event that is NaN has no say: it stays NaN, and steps made smaller would not mend it.
    """
    z, gathered = (lax.stop_gradient(part) for part in state)
    batch = gathered.shape[1:]
    size = math.prod(z.shape[: z.ndim - len(batch)])
    errors = jnp.concatenate([z.reshape((size, *batch)), gathered])
    squares = (errors * errors).mean(0)
    return jnp.sqrt(jnp.where(jnp.isnan(squares), 0, squares).max(initial=0))
