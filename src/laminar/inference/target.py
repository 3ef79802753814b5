"""Targets: a posterior's log density as a function of one unconstrained vector.

    ln p̃(z) = ln p(θ(z), data) + ln |dθ/dz|,        z ∈ ℝ^D

θ(z) maps to the user's constrained values by NumPyro's transforms. Densities of constrained values
are with respect to Lebesgue measure on their free coordinates: the first K − 1 entries of a
simplex, the strict lower triangle of a correlation matrix or of its Cholesky factor.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from laminar._errors import InputError, ShapeError
from laminar._typing import Array, PRNGKeyArray, PyTree, Shape
from laminar.inference.evaluate import slopes
from laminar.inference.models import open_model
from laminar.inference.supports import (
    Leaf,
    Way,
    leaf_name,
    leaf_shapes,
    make_leaf,
    scalar_names,
    spread_supports,
)

STARTS = 64
_TOLERATED = 0.2
"""The part of the starting points, far from the mass as some are, that may fail numerically."""


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """An unnormalised log density over ℝ^D with the way to the user's values; see `as_target`.

    It compares and hashes by identity, so it may be closed over or be a static argument.

    Attributes:
        dim: Length D of the unconstrained vector.
        names: Names of the constrained scalars, as ``"theta[0]"``. There may be more than D, as of
            a simplex or a correlation matrix.
        dtype: Dtype of z and of the log density.
        leaves: The arrays of the user's values and their places in z.
        model: The NumPyro model, if it is one, else None.
        args: Positional arguments of the model or log density.
        kwargs: Keyword arguments likewise.
        way: What evaluates single vectors for the methods.
    """

    dim: int
    names: tuple[str, ...]
    dtype: Any
    leaves: tuple[Leaf, ...] = dataclasses.field(repr=False)
    model: Callable | None
    args: tuple = dataclasses.field(repr=False)
    kwargs: dict[str, Any] = dataclasses.field(repr=False)
    way: Way = dataclasses.field(repr=False)

    @property
    def coordinates(self) -> tuple[str, ...]:
        """Names of the D coordinates of z, after the values that they give."""
        return tuple(
            f"{name} (unconstrained)"
            for leaf in self.leaves
            for name in scalar_names(leaf.name, leaf.raw_shape)
        )

    def log_density(self, z: Array) -> Array:
        """The log density ln p̃(z) of one vector ``(D,)``, the log-Jacobian included: ``()``."""
        return self.way.log_density(z)

    def potential(self, z: Array) -> Array:
        """The potential energy −ln p̃(z), as NumPyro's samplers take it (``potential_fn``)."""
        return -self.way.log_density(z)

    def log_jacobian(self, z: Array) -> Array:
        """The logarithm of |d constrained / d unconstrained| at one vector ``(D,)``: ``()``.

        The density of constrained values is ``log q(z) − log_jacobian(z)``.
        """
        return self.way.log_jacobian(z)

    def constrain(self, z: Array) -> PyTree:
        """The user's constrained values of vectors ``(..., D)``, with the same leading axes.

        Raises:
            ShapeError: If the last axis has not length D.
        """
        return _batched("constrain", self, self._vectors(z))

    def deterministics(self, z: Array) -> dict[str, Array]:
        """Values of the model's ``deterministic`` sites at vectors ``(..., D)``; {} without any."""
        return _batched("deterministics", self, self._vectors(z))

    def unconstrain(self, values: PyTree) -> Array:
        """The vectors ``(..., D)`` of constrained values with any leading axes.

        Raises:
            InputError: If the values have another structure than the target's.
            ShapeError: If their shapes do not fit.
        """
        found = self.named(values)
        batch, arrays = None, []
        for leaf in self.leaves:
            array = jnp.asarray(found[leaf.name], self.dtype)
            split = array.ndim - len(leaf.shape)
            if split < 0 or array.shape[split:] != leaf.shape:
                raise ShapeError(
                    f"unconstrain: {leaf.name} has shape {array.shape}, but one value has shape "
                    f"{leaf.shape} (batch axes first)."
                )
            if batch not in (None, array.shape[:split]):
                raise ShapeError(
                    f"unconstrain: {leaf.name} has batch axes {array.shape[:split]}, the values "
                    f"before it {batch}."
                )
            batch = array.shape[:split]
            arrays.append(array)
        return _unconstrain(self, batch or (), arrays)

    def named(self, values: PyTree) -> dict[str, Array]:
        """The user's values as one flat dictionary of arrays, by name, in the order of `leaves`.

        Raises:
            InputError: If the values have another structure than the target's.
        """
        return self.way.named(values)

    def start(self, key: PRNGKeyArray, n: int) -> Array:
        """Dispersed starting points, ``(n, D)``: uniform on [−2, 2]^D where nothing is known."""
        return self.way.start(key, n, self.dtype)

    def check(self, key: PRNGKeyArray, n: int = STARTS) -> tuple[str, ...]:
        """Look for what would make inference fail, at n starting points.

        Args:
            key: Draws the starting points.
            n: How many.

        Returns:
            Sentences about what is odd but can be lived with; empty where nothing is.

        Raises:
            InputError: If the log density is NaN, +∞ or not differentiable at more than a fifth of
                the starting points, zero at all of them, or does not depend on a parameter; the
                message says where.
        """
        z = np.asarray(self.start(key, n))
        try:
            values, gradients = slopes(self.log_density, z, self.dtype)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise InputError(
                f"The log density cannot be differentiated: {_first_line(error)}"
            ) from error
        return _judge(self, z, values, gradients)

    def _vectors(self, z: Array) -> Array:
        if jnp.shape(z)[-1:] != (self.dim,):
            raise ShapeError(
                f"z has shape {jnp.shape(z)}, but the target takes vectors (…, {self.dim})."
            )
        return jnp.asarray(z, self.dtype)


def as_target(
    target: Callable | Target,
    *args: Any,
    supports: PyTree = None,
    example: PyTree = None,
    dtype: Any = None,
    **kwargs: Any,
) -> Target:
    """Make a target of a JAX log density or of a NumPyro model.

        as_target(model, data)                                     # a NumPyro model
        as_target(log_density, example=3)                          # over vectors of length 3
        as_target(log_density, example={"mu": (), "sd": (2,)}, supports={"sd": "positive"})

    Args:
        target: ``target(values, *args, **kwargs)``, the log density up to a constant, in pure JAX,
            where `example` says what values are; or else a NumPyro model, called as
            ``target(*args, **kwargs)``, whose unobserved sites are the parameters.
        *args: Further arguments.
        supports: For a log density, where its parameters live: a tree of NumPyro constraints, of
            the words ``"real"``, ``"positive"``, ``"unit_interval"``, ``"simplex"``, ``"ordered"``,
            ``"positive_ordered"``, ``"correlation"``, ``"correlation_cholesky"`` or
            ``"covariance"``, or of tuples ``("interval", a, b)``, ``("greater_than", a)`` or
            ``("less_than", b)``. It may be a prefix of the example; what is left out is real.
        example: For a log density, the structure of its values: a tree of arrays, of shapes
            (tuples), of ``jax.ShapeDtypeStruct`` or of lengths of vectors.
        dtype: Floating-point dtype, float32 or float64. By default JAX's own default: float32, or
            float64 where the user has enabled it.
        **kwargs: Further keyword arguments.

    Raises:
        InputError: If a dtype is not supported, the structure and the supports do not fit, the log
            density is no real scalar, or the model has discrete, subsampled or changing sites.
        MissingExtraError: If NumPyro is not installed.
    """
    if isinstance(target, Target):
        given = args or kwargs or any(x is not None for x in (supports, example, dtype))
        if given:
            raise InputError("The target is ready-made, so it takes no further arguments.")
        return target
    if not callable(target):
        raise InputError(
            f"A target is a log density or a NumPyro model, not {type(target).__name__}."
        )
    dtype = _check_dtype(dtype)
    if example is None:
        if supports is not None:
            raise InputError(
                "supports= belongs to a log density, whose values example= must describe; a "
                "NumPyro model says itself where its sites live."
            )
        way = open_model(target, args, kwargs)
        return _build(way, dtype, target, args, kwargs)
    return _density_target(target, args, kwargs, supports, example, dtype)


def _check_dtype(dtype: Any) -> Any:
    if dtype is None:
        return jnp.result_type(float)
    try:
        asked = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"dtype {dtype!r} is no dtype; choose float32 or float64.") from error
    if asked not in (jnp.float32, jnp.float64):
        raise InputError(f"dtype {asked} is not supported; choose float32 or float64.")
    if asked != jax.dtypes.canonicalize_dtype(asked):
        raise InputError(
            "float64 is switched off in JAX: call jax.config.update('jax_enable_x64', True) first."
        )
    return asked


@dataclasses.dataclass(frozen=True, eq=False)
class _Density(Way):
    """A JAX log density over a tree of values with declared supports."""

    function: Callable
    leaves: tuple[Leaf, ...]
    structure: Any

    def log_density(self, z):
        log_p = self.function(self.constrain(z))
        return jnp.asarray(log_p).astype(z.dtype) + self.log_jacobian(z)

    def log_jacobian(self, z):
        return sum(
            (leaf.log_jacobian(_cut(leaf, z)) for leaf in self.leaves), jnp.zeros((), z.dtype)
        )

    def constrain(self, z):
        return jtu.tree_unflatten(
            self.structure, [leaf.constrain(_cut(leaf, z)) for leaf in self.leaves]
        )

    def unconstrain(self, arrays):
        raw = [leaf.unconstrain(x) for leaf, x in zip(self.leaves, arrays, strict=True)]
        return jnp.concatenate([x.reshape(-1) for x in raw])

    def named(self, values):
        try:
            found = self.structure.flatten_up_to(values)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"The values are no tree like the example, {self.structure}."
            ) from error
        return {leaf.name: x for leaf, x in zip(self.leaves, found, strict=True)}


def _density_target(function, args, kwargs, supports, example, dtype) -> Target:
    shapes = leaf_shapes(example, dtype)
    paths, structure = jtu.tree_flatten_with_path(shapes)
    if not paths:
        raise InputError("example holds no array, so there is nothing to infer.")
    leaves, start = [], 0
    for (path, spec), support in zip(paths, spread_supports(supports, shapes), strict=True):
        leaves.append(make_leaf(leaf_name(path), spec.shape, support, start))
        start = leaves[-1].stop

    def applied(values):
        return function(values, *args, **kwargs)

    way = _Density(applied, tuple(leaves), structure)
    return _build(way, dtype, None, args, kwargs)


def _build(way: Way, dtype, model, args, kwargs) -> Target:
    """The target of a way from vectors to values, once its log density is tried."""
    leaves = way.leaves
    names = tuple(name for leaf in leaves for name in scalar_names(leaf.name, leaf.shape))
    made = Target(leaves[-1].stop, names, dtype, leaves, model, args, kwargs, way)
    if made.dim == 0:
        raise InputError("The target has no parameter to infer.")
    _check_value(made)
    return made


def _check_value(target: Target) -> None:
    """Refuse what is no real scalar, by an abstract evaluation."""
    z = jax.ShapeDtypeStruct((target.dim,), target.dtype)
    function, argument = target.log_density, z
    if isinstance(target.way, _Density):
        # The user's own function, before what is added to it changes its shape.
        function, argument = target.way.function, jax.eval_shape(target.way.constrain, z)
    try:
        out = jax.eval_shape(function, argument)
    except jax.errors.ConcretizationTypeError as error:
        raise InputError(
            "The target decides in Python on the value of a parameter, which cannot be compiled; "
            "use jax.numpy.where or jax.lax.cond."
        ) from error
    except jax.errors.TracerArrayConversionError as error:
        raise InputError(
            "The target calls NumPy on a parameter, which cannot be compiled; use jax.numpy."
        ) from error
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if dtype is None:
        raise InputError(f"The log density must return one number, not {type(out).__name__}.")
    if shape != ():
        raise ShapeError(
            f"The log density returns shape {shape}, but must return a scalar of shape (): sum it "
            "over its terms, and leave batches of parameters to the library."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"The log density has dtype {dtype}, but must be a floating-point number.")


def _cut(leaf: Leaf, z: Array) -> Array:
    return z[leaf.start : leaf.stop].reshape(leaf.raw_shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batched(method: str, target: Target, z: Array) -> PyTree:
    """A method of one vector mapped over any leading axes."""
    batch: Shape = z.shape[:-1]
    out = jax.vmap(getattr(target.way, method))(z.reshape(-1, target.dim))
    return jtu.tree_map(lambda x: x.reshape(batch + x.shape[1:]), out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unconstrain(target: Target, batch: Shape, arrays: list[Array]) -> Array:
    pairs = zip(target.leaves, arrays, strict=True)
    flat = [x.reshape(-1, *leaf.shape) for leaf, x in pairs]
    return jax.vmap(target.way.unconstrain)(flat).reshape(*batch, target.dim)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _judge(target: Target, z, values, gradients) -> tuple[str, ...]:
    """What `Target.check` says about log densities and gradients at starting points."""
    n, odd = len(z), []
    for what, bad in (("NaN", np.isnan(values)), ("+∞", values == np.inf)):
        if bad.any():
            said = (
                f"The log density is {what} at {bad.sum()} of {n} starting points"
                f"{_culprits(target, z[bad][0])}, as at {in_words(target, z[bad][0])}."
            )
            if bad.mean() > _TOLERATED:
                raise InputError(said)
            odd.append(said)
    alive = np.isfinite(values)
    if not alive.any():
        raise InputError(
            f"The log density is −∞ at all {n} starting points{_culprits(target, z[0])}, as at "
            f"{in_words(target, z[0])}: declare where the parameters live."
        )
    broken = ~np.isfinite(gradients) & alive[:, None]
    if broken.any(1).mean() > _TOLERATED:
        row = int(np.argmax(broken.any(1)))
        raise InputError(
            f"The log density is finite but its gradient is not at {broken.any(1).sum()} of {n} "
            f"starting points, in {_list(_parameters(target, broken.any(0)))}, as at "
            f"{in_words(target, z[row])}: look for a square root, logarithm or norm at zero."
        )
    flat = (gradients[alive] == 0).all(0)
    if flat.any():
        raise InputError(
            f"The log density does not change with {_list(_parameters(target, flat))} at any of "
            f"{n} starting points: it is improper there, or not differentiable."
        )
    if broken.any():
        odd.append(
            f"The gradient of the log density is not finite at {broken.any(1).sum()} of {n} "
            f"starting points, in {_list(_parameters(target, broken.any(0)))}."
        )
    outside = int((values == -np.inf).sum())
    if outside:
        odd.append(f"The log density is −∞ at {outside} of {n} starting points.")
    return tuple(odd)


def _parameters(target: Target, mask) -> list[str]:
    """Names of the parameters that some coordinates belong to: scalars where these are known."""
    found = []
    for leaf in target.leaves:
        part = mask[leaf.start : leaf.stop]
        if part.any() and leaf.raw_shape == leaf.shape:
            names = scalar_names(leaf.name, leaf.shape)
            found += [name for name, bad in zip(names, part, strict=True) if bad]
        elif part.any():
            found.append(leaf.name)
    return found


def _culprits(target: Target, z) -> str:
    """The sites of a model that are to blame for a density that is not finite."""
    found = target.way.guilty(jnp.asarray(z))
    return f" because of {_list(found)}" if found else ""


def in_words(target: Target, z, most: int = 4) -> str:
    """A vector as the user's values, for a message."""
    values = target.named(target.constrain(jnp.asarray(z, target.dtype)))
    words = [
        f"{name} = {np.array2string(np.asarray(x), precision=3, threshold=4, edgeitems=2)}"
        for name, x in values.items()
    ]
    return _list(words, most)


def _list(words: list[str], most: int = 5) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
