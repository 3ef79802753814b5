r"""Surjections: maps that lose something one way and draw it the other (Nielsen et al. 2020).

`drop` maps the wide space to the narrow one, and `draw` comes back with what a law q draws for the
part that was lost. Which of the two is ``forward`` decides what the likelihood is. With
``loses="inverse"`` the latent space is the narrow one, sampling draws, and the density is exact:

    ln p(x) = ln p(z) + ln q(lost | z),    z = drop(x)

With ``loses="forward"`` data stand in the narrow space, so their density is an integral or a sum
over all z that lead to them, which one draw estimates:

    ln p(x) ≥ E[ln p(z) − ln q(lost | x)],    z = draw(x)

There a single ``log_prob(x, key=…)`` is the logarithm of an unbiased estimate of p(x), so on
average a lower bound. It is tight where q is the posterior of what was lost. As in
`laminar.bijections.dynamics`, ``sample_and_log_prob`` errs to the other side.
"""

import abc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, expand
from laminar._typing import Array, Condition, Direction, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractBijection, Exactness
from laminar.bijections.frames import AbstractShaped, AbstractTwoWay, as_shape, needed
from laminar.nn.mlp import apply_network, joined


class Law(Protocol):
    """What a surjection asks of the distribution of the lost part; every laminar one has it."""

    @property
    def shape(self) -> Shape:
        """Shape of what is lost."""
        ...

    @property
    def cond_shape(self) -> Shape | None:
        """Shape of what it is conditioned on, or None."""
        ...

    @property
    def exactness(self) -> str:
        """Must be ``"exact"``."""
        ...

    def _log_prob(
        self, x: Array, condition: Condition = None, *, key: PRNGKeyArray | None = None
    ) -> Array: ...

    def _sample_and_log_prob(
        self, key: PRNGKeyArray, batch: Shape = (), condition: Condition = None
    ) -> tuple[Array, Array]: ...


class AbstractSurjection(AbstractTwoWay):
    """A map from a wide space to a narrow one, and a law for the way back.

    Attributes:
        wide: Shape of an event before something is lost.
        narrow: Shape of it afterwards.
        loses: The direction that loses.
    """

    if TYPE_CHECKING:
        wide: Shape = eqx.field(init=False)
    else:
        wide: eqx.AbstractVar[Shape]
    narrow: Shape = eqx.field(static=True)
    loses: Direction = eqx.field(static=True)

    @abc.abstractmethod
    def drop(self, z: Array, condition: Condition, key: PRNGKeyArray | None) -> tuple[Array, Array]:
        """``(x, ln q(lost | x))`` of wide events."""

    @abc.abstractmethod
    def draw(self, x: Array, condition: Condition, key: PRNGKeyArray) -> tuple[Array, Array]:
        """``(z, ln q(lost | x))`` of narrow events; infinite where x is outside their space."""

    def __check_init__(self):
        if self.loses not in ("forward", "inverse"):
            raise InputError(
                f"{self.name}: loses must be 'forward' (data are the narrow side) or 'inverse' "
                f"(latents are), not {self.loses!r}."
            )

    @property
    def in_shape(self) -> Shape:
        """The wide shape if forward loses, else the narrow one."""
        return self.wide if self.loses == "forward" else self.narrow

    @property
    def out_shape(self) -> Shape:
        """The other of the two."""
        return self.narrow if self.loses == "forward" else self.wide

    @property
    def exactness(self) -> Exactness:
        """``"bound"`` if forward loses, else ``"exact"``."""
        return "bound" if self.loses == "forward" else "exact"

    @property
    def draws(self) -> bool:
        """Whether inverse loses, so that forward draws."""
        return self.loses == "inverse"

    def _run(self, direction: Direction, x, condition, key):
        # A condition that is needed and missing must not be taken for none.
        condition = needed(self, condition)
        if direction == self.loses:
            return self.drop(x, condition, key)
        if key is None:
            raise InputError(
                f"{self.name} draws what it lost, so {direction} needs a random key: key=…."
            )
        z, log_q = self.draw(x, condition, key)
        return z, -log_q


class Slice(AbstractSurjection):
    r"""Keeps the first entries of a wide event and loses the others, whose law is given.

        drop:  (x, u) ↦ x,    draw:  x ↦ (x, u), u ~ q(u | x, c)

    With ``loses="forward"`` a flow on D + K entries gives one on D: the data are padded with noise,
    as in the augmented flows of Huang et al. (2020), and the density is a bound. With
    ``loses="inverse"`` K further entries are appended by a law of their own, which is exact: any
    factor p(u | x) can be a part of a flow so, and multiscale flows split entries off.

    Args:
        law: q: a distribution of events (K, …) without condition, or with one of (D,) or (D + C,):
            the entries kept, then the condition. A `ConditionalNormal`, say, or another flow. In a
            `Frozen` it is not trained.
        shape: Shape of what is kept, ``(D, …)`` or D; later axes agree with those of the law.
        loses: The direction that loses; see above.
        cond_dim: C, the length of the condition, or 0 for none.

    Raises:
        InputError: If the law is not exact, `loses` is no direction, or a key is missing.
        ShapeError: If the law does not fit.
    """

    law: Law | Frozen[Law]
    cond_shape: Shape | None = eqx.field(static=True)

    def __init__(
        self,
        law: Law | Frozen[Law],
        shape: Shape | int,
        *,
        loses: Direction,
        cond_dim: int = 0,
    ):
        self.law, self.loses = law, loses
        self.narrow = as_shape(shape)
        self.cond_shape = (cond_dim,) if cond_dim else None
        q, taken = self._law, math.prod(self.narrow) + cond_dim
        if q.exactness != "exact":
            raise InputError(f"Slice needs a law with an exact density, not a {q.exactness} one.")
        if not self.narrow or len(q.shape) != len(self.narrow) or q.shape[1:] != self.narrow[1:]:
            raise ShapeError(
                f"Slice: events {self.narrow} and those of the law, {q.shape}, must agree in all "
                "but the first axis."
            )
        if q.cond_shape not in (None, (taken,)):
            raise ShapeError(
                f"Slice: the law takes a condition {q.cond_shape}, but gets ({taken},): what "
                "is kept, then the condition of cond_dim numbers."
            )

    @property
    def _law(self) -> Law:
        return self.law.value if isinstance(self.law, Frozen) else self.law

    @property
    def wide(self) -> Shape:
        """The kept entries and the lost ones."""
        return (self.narrow[0] + self._law.shape[0], *self.narrow[1:])

    def _given(self, x: Array, condition: Condition) -> Array | None:
        """What the law is conditioned on."""
        if self._law.cond_shape is None:
            return None
        batch = x.shape[len(self.narrow) :]
        kept = x.reshape((math.prod(self.narrow), *batch))
        return kept if condition is None else joined(kept, condition)

    def drop(self, z, condition, key):
        """``(x, ln q(u | x))``."""
        x, lost = z[: self.narrow[0]], z[self.narrow[0] :]
        return x, self._law._log_prob(lost, self._given(x, condition), key=key)

    def draw(self, x, condition, key):
        """``((x, u), ln q(u | x))``."""
        batch = x.shape[len(self.narrow) :]
        lost, log_q = self._law._sample_and_log_prob(key, batch, self._given(x, condition))
        return jnp.concatenate([x, lost]), log_q


class AbsoluteValue(AbstractSurjection):
    r"""Loses the sign of every entry.

        drop:  z ↦ |z|,    draw:  x ↦ ±x,  P(+) = σ(logits + net(x, c))

    With ``loses="inverse"`` the signs of data have a law of their own, independent or given their
    absolute values by a network, and the density is exact; it suits latents that are positive, as
    after `Exp`. With ``loses="forward"`` the data are positive and signs are fair coins: a bound,
    tight if the latent density is the same for all signs, as the normal base's is.

    Args:
        shape: Shape of an event.
        loses: The direction that loses.
        net: With ``loses="inverse"``, a network ``net(x)``, or ``net(x, c)`` with a condition, of
            the flattened absolute values that gives as many numbers; see `apply_network`.
        cond_dim: Length of the condition that the network takes, or 0 for none.

    Outside the narrow space, where an entry is negative, it is taken as zero.

    Raises:
        InputError: If `loses` is no direction, a key is missing, or fair coins are given a network:
            a choice of signs has no derivative, so a bound would not train it.
    """

    logits: Array | None
    net: Callable | None
    cond_shape: Shape | None = eqx.field(static=True)

    def __init__(
        self,
        shape: Shape | int = (),
        *,
        loses: Direction,
        net: Callable | None = None,
        cond_dim: int = 0,
    ):
        self.narrow = as_shape(shape)
        self.net, self.loses = net, loses
        self.cond_shape = (cond_dim,) if cond_dim else None
        if loses == "forward" and net is not None:
            raise InputError("AbsoluteValue: with loses='forward' signs are fair; leave out net.")
        if cond_dim and net is None:
            raise InputError("AbsoluteValue: nothing takes the condition without a network.")
        self.logits = None if loses == "forward" else jnp.zeros(self.narrow)

    def _log_odds(self, x: Array, condition: Condition) -> Array:
        """Of a positive sign, for each entry."""
        if self.logits is None:
            return jnp.zeros_like(x)
        odds = jnp.broadcast_to(expand(self.logits, x.ndim), x.shape)
        if self.net is None:
            return odds
        flat = x.reshape((math.prod(self.narrow), *x.shape[len(self.narrow) :]))
        return odds + apply_network(self.net, flat, condition).reshape(x.shape)

    def _log_q(self, positive: Array, odds: Array) -> Array:
        events = tuple(range(len(self.narrow)))
        return jax.nn.log_sigmoid(jnp.where(positive, odds, -odds)).sum(events)

    @property
    def wide(self) -> Shape:
        """Equal to the narrow shape."""
        return self.narrow

    def drop(self, z, condition, key):
        """``(|z|, ln q(signs | |z|))``."""
        x = jnp.where(z < 0, -z, z)
        return x, self._log_q(z >= 0, self._log_odds(x, condition))

    def draw(self, x, condition, key):
        """``(±x, ln q(signs | x))``."""
        outside = ((x < 0) | (x == jnp.inf)).any(tuple(range(len(self.narrow))))
        x = jnp.where(x < 0, 0, jnp.minimum(x, float(jnp.finfo(x.dtype).max)))
        odds = self._log_odds(x, condition)
        positive = jr.logistic(key, x.shape, x.dtype) < odds
        log_q = jnp.where(outside, jnp.inf, self._log_q(positive, odds))
        return jnp.where(positive, x, -x), log_q


class Sort(AbstractSurjection):
    r"""Loses the order of the rows of an event, which are sorted by their first entry.

        drop:  z ↦ sorted z,    draw:  a uniformly random order,  ln q = −ln N!

    With ``loses="inverse"`` data are exchangeable: latents come sorted, as after `Ordered`, and are
    shuffled; the density is exact. With ``loses="forward"`` data are sorted: a bound, tight if the
    latent density is exchangeable, as the normal base's is.

    Args:
        shape: ``(N,)`` for numbers, ``(N, …)`` for rows; or N.
        loses: The direction that loses.

    Where rows of the narrow side are not sorted they are taken as if they were, and the log-det is
    −inf.

    Raises:
        InputError: If `loses` is no direction, or a key is missing.
        ShapeError: If an event has no rows.
    """

    cond_shape: None = eqx.field(static=True)

    def __init__(self, shape: Shape | int, *, loses: Direction):
        self.narrow = as_shape(shape)
        self.loses, self.cond_shape = loses, None
        if not self.narrow:
            raise ShapeError("Sort needs events with at least one axis.")

    @property
    def wide(self) -> Shape:
        """Equal to the narrow shape."""
        return self.narrow

    def _first(self, z: Array) -> Array:
        """The first entry of every row, ``(N, *batch)``."""
        batch = z.shape[len(self.narrow) :]
        return z.reshape((self.narrow[0], math.prod(self.narrow[1:]), *batch))[:, 0]

    def _reordered(self, z: Array, order: Array) -> Array:
        rest, batch = self.narrow[1:], z.shape[len(self.narrow) :]
        index = order.reshape((order.shape[0], *(1,) * len(rest), *batch))
        return jnp.take_along_axis(z, jnp.broadcast_to(index, z.shape), axis=0)

    def _log_q(self, z: Array) -> Array:
        log_q = -math.lgamma(self.narrow[0] + 1)
        return jnp.full(z.shape[len(self.narrow) :], log_q, z.dtype)

    def drop(self, z, condition, key):
        """``(sorted z, −ln N!)``."""
        return self._reordered(z, jnp.argsort(self._first(z), axis=0)), self._log_q(z)

    def draw(self, x, condition, key):
        """``(shuffled x, −ln N!)``."""
        first = self._first(x)
        outside = (first[1:] < first[:-1]).any(0)
        order = jnp.argsort(jr.uniform(key, first.shape, x.dtype), axis=0)
        return self._reordered(x, order), jnp.where(outside, jnp.inf, self._log_q(x))


class Ordered(AbstractShaped, AbstractBijection):
    r"""From ℝ^D to increasing vectors: y_1 = x_1, y_k = y_{k−1} + exp(x_k).

        log_det = Σ_{k ≥ 2} x_k

    A latent for `Sort`. Differences that would underflow are clamped to the smallest normal number;
    where entries do not increase, `inverse` gives −inf.

    Args:
        dim: D.

    Raises:
        ShapeError: If `dim` is not positive.
    """

    def __init__(self, dim: int):
        if dim < 1:
            raise ShapeError(f"Ordered: dim must be at least 1, not {dim}.")
        super().__init__(dim)

    def forward(self, x, condition=None, *, key=None):
        """``(cumulative sum of x_1, exp(x_2), …, Σ_{k ≥ 2} x_k)``."""
        limits = jnp.finfo(x.dtype)
        lo, hi = math.log(float(limits.tiny)) + 1e-4, math.log(float(limits.max)) / 2
        steps = jnp.concatenate([x[:1], jnp.exp(jnp.clip(x[1:], lo, hi))])
        return jnp.cumsum(steps, axis=0), x[1:].sum(0)

    def inverse(self, y, condition=None, *, key=None):
        """``(y_1, ln of differences)`` and minus the sum of these logarithms."""
        steps = y[1:] - y[:-1]
        logs = jnp.log(jnp.maximum(steps, float(jnp.finfo(y.dtype).tiny)))
        log_det = jnp.where((steps <= 0).any(0), -jnp.inf, -logs.sum(0))
        return jnp.concatenate([y[:1], logs]), log_det
