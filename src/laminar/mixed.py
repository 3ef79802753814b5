r"""Rows whose columns are of different kinds: numbers, points of a grid, categories, gaps.

A column is in one of S *states*, and in state 0 it may have a *value* besides:

    ln p(s, x) = Σ_d [ ln p(s_d | s_<d, x_<d) + 1{s_d = 0} ln p(x_d | s_≤d, x_<d) ]

So a number is one state with a density; a category is K states without a value; a column with gaps
has one state more; a number with a spike at zero has a state for the spike. A value has a density,
or, where it lies on a grid, the probability of its cell, F(x + w/2) − F(x − w/2). The whole is
exact: a density in the columns with one, a probability in the others.

An event is an array (2, D): values in the first row, states in the second. State −1 is *withheld*:
nothing is said about that column, it contributes nothing, and the columns after it do not see it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, ArrayLike, Condition, PRNGKeyArray, Shape
from laminar.bijections.base import AbstractTransform
from laminar.bijections.compose import Chain
from laminar.bijections.elementwise import AbstractElementwise, Affine
from laminar.bijections.splines import RationalQuadratic
from laminar.bijections.templates import as_template
from laminar.density import AbstractDistribution, apply_to_rows, broadcast, check_key
from laminar.nn.masked import MaskedMLP

WITHHELD = -1
"""The state of a column of which nothing is said."""

_GENTLE, _AFFINE = 0.1, 2  # gain of the spline's parameters; how many are those of the affine map
LINEAR = 4.0
"""Values within it are softened to themselves, those beyond it to their logarithm."""

_LOGISTIC_SD = math.pi / math.sqrt(3.0)
_MOST_LOG_SCALE = 8.0
_MOST_LOG = 80.0  # of a softened value beyond that
_BLURRED = 64.0  # of a value's rounding: cells narrower than that have lost their digits


@dataclasses.dataclass(frozen=True)
class ColumnLaw:
    """What one column of a row is.

    Attributes:
        states: S, how many states it has; state 0 is the one with the value.
        value: ``"density"``, ``"cells"`` for a probability on a grid, or None for states alone.
        width: Of a cell.
        origin: A point of the grid.
        low: The lowest point, whose cell goes down to −∞; None where there is none.
        high: The highest point, likewise.
        gap: Whether the last state is that of a missing cell.
        heavy: The unit u of a law whose tails may fall as powers, or zero. Its template sees x/u,
            and beyond ±4 of them ±(4 + ln(1 + |x/u| − 4)), in which an exponential tail is that of
            a power.
    """

    states: int = 1
    value: Literal["density", "cells"] | None = "density"
    width: float = 0.0
    origin: float = 0.0
    low: float | None = None
    high: float | None = None
    gap: bool = False
    heavy: float = 0.0

    def __post_init__(self):
        if self.states < 1 + self.gap:
            raise InputError(
                f"A column needs at least one state that is no gap, and has {self.states} in all."
            )
        if self.value == "cells" and not self.width > 0:
            raise InputError(f"A column on a grid needs a positive width, not {self.width}.")


class AutoregressiveDistribution(AbstractDistribution):
    r"""The exact law of rows of mixed columns, each given those before it (see the module).

    One masked network gives the parameters of all columns in one dense pass: logits of the states,
    and of the value those of the template τ, a scalar bijection from a standard logistic variable.
    With F the logistic distribution function,

        ln p(x_d) = ln F′(τ⁻¹(x_d)) + ln (τ⁻¹)′(x_d)                            for a density,
        ln P(x_d) = ln [ F(τ⁻¹(x_d + w/2)) − F(τ⁻¹(x_d − w/2)) ]                for a cell,

    the latter as ln σ(b) + ln σ(−a) + ln(1 − e^{a−b}), which loses no digits. Sampling is the
    incremental pass, at about the cost of one dense pass.

    With states of value −1 `log_prob` is that of the other columns. This is a normalised density
    for every choice of columns; that the densities of different choices agree with each other is
    learned, from rows with cells withheld at random (`laminar.objectives.WithheldNLL`).

    Args:
        laws: The columns.
        net: A masked network with `features` as `features_of` gives them.
        template: τ, a scalar bijection of shape ().
        gaps: Whether a column can be in the state of a gap; otherwise states are those given that
            there is none.

    Raises:
        ShapeError: If the network does not fit the columns and the template.
    """

    net: MaskedMLP
    template: AbstractElementwise
    laws: tuple[ColumnLaw, ...] = eqx.field(static=True)
    gaps: bool = eqx.field(static=True)
    shape: Shape = eqx.field(static=True)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        laws: Sequence[ColumnLaw],
        net: MaskedMLP,
        template: AbstractTransform,
        gaps: bool = True,
    ):
        self.laws, self.net, self.gaps = tuple(laws), net, gaps
        self.shape = (2, len(self.laws))
        own = net.params - logits_of(self.laws)
        valued = any(law.value for law in self.laws)
        self.template = as_template("AutoregressiveDistribution", template, own if valued else None)
        if net.features != features_of(self.laws):
            raise ShapeError(
                f"AutoregressiveDistribution: the network sees features {net.features}, and the "
                f"columns have {features_of(self.laws)}."
            )

    def without_gaps(self) -> "AutoregressiveDistribution":
        """The law of rows given that no cell is missing: what lies behind the gaps, at random."""
        return AutoregressiveDistribution(self.laws, self.net, self.template, gaps=False)

    @property
    def cond_shape(self) -> Shape | None:
        """What the network takes."""
        return self.net.cond_shape

    def _open(self, law: ColumnLaw) -> int:
        """How many states a column can be in."""
        return law.states - (law.gap and not self.gaps)

    def _row_cost(self, direction):
        net = self.net
        features, logits = sum(net.features or ()), logits_of(self.laws)
        if direction == "forward":
            return 2 * features + net.width * (len(net.hidden) + 1) + 4 * net.params
        return (
            features
            + 2 * net.width
            + 2
            * sum(
                (law.states if logits else 0)
                + (self.template.params.shape[0] + 16) * bool(law.value)
                for law in self.laws
            )
        )

    # ------------------------------------------------------------------------------- scoring

    def _log_prob(self, x, condition=None, *, key=None):
        value, state = x[0], x[1]
        h = self.net.units(self._seen(value, state), condition)
        total = jnp.zeros(value.shape[1:], value.dtype)
        for columns in _by_states(self.laws):
            total = total + self._state_terms(h, state, columns).sum(0)
        for kind in ("density", "cells"):
            columns = _where(self.laws, lambda law, kind=kind: law.value == kind)
            if len(columns):
                own = self._shaped(
                    self.net.some_parameters(h, slice(logits_of(self.laws), None), columns)
                )
                tables = _tables([self.laws[i] for i in columns], value)
                terms = self._value_terms(own, value[columns], tables, kind)
                total = total + jnp.where(state[columns] == 0, terms, 0).sum(0)
        return total

    def _state_terms(self, h, state, columns):
        """Ln p(s_d | …) of some columns, zero where withheld."""
        count = max(self.laws[i].states for i in columns)
        logits = self.net.some_parameters(h, slice(0, count), columns)
        states = np.array([self._open(self.laws[i]) for i in columns])
        return _pick(logits, state[columns], expand(jnp.asarray(states, state.dtype), state.ndim))

    def _shaped(self, raw):
        """Parameters of the template from what the network gives, ``(P, *batch)``.

        The spline's move less than location and scale: a scale that is too wide could else be made
        up for in the middle, where rows are, by a spline that leaves the tails as wide.
        """
        count = self.template.params.shape[0]
        gain = np.full(count, _GENTLE)
        gain[-_AFFINE:] = 1.0
        gain = expand(jnp.asarray(gain, raw.dtype), raw.ndim)
        return gain * raw + expand(self.template.params, raw.ndim)

    def _value_terms(self, params, value, tables, kind):
        """Ln p of values in their columns: of a density, or of a cell."""
        heavy = tables.get("heavy")
        if kind == "density":
            near, warp = _warped(value, heavy)
            z, log_det = self.template.inverse_kernel(params, near)
            return jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z) + log_det + warp
        half = 0.5 * tables["width"]
        left, warp = _warped(value - half, heavy)
        right, _ = _warped(value + half, heavy)
        below, slope = self.template.inverse_kernel(params, left)
        above, _ = self.template.inverse_kernel(params, right)
        lowest, highest = value - half < tables["low"], value + half > tables["high"]
        # The cells at the ends of the support are open: their other side is not looked at.
        gap = jnp.where(lowest | highest, 1.0, below - above)
        inside = jnp.log(-jnp.expm1(jnp.where(gap < 0, gap, -1.0)))
        inside = jnp.where(lowest | highest, 0.0, jnp.where(gap < 0, inside, -jnp.inf))
        term = (
            inside
            + jnp.where(highest, 0.0, jax.nn.log_sigmoid(above))
            + jnp.where(lowest, 0.0, jax.nn.log_sigmoid(-below))
        )
        # Far out a cell is narrower than the rounding of its ends: a density times its width.
        blurred = right - left < _BLURRED * jnp.finfo(value.dtype).eps * jnp.abs(left)
        density = jax.nn.log_sigmoid(below) + jax.nn.log_sigmoid(-below) + slope + warp
        thin = density + jnp.log(jnp.where(half > 0, 2 * half, 1))
        term = jnp.where(blurred & ~lowest & ~highest, thin, term)
        outside = (value + half < tables["low"]) | (value - half > tables["high"])
        return jnp.where(outside, -jnp.inf, jnp.where(jnp.isnan(gap), jnp.nan, term))

    def _seen(self, value, state):
        """What the network sees of columns, ``(Σ features, *batch)``, zero where withheld."""
        owner, flagged = _feature_table(self.laws)
        state = state[owner]
        code = expand(jnp.asarray(flagged, value.dtype), state.ndim)
        near = _in_units(value, _tables(self.laws, value).get("heavy"))
        numbers = jnp.where(state == 0, _softened(near[owner]), 0)
        return jnp.where(code < 0, numbers, (state == code).astype(value.dtype))

    # ------------------------------------------------------------------------------ sampling

    def _sample(self, key, batch=(), condition=None):
        return self._sample_and_log_prob(key, batch, condition)[0]

    def _sample_and_log_prob(self, key, batch=(), condition=None):
        nothing = jnp.full((2, len(self.laws), *batch), WITHHELD, self.dtype)
        x, terms = self._complete(key, nothing, condition)
        return x, terms.sum(0)

    def _complete(self, key, x, condition=None):
        """Draw what is withheld, column by column; ``ln p`` of every column given those before."""
        batch = x.shape[2:]
        kinds = {law.value for law in self.laws}
        logits, template = logits_of(self.laws), self.template
        tables = _tables(self.laws, x[0])
        tables |= {
            "states": jnp.asarray([law.states for law in self.laws], x.dtype),
            "open": jnp.asarray([self._open(law) for law in self.laws], x.dtype),
            "valued": jnp.asarray([law.value is not None for law in self.laws]),
            "cells": jnp.asarray([law.value == "cells" for law in self.laws]),
        }
        most = max(features_of(self.laws))

        def step(theta, at):
            state_key, value_key = jr.split(at["key"])
            known = at["state"] >= 0
            state, term = at["state"], jnp.zeros(batch, x.dtype)
            if logits:
                drawn = _draw_state(state_key, theta[:logits], at["open"])
                state = jnp.where(known, state, drawn.astype(x.dtype))
                term = _pick(theta[:logits], state, at["open"])
            else:
                state = jnp.zeros_like(state)
            value = jnp.zeros_like(state)
            if kinds - {None}:
                own = self._shaped(theta[logits:])
                noise = jr.logistic(value_key, batch, x.dtype)
                drawn = template.forward_kernel(own, noise)[0]
                if "heavy" in at:
                    far = at["heavy"] * _hardened(drawn)
                    drawn = jnp.where(at["heavy"] > 0, far, drawn)
                if "cells" in kinds:
                    drawn = jnp.where(at["cells"], _onto_grid(drawn, at), drawn)
                here = at["valued"] & (state == 0)
                value = jnp.where(here, jnp.where(known, at["value"], drawn), 0)
                terms = jnp.zeros_like(value)
                if "density" in kinds:
                    terms = self._value_terms(own, value, at, "density")
                if "cells" in kinds:
                    cells = self._value_terms(own, value, at, "cells")
                    terms = jnp.where(at["cells"], cells, terms)
                term = term + jnp.where(here, terms, 0)
            near = _in_units(value, at.get("heavy"))
            return _block(near, state, at["valued"], at["states"], most), (value, state, term)

        xs = tables | {"value": x[0], "state": x[1], "key": jr.split(key, len(self.laws))}
        value, state, term = self.net.columns(step, xs, batch, condition)
        return jnp.stack([value, state]), term

    def complete(
        self, key: PRNGKeyArray, x: ArrayLike, shape: Shape | int = (), condition: Condition = None
    ) -> tuple[Array, Array]:
        r"""Draw the withheld columns of rows, with what makes the draws those of the posterior.

        Each withheld column is drawn given the columns before it, and the columns that are there
        weigh the draw:

            ln w = Σ_{d there} ln p(x_d | x_<d)

        E[w] is the marginal density of what is there, and draws resampled by w are conditional on
        it (sequential importance sampling; Liu & Chen 1998).

        Args:
            key: Random key.
            x: Events ``batch + (2, D)``, with state −1 where a column is withheld.
            shape: How many draws of each row.
            condition: ``batch + cond_shape``.

        Returns:
            Events ``shape + batch + (2, D)`` and log-weights ``shape + batch``.
        """
        check_key("complete", key)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        x, batch = self._check_event(x, self.shape, "x")
        condition, cond_batch = self._check_condition(condition)
        target = shape + broadcast(self.name, batch, cond_batch)
        rows = (key, x, batch, condition, cond_batch, target, None)
        return apply_to_rows(_completed, "forward", self, *rows)

    def cumulative(self, x: ArrayLike, condition: Condition = None) -> tuple[Array, Array]:
        """What is probable below each column's place, and at it, given the columns before.

        A column's states come in the order of their numbers, and its values lie within state 0.
        With U uniform, ``below + U · at`` is uniform and independent of the columns before if rows
        follow this law (Rosenblatt 1952); so it is for a column that is withheld.

        Args:
            x: Events ``batch + (2, D)``.
            condition: ``batch + cond_shape``.

        Returns:
            Probabilities ``batch + (D,)`` below and at, the latter zero where there is a density.
        """
        x, batch = self._check_event(x, self.shape, "x")
        condition, cond_batch = self._check_condition(condition)
        target = broadcast(self.name, batch, cond_batch)
        rows = (None, x, batch, condition, cond_batch, target, None)
        return apply_to_rows(_cumulative, "inverse", self, *rows)

    def _cumulative(self, x, condition=None):
        value, state = x[0], x[1]
        params = self.net.parameters(self.net.units(self._seen(value, state), condition))
        tables, logits = _tables(self.laws, value), logits_of(self.laws)
        below, at = jnp.zeros_like(value), jnp.zeros_like(value)
        if any(law.value for law in self.laws):
            own = self._shaped(params[logits:])
            left = value - 0.5 * tables["width"]
            z, _ = self.template.inverse_kernel(own, _warped(left, tables.get("heavy"))[0])
            below = jnp.where(left < tables["low"], 0, jax.nn.sigmoid(z))
            below = jnp.where(left > tables["high"], 1, below)
            # As a difference of probabilities it would have no digits far above.
            at = jnp.exp(self._value_terms(own, value, tables, "cells"))
            at = jnp.where(tables["width"] > 0, at, 0)
        if logits:
            counts = jnp.asarray([self._open(law) for law in self.laws], value.dtype)
            row, log_p = _log_shares(params[:logits], expand(counts, value.ndim))
            p = jnp.exp(log_p)
            valued = expand(jnp.asarray([law.value is not None for law in self.laws]), value.ndim)
            within = valued & (state == 0)
            own = jnp.where(row == state[None], p, 0).sum(0)
            before = jnp.where(row < state[None], p, 0).sum(0)
            below = jnp.where(within, own * below, before)
            at = jnp.where(within, own * at, own)
        withheld, failed = state < 0, jnp.isnan(value) | jnp.isnan(state)
        below, at = (jnp.where(failed, jnp.nan, p) for p in (below, at))
        return jnp.where(withheld, 0, below), jnp.where(withheld, 1, at)


def _completed(dist, key, rows, x, condition):
    filled, terms = dist._complete(key, x, condition)
    return filled, jnp.where(x[1] >= 0, terms, 0).sum(0)


def _cumulative(dist, key, rows, x, condition):
    return dist._cumulative(x, condition)


def autoregressive_distribution(
    laws: Sequence[ColumnLaw],
    *,
    key: PRNGKeyArray,
    width: int = 128,
    depth: int = 2,
    bins: int = 8,
    cond_dim: int = 0,
    residual: bool = True,
    order: Array | None = None,
    shares: Sequence[ArrayLike | None] = (),
) -> AutoregressiveDistribution:
    """Build an `AutoregressiveDistribution` with a network that fits its columns.

    It starts with independent columns: states of the given shares, values of a standard deviation
    of one about zero.

    Args:
        laws: The columns.
        key: Draws the network's weights.
        width: Hidden units in a layer.
        depth: Residual blocks, or hidden layers.
        bins: Bins of the spline that a value goes through.
        cond_dim: Length of the condition; 0 for none.
        residual: Use residual blocks.
        order: The position of each column in the autoregressive order, by default the natural one.
        shares: For each column the probabilities of its states at the start, or None.

    Returns:
        The distribution of events ``(2, D)``.

    Raises:
        InputError: If a size is not positive.
        ShapeError: If the order is none of the columns.
    """
    laws = tuple(laws)
    template = as_template("autoregressive_distribution", _template(bins))
    net = MaskedMLP(
        len(laws),
        logits_of(laws) + (template.params.shape[0] if any(law.value for law in laws) else 0) or 1,
        width=width,
        depth=depth,
        cond_dim=cond_dim,
        residual=residual,
        order=order,
        features=features_of(laws),
        key=key,
    )
    bias = np.zeros(net.head_bias.shape, net.head_bias.dtype)
    for column, share in enumerate(shares):
        if share is not None and laws[column].states > 1:
            bias[: laws[column].states, column] = np.log(np.asarray(share))
    net = eqx.tree_at(lambda n: n.head_bias, net, jnp.asarray(bias))
    return AutoregressiveDistribution(laws, net, template)


def _template(bins: int) -> AbstractTransform:
    spline = RationalQuadratic(bins, interval=(-6.0, 6.0), tails="linear")
    return Chain([spline, Affine(0.0, 1.0 / _LOGISTIC_SD, max_log_scale=_MOST_LOG_SCALE)])


def logits_of(laws: Sequence[ColumnLaw]) -> int:
    """How many logits the head gives every column: of the most states, or none."""
    most = max(law.states for law in laws)
    return most if most > 1 else 0


def features_of(laws: Sequence[ColumnLaw]) -> tuple[int, ...]:
    """How many numbers the network sees of each column: its value, and a flag for each state."""
    return tuple((law.value is not None) + law.states for law in laws)


def _feature_table(laws: Sequence[ColumnLaw]) -> tuple[np.ndarray, np.ndarray]:
    """The column of each feature, and the state that it flags, or −1 for the value."""
    owner = np.repeat(np.arange(len(laws)), features_of(laws))
    code = np.concatenate([np.arange(-(law.value is not None), law.states) for law in laws])
    return owner, code


def _block(value, state, valued, states, most: int):
    """The same features of one column, padded with zeros to the most of all columns."""
    row = expand(jnp.arange(most, dtype=value.dtype), value.ndim + 1)
    code = row - valued.astype(value.dtype)
    flags = ((state[None] == code) & (code < states)).astype(value.dtype)
    return jnp.where(code < 0, jnp.where(state == 0, _softened(value), 0)[None], flags)


def _softened(value: Array) -> Array:
    """The value within ±4 and ±(4 + ln(1 + |x| − 4)) beyond: outliers do not swamp a network."""
    excess = jnp.maximum(jnp.abs(value) - LINEAR, 0)
    return jnp.where(excess > 0, jnp.sign(value) * (LINEAR + jnp.log1p(excess)), value)


def _hardened(value: Array) -> Array:
    """The inverse of `_softened`; what would overflow ends far out."""
    excess = jnp.clip(jnp.abs(value) - LINEAR, 0, _MOST_LOG)
    return jnp.where(excess > 0, jnp.sign(value) * (LINEAR + jnp.expm1(excess)), value)


def _warped(value: Array, heavy: Array | None) -> tuple[Array, Any]:
    """The value as a template sees it, and the logarithm of the slope of that."""
    if heavy is None:
        return value, 0
    near = _in_units(value, heavy)
    slope = -jnp.log1p(jnp.maximum(jnp.abs(near) - LINEAR, 0))
    slope = slope - jnp.log(jnp.where(heavy > 0, heavy, 1))
    return jnp.where(heavy > 0, _softened(near), value), jnp.where(heavy > 0, slope, 0)


def _in_units(value: Array, heavy: Array | None) -> Array:
    """The value in the unit of its column's law, where that has heavy tails."""
    return value if heavy is None else value / jnp.where(heavy > 0, heavy, 1)


def _pick(logits: Array, state: Array, states: Any) -> Array:
    """The log-probability of a state among the first `states`; zero where withheld."""
    row, log_p = _log_shares(logits, states)
    chosen = (row == state[None]) & (row < (states[None] if states.ndim else states))
    found = jnp.where(chosen, log_p, 0).sum(0)
    known = jnp.where(chosen.any(0), found, -jnp.inf)
    return jnp.where(jnp.isnan(state), jnp.nan, jnp.where(state == WITHHELD, 0, known))


def _log_shares(logits: Array, states: Any) -> tuple[Array, Array]:
    """The numbers of all states, and their log-probabilities among the first `states`."""
    row = expand(jnp.arange(logits.shape[0], dtype=logits.dtype), logits.ndim)
    used = row < (states[None] if states.ndim else states)
    lowest = jnp.finfo(logits.dtype).min
    return row, jax.nn.log_softmax(jnp.where(used, logits, lowest), axis=0)


def _draw_state(key: PRNGKeyArray, logits: Array, states: Any) -> Array:
    noise = jr.gumbel(key, logits.shape, logits.dtype)
    used = expand(jnp.arange(logits.shape[0], dtype=logits.dtype), logits.ndim) < states
    return jnp.argmax(jnp.where(used, logits + noise, -jnp.inf), axis=0)


def _onto_grid(value: Array, at: dict[str, Array]) -> Array:
    """The nearest point of a column's grid, within its ends."""
    width = jnp.where(at["width"] > 0, at["width"], 1)
    point = at["origin"] + width * jnp.round((value - at["origin"]) / width)
    return jnp.clip(point, at["low"], at["high"])


def _tables(laws: Sequence[ColumnLaw], like: Array) -> dict[str, Array]:
    """The grids of columns, as arrays that broadcast against ``(columns, *batch)``."""
    lists = {
        "width": [law.width for law in laws],
        "origin": [law.origin for law in laws],
        "low": [-math.inf if law.low is None else law.low for law in laws],
        "high": [math.inf if law.high is None else law.high for law in laws],
    }
    if any(law.heavy for law in laws):  # most have none, and need no logarithms
        lists["heavy"] = [law.heavy for law in laws]
    return {name: expand(jnp.asarray(v, like.dtype), like.ndim) for name, v in lists.items()}


def _where(laws: Sequence[ColumnLaw], test) -> np.ndarray:
    return np.array([i for i, law in enumerate(laws) if test(law)], np.int32)


def _by_states(laws: Sequence[ColumnLaw]) -> list[np.ndarray]:
    """Columns of more than one state, those of about as many together."""
    sizes = [(law.states - 1).bit_length() for law in laws]
    return [
        np.array([i for i, own in enumerate(sizes) if own == size], np.int32)
        for size in sorted({size for size in sizes if size})
    ]
