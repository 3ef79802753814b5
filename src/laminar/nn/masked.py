r"""Masked autoregressive networks (MADE) whose inversion costs about one pass.

Hidden units are sorted by *degree*: a unit of degree m sees only the m inputs that come first in
the layer's order, and the parameters of the d-th input see units of degree below d (Germain et al.
2015, "MADE"). So, with inputs numbered in that order, once x_1, …, x_m are known, all
units of degree m are final and never change again. `MaskedMLP.sequential` uses this: step by step
it computes only the block of units that has just become final and the one parameter vector that is
needed next. All D steps together read every weight once, as one dense pass does, where the usual
inversion makes D full passes.

With a graph that says which inputs each input depends on, a unit sees a set of inputs instead of
the first m, and the passes go by the levels of the graph (see `laminar.nn.graph`): as many steps as
its longest path has columns, each for all columns of a level at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer

from laminar._checks import check_sizes
from laminar._errors import InputError, ShapeError
from laminar._params import expand
from laminar._typing import Array, ArrayLike, PRNGKeyArray, Shape
from laminar.nn.graph import Graph, levels, parents_of, units_of
from laminar.nn.mlp import affine, circular_features, folds_bias, matmul

Step = Callable[[Array, Array], tuple[Array, Array]]


def degrees(dim: int, width: int, conditional: bool) -> np.ndarray:
    """The degree of each hidden unit, sorted and spread evenly.

    Without a condition degrees run over 1, …, dim−1: a unit of degree 0 would be a constant. With
    one, or where there is nothing else, degree 0 is used too. With fewer units than degrees, some
    degrees are absent.
    """
    lowest = 0 if conditional or dim == 1 else 1
    count = max(dim - lowest, 1)
    return (lowest + (np.arange(width) * count) // width).astype(np.int32)


class MaskedMLP(eqx.Module):
    r"""MADE: maps x of shape (D,) to parameters (P, D); column d depends on the entries before d.

    Plain: h_1 = a(W_1 x + V c + b_1), h_l = a(W_l h_{l−1} + b_l), θ = W h_depth + b, with weights
    masked so that a unit of degree m sees units of degree at most m. Residual: after the first
    product come `depth` blocks h ← h + W_b a(W_a a(h) + b_a) + b_b, all units keeping their degree.
    The head starts at zero, so a layer starts at its template.

    Args:
        dim: Number of inputs D.
        params: Number of parameters P for each input.
        width: Hidden units in a layer.
        depth: Hidden layers, or residual blocks if `residual`.
        cond_dim: Length of the condition vector c; 0 for none.
        residual: Use residual blocks (two products each).
        activation: Elementwise activation.
        order: The position 0, …, D−1 of each input in the autoregressive order, by default the
            natural one. An integer array, so that stacked layers can differ in it; a layer of
            another order needs no permutation around it.
        graph: Instead of an order, which inputs each input depends on: an array (D, D) whose entry
            [i, j] is not zero where i depends on j, or a list of the parents of each input. Column
            i of the parameters then depends on the parents of i alone.
        periodic: Whether inputs are angles; the first layer then sees their cosines and sines, so
            that the network is continuous on the torus.
        features: How many numbers the network sees of each input, where it is not the input
            itself. `units` then takes these, ``(Σ features, *batch)``, and `columns` stands in for
            `sequential`.
        key: Draws the weights, LeCun-normal over the connections that the mask leaves.

    Raises:
        InputError: If a size is not positive, `order` is not a permutation, the graph has a cycle,
            or there are fewer units than different sets of parents.
        ShapeError: If `order` or `graph` does not fit.
    """

    order: Array
    first: Array
    cond: Array | None
    first_bias: Array
    hidden: tuple[Array, ...]
    hidden_bias: tuple[Array, ...]
    head: Array
    head_bias: Array
    dim: int = eqx.field(static=True)
    params: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    cond_dim: int = eqx.field(static=True)
    residual: bool = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)
    graph: Graph | None = eqx.field(static=True)
    periodic: bool = eqx.field(static=True, default=False)
    features: tuple[int, ...] | None = eqx.field(static=True, default=None)
    batch_last: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        params: int,
        *,
        width: int,
        depth: int,
        cond_dim: int = 0,
        residual: bool = False,
        activation: Callable[[Array], Array] = jax.nn.relu,
        order: Array | None = None,
        graph: ArrayLike | Sequence[Sequence[int]] | None = None,
        periodic: bool = False,
        features: Sequence[int] | None = None,
        key: PRNGKeyArray,
    ):
        check_sizes("MaskedMLP", dim=dim, params=params, width=width, depth=depth)
        self.dim, self.params, self.width, self.depth = dim, params, width, depth
        self.cond_dim, self.residual, self.activation = cond_dim, residual, activation
        self.periodic = periodic
        self.features = None if features is None else tuple(int(n) for n in features)
        if self.features is not None and (periodic or graph is not None):
            raise InputError(
                "MaskedMLP takes features without periodic inputs and without a graph."
            )
        if self.features is not None and len(self.features) != dim:
            raise ShapeError(f"MaskedMLP: {len(self.features)} numbers of features, {dim} inputs.")
        self.graph = None if graph is None else parents_of(graph, dim)
        if self.graph is not None:
            if order is not None:
                raise InputError("MaskedMLP takes either an order or a graph, and got both.")
            order = jnp.argsort(jnp.argsort(jnp.asarray(levels(self.graph)), stable=True))
        self.order = as_order("MaskedMLP", dim, order)
        first_key, cond_key, hidden_key = jr.split(key, 3)
        first_mask, hidden_mask, _ = self._masks()
        fan_in = first_mask.sum(1) + cond_dim
        self.first = _draw(first_key, first_mask, fan_in)
        everyone = np.ones((width, cond_dim), bool)
        self.cond = _draw(cond_key, everyone, fan_in) if cond_dim else None
        self.first_bias = jnp.zeros(width)
        count = 2 * depth if residual else depth - 1
        hidden = [
            _draw(k, hidden_mask, hidden_mask.sum(1)) for k in jr.split(hidden_key, max(count, 1))
        ][:count]
        if residual:
            # Each block starts as the identity up to a small term, so depth does not scale h up.
            hidden = [w * 0.1 if j % 2 else w for j, w in enumerate(hidden)]
        self.hidden = tuple(hidden)
        self.hidden_bias = tuple(jnp.zeros(width) for _ in hidden)
        self.head = jnp.zeros((params, dim, width))
        self.head_bias = jnp.zeros((params, dim))

    @property
    def cond_shape(self) -> Shape | None:
        """``(cond_dim,)``, or None without a condition."""
        return (self.cond_dim,) if self.cond_dim else None

    def _masks(self) -> tuple[Array, Array, Array]:
        """Allowed connections: input → unit, unit → unit, unit → parameters of an input."""
        if self.graph is not None:
            units = units_of(self.graph, self.width, self.cond_dim > 0)
            sees = jnp.tile(jnp.asarray(units.sees), (1, 1 + self.periodic))
            return sees, jnp.asarray(units.hidden), jnp.asarray(units.head)
        degree = jnp.asarray(degrees(self.dim, self.width, self.cond_dim > 0))
        inputs = jnp.tile(self.order, 1 + self.periodic)
        if self.features is not None:
            inputs = self.order[np.repeat(np.arange(self.dim), self.features)]
        return (
            degree[:, None] > inputs[None, :],
            degree[:, None] >= degree[None, :],
            self.order[:, None] >= degree[None, :],
        )

    def _seen(self, x: Array) -> Array:
        """What the first layer sees of inputs."""
        return circular_features(x) if self.periodic else x

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        """From which step on each unit is final, and the step of each input in order."""
        if self.graph is None:
            return degrees(self.dim, self.width, self.cond_dim > 0), np.arange(self.dim)
        units = units_of(self.graph, self.width, self.cond_dim > 0)
        return units.level, np.sort(levels(self.graph))

    def _masked_body(self) -> tuple[Array, list[Array]]:
        """The weights of the units with forbidden connections set to zero."""
        first, hidden, _ = self._masks()
        return jnp.where(first, self.first, 0), [jnp.where(hidden, w, 0) for w in self.hidden]

    def _masked_head(self) -> Array:
        """The weights of the parameters with forbidden connections set to zero."""
        return jnp.where(self._masks()[2][None], self.head, 0)

    def _body(self, h: Array, product: Callable[[int, Array], Array]) -> Array:
        """From the first pre-activation to the last activation.

        Both passes run this: `product(j, a)` is the j-th hidden product, over all units in the
        dense pass and over the block that has just become final in the sequential one.
        """
        act = self.activation
        if self.residual:
            for j in range(self.depth):
                h = h + product(2 * j + 1, act(product(2 * j, act(h))))
        else:
            for j in range(self.depth - 1):
                h = product(j, act(h))
        return act(h)

    def _condition_term(self, condition: Array | None, ndim: int) -> Array:
        """First bias plus V c, broadcastable against ``(width, *batch)`` of `ndim` axes."""
        bias = expand(self.first_bias, ndim)
        if self.cond is None:
            return bias
        if condition is None:
            raise InputError(f"MaskedMLP needs a condition of shape ({self.cond_dim},), got none.")
        return bias + expand(matmul(self.cond, condition), ndim)

    def __call__(
        self, x: Array, condition: Array | None = None, offset: Array | None = None
    ) -> Array:
        """The dense pass.

        Args:
            x: ``(D, *batch)``.
            condition: ``(cond_dim,)`` or ``(cond_dim, *batch)``.
            offset: ``(P,)``, added to the parameters of every input.

        Returns:
            Parameters ``(P, D, *batch)``.
        """
        return self.parameters(self.units(x, condition), offset)

    def units(self, x: Array, condition: Array | None = None) -> Array:
        """The last hidden units, ``(width, *batch)``."""
        first, hidden = self._masked_body()
        h = matmul(first, self._seen(x)) + self._condition_term(condition, x.ndim)

        def product(j, a):
            return matmul(hidden[j], a) + expand(self.hidden_bias[j], x.ndim)

        return self._body(h, product)

    def parameters(self, h: Array, offset: Array | None = None) -> Array:
        """The parameters ``(P, D, *batch)`` that the last hidden units give."""
        return affine(self._masked_head(), self._offset(offset), h)

    def some_parameters(self, h: Array, params: slice, inputs: np.ndarray) -> Array:
        """As `parameters`, for some of the parameters of some inputs."""
        weight = self.head[params][:, inputs]
        weight = jnp.where(self._masks()[2][None, inputs], weight, 0)
        return affine(weight, self.head_bias[params][:, inputs], h)

    def _offset(self, offset: Array | None) -> Array:
        """The bias of the head, ``(P, D)``, with what is added to every column of it."""
        return self.head_bias if offset is None else self.head_bias + offset[:, None]

    def sequential(
        self,
        step: Step,
        x: Array,
        condition: Array | None = None,
        offset: Array | None = None,
    ) -> tuple[Array, Array]:
        r"""Solve y_d = step(θ_d(y_1, …, y_{d−1}), x_d) for d = 1, …, D in one incremental pass.

        The values equal those of D dense passes up to rounding; the multiply-adds are those of
        about one. A ``lax.scan`` over d keeps compile time flat in D. Reverse-mode gradients keep
        the activations of every step, so their memory grows as D · width · batch. With a graph the
        steps are its levels, padded to the size of the largest: the work is that of one dense pass
        where levels are even, and at most that of one pass for each.

        Args:
            step: Maps parameters ``(P, *s)`` and x ``(*s)`` to y and log-derivatives ``(*s)``,
                element by element.
            x: ``(D, *batch)``.
            condition: ``(cond_dim,)`` or ``(cond_dim, *batch)``.
            offset: ``(P,)``, added to the parameters of every input.

        Returns:
            y of shape ``(D, *batch)`` and the summed log-dets ``(*batch)``.
        """
        batch, ndim = x.shape[1:], x.ndim
        level, step_of = self._levels()
        # Without a condition no unit comes before the first inputs, whose parameters are constants.
        begin, end = int(level[0]), int(step_of[-1]) + 1
        rows, start, valid = _blocks(level, begin, end)
        inputs, y_start, y_valid = _blocks(step_of, begin, end)
        alone, even = end == self.dim, bool(y_valid.all())
        (first, hidden), head = self._masked_body(), self._masked_head()
        condition_term = self._condition_term(condition, ndim)
        place = jnp.argsort(self.order)
        bias, index = self._offset(offset), place[inputs]
        padding = _overhang(rows, start, self.width)
        y_padding = _overhang(inputs, y_start, self.dim)
        columns = [(0, 0), (0, 0), (0, padding)]
        folded = folds_bias()

        # Inputs of one step are put side by side. Where each has a step of its own they stay in
        # their places instead, which spares reordering the result.
        if not alone:
            halves = jnp.split(first, 1 + self.periodic, axis=1)
            padded = [jnp.pad(half[:, place], [(0, 0), (0, y_padding)]) for half in halves]
            first = jnp.concatenate(padded, 1)
        y, log_det = jnp.zeros((self.dim + y_padding, *batch), x.dtype), jnp.zeros(batch, x.dtype)
        if begin:
            now = place[: int((step_of == 0).sum())]
            y_now, log_det_now = step(expand(bias[:, now], ndim + 1), x[now])
            y, log_det = y.at[now if alone else slice(len(now))].set(y_now), log_det_now.sum(0)
        biases = jnp.moveaxis(bias[:, index], 1, 0)
        xs = {
            "y_start": index[:, 0] if alone else jnp.asarray(y_start),
            "y_valid": jnp.asarray(y_valid),
            "x": x[index],
            "head": jnp.concatenate(
                [
                    jnp.pad(jnp.moveaxis(head[:, index], 1, 0), [(0, 0), *columns]),
                    biases[..., None] * float(folded),
                ],
                -1,
            ),
            "bias": biases,
            **self._rows(rows, start, valid, first, hidden, condition_term),
        }

        def body(carry, at):
            y, log_det, stores = carry

            def only_own(values):
                # Likewise inputs past the end of this step, whose parameters are not final.
                return values if even else jnp.where(expand(at["y_valid"], ndim), values, 0)

            h, stores = self._advance(at, self._seen(y), stores)
            theta = matmul(at["head"], h)
            theta = theta if folded else theta + expand(at["bias"], ndim + 1)
            if alone:  # kernels are faster without an axis of size one
                y_now, log_det_now = (v[None] for v in step(theta[:, 0], at["x"][0]))
            else:
                y_now, log_det_now = (only_own(v) for v in step(theta, only_own(at["x"])))
            y = lax.dynamic_update_slice_in_dim(y, y_now, at["y_start"], 0)
            return (y, log_det + log_det_now.sum(0), stores), None

        store = jnp.zeros((self.width + padding, *batch), x.dtype)
        last = jnp.concatenate([store, jnp.ones((1, *batch), x.dtype)])
        (y, log_det, _), _ = lax.scan(body, (y, log_det, (*(store,) * len(hidden), last)), xs)
        if alone:
            return y, log_det
        return jnp.take(y, self.order, axis=0, unique_indices=True, mode="clip"), log_det

    def _rows(self, rows, start, valid, first, hidden, offset) -> dict[str, Any]:
        """What `_advance` takes at each step: the weights of the units that it makes final."""
        columns = [(0, 0), (0, 0), (0, _overhang(rows, start, self.width))]
        return {
            "start": jnp.asarray(start),
            "valid": jnp.asarray(valid),
            "first": first[rows],
            "offset": offset[rows],
            "hidden": [jnp.pad(w[rows], columns) for w in hidden],
            "hidden_bias": [b[rows] for b in self.hidden_bias],
        }

    def _advance(self, at: dict[str, Any], seen: Array, stores: tuple[Array, ...]):
        """All last hidden units after a step, and the units of every layer."""
        kept, ndim = list(stores), seen.ndim

        def put(j, a):
            # Rows past the end of this degree's block belong to later degrees, which are still
            # zero in the store.
            a = jnp.where(expand(at["valid"], ndim), a, 0)
            kept[j] = lax.dynamic_update_slice_in_dim(kept[j], a, at["start"], 0)
            return kept[j]

        def product(j, a):
            return matmul(at["hidden"][j], put(j, a)) + expand(at["hidden_bias"][j], ndim)

        h = put(-1, self._body(matmul(at["first"], seen) + at["offset"], product))
        return h, tuple(kept)

    def columns(
        self,
        step: Callable[[Array, Any], tuple[Array, Any]],
        xs: Any,
        batch: Shape,
        condition: Array | None = None,
    ) -> Any:
        r"""The incremental pass over inputs of several `features` each, in the layer's order.

        Step d gives the parameters of the d-th input to `step`, which answers with what the network
        sees of that input from then on. As in `sequential` all steps together cost about one pass.

        Args:
            step: Maps parameters ``(P, *batch)`` and the slice of `xs` at an input to its features
                ``(max features, *batch)``, zero beyond its own, and anything else.
            xs: A tree of arrays ``(D, …)``, in the natural order of the inputs.
            batch: The batch shape.
            condition: ``(cond_dim,)`` or ``(cond_dim, *batch)``.

        Returns:
            What `step` gave besides, stacked in the natural order.
        """
        counts = np.asarray(self.features)
        ndim, most = len(batch) + 1, int(counts.max())
        level, _ = self._levels()
        rows, start, valid = _blocks(level, 0, self.dim)
        padding = _overhang(rows, start, self.width)
        (first, hidden), head = self._masked_body(), self._masked_head()
        place = jnp.argsort(self.order)
        # The store of features is in the layer's order, so that the block a step writes runs over
        # rows of later inputs only, which are still zero.
        by_order = jnp.argsort(self.order[np.repeat(np.arange(self.dim), counts)], stable=True)
        first = jnp.pad(first[:, by_order], [(0, 0), (0, most)])
        sizes = jnp.asarray(counts)[place]
        moves = {
            "begin": jnp.cumsum(sizes) - sizes,
            "head": jnp.pad(jnp.moveaxis(head[:, place], 1, 0), [(0, 0), (0, 0), (0, padding)]),
            "bias": self.head_bias[:, place].T,
            "x": jtu.tree_map(lambda x: x[place], xs),
            **self._rows(rows, start, valid, first, hidden, self._condition_term(condition, ndim)),
        }

        def body(carry, at):
            seen, stores = carry
            h, stores = self._advance(at, seen, stores)
            theta = matmul(at["head"], h) + expand(at["bias"], ndim)
            block, out = step(theta, at["x"])
            seen = lax.dynamic_update_slice_in_dim(seen, block, at["begin"], 0)
            return (seen, stores), out

        dtype = self.head.dtype
        seen = jnp.zeros((int(counts.sum()) + most, *batch), dtype)
        store = jnp.zeros((self.width + padding, *batch), dtype)
        _, out = lax.scan(body, (seen, (*(store,) * len(hidden), store)), moves)
        return jtu.tree_map(lambda y: jnp.take(y, self.order, axis=0), out)


def as_order(owner: str, dim: int, order: Array | None) -> Array:
    """The positions of D inputs as integers, by default the natural ones.

    Raises:
        InputError: If the order is not a permutation.
        ShapeError: If it has another length.
    """
    order = jnp.arange(dim, dtype=jnp.int32) if order is None else jnp.asarray(order, jnp.int32)
    if order.shape != (dim,):
        raise ShapeError(f"{owner}: an order of shape {order.shape} for {dim} inputs.")
    if not isinstance(order, Tracer) and not np.array_equal(
        np.sort(np.asarray(order)), np.arange(dim)
    ):
        raise InputError(f"{owner}: the order must hold each position 0…{dim - 1} once.")
    return order


def _draw(key: PRNGKeyArray, mask: Array | np.ndarray, fan_in: Array) -> Array:
    """LeCun-normal weights where the mask allows a connection, zero elsewhere."""
    scale = lax.rsqrt(jnp.maximum(fan_in, 1).astype(jnp.zeros(()).dtype))[:, None]
    return jnp.where(mask, jr.normal(key, mask.shape) * scale, 0)


def _overhang(rows: np.ndarray, start: np.ndarray, size: int) -> int:
    """How far the last block reaches beyond the end."""
    return max(int(start.max(initial=0)) + rows.shape[1] - size, 0)


def _blocks(degree: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, ...]:
    """For each degree begin, …, end−1 the rows of its units, all blocks padded to one size.

    Returns:
        Row numbers ``(end − begin, block)`` held inside the network, the first rows, and which
        rows of a block belong to its degree.
    """
    wanted = np.arange(begin, end)
    start = np.searchsorted(degree, wanted, side="left").astype(np.int32)
    count = np.searchsorted(degree, wanted, side="right") - start
    offset = np.arange(max(count.max(initial=0), 1), dtype=np.int32)
    rows = np.minimum(start[:, None] + offset, len(degree) - 1)
    return rows, start, offset < count[:, None]
