"""Flows in NumPyro: as a distribution, as an automatic guide, and as a preconditioner of samplers.

numpyro.sample("x", FlowDistribution(flow))                          # in a model
SVI(model, AutoFlow(model), optax.adam(1e-3), Trace_ELBO())          # as a guide
NUTS(potential_fn=neutra(target, flow).potential)                    # neural transport
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from laminar._errors import InputError, ShapeError
from laminar._params import partition
from laminar._typing import Array, PRNGKeyArray
from laminar.bijections.base import AbstractTransform, call
from laminar.density import AbstractDistribution
from laminar.flow import Flow
from laminar.inference.supports import Way, load_numpyro
from laminar.inference.target import Target
from laminar.zoo import nsf

numpyro = load_numpyro()
from numpyro import distributions as dist  # noqa: E402 - after the clear message
from numpyro.distributions import constraints  # noqa: E402
from numpyro.infer.autoguide import AutoContinuous  # noqa: E402
from numpyro.infer.initialization import init_to_uniform  # noqa: E402


class FlowDistribution(dist.Distribution):
    """A laminar distribution as a NumPyro one, to sample, observe, or guide with.

    ``batch_shape`` is that of the condition and ``event_shape`` that of one event. Its arrays are
    leaves of a pytree, so instances go through ``jit`` and ``vmap``. A draw keeps its log-density,
    so a guide never inverts the flow.

    Args:
        flow: Any laminar distribution with an exact density.
        condition: ``batch + cond_shape`` where the flow takes a condition.
        support: NumPyro's constraint on one event; by default all of ℝ.
        validate_args: As everywhere in NumPyro.

    Raises:
        InputError: If the density is not exact, or the condition is missing or not wanted.
        ShapeError: If the condition does not fit.
    """

    arg_constraints = {}
    pytree_data_fields = ("_arrays", "condition")
    pytree_aux_fields = ("_static", "_support")

    def __init__(
        self,
        flow: AbstractDistribution,
        condition: Any = None,
        *,
        support: Any = None,
        validate_args: bool | None = None,
    ):
        if flow.exactness != "exact":
            raise InputError(
                f"FlowDistribution: the log-density of {flow.name} is "
                f"{flow.exactness!r}, and NumPyro needs an exact one."
            )
        self.condition, batch = flow._check_condition(condition)
        self._arrays, self._static = eqx.partition(flow, eqx.is_array)
        if support is None:
            support = constraints.real
        missing = len(flow.shape) - support.event_dim
        self._support = constraints.independent(support, missing) if missing else support
        super().__init__(batch, flow.shape, validate_args=validate_args)

    @property
    def flow(self) -> AbstractDistribution:
        """The laminar distribution."""
        return eqx.combine(self._arrays, self._static)

    @property
    def has_rsample(self) -> bool:
        """True: draws are differentiable in the parameters."""
        return True

    def sample(self, key: Any, sample_shape=()):
        """Draws of shape ``sample_shape + batch_shape + event_shape``."""
        return self.flow.sample(key, tuple(sample_shape), self.condition)

    def sample_with_intermediates(self, key: Any, sample_shape=()):
        """Draws with their log-densities, which `log_prob` takes back."""
        x, log_q = self.flow.sample_and_log_prob(key, tuple(sample_shape), self.condition)
        return x, [log_q]

    def log_prob(self, value, intermediates=None):
        """The log-density of events, broadcast against the batch shape."""
        if intermediates:
            return intermediates[0]
        return self.flow.log_prob(value, self.condition)


class FlowTransform(dist.transforms.Transform):
    """The bijection of a flow over vectors as a NumPyro transform, latent to data.

    Args:
        bijection: An exact bijection of vectors without condition.

    Raises:
        InputError: If it is not exact or takes a condition.
        ShapeError: If its events are no vectors.
    """

    def __init__(self, bijection: AbstractTransform):
        _check_map(bijection, "FlowTransform")
        self._arrays, self._static = eqx.partition(bijection, eqx.is_array)

    @property
    def domain(self):
        """Real vectors."""
        return constraints.real_vector

    @property
    def codomain(self):
        """Real vectors."""
        return constraints.real_vector

    @property
    def bijection(self) -> AbstractTransform:
        """The laminar bijection."""
        return eqx.combine(self._arrays, self._static)

    def __call__(self, x):
        """The images of vectors ``(..., D)``."""
        return self._carry("forward", x)[0]

    def _inverse(self, y):
        return self._carry("inverse", y)[0]

    def call_with_intermediates(self, x):
        """The images and their log-determinants, in one pass."""
        return self._carry("forward", x)

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        """The log-determinants at vectors ``(..., D)``: ``(...)``."""
        return self._carry("forward", x)[1] if intermediates is None else intermediates

    def tree_flatten(self):
        """The arrays are leaves, all else is structure."""
        return (self._arrays,), (("_arrays",), {"_static": self._static})

    def eq(self, other, static=False):
        """Whether another transform has the same structure and, unless `static`, arrays."""
        if not isinstance(other, FlowTransform):
            return False
        if self is other:
            return True
        # Arrays may be tracers, of which no static answer can be had.
        return not static and bool(eqx.tree_equal(self.bijection, other.bijection))

    def _carry(self, direction, x):
        x = jnp.asarray(x)
        flat = x.reshape(-1, x.shape[-1]).T
        y, log_det = call(self.bijection, direction, flat)
        return y.T.reshape(x.shape), log_det.reshape(x.shape[:-1])


class AutoFlow(AutoContinuous):
    """An automatic guide whose posterior is a laminar flow over the unconstrained latents.

        guide = AutoFlow(model)
        svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=32))
        result = svi.run(key, 5_000, *args)
        guide.sample_posterior(key, result.params, sample_shape=(1_000,))

    It does not depend on the model's arguments, and serves ``NeuTraReparam(guide, params)``.

    Args:
        model: A NumPyro model without discrete latents.
        flow: The flow to start from, over vectors of the latent dimension; or a builder called as
            ``flow(dim, key=key)``, such as `laminar.zoo.iaf`. By default four spline layers that
            are fast to draw from, of a size that goes by the dimension.
        prefix: Begins the names of the guide's sites.
        init_loc_fn: Where NumPyro looks at the model for the first time.

    Raises:
        InputError: When the guide first runs, if the flow takes a condition or is not exact.
        ShapeError: When the guide first runs, if the flow has another dimension.
    """

    def __init__(
        self,
        model: Callable,
        flow: Flow | Callable[..., Flow] | None = None,
        *,
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_uniform,
    ):
        self._given = flow
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def flow(self, params: dict[str, Any]) -> Flow:
        """The flow with parameters that ``svi.get_params`` or ``svi.run`` gave."""
        return eqx.combine(params[self._site], self._rest)

    def get_transform(self, params):
        """The bijection of the flow as a NumPyro transform."""
        return FlowTransform(self.flow(params)._map)

    def get_base_dist(self):
        """The base of the flow as it began."""
        return FlowDistribution(self._start._base)

    def get_posterior(self, params):
        """The flow over the unconstrained latents as a NumPyro distribution."""
        return FlowDistribution(self.flow(params))

    @property
    def _site(self) -> str:
        return f"{self.prefix}_flow$params"

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        given = self._given
        if isinstance(given, Flow):
            self._start = given
        else:
            key = numpyro.prng_key()
            build = _default if given is None else given
            self._start = build(self.latent_dim, key=key)
        _check_flow(self._start, self.latent_dim, "AutoFlow")
        self._first, self._rest = partition(self._start)

    def _get_posterior(self):
        params = numpyro.param(self._site, lambda _: self._first)
        return FlowDistribution(eqx.combine(params, self._rest))


def neutra(target: Target, flow: Flow) -> Target:
    """Neural transport: a target seen through a flow, which a sampler finds easier.

        ln p̃_Z(z) = ln p̃(f(z)) + ln |det ∂f/∂z|

    (Hoffman et al. 2019). Where the flow is close to the target this is close to the flow's base,
    whatever the target's scales and correlations are.

        warped = neutra(target, flow)
        mcmc = MCMC(NUTS(potential_fn=warped.potential), num_warmup=500, num_samples=1000)
        mcmc.run(key, init_params=warped.start(key, 1)[0])
        target_values = warped.constrain(mcmc.get_samples())

    Args:
        target: What to sample.
        flow: A fitted flow over the target's unconstrained vectors.

    Returns:
        A target over the flow's latent space, whose `constrain` and `unconstrain` lead to the
        user's values, and whose `start` draws from the base.

    Raises:
        InputError: If the flow takes a condition or is not exact.
        ShapeError: If the flow has another dimension than the target.
    """
    _check_flow(flow, target.dim, "neutra")
    return dataclasses.replace(target, way=_Warped(target.way.leaves, target.way, flow))


@dataclasses.dataclass(frozen=True, eq=False)
class _Warped(Way):
    """The way of a target entered through a flow's latent space."""

    leaves: tuple
    inner: Way
    flow: Flow

    def log_density(self, z):
        x, log_det = call(self.flow._map, "forward", z)
        return self.inner.log_density(x) + log_det

    def log_jacobian(self, z):
        x, log_det = call(self.flow._map, "forward", z)
        return self.inner.log_jacobian(x) + log_det

    def constrain(self, z):
        return self.inner.constrain(call(self.flow._map, "forward", z)[0])

    def deterministics(self, z):
        return self.inner.deterministics(call(self.flow._map, "forward", z)[0])

    def unconstrain(self, arrays):
        return call(self.flow._map, "inverse", self.inner.unconstrain(arrays))[0]

    def named(self, values):
        return self.inner.named(values)

    def guilty(self, z):
        return self.inner.guilty(call(self.flow._map, "forward", z)[0])

    def start(self, key: PRNGKeyArray, n: int, dtype: Any) -> Array:
        return self.flow._base.sample(key, (n,)).astype(dtype)


def _default(dim: int, *, key: PRNGKeyArray) -> Flow:
    """Splines with a scale and shift each, which begin as the identity."""
    width = max(32, min(128, 4 * dim))
    return nsf(dim, key=key, layers=4, width=width, depth=1, fast="sample", affine=True)


def _check_flow(flow: Flow, dim: int, owner: str) -> None:
    if not isinstance(flow, Flow):
        raise InputError(f"{owner}: a Flow is needed, not {type(flow).__name__}.")
    _check_map(flow._map, owner)
    if flow.cond_shape is not None:
        raise InputError(f"{owner}: the flow takes a condition, and there is none.")
    if flow.shape != (dim,) or flow._base.shape != (dim,):
        raise ShapeError(
            f"{owner}: the flow has events of shape {flow.shape}, but there are {dim} "
            f"unconstrained parameters, so it must have ({dim},)."
        )


def _check_map(bijection: AbstractTransform, owner: str) -> None:
    if bijection.exactness != "exact":
        raise InputError(
            f"{owner}: {bijection.name} is declared {bijection.exactness!r}, but an exact "
            "bijection is needed."
        )
    if bijection.cond_shape is not None:
        raise InputError(f"{owner}: {bijection.name} takes a condition, and there is none.")
    if len(bijection.in_shape) != 1 or len(bijection.out_shape) != 1:
        raise ShapeError(
            f"{owner}: {bijection.name} maps {bijection.in_shape} to {bijection.out_shape}, but "
            "must map vectors."
        )
