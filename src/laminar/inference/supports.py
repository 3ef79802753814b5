"""Where parameters live: words for NumPyro's constraints, and flat vectors for trees of values."""

import abc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from laminar._errors import InputError, MissingExtraError, ShapeError
from laminar._typing import Array, PRNGKeyArray, PyTree, Shape
from laminar.density import is_shape

Support: TypeAlias = Any
"""A NumPyro constraint, one of `WORDS`, or a tuple of a word of `BOUNDED` and its bounds."""

WORDS = {
    "real": "real",
    "positive": "positive",
    "unit_interval": "unit_interval",
    "simplex": "simplex",
    "ordered": "ordered_vector",
    "positive_ordered": "positive_ordered_vector",
    "correlation": "corr_matrix",
    "correlation_cholesky": "corr_cholesky",
    "covariance": "positive_definite",
}
"""Words for supports, and what NumPyro calls them."""
BOUNDED = {"interval": 2, "greater_than": 1, "less_than": 1}
"""Words that take bounds, as in ``("interval", 0.0, 2.0)``, and how many."""

_LARGEST_NAMED = 100_000


def load_numpyro() -> Any:
    """The package NumPyro, or a `MissingExtraError` that says how to get it."""
    try:
        import numpyro
        import numpyro.distributions
        import numpyro.infer
    except ImportError as error:
        raise MissingExtraError("numpyro", "inference", "Bayesian inference") from error
    return numpyro


@contextmanager
def permissive() -> Iterator[None]:
    """NumPyro promotes dtypes and ranks, which a user of JAX's strict settings has switched off."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Leaf(NamedTuple):
    """One array of the user's values, and its place in the unconstrained vector.

    Attributes:
        name: What the user calls it, as ``"theta"`` or ``"group.scale"``.
        shape: Shape of the constrained array.
        raw_shape: Shape of the unconstrained one.
        start: Where its entries begin in the unconstrained vector.
        transform: NumPyro's transform, unconstrained to constrained, or None for the identity. In a
            model whose supports depend on other sites it is one of many, of the right shapes.
    """

    name: str
    shape: Shape
    raw_shape: Shape
    start: int
    transform: Any

    @property
    def stop(self) -> int:
        """Where the entries end in the unconstrained vector."""
        return self.start + math.prod(self.raw_shape)

    def constrain(self, raw: Array) -> Array:
        """The constrained array ``(..., *shape)`` of an unconstrained one ``(..., *raw_shape)``."""
        if self.transform is None:
            return raw
        with permissive():
            return self.transform(raw)

    def unconstrain(self, value: Array) -> Array:
        """The unconstrained array ``(..., *raw_shape)`` of a constrained one ``(..., *shape)``."""
        if self.transform is None:
            return value
        with permissive():
            return self.transform.inv(value)

    def log_jacobian(self, raw: Array) -> Array:
        """The logarithm of |d constrained / d unconstrained| at one array ``raw_shape``."""
        if self.transform is None:
            return jnp.zeros((), raw.dtype)
        with permissive():
            return log_det(self.transform, raw, self.transform(raw))


class Way(abc.ABC):
    """From single unconstrained vectors to the user's values, and the log density on that way.

    Attributes:
        leaves: The arrays of the user's values, in the order of the vector.
    """

    leaves: tuple[Leaf, ...]

    @abc.abstractmethod
    def log_density(self, z: Array) -> Array:
        """The log density of one vector ``(D,)``, log-Jacobian included: ``()``."""

    @abc.abstractmethod
    def log_jacobian(self, z: Array) -> Array:
        """The logarithm of |d constrained / d unconstrained| at one vector: ``()``."""

    @abc.abstractmethod
    def constrain(self, z: Array) -> PyTree:
        """The user's values at one vector."""

    @abc.abstractmethod
    def unconstrain(self, arrays: list[Array]) -> Array:
        """The vector of one array for each leaf."""

    @abc.abstractmethod
    def named(self, values: PyTree) -> dict[str, Array]:
        """The user's values as a flat dictionary, in the order of the leaves."""

    def deterministics(self, z: Array) -> dict[str, Array]:
        """What a model computes of its parameters, at one vector."""
        return {}

    def guilty(self, z: Array) -> list[str]:
        """The parts of a model whose log density is not finite at one vector."""
        return []

    def start(self, key: PRNGKeyArray, n: int, dtype: Any) -> Array:
        """Dispersed vectors, ``(n, D)``: uniform on [−2, 2]^D, as in NumPyro and Stan."""
        return jr.uniform(key, (n, self.leaves[-1].stop), dtype, -2.0, 2.0)


def log_det(transform: Any, raw: Array, value: Array) -> Array:
    """The logarithm of |d value / d raw| of a NumPyro transform, summed over batch axes.

    For correlations it is computed from `raw`: NumPyro's own formula takes logarithms of small
    differences and is NaN from about |raw| = 5 on in float32.
    """
    transforms = load_numpyro().distributions.transforms
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    parts = getattr(transform, "parts", [transform])
    if isinstance(parts[0], transforms.CorrCholeskyTransform) and len(parts) <= 2:
        return _correlation_log_det(raw, value.shape[-1], whole=len(parts) == 2)
    return jnp.sum(transform.log_abs_det_jacobian(raw, value))


def _correlation_log_det(raw: Array, size: int, whole: bool) -> Array:
    """The log-Jacobian of a correlation matrix (`whole`) or of its Cholesky factor.

    Row i of the factor has L_ij = r_ij Π_{k<j} √(1 − r_ik²) with r = tanh(raw), so its logarithm is
    Σ_k (1 + (i − 1 − k)/2) ln(1 − r_ik²). The matrix adds (size − 1 − i) ln L_ii for each row.
    """
    row, column = np.tril_indices(size, -1)
    weight = 1 + 0.5 * (row - 1 - column) + whole * 0.5 * (size - 1 - row)
    log_cosh = jnp.abs(raw) + jnp.log1p(jnp.exp(-2 * jnp.abs(raw))) - math.log(2)
    return -2 * jnp.sum(jnp.asarray(weight, raw.dtype) * log_cosh)


def make_leaf(name: str, shape: Shape, support: Support, start: int) -> Leaf:
    """The leaf of an array with a support.

    Raises:
        InputError: If the support is discrete, unknown or has no bijection from real vectors.
        ShapeError: If the array's shape cannot have that support.
    """
    constraint = as_constraint(support, name)
    numpyro = load_numpyro()
    if constraint.is_discrete:
        raise InputError(
            f"{name}: {constraint} is a discrete support, which no flow reaches; sum the "
            "parameter out of the log density."
        )
    base = getattr(constraint, "base_constraint", constraint)
    if base is numpyro.distributions.constraints.real:
        return Leaf(name, shape, shape, start, None)
    if len(shape) < constraint.event_dim:
        raise ShapeError(
            f"{name}: shape {shape} has too few axes for the support {constraint}, which takes "
            f"{constraint.event_dim}."
        )
    try:
        transform = numpyro.distributions.biject_to(constraint)
        with permissive():
            raw_shape = tuple(transform.inverse_shape(shape))
    except NotImplementedError as error:
        raise InputError(
            f"{name}: no smooth bijection from real vectors to {constraint} is known; choose one "
            f"of {', '.join(WORDS)} or another parametrisation."
        ) from error
    except ValueError as error:
        raise ShapeError(f"{name}: shape {shape} does not fit {constraint}: {error}") from error
    if any(n < 1 for n in raw_shape) and math.prod(shape):
        raise ShapeError(
            f"{name}: shape {shape} with the support {constraint} leaves nothing to infer."
        )
    return Leaf(name, shape, raw_shape, start, transform)


def as_constraint(support: Support, name: str) -> Any:
    """The NumPyro constraint of a word, a bounded word or a constraint."""
    constraints = load_numpyro().distributions.constraints
    if isinstance(support, constraints.Constraint):
        return support
    if isinstance(support, str) and support in WORDS:
        return getattr(constraints, WORDS[support])
    if _is_bounded(support):
        word: str = support[0]
        bounds: list[Any] = list(support[1:])
        if any(isinstance(b, bool) or not isinstance(b, int | float) for b in bounds):
            raise InputError(f"{name}: the bounds of {support} must be numbers.")
        if not all(map(math.isfinite, bounds)) or bounds != sorted(set(bounds)):
            raise InputError(f"{name}: the bounds of {support} must be finite and ascending.")
        return getattr(constraints, word)(*map(float, bounds))
    raise InputError(
        f"{name}: {support!r} is no support; give a NumPyro constraint, one of "
        f"{', '.join(WORDS)}, or a tuple such as ('interval', 0.0, 1.0)."
    )


def _is_bounded(x: Any) -> bool:
    if not (isinstance(x, tuple) and x and isinstance(x[0], str)):
        return False
    return len(x) == 1 + BOUNDED.get(x[0], -1)


def is_support(x: Any) -> bool:
    """Whether x describes one support, and is not a tree of them."""
    constraints = load_numpyro().distributions.constraints
    # A tuple of words is a tree; but a word that takes bounds shows that one support is meant.
    named = isinstance(x, tuple) and bool(x) and isinstance(x[0], str) and x[0] in BOUNDED
    return x is None or named or isinstance(x, str | constraints.Constraint)


def leaf_shapes(example: PyTree, dtype: Any) -> PyTree:
    """A tree of ``jax.ShapeDtypeStruct`` like an example of arrays, shapes and lengths.

    Raises:
        InputError: If a leaf is neither, or no floating-point array.
    """

    def one(path, x):
        name = leaf_name(path)
        if isinstance(x, bool) or not (
            is_shape(x) or isinstance(x, int | float) or hasattr(x, "shape")
        ):
            raise InputError(
                f"example: {name} is {x!r}; give an array, a shape or the length of a vector."
            )
        if is_shape(x):
            return jax.ShapeDtypeStruct(x, dtype)
        if isinstance(x, int):
            return jax.ShapeDtypeStruct((x,), dtype)
        found = np.result_type(x) if isinstance(x, float) else x.dtype
        if not jnp.issubdtype(found, jnp.floating):
            raise InputError(
                f"example: {name} has dtype {found}, but a density is over floating-point arrays."
            )
        return jax.ShapeDtypeStruct(np.shape(x) if isinstance(x, float) else x.shape, dtype)

    return jtu.tree_map_with_path(one, example, is_leaf=is_shape)


def spread_supports(supports: PyTree, shapes: PyTree) -> list[Support]:
    """One support for each leaf of a tree of shapes, from a prefix tree of supports.

    A missing support, and a key that a dictionary lacks, means the whole real line.

    Raises:
        InputError: If the supports are no prefix of the tree.
    """

    def walk(supports, node, path):
        if is_support(supports):
            support = "real" if supports is None else supports
            return [support] * len(jtu.tree_leaves(node))
        if isinstance(supports, dict) and isinstance(node, dict):
            unknown = [key for key in supports if key not in node]
            if unknown:
                raise InputError(
                    f"supports names {', '.join(map(repr, unknown))}, but the example has "
                    f"{', '.join(map(repr, node))}."
                )
            # JAX flattens a dictionary by its sorted keys.
            parts = [walk(supports.get(k), node[k], (*path, str(k))) for k in sorted(node)]
            return [s for part in parts for s in part]
        if isinstance(supports, list | tuple) and type(supports) is type(node):
            if len(supports) != len(node):
                raise InputError(
                    f"supports: {'.'.join(path) or 'supports'} has {len(supports)} parts, the "
                    f"example {len(node)}."
                )
            pairs = enumerate(zip(supports, node, strict=True))
            parts = [walk(s, n, (*path, str(i))) for i, (s, n) in pairs]
            return [s for part in parts for s in part]
        try:
            full = jtu.tree_broadcast(supports, node, is_leaf=is_support)
            return jtu.tree_leaves(full, is_leaf=is_support)
        except ValueError as error:
            where = ".".join(path) or "supports"
            raise InputError(
                f"supports: {where} is {supports!r}, which is no prefix of the example."
            ) from error

    found = walk(supports, shapes, ())
    return ["real" if s is None else s for s in found]


def leaf_name(path: tuple) -> str:
    """The dotted name of a leaf, ``"x"`` for a bare array."""
    words = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    return ".".join(words) or "x"


def scalar_names(name: str, shape: Shape) -> tuple[str, ...]:
    """Names of the entries of an array: ``theta[0]``, ``L[1,0]``, or the bare name of a scalar.

    Raises:
        ShapeError: If the array is too large for its entries to be named.
    """
    if math.prod(shape) > _LARGEST_NAMED:
        raise ShapeError(f"{name} has shape {shape}: more than {_LARGEST_NAMED:,} parameters.")
    if not shape:
        return (name,)
    return tuple(f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*shape))
