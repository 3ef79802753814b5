r"""Infinitesimal flows of Rezende & Mohamed (2015, §3.3): Langevin and Hamiltonian dynamics.

`Leapfrog` moves positions and momenta and is an exact bijection. `Langevin` and `Hamiltonian` draw:
a step goes from z to z' by q(z' | z), and the marginal density of z' has no closed form. They are
scored by a *reverse density* r that guesses what was drawn, on the augmented space of all draws, so
their "log-det" is a log-ratio (Salimans et al. 2015):

    forward:  z' ~ q(z' | z),   log_det = ln r(z | z') − ln q(z' | z)
    inverse:  z ~ r(z | z'),    log_det = ln q(z' | z) − ln r(z | z')

Within a `Flow` with base q_0 this has two meanings, both honest:

- ``log_prob(z', key=…)`` is ln of an unbiased estimate of the density of z', so on average a lower
  bound on its logarithm.
- ``sample_and_log_prob`` gives pairs with E[p(z') / exp(log_q)] = ∫ p for any p, so that
  E[ln p(z') − log_q] is a lower bound on ln ∫ p: the bound of the paper, less what r misses.

Both gaps close as r becomes the true reverse, for which its parameters are trained.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.core import Tracer

from laminar._checks import check_sizes
from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, expand, positive, positive_inverse
from laminar._typing import Array, ArrayLike, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractBijection, AbstractTransform, Exactness
from laminar.bijections.frames import AbstractSameShape, AbstractTwoWay, needed
from laminar.nn.mlp import apply_network

Density = Callable[..., Array]


class Leapfrog(AbstractSameShape, AbstractTwoWay, AbstractBijection):
    r"""Leapfrog steps of Hamiltonian dynamics on events (z, v) of position and momentum.

    One step, with step size ε and masses m (Neal 2011):

        v ← v + ½ ε ∇ln p(z),    z ← z + ε v / m,    v ← v + ½ ε ∇ln p(z),    v ← α v

    Each line is a shear, so volume is preserved whatever ln p is, and the inverse is the same steps
    backwards. With *tempering* the momentum is scaled by α after each step, as in Caterini et al.
    (2018), and then log_det = D Σ ln α. Step sizes, masses and α are trained.

    Args:
        log_density: ``log_density(z)``, or ``log_density(z, c)`` with a condition: the unnormalised
            ln p of one event ``(D,)``, of shape ``()``. A function, or a module; with an attribute
            ``batch_last = True`` it must take trailing batch axes.
        dim: D; events have shape (2 D,), positions first.
        steps: Number of steps.
        step_size: ε > 0, one number or one for each step.
        mass: m > 0, one number or one for each dimension.
        tempering: α > 0, one number or one for each step; None for no scaling, and nothing to
            train.
        cond_dim: Length of the condition that `log_density` takes, or 0 for none.
        train_density: Whether the arrays within `log_density` are trained, as those of a decoder
            would be. By default they are frozen.

    Raises:
        InputError: If a size or a value is not positive.
        ShapeError: If a value has another shape, or `log_density` does not give one number.
    """

    log_density: Density | Frozen[Density]
    raw_step: Array
    raw_mass: Array
    log_tempering: Array | None
    in_shape: Shape = eqx.field(static=True)
    cond_shape: Shape | None = eqx.field(static=True)

    def __init__(
        self,
        log_density: Density,
        dim: int,
        *,
        steps: int = 5,
        step_size: ArrayLike = 0.1,
        mass: ArrayLike = 1.0,
        tempering: ArrayLike | None = None,
        cond_dim: int = 0,
        train_density: bool = False,
    ):
        check_sizes("Leapfrog", dim=dim, steps=steps)
        self.raw_step = positive_inverse(_as_values("Leapfrog", "step_size", step_size, (steps,)))
        self.raw_mass = positive_inverse(_as_values("Leapfrog", "mass", mass, (dim,)))
        self.log_tempering = None
        if tempering is not None:
            scale = _as_values("Leapfrog", "tempering", tempering, (steps,))
            self.log_tempering = jnp.log(scale)
        self.in_shape = (2 * dim,)
        self.cond_shape = (cond_dim,) if cond_dim else None
        _check_density("Leapfrog", log_density, dim, cond_dim, self.raw_mass.dtype)
        self.log_density = log_density if train_density else Frozen(log_density)

    @property
    def mass(self) -> Array:
        """The masses m, ``(D,)``."""
        return positive(self.raw_mass)

    def _run(self, direction, x, condition, key):
        condition, backwards = needed(self, condition), direction == "inverse"
        dim = self.in_shape[0] // 2
        mass = expand(self.mass, x.ndim)
        sign = -1 if backwards else 1
        log_scale = self.log_tempering
        total = jnp.zeros((), x.dtype) if log_scale is None else dim * log_scale.sum()

        def step(state, values):
            z, v, score = state
            size, scale = sign * values[0], values[1]
            if scale is not None and backwards:
                v = v * jnp.exp(-scale)
            v = v + 0.5 * size * score
            z = z + size * v / mass
            score = _score(self.log_density, z, condition)
            v = v + 0.5 * size * score
            if scale is not None and not backwards:
                v = v * jnp.exp(scale)
            return (z, v, score), None

        z, v = x[:dim], x[dim:]
        start = (z, v, _score(self.log_density, z, condition))
        values = (positive(self.raw_step), log_scale)
        (z, v, _), _ = lax.scan(step, start, values, reverse=backwards)
        return jnp.concatenate([z, v]), jnp.broadcast_to(sign * total, x.shape[1:])


class ReverseKernel(eqx.Module):
    r"""A normal density of what was drawn, given where it led: the r of this module.

        mean = m + σ ⊙ (shift + gain ⊙ z + drift ⊙ σ ⊙ ∇ln p(z) + net_1(z)),
        ln scale = ln σ + log_scale + net_2(z)

    with m and σ the natural guess that each transform makes. All parameters start at zero, which is
    that guess.

    Args:
        dim: D.
        net: An optional network ``net(z)``, or ``net(z, c)`` with a condition, that gives (2, D);
            with ``batch_last = True`` it must take trailing batch axes.
    """

    shift: Array
    gain: Array
    drift: Array
    log_scale: Array
    net: Callable | None

    def __init__(self, dim: int, net: Callable | None = None):
        self.shift, self.gain, self.drift, self.log_scale = (jnp.zeros((dim,)) for _ in range(4))
        self.net = net

    def __call__(
        self, z: Array, score: Array, mean: Array, scale: Array, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """Mean and scale, ``(D, *batch)`` each, from those of the natural guess."""
        shift, gain, drift, log_scale = (
            expand(v, z.ndim) for v in (self.shift, self.gain, self.drift, self.log_scale)
        )
        move = shift + gain * z + drift * scale * score
        if self.net is not None:
            out = apply_network(self.net, z, condition).reshape((2, *z.shape))
            move, log_scale = move + out[0], log_scale + out[1]
        return mean + scale * move, scale * jnp.exp(log_scale)


class Langevin(AbstractSameShape):
    r"""One step of Langevin dynamics towards p; the log-det is a bound (see the module's text).

        q(z' | z) = N(z + ½ ε² ∇ln p(z), ε²)

    The reverse density starts as the same step from z', which is the true one near equilibrium, and
    has a mean and scale to be trained (`ReverseKernel`). Both directions draw, so need a key. One
    step costs two gradients of ln p. For many steps take `repeat`, each with parameters of its own.

    Args:
        log_density: The unnormalised ln p of one event; see `Leapfrog`.
        dim: D.
        step_size: ε > 0, one number or one for each dimension.
        net: A network of the reverse density; see `ReverseKernel`.
        cond_dim: Length of the condition that `log_density` (and `net`) take, or 0 for none.
        train_density: Whether the arrays within `log_density` are trained.

    Raises:
        InputError: If a size or value is not positive, or a key is missing.
        ShapeError: If a shape does not fit.
    """

    log_density: Density | Frozen[Density]
    raw_step: Array
    reverse: ReverseKernel
    in_shape: Shape = eqx.field(static=True)
    cond_shape: Shape | None = eqx.field(static=True)

    def __init__(
        self,
        log_density: Density,
        dim: int,
        *,
        step_size: ArrayLike = 0.1,
        net: Callable | None = None,
        cond_dim: int = 0,
        train_density: bool = False,
    ):
        check_sizes("Langevin", dim=dim)
        self.raw_step = positive_inverse(_as_values("Langevin", "step_size", step_size, (dim,)))
        self.reverse = ReverseKernel(dim, net)
        self.in_shape = (dim,)
        self.cond_shape = (cond_dim,) if cond_dim else None
        _check_density("Langevin", log_density, dim, cond_dim, self.raw_step.dtype)
        self.log_density = log_density if train_density else Frozen(log_density)

    @property
    def exactness(self) -> Exactness:
        """``"bound"``."""
        return "bound"

    def _step(self, z, condition):
        """Mean and scale of q(· | z), and ∇ln p(z)."""
        size = expand(positive(self.raw_step), z.ndim)
        score = _score(self.log_density, z, condition)
        return z + 0.5 * size * size * score, jnp.broadcast_to(size, z.shape), score

    def _back(self, z, condition):
        """Mean and scale of r(· | z)."""
        mean, scale, score = self._step(z, condition)
        return self.reverse(z, score, mean, scale, condition)

    def forward(self, x, condition=None, *, key=None):
        """``(z', ln r(z | z') − ln q(z' | z))`` for a draw z'."""
        condition, noise = needed(self, condition), _noise(self, key, x)
        mean, scale, _ = self._step(x, condition)
        y = mean + scale * noise
        log_det = _log_normal(x, *self._back(y, condition)) - _log_standard(noise, scale)
        return y, log_det

    def inverse(self, y, condition=None, *, key=None):
        """``(z, ln q(z' | z) − ln r(z | z'))`` for a draw z."""
        condition, noise = needed(self, condition), _noise(self, key, y)
        mean, scale = self._back(y, condition)
        x = mean + scale * noise
        log_det = _log_normal(y, *self._step(x, condition)[:2]) - _log_standard(noise, scale)
        return x, log_det


class Hamiltonian(AbstractSameShape):
    r"""Hamiltonian dynamics with a momentum of its own; the log-det is a bound (see the module).

        v ~ N(0, m),    (z', v') = leapfrog(z, v),
        log_det = ln r(v' | z') − ln N(v; 0, m) + log_det of the leapfrog

    The momentum is an auxiliary variable: it is drawn, and what it became is scored by a reverse
    density r that starts as N(0, m), the true one at equilibrium. Both directions draw, so need a
    key. Reusing one momentum over many leapfrog steps, as `Leapfrog` does, travels further than as
    many `Langevin` steps.

    Args:
        log_density: The unnormalised ln p of one event; see `Leapfrog`.
        dim: D.
        steps: Leapfrog steps.
        step_size: ε > 0, one number or one for each step.
        mass: m > 0, one number or one for each dimension.
        tempering: α > 0 or None; see `Leapfrog`.
        net: A network of the reverse density; see `ReverseKernel`.
        cond_dim: Length of the condition that `log_density` (and `net`) take, or 0 for none.
        train_density: Whether the arrays within `log_density` are trained.

    Raises:
        InputError: If a size or value is not positive, or a key is missing.
        ShapeError: If a shape does not fit.
    """

    leapfrog: Leapfrog
    reverse: ReverseKernel

    def __init__(
        self,
        log_density: Density,
        dim: int,
        *,
        steps: int = 5,
        step_size: ArrayLike = 0.1,
        mass: ArrayLike = 1.0,
        tempering: ArrayLike | None = None,
        net: Callable | None = None,
        cond_dim: int = 0,
        train_density: bool = False,
    ):
        self.leapfrog = Leapfrog(
            log_density,
            dim,
            steps=steps,
            step_size=step_size,
            mass=mass,
            tempering=tempering,
            cond_dim=cond_dim,
            train_density=train_density,
        )
        self.reverse = ReverseKernel(dim, net)

    @property
    def in_shape(self) -> Shape:
        """``(D,)``: positions alone."""
        return (self.leapfrog.in_shape[0] // 2,)

    @property
    def cond_shape(self) -> Shape | None:
        """The condition of the log-density."""
        return self.leapfrog.cond_shape

    @property
    def exactness(self) -> Exactness:
        """``"bound"``."""
        return "bound"

    def row_cost(self, direction):
        """That of positions and momenta."""
        return self.leapfrog.row_cost(direction)

    def _spread(self, z):
        """The scale of a fresh momentum."""
        return jnp.broadcast_to(jnp.sqrt(expand(self.leapfrog.mass, z.ndim)), z.shape)

    def _back(self, z, condition):
        """Mean and scale of r(· | z')."""
        score = _score(self.leapfrog.log_density, z, condition)
        return self.reverse(z, score, jnp.zeros_like(z), self._spread(z), condition)

    def forward(self, x, condition=None, *, key=None):
        """``(z', log_det)`` for a drawn momentum v."""
        condition, noise = needed(self, condition), _noise(self, key, x)
        scale = self._spread(x)
        moved, log_det = self.leapfrog.forward(jnp.concatenate([x, scale * noise]), condition)
        y, momentum = jnp.split(moved, 2)
        gained = _log_normal(momentum, *self._back(y, condition)) - _log_standard(noise, scale)
        return y, log_det + gained

    def inverse(self, y, condition=None, *, key=None):
        """``(z, −log_det)`` for a drawn momentum v'."""
        condition, noise = needed(self, condition), _noise(self, key, y)
        mean, scale = self._back(y, condition)
        start = jnp.concatenate([y, mean + scale * noise])
        moved, log_det = self.leapfrog.inverse(start, condition)
        x, momentum = jnp.split(moved, 2)
        zero = jnp.zeros_like(x)
        gained = _log_normal(momentum, zero, self._spread(x)) - _log_standard(noise, scale)
        return x, log_det + gained


def _score(log_density: Density | Frozen[Density], z: Array, condition: Array | None) -> Array:
    """∇ln p at each of the points ``(D, *batch)``."""
    density = log_density.value if isinstance(log_density, Frozen) else log_density
    # Each value depends on its own point alone, so the gradient of the sum holds all gradients.
    return jax.grad(lambda z: apply_network(density, z, condition).sum())(z)


def _log_normal(x: Array, mean: Array, scale: Array) -> Array:
    """The log-density of N(mean, scale²) at x, summed over the event."""
    return _log_standard((x - mean) / scale, scale)


def _log_standard(noise: Array, scale: Array) -> Array:
    """The log-density of mean + scale · noise under its own law."""
    return (-0.5 * noise * noise - jnp.log(scale) - 0.5 * math.log(2 * math.pi)).sum(0)


def _noise(transform: AbstractTransform, key: PRNGKeyArray | None, x: Array) -> Array:
    if key is None:
        raise InputError(f"{transform.name} draws, so it needs a random key: key=….")
    return jr.normal(key, x.shape, x.dtype)


def _as_values(owner: str, name: str, value: ArrayLike, shape: Shape) -> Array:
    """Positive numbers of a shape, as floats."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    if not isinstance(array, Tracer):
        values = np.asarray(array, np.float64)
        if not (np.isfinite(values) & (values > 0)).all():
            raise InputError(f"{owner}: {name} must be positive, and is {value}.")
    if array.shape not in ((), shape):
        raise ShapeError(f"{owner}: {name} has shape {array.shape}; give one number or {shape}.")
    return jnp.broadcast_to(array, shape)


def _check_density(owner: str, log_density: Density, dim: int, cond_dim: int, dtype) -> None:
    """Evaluate the shape of the log-density at one event, without running it."""
    z = jax.ShapeDtypeStruct((dim,), dtype)
    condition = jax.ShapeDtypeStruct((cond_dim,), dtype) if cond_dim else None
    out = jax.eval_shape(lambda z, c: apply_network(log_density, z, c), z, condition)
    got = getattr(out, "shape", None)
    if got != ():
        raise ShapeError(
            f"{owner}: the log-density of one event of shape ({dim},) must have shape (), and has "
            f"{got}."
        )
