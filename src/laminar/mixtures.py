"""Mixtures: of Gaussians with full covariances, of equal round ones, and of any distributions."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, expand
from laminar._typing import Array, ArrayLike, Direction, Shape
from laminar.density import AbstractDistribution, is_shape

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class GaussianMixture(AbstractDistribution):
    """A mixture of K normal laws on vectors, each with a full covariance.

        ln p(x) = ln Σ_k π_k |det W_k| (2π)^{−D/2} exp(−½ ‖W_k (x − μ_k)‖²)

    The lower triangular W_k is the inverse of the Cholesky factor of covariance k, so that a
    density costs one matrix product for each component and no triangular solve. A mixture fitted
    by scikit-learn loads as ``GaussianMixture(gm.weights_, gm.means_, gm.covariances_)`` with the
    covariance types ``"full"``, ``"diag"`` and ``"spherical"``.

    Draws carry gradients to means and factors; the choice of a component carries none, so weights
    learn from `log_prob` only.

    Args:
        weights: π, ``(K,)``, non-negative; scaled to sum to one.
        means: μ, ``(K, D)``.
        covariances: ``(K, D, D)``, or ``(K, D)`` for diagonals, or ``(K,)`` for multiples of the
            identity; the identity by default.

    Raises:
        InputError: If a covariance is not positive definite or the weights are negative.
        ShapeError: If the shapes do not fit.
    """

    logits: Array
    means: Array
    log_diagonal: Array
    lower: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike | None = None):
        dtype = float_dtype(means)
        # In double precision on the host: covariances of a fit may be close to singular.
        means = np.asarray(means, np.float64)
        if means.ndim != 2:
            raise ShapeError(
                f"GaussianMixture: means must be (K, D), and have shape {means.shape}."
            )
        count, dim = means.shape
        factors = inverse_factors("GaussianMixture", covariances, count, dim)
        self.logits = jnp.asarray(log_weights("GaussianMixture", weights, count), dtype)
        self.means = jnp.asarray(means, dtype)
        self.log_diagonal = jnp.asarray(np.log(np.diagonal(factors, axis1=1, axis2=2)), dtype)
        self.lower = jnp.asarray(np.tril(factors, -1), dtype)
        self.shape, self.cond_shape = (dim,), None

    def _row_cost(self, direction: Direction) -> int:
        return self.logits.size * (self.shape[0] + 4)

    @property
    def weights(self) -> Array:
        """The weights π, ``(K,)``."""
        return jax.nn.softmax(self.logits)

    def _factors(self):
        return assemble_factors(self.lower, self.log_diagonal)

    def _log_prob(self, x, condition=None, *, key=None):
        flat = x.reshape((self.shape[0], -1))
        log_heights = jax.nn.log_softmax(self.logits) + self.log_diagonal.sum(1)

        # A scan keeps each component's product in cache; a batched product is slower and larger.
        def component(_, part):
            factor, mean, log_height = part
            z = product(factor, flat - mean[:, None])
            return None, log_height - 0.5 * (z * z).sum(0)

        _, terms = lax.scan(component, None, (self._factors(), self.means, log_heights))
        return (_log_sum(terms) - self.shape[0] * HALF_LOG_TWO_PI).reshape(x.shape[1:])

    def _sample(self, key, batch=(), condition=None):
        choice_key, noise_key = jr.split(key)
        rows = math.prod(batch)
        choice = _choose(choice_key, self.logits, rows)
        noise = jr.normal(noise_key, (self.shape[0], rows), self.means.dtype)

        # Inverting K small factors is far cheaper than K triangular solves of all rows. One by one:
        # batched solves were seen to hang in the CPU runtime.
        identity = jnp.eye(self.shape[0], dtype=self.means.dtype)

        def component(x, part):
            k, factor, mean = part
            root = solve_triangular(factor, identity, lower=True)
            drawn = mean[:, None] + product(root, noise)
            return jnp.where((choice == k)[None, :], drawn, x), None

        numbers = jnp.arange(self.logits.size, dtype=jnp.int32)
        parts = (numbers, self._factors(), self.means)
        x, _ = lax.scan(component, jnp.zeros_like(noise), parts)
        return x.reshape(self.shape + batch)


class IsotropicMixture(AbstractDistribution):
    """A mixture of K round normal laws, cheap up to a few thousand components.

        ln p(x) = ln Σ_k π_k (2π h_k²)^{−D/2} exp(−‖x − μ_k‖² / 2h_k²)

    With the training rows as means and one scale it is the Gaussian kernel density estimate, then
    best held in `_params.Frozen` or fitted by its scale alone. Gradients of draws are as in
    `GaussianMixture`.

    Args:
        means: μ, ``(K, D)``.
        scale: Standard deviations h, one or ``(K,)``.
        weights: π, ``(K,)``; equal by default.

    Raises:
        InputError: If a scale is not positive or a weight is negative.
        ShapeError: If the shapes do not fit.
    """

    logits: Array
    means: Array
    log_scale: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, means: ArrayLike, scale: ArrayLike = 1.0, weights: ArrayLike | None = None):
        dtype = float_dtype(means)
        self.means = jnp.asarray(means, dtype)
        if self.means.ndim != 2:
            raise ShapeError(
                f"IsotropicMixture: means must be (K, D), and have shape {self.means.shape}."
            )
        count, dim = self.means.shape
        scale = np.asarray(scale, np.float64)
        if scale.shape not in ((), (count,)):
            raise ShapeError(
                f"IsotropicMixture: scale has shape {scale.shape}, but means of shape "
                f"{self.means.shape} take one scale or {(count,)}."
            )
        if not np.all(scale > 0):
            raise InputError("IsotropicMixture: scale must be positive everywhere.")
        weights = np.ones(count) if weights is None else weights
        self.logits = jnp.asarray(log_weights("IsotropicMixture", weights, count), dtype)
        self.log_scale = jnp.asarray(np.log(scale), dtype)
        self.shape, self.cond_shape = (dim,), None

    def _row_cost(self, direction: Direction) -> int:
        return 4 * self.logits.size + 8 * self.shape[0]

    @property
    def weights(self) -> Array:
        """The weights π, ``(K,)``."""
        return jax.nn.softmax(self.logits)

    def _log_prob(self, x, condition=None, *, key=None):
        flat = x.reshape((self.shape[0], -1))
        log_scale = jnp.broadcast_to(self.log_scale, self.logits.shape)
        log_height = jax.nn.log_softmax(self.logits) - self.shape[0] * log_scale
        precision = jnp.exp(-2 * log_scale)
        terms = log_height[:, None] - 0.5 * precision[:, None] * _square_distances(self.means, flat)
        return (_log_sum(terms) - self.shape[0] * HALF_LOG_TWO_PI).reshape(x.shape[1:])

    def _sample(self, key, batch=(), condition=None):
        choice_key, noise_key = jr.split(key)
        choice = _choose(choice_key, self.logits, math.prod(batch))
        scale = jnp.exp(jnp.broadcast_to(self.log_scale, self.logits.shape))[choice]
        noise = jr.normal(noise_key, (self.shape[0], choice.size), self.means.dtype)
        return (self.means.T[:, choice] + scale[None] * noise).reshape(self.shape + batch)


class Mixture(AbstractDistribution):
    """A mixture of any distributions or flows over events of one shape.

        ln p(x | c) = ln Σ_k π_k p_k(x | c)

    A draw runs every component and keeps one, so it costs as much as K draws. It carries gradients
    to the components; weights learn from `log_prob` only.

    Args:
        components: A sequence of distributions, or one module whose arrays carry a leading
            component axis (as ``eqx.filter_vmap(make)(keys)`` gives), which is then mapped over.
            One wrapped in `_params.Frozen` is not trained.
        logits: Log-weights up to a constant, ``(K,)``; equal weights by default.

    Raises:
        ShapeError: If components or logits do not fit each other.
    """

    components: tuple[AbstractDistribution | Frozen, ...] | AbstractDistribution | Frozen
    logits: Array
    shape: Shape = eqx.field(static=True)
    cond_shape: Shape | None = eqx.field(static=True)

    def __init__(
        self,
        components: Sequence[AbstractDistribution | Frozen] | AbstractDistribution | Frozen,
        logits: ArrayLike | None = None,
    ):
        if isinstance(components, AbstractDistribution | Frozen):
            self.components = components
            count = _leading(components)
            parts = [_first(components)]
        else:
            self.components = tuple(components)
            parts = [_bare(part) for part in self.components]
            count = len(parts)
        if not parts:
            raise ShapeError("Mixture needs at least one component.")
        if logits is None:
            logits = jnp.zeros(count, parts[0].dtype)
        self.logits = jnp.asarray(logits, parts[0].dtype)
        if self.logits.shape != (count,):
            raise ShapeError(
                f"Mixture: logits have shape {self.logits.shape}, for {count} components."
            )
        self.shape = parts[0].shape
        self.cond_shape = None
        for i, part in enumerate(parts):
            if part.space != parts[0].space:
                raise ShapeError(
                    f"Mixture: component 0 ({parts[0].name}) has events on {parts[0].space}, "
                    f"component {i} ({part.name}) on {part.space} (None: Lebesgue measure)."
                )
            if part.shape != self.shape:
                raise ShapeError(
                    f"Mixture: component 0 ({parts[0].name}) has events of shape {self.shape}, "
                    f"component {i} ({part.name}) of shape {part.shape}."
                )
            if part.cond_shape is None:
                continue
            if not is_shape(part.cond_shape) or self.cond_shape not in (None, part.cond_shape):
                raise ShapeError(
                    f"Mixture: component {i} ({part.name}) takes conditions {part.cond_shape}, but "
                    f"all components must share one array, so far of shape {self.cond_shape}; "
                    "embed a tree once, outside the mixture."
                )
            self.cond_shape = part.cond_shape

    @property
    def weights(self) -> Array:
        """The weights π, ``(K,)``."""
        return jax.nn.softmax(self.logits)

    @property
    def space(self):
        """That of the components."""
        return self._parts()[0].space

    @property
    def exactness(self) -> str:
        """The weakest exactness among the components: an estimate in a logarithm is a bound."""
        kinds = {part.exactness for part in self._parts()}
        return "biased" if "biased" in kinds else "exact" if kinds == {"exact"} else "bound"

    def _row_cost(self, direction: Direction) -> int:
        # Stacked components run side by side, separate ones one after the other.
        together = 1 if isinstance(self.components, tuple) else self.logits.size
        return (
            together * max(part._row_cost(direction) for part in self._parts())
            + 4 * self.logits.size
        )

    def _encode(self, condition, batch, batch_size):
        # A component with an embedding takes the condition as it is, integers included.
        if any(getattr(part, "embed", None) is not None for part in self._parts()):
            return self, condition
        return super()._encode(condition, batch, batch_size)

    def parts(self) -> list[AbstractDistribution]:
        """The components one by one, stacked ones taken apart."""
        if isinstance(self.components, tuple):
            return [_bare(part) for part in self.components]
        whole = _bare(self.components)
        return [
            jtu.tree_map(lambda x, i=i: x[i] if eqx.is_array(x) else x, whole)
            for i in range(self.logits.size)
        ]

    def _keep(self, chosen, drawn, x):
        """Take the drawn events where chosen; the event axes stand in front."""
        return jnp.where(chosen.reshape((1,) * len(self.shape) + chosen.shape), drawn, x)

    def _parts(self):
        if isinstance(self.components, tuple):
            return [_bare(part) for part in self.components]
        return [_first(self.components)]

    def _log_prob(self, x, condition=None, *, key=None):
        keys = None if key is None else jr.split(key, len(self.logits))
        if isinstance(self.components, tuple):
            terms = jnp.stack(
                [
                    part._log_prob(x, condition, key=None if keys is None else keys[i])
                    for i, part in enumerate(self._parts())
                ]
            )
        else:
            axes = (eqx.if_array(0), None if keys is None else 0)
            terms = eqx.filter_vmap(
                lambda part, key: part._log_prob(x, condition, key=key), in_axes=axes
            )(_bare(self.components), keys)
        return _log_sum(terms + expand(jax.nn.log_softmax(self.logits), terms.ndim))

    def _sample(self, key, batch=(), condition=None):
        choice_key, *keys = jr.split(key, len(self.logits) + 1)
        choice = _choose(choice_key, self.logits, math.prod(batch)).reshape(batch)
        if isinstance(self.components, tuple):
            x = jnp.zeros(self.shape + batch, self.dtype)
            for i, (part, part_key) in enumerate(zip(self._parts(), keys, strict=True)):
                x = self._keep(choice == i, part._sample(part_key, batch, condition), x)
            return x
        arrays, static = eqx.partition(_bare(self.components), eqx.is_array)

        def component(x, part):
            k, arrays, key = part
            drawn = eqx.combine(arrays, static)._sample(key, batch, condition)
            return self._keep(choice == k, drawn, x), None

        start = jnp.zeros(self.shape + batch, self.dtype)
        indices = jnp.arange(len(self.logits), dtype=jnp.int32)
        return lax.scan(component, start, (indices, arrays, jnp.stack(keys)))[0]


def _bare(part):
    return part.value if isinstance(part, Frozen) else part


def _leading(stacked) -> int:
    sizes = {
        x.shape[0] if x.ndim else 0 for x in jtu.tree_leaves(eqx.filter(stacked, eqx.is_array))
    }
    if len(sizes) != 1 or 0 in sizes:
        raise ShapeError(
            "Mixture: every array of the stacked components needs one leading component axis; "
            f"found leading sizes {sorted(sizes)}."
        )
    return sizes.pop()


def _first(stacked) -> AbstractDistribution:
    """The first of stacked components, by shapes alone."""
    return eqx.filter_eval_shape(
        lambda s: jtu.tree_map(lambda x: x[0] if eqx.is_array(x) else x, s), _bare(stacked)
    )


def assemble_factors(lower: Array, log_diagonal: Array) -> Array:
    """Lower triangular matrices ``(K, D, D)`` from strict triangles and logarithms of diagonals."""
    identity = jnp.eye(lower.shape[-1], dtype=lower.dtype)
    return jnp.tril(lower, -1) + jnp.exp(log_diagonal)[:, :, None] * identity[None]


def _log_sum(terms: Array) -> Array:
    """The logarithm of a sum over the first axis, with zero gradients where all terms are −∞."""
    nothing = (terms == -jnp.inf).all(0)
    safe = jnp.where(nothing[None], 0, terms)
    return jnp.where(nothing, -jnp.inf, jax.nn.logsumexp(safe, axis=0))


def _choose(key, logits: Array, rows: int) -> Array:
    """Draw component indices by the inverse distribution function: no array of rows × K."""
    cumulative = jnp.cumsum(jax.nn.softmax(lax.stop_gradient(logits)))
    uniform = jr.uniform(key, (rows,), logits.dtype) * cumulative[-1]
    found = jnp.searchsorted(cumulative, uniform, side="right").astype(jnp.int32)
    return jnp.minimum(found, logits.size - 1)


@jax.custom_jvp
def _square_distances(means: Array, x: Array) -> Array:
    """‖x_n − μ_k‖², ``(K, N)``, from ``(K, D)`` and ``(D, N)``.

    The values add up squared differences, exact next to a mean however far from the origin it
    lies; the derivative is bilinear and goes through matrix products, many times faster.
    """

    def add(total, row):
        x_row, mean_row = row
        difference = x_row[None, :] - mean_row[:, None]
        return total + difference * difference, None

    start = jnp.zeros((means.shape[0], x.shape[1]), x.dtype)
    return lax.scan(add, start, (x, means.T))[0]


@_square_distances.defjvp
def _square_distances_jvp(primals, tangents):
    means, x = primals
    # Distances do not change when all points move, and products near the origin keep their digits.
    centre = means.mean(0)
    d_means, d_x = tangents
    offset_means, offset_x = means - centre[None, :], x - centre[:, None]
    own = (offset_x * d_x).sum(0)[None, :] + (offset_means * d_means).sum(1)[:, None]
    crossed = product(offset_means, d_x) + product(d_means, offset_x)
    return _square_distances(means, x), 2 * (own - crossed)


def product(a: Array, b: Array) -> Array:
    """The matrix product at full precision on every device: squares of it are summed."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def float_dtype(value):
    """The floating-point dtype of an array-like, by default that of new arrays."""
    dtype = getattr(value, "dtype", None)
    inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    return jax.dtypes.canonicalize_dtype(dtype if inexact else float)


def log_weights(owner: str, weights: ArrayLike, count: int) -> np.ndarray:
    """Logarithms of weights scaled to sum to one; `owner` is named in errors."""
    weights = np.asarray(weights, np.float64)
    if weights.shape != (count,):
        raise ShapeError(f"{owner}: weights have shape {weights.shape}, for {count} components.")
    if not np.all(weights >= 0) or not weights.sum() > 0:
        raise InputError(f"{owner}: weights must be non-negative, with a positive sum.")
    # A weight of zero keeps a finite logit, so that its gradient is a number.
    return np.log(np.maximum(weights / weights.sum(), 1e-30))


def inverse_factors(owner: str, covariances, count: int, dim: int) -> np.ndarray:
    """The inverses of the Cholesky factors, ``(K, D, D)``, in double precision."""
    if covariances is None:
        covariances = np.ones(count)
    covariances = np.asarray(covariances, np.float64)
    if covariances.shape == (count,):
        covariances = np.repeat(covariances[:, None], dim, axis=1)
    if covariances.shape == (count, dim):
        covariances = covariances[:, :, None] * np.eye(dim)
    if covariances.shape != (count, dim, dim):
        raise ShapeError(
            f"{owner}: covariances have shape {covariances.shape}; with {count} components "
            f"of {dim} entries they must be {(count, dim, dim)}, {(count, dim)} or {(count,)}."
        )
    try:
        factors = np.linalg.cholesky(covariances)
    except np.linalg.LinAlgError as error:
        raise InputError(f"{owner}: a covariance is not positive definite.") from error
    return np.tril(np.linalg.solve(factors, np.broadcast_to(np.eye(dim), factors.shape)))
