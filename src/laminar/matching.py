"""Objectives for continuous flows: flow matching, and maximum likelihood with straight paths.

Flow matching regresses the velocity on that of a path from the base to the data, so a training step
solves no equation. The density afterwards is that of the same flow: exact, up to its tolerance.
"""

import math
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax

from laminar._errors import InputError
from laminar._params import Frozen
from laminar._typing import Array, Condition, PRNGKeyArray
from laminar.bijections.base import AbstractTransform, call
from laminar.bijections.compose import Chain, Repeat
from laminar.bijections.continuous import Continuous, Energies
from laminar.density import AbstractDistribution
from laminar.flow import Flow
from laminar.objectives import Batch, take_rows, weighted_mean

Paths = Literal["ot", "variance_preserving", "schroedinger_bridge", "minibatch_ot"]

_SHARPNESS = 0.05  # entropy of a minibatch plan, in units of the mean cost
_SINKHORN_STEPS = 25, 1000  # of falling entropy, and the most in all
_COLUMN_ERROR = 0.02  # of the mass of a draw at which they end, relative
_BRIDGE_ENDS = 1e-3  # the bridge's velocity has infinite variance at its very ends


def flow_matching(
    path: Paths = "ot", *, sigma: float | None = None, condition_cost: float = 10.0
) -> "FlowMatching":
    r"""An objective that fits the velocity of a continuous flow without solving it.

        loss = E ‖v(t, z_t, c) − u_t‖² / D,    t ~ U(0, 1),    (z_0, x) a pair of base and data

    with the path and its velocity u_t = dz_t/dt:

    - ``"ot"``: z_t = (1 − (1 − σ) t) z_0 + t x, straight lines (Lipman et al. 2023).
    - ``"variance_preserving"``: z_t = cos(½πt) z_0 + sin(½πt) x (Albergo & Vanden-Eijnden 2023).
    - ``"minibatch_ot"``: those of ``"ot"`` between pairs drawn from an optimal plan between the
      draws and the rows of a batch, which makes paths straighter (Tong et al. 2024). The plan is
      entropic, by Sinkhorn's iteration, whose steps take time of the square of the batch; more of
      them are needed the smaller the entropy is against the distances, as with a small σ of the
      bridge in many dimensions.
    - ``"schroedinger_bridge"``: z_t ~ N((1 − t) z_0 + t x, t (1 − t) σ²) between pairs of the plan
      of entropy 2 σ² (Tong et al. 2024); its velocity approximates that of the bridge.

    The flow holds one `Continuous`, alone or in a `Chain`. Other parts, and the base, are taken as
    they are and do not learn: a standardisation may stand after it.

    Args:
        path: The path.
        sigma: σ. With straight lines the noise that is left at the data, by default 0; with
            the bridge its diffusion, by default 0.5. Not for ``"variance_preserving"``.
        condition_cost: In plans of conditional flows, the cost of a pair across conditions, where
            the mean squared distance of points and that of conditions count one. With zero, pairs
            would make the latent depend on the condition, which it does not when sampling.

    Returns:
        An objective. Its ``aux`` holds ``{"matching": loss, "weight": Σ w_i}``.

    Raises:
        InputError: If an option has no meaning, and, when called, if the flow does not fit.
    """
    if path not in get_args(Paths):
        raise InputError(f"flow_matching: path is {path!r}; choose one of {get_args(Paths)}.")
    if path == "variance_preserving" and sigma is not None:
        raise InputError("flow_matching: the path 'variance_preserving' has no sigma.")
    bridge = path == "schroedinger_bridge"
    sigma = (0.5 if bridge else 0.0) if sigma is None else float(sigma)
    if not (0 <= sigma < math.inf and (sigma > 0 or not bridge) and (sigma < 1 or bridge)):
        words = "positive" if bridge else "in [0, 1)"
        raise InputError(f"flow_matching: sigma must be {words}, not {sigma}.")
    if not 0 <= condition_cost < math.inf:
        raise InputError(f"flow_matching: condition_cost is {condition_cost}; give 0 or more.")
    return FlowMatching(path, sigma, float(condition_cost))


class FlowMatching(eqx.Module):
    """The objective that `flow_matching` makes."""

    path: Paths = eqx.field(static=True)
    sigma: float = eqx.field(static=True)
    condition_cost: float = eqx.field(static=True)

    def __call__(
        self, flow: AbstractDistribution, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of the batch with fresh draws and times."""
        draw_key, pair_key, time_key, noise_key = jr.split(key, 4)
        inner, x, condition = take_rows("flow_matching", flow, batch)
        base, before, part, after = _around("flow_matching", inner)
        count = x.shape[-1]
        for step in reversed(after):
            x = step.points("inverse", x, condition)
        z = base._sample(draw_key, (count,), condition)
        for step in before:
            z = step.points("forward", z, condition)
        x, z = lax.stop_gradient((x, z))
        if self.path in ("minibatch_ot", "schroedinger_bridge"):
            given = None if condition is None else lax.stop_gradient(condition)
            z = z[..., self._pairs(pair_key, x, z, given, batch.weights)]
        t = _times(time_key, count, x.dtype)
        if self.path == "schroedinger_bridge":
            t = _BRIDGE_ENDS + (1 - 2 * _BRIDGE_ENDS) * t
        point, target = self._on_path(noise_key, t, z, x)
        start, end = part.times[0], part.times[-1]
        found = part.velocity(start + (end - start) * t, point, condition)
        errors = ((found * (end - start) - target) ** 2).mean(tuple(range(len(part.in_shape))))
        loss, total = weighted_mean(errors, batch.weights)
        return loss, {"matching": loss, "weight": total}

    def _on_path(self, key, t, z, x):
        """z_t and u_t."""
        t = t.reshape((1,) * (x.ndim - 1) + t.shape)
        if self.path == "variance_preserving":
            cos, sin = jnp.cos(0.5 * jnp.pi * t), jnp.sin(0.5 * jnp.pi * t)
            return cos * z + sin * x, 0.5 * jnp.pi * (cos * x - sin * z)
        if self.path != "schroedinger_bridge":
            return (1 - (1 - self.sigma) * t) * z + t * x, x - (1 - self.sigma) * z
        noise = self.sigma * jr.normal(key, x.shape, x.dtype)
        spread = jnp.sqrt(t * (1 - t))
        return (1 - t) * z + t * x + spread * noise, x - z + (1 - 2 * t) / (2 * spread) * noise

    def _pairs(self, key, x, z, condition, weights):
        """For each row the number of its draw, from a plan with the weights of the rows."""
        count = x.shape[-1]
        cost = _square_distances(x, z)
        unit = jnp.maximum(cost.mean(), jnp.finfo(cost.dtype).tiny)
        entropy = _SHARPNESS
        if self.path == "schroedinger_bridge":
            entropy = 2 * self.sigma**2 / unit
        cost = cost / unit
        if condition is not None and condition.shape[-1:] == (count,) and condition.ndim > 1:
            apart = _square_distances(condition, condition)
            apart = apart / jnp.maximum(apart.mean(), jnp.finfo(cost.dtype).tiny)
            cost = cost + self.condition_cost * apart
        shares = jnp.ones((count,), cost.dtype)
        if weights is not None:
            weights = jnp.asarray(weights, cost.dtype)
            shares = jnp.where(weights.sum() > 0, weights, shares)
        used = shares > 0
        log_shares = jnp.where(used, jnp.log(jnp.where(used, shares, 1)), -jnp.inf)
        log_shares = log_shares - jnp.log(shares.sum())
        return jr.categorical(key, _log_plan(cost, log_shares, entropy), axis=-1)


def rnode(kinetic: float = 0.01, jacobian: float = 0.01) -> "Regularised":
    r"""Maximum likelihood with regular paths, RNODE (Finlay et al. 2020).

        loss = −ln q(x) + λ_K ∫ ‖v‖² dt + λ_J ∫ ‖∂v/∂z‖² dt

    along the path of x, with the Frobenius norm, averaged like `laminar.objectives.nll`. Straight
    and smooth paths take fewer steps to solve. Every step of training solves the equation; see
    `flow_matching` for one that does not. The norm of the Jacobian is exact where the divergence
    is, else estimated with the same probes.

    Args:
        kinetic: λ_K.
        jacobian: λ_J.

    Returns:
        An objective; its ``aux`` holds those of `nll` and the means ``kinetic`` and ``jacobian``.

    Raises:
        InputError: If a factor is negative, and, when called, if the flow has no `Continuous`.
    """
    for name, value in (("kinetic", kinetic), ("jacobian", jacobian)):
        if not 0 <= value < math.inf:
            raise InputError(f"rnode: {name} must be 0 or more, not {value}.")
    return Regularised(float(kinetic), float(jacobian))


class Regularised(eqx.Module):
    """The objective that `rnode` makes."""

    kinetic: float = eqx.field(static=True)
    jacobian: float = eqx.field(static=True)

    def __call__(
        self, flow: AbstractDistribution, batch: Batch, key: PRNGKeyArray | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of the batch."""
        inner, z, condition = take_rows("rnode", flow, batch)
        flow_key, base_key = (None, None) if key is None else jr.split(key)
        base, bijection, _ = _map("rnode", inner)
        z, energies = _solved(bijection, z, condition, flow_key)
        log_p = base._log_prob(z, condition, key=base_key) + energies.log_det
        (log_p, total), (kinetic, _), (jacobian, _) = (
            weighted_mean(values, batch.weights)
            for values in (log_p, energies.kinetic, energies.jacobian)
        )
        loss = self.kinetic * kinetic + self.jacobian * jacobian - log_p
        aux = {"log_prob": log_p, "kinetic": kinetic, "jacobian": jacobian, "weight": total}
        return loss, aux


def _solved(
    part: AbstractTransform | Frozen, z: Array, condition: Condition, key: PRNGKeyArray | None
) -> tuple[Array, Energies]:
    """The latent of events with the batch last, and the energies on the way to it."""
    if isinstance(part, Frozen):
        return _solved(part.value, z, condition, key)
    if isinstance(part, Continuous):
        return part.energies("inverse", z, condition, key=key)
    none = jnp.zeros(z.shape[-1:], z.dtype)
    if _count(part) == 0:
        z, log_det = call(part, "inverse", z, condition, key=key)
        return z, Energies(log_det, none, none)

    def add(state, layer, layer_key):
        z, gained = _solved(layer, state[0], condition, layer_key)
        return z, jtu.tree_map(jnp.add, state[1], gained)

    state = z, Energies(none, none, none)
    if isinstance(part, Repeat):
        dynamic, static = eqx.partition(part.layers, eqx.is_array)
        keys = None if key is None else jr.split(key, part.length)

        def body(state, at):
            return add(state, eqx.combine(at[0], static), at[1]), None

        return lax.scan(body, state, (dynamic, keys), reverse=True)[0]
    parts = part.parts if isinstance(part, Chain) else ()
    keys = [None] * len(parts) if key is None else jr.split(key, len(parts))
    for inner, inner_key in zip(reversed(parts), keys, strict=True):
        state = add(state, inner, inner_key)
    return state


def _count(part: AbstractTransform | Frozen) -> int:
    """How many `Continuous` there are in chains and repetitions."""
    if isinstance(part, Frozen):
        return _count(part.tree)
    if isinstance(part, Chain):
        return sum(_count(inner) for inner in part.parts)
    if isinstance(part, Repeat):
        return part.length * _count(part.layers)
    return int(isinstance(part, Continuous))


def _map(
    owner: str, flow: AbstractDistribution
) -> tuple[AbstractDistribution, AbstractTransform | Frozen, int]:
    """The base, the bijection, and how many `Continuous` it has: at least one."""
    count = _count(flow.bijection) if isinstance(flow, Flow) else 0
    if not isinstance(flow, Flow) or count == 0:
        raise InputError(f"{owner}: {flow.name} is not a flow with a Continuous part, such as cnf.")
    return flow._base, flow.bijection, count


def _around(owner: str, flow: AbstractDistribution):
    """The base, the parts before the one `Continuous`, itself, and those after."""
    base, bijection, count = _map(owner, flow)
    if count > 1:
        raise InputError(
            f"{owner}: the flow has {count} Continuous parts, and a path from base to data "
            "has one velocity; use a single one (layers=1)."
        )

    def flat(part: Any) -> list[AbstractTransform]:
        part = part.value if isinstance(part, Frozen) else part
        if isinstance(part, Chain):
            return [piece for inner in part.parts for piece in flat(inner)]
        if isinstance(part, Repeat) and _count(part):
            return flat(part.layer(0))
        return [part]

    parts = flat(bijection)
    at, part = next((i, p) for i, p in enumerate(parts) if isinstance(p, Continuous))
    return base, parts[:at], part, parts[at + 1 :]


def _times(key: PRNGKeyArray, count: int, dtype) -> Array:
    """Uniform times, one in each of as many equal intervals, in a random order."""
    order_key, shift_key = jr.split(key)
    order = jr.permutation(order_key, count).astype(dtype)
    return (order + jr.uniform(shift_key, (count,), dtype)) / count


def _square_distances(a: Array, b: Array) -> Array:
    """‖a_i − b_j‖² of batch-last events, ``(i, j)``."""
    a, b = (part.reshape((-1, part.shape[-1])) for part in (a, b))
    squares = (a * a).sum(0)[:, None] + (b * b).sum(0)[None, :]
    return jnp.maximum(squares - 2 * a.T @ b, 0)


def _log_plan(cost: Array, log_shares: Array, entropy: float | Array) -> Array:
    """The logarithm of π(j | i), up to constants of i, for the entropic plan of even columns.

    Sinkhorn's iteration on logarithms. The entropy falls to its value in the first steps, because
    from a large one few suffice (Schmitzer 2019); then it goes on until no draw has a mass that is
    wrong by more than 2%, or for 1000 steps.
    """
    entropy = jnp.asarray(entropy, cost.dtype)
    first = jnp.maximum(entropy, 1)
    falling, most = _SINKHORN_STEPS
    log_column = -math.log(cost.shape[1])

    def unfinished(state):
        count, _, error = state
        return (count < falling) | ((count < most) & (error > _COLUMN_ERROR))

    def step(state):
        count, column, _ = state
        level = first * (entropy / first) ** jnp.minimum(count / falling, 1).astype(cost.dtype)
        row = level * (log_shares - jax.nn.logsumexp((column[None, :] - cost) / level, axis=1))
        new = level * (log_column - jax.nn.logsumexp((row[:, None] - cost) / level, axis=0))
        return count + 1, new, jnp.abs(jnp.expm1((column - new) / level)).max()

    start = jnp.asarray(0), jnp.zeros(cost.shape[1:], cost.dtype), jnp.asarray(1, cost.dtype)
    column = lax.while_loop(unfinished, step, start)[1]
    return (column[None, :] - cost) / entropy
