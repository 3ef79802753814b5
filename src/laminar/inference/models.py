"""NumPyro models as targets: which are refused, and how their sites become one vector."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from laminar._errors import InputError
from laminar._typing import Array
from laminar.inference.supports import Leaf, Way, load_numpyro, log_det, make_leaf, permissive

_TRACES = 2
"""How often a model is run to see whether its sites stay the same."""


def open_model(model: Callable, args: tuple, kwargs: dict[str, Any]) -> "Model":
    """A NumPyro model made ready to be evaluated at unconstrained vectors.

    Raises:
        InputError: If the model has no unobserved site, or one that is discrete, deterministic in
            disguise, subsampled or not always there.
    """
    traces = [_trace(model, args, kwargs, seed) for seed in range(_TRACES)]
    latent = _latent(traces[0])
    _refuse(model, traces, latent)
    leaves, start = [], 0
    for name, site in latent.items():
        # A support that depends on other sites gives the same shapes, which is all that is read.
        leaves.append(make_leaf(name, np.shape(site["value"]), site["fn"].support, start))
        start = leaves[-1].stop
    values = {name: site["value"] for name, site in latent.items()}
    return Model(
        model, args, kwargs, tuple(leaves), _has_moving_supports(model, args, kwargs, values)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Model(Way):
    """A NumPyro model as a function of unconstrained vectors.

    Where supports depend on the values of other sites (``moving``), the model is run to learn the
    transforms; else those of the leaves serve.
    """

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    leaves: tuple[Leaf, ...]
    moving: bool

    def log_density(self, z):
        """The log joint density of one vector, log-Jacobian included."""
        util = load_numpyro().infer.util
        with permissive():
            joint, _ = util.log_density(self._seeded(), self.args, self.kwargs, self.constrain(z))
        return jnp.asarray(joint).astype(z.dtype) + self.log_jacobian(z)

    def log_jacobian(self, z):
        """The logarithm of |d constrained / d unconstrained| at one vector."""
        raw, values = self._raw(z), self.constrain(z)
        transforms = self._transforms(values)
        with permissive():
            terms = [
                log_det(transform, raw[name], values[name])
                for name, transform in transforms.items()
                if transform is not None
            ]
        return sum((term.astype(z.dtype) for term in terms), jnp.zeros((), z.dtype))

    def constrain(self, z):
        """The values of the sites at one vector."""
        raw = self._raw(z)
        if not self.moving:
            return {leaf.name: leaf.constrain(raw[leaf.name]) for leaf in self.leaves}
        found = self._sites(z, deterministic=False)
        return {leaf.name: found[leaf.name] for leaf in self.leaves}

    def deterministics(self, z):
        """The values of the deterministic sites at one vector."""
        latent = {leaf.name for leaf in self.leaves}
        found = self._sites(z, deterministic=True)
        return {name: x for name, x in found.items() if name not in latent}

    def unconstrain(self, arrays):
        """The vector of the sites' values, in the order of the leaves."""
        values = {leaf.name: x for leaf, x in zip(self.leaves, arrays, strict=True)}
        transforms = self._transforms(values)
        with permissive():
            raw = [x if (t := transforms[k]) is None else t.inv(x) for k, x in values.items()]
        return jnp.concatenate([x.reshape(-1) for x in raw])

    def named(self, values):
        """The sites' values in the order of the leaves."""
        names = {leaf.name for leaf in self.leaves}
        given = set(values) if isinstance(values, dict) else None
        if given is None or not names <= given:
            missing = sorted(names - (given or set()))
            raise InputError(f"The values lack the model's sites {', '.join(missing)}.")
        return {leaf.name: values[leaf.name] for leaf in self.leaves}

    def guilty(self, z: Array) -> list[str]:
        """The sites whose log density is not finite at one vector."""
        util = load_numpyro().infer.util

        # Compiled, since NumPyro warns of values that it can look at.
        @jax.jit
        def terms(z):
            values = self.constrain(z)
            return util.compute_log_probs(self._seeded(), self.args, self.kwargs, values)[0]

        with permissive():
            found = terms(z)
        return [name for name, value in found.items() if not bool(jnp.isfinite(value))]

    def _seeded(self):
        # A handler made anew for each use: it changes its key while the model is traced.
        return load_numpyro().handlers.seed(self.model, jr.key(0))

    def _raw(self, z) -> dict[str, Array]:
        return {
            leaf.name: z[leaf.start : leaf.stop].reshape(leaf.raw_shape) for leaf in self.leaves
        }

    def _sites(self, z, deterministic: bool) -> dict[str, Array]:
        with permissive():
            return load_numpyro().infer.util.constrain_fn(
                self._seeded(), self.args, self.kwargs, self._raw(z), deterministic
            )

    def _transforms(self, values) -> dict[str, Any]:
        if not self.moving:
            return {leaf.name: leaf.transform for leaf in self.leaves}
        with permissive():
            return load_numpyro().infer.util.get_transforms(
                self._seeded(), self.args, self.kwargs, values
            )


def _has_moving_supports(model, args, kwargs, values: dict[str, Array]) -> bool:
    """Whether some support is computed while the model runs, so may depend on other sites."""
    handlers = load_numpyro().handlers

    def found(values):
        seeded = handlers.seed(handlers.substitute(model, data=values), jr.key(0))
        with permissive():
            sites = _latent(handlers.trace(seeded).get_trace(*args, **kwargs))
        bounds = [jtu.tree_leaves(site["fn"].support) for site in sites.values()]
        moving.append(any(isinstance(x, Tracer) for leaves in bounds for x in leaves))

    moving: list[bool] = []
    try:
        jax.eval_shape(found, values)
    except jax.errors.JAXTypeError:
        # The model cannot be compiled, of which the trial of its density will tell.
        return True
    return moving[0]


def _trace(model, args, kwargs, seed: int) -> dict[str, Any]:
    """The sites of one run of a model, with latent values near the middle of their supports."""
    numpyro = load_numpyro()
    handlers, start = numpyro.handlers, functools.partial(numpyro.infer.init_to_uniform)
    seeded = handlers.substitute(handlers.seed(model, jr.key(seed)), substitute_fn=start())
    name = getattr(model, "__name__", type(model).__name__)
    try:
        with permissive():
            return handlers.trace(seeded).get_trace(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{name} cannot be run as a NumPyro model with the arguments given ({error}); for a "
            "log density, describe its values by example=."
        ) from error


def _latent(trace: dict[str, Any]) -> dict[str, Any]:
    return {k: s for k, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}


def _refuse(model, traces, latent) -> None:
    """Name what makes a model no target."""
    delta = load_numpyro().distributions.Delta
    name = getattr(model, "__name__", type(model).__name__)
    sites = traces[0].items()
    discrete = [k for k, s in latent.items() if s["fn"].support.is_discrete]
    fixed = [k for k, s in latent.items() if isinstance(s["fn"], delta)]
    free = [k for k, s in sites if s["type"] == "param"]
    mini = [
        k for k, s in sites if s["type"] == "plate" and s["args"][1] not in (None, s["args"][0])
    ]
    for found, what in (
        (
            discrete,
            "discrete latent sites {}, which no flow reaches: sum them out, or pass their data",
        ),
        (fixed, "sample sites {} with a delta distribution: use numpyro.deterministic"),
        (free, "param sites {}, which have no prior: use numpyro.sample"),
        (mini, "plates {} that take subsamples, so its density is random: use all data"),
    ):
        if found:
            raise InputError(f"{name} has {what.format(', '.join(found))}.")
    shapes = [{k: np.shape(s["value"]) for k, s in _latent(t).items()} for t in traces]
    changed = {
        k for found in shapes for k in {*found, *shapes[0]} if found.get(k) != shapes[0].get(k)
    }
    if changed:
        raise InputError(
            f"{name} has sites {', '.join(sorted(changed))} that are not there, or not of one "
            "shape, in every run; a posterior needs a fixed set of parameters."
        )
    if not any(math.prod(shape) for shape in shapes[0].values()):
        raise InputError(
            f"{name} has no unobserved sample site to infer; for a log density, describe its "
            "values by example=."
        )
