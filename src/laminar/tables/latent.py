"""How far out rows lie in the latent spaces of a density, mixtures included."""

import jax.numpy as jnp
import numpy as np

from laminar._params import Frozen
from laminar._typing import Array
from laminar.density import AbstractDistribution
from laminar.distributions import Normal, StudentT
from laminar.flow import Flow
from laminar.mixtures import GaussianMixture, IsotropicMixture, Mixture
from laminar.scores import chi_square_log_tail

_BLOCK = 20_000_000  # distances that are held at a time
_NOTHING = 40.0  # nats below the whole, a part adds nothing


def latent_log_tail(flow: AbstractDistribution, x: Array, condition: Array | None) -> np.ndarray:
    r"""The log of the probability of lying further out, ln Σ_k r_k(x) P(χ²_d ≥ ‖z_k‖²).

    Every normal law in the density, be it the base of a flow or a component of a mixture, has a
    latent point z_k = W_k (f_k⁻¹(x) − μ_k), and r_k is the probability that the row came from it.
    Entries of a Student base count as the normal ones with the same tail probability.

    Args:
        flow: The density of standardised rows.
        x: Rows (N, d).
        condition: Conditions, with which there is no answer.

    Returns:
        (N,), at most zero; NaN where no part of the density has such a base, or columns are given.
    """
    rows = len(x)
    if condition is not None or len(flow.shape) != 1:
        return np.full(rows, np.nan)
    step = max(_BLOCK // max(_count(flow) * flow.shape[0], 1), 1)
    parts = [_log_tail(flow, x[start : start + step]) for start in range(0, rows, step)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _log_tail(flow: AbstractDistribution, x: Array) -> np.ndarray:
    from scipy.special import logsumexp

    log_joint, squares = _parts(flow, x)
    told = ~np.isnan(squares).all(axis=0)
    if not told.any():
        return np.full(len(x), np.nan)
    log_joint, squares = log_joint[:, told], squares[:, told]
    # Where all densities underflow, nothing tells the parts from each other.
    log_joint[np.isneginf(log_joint).all(axis=1)] = 0.0
    log_share = log_joint - logsumexp(log_joint, axis=1, keepdims=True)
    # Most of many parts have no share in a row, and a tail takes its time.
    counts = ~(log_share < -_NOTHING)
    log_tail = np.zeros(squares.shape)
    log_tail[counts] = chi_square_log_tail(squares[counts], x.shape[1])
    both = logsumexp(np.where(counts, log_share, -np.inf) + log_tail, axis=1)
    return np.minimum(np.asarray(both), 0.0)


def _parts(dist: AbstractDistribution | Frozen, x: Array) -> tuple[np.ndarray, np.ndarray]:
    """The log of p(part k, x), and ‖z_k‖²; both (N, K)."""
    if isinstance(dist, Frozen):
        dist = dist.value
    if isinstance(dist, Flow):
        z = dist.to_latent(x)
        log_joint, squares = _parts(dist._base, z)
        with np.errstate(invalid="ignore"):
            shift = _host(dist.log_prob(x)) - _host(dist._base.log_prob(z))
        # Both are −inf far out, and then nothing is known of the shift, nor does it matter.
        return log_joint + np.nan_to_num(shift, nan=0.0)[:, None], squares
    if isinstance(dist, Mixture) and isinstance(dist.components, tuple):
        found = [_parts(part, x) for part in dist.components]
        log_weights = np.log(_host(dist.weights))
        joint = [j + w for (j, _), w in zip(found, log_weights, strict=True)]
        return np.concatenate(joint, axis=1), np.concatenate([s for _, s in found], axis=1)
    if isinstance(dist, GaussianMixture):
        return _gaussians(dist, _host(x))
    if isinstance(dist, IsotropicMixture):
        return _round(dist, _host(x))
    if not isinstance(dist, AbstractDistribution):
        raise TypeError(f"{type(dist).__name__} is no distribution.")
    log_p = _host(dist.log_prob(x))[:, None]
    if isinstance(dist, Normal):
        z = (_host(x) - _host(dist.loc)) * np.exp(-_host(dist.log_scale))
        return log_p, np.square(z).sum(axis=1)[:, None]
    if isinstance(dist, StudentT):
        return log_p, _student(dist, _host(x))[:, None]
    return log_p, np.full(log_p.shape, np.nan)


def _gaussians(dist: GaussianMixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    factors = _host(dist._factors())
    means, dim = _host(dist.means), x.shape[1]
    squares = np.stack(
        [np.square((x - mean) @ w.T).sum(axis=1) for mean, w in zip(means, factors, strict=True)],
        axis=1,
    )
    heights = np.log(_host(dist.weights)) + _host(dist.log_diagonal).sum(axis=1)
    return heights - 0.5 * squares - 0.5 * dim * np.log(2 * np.pi), squares


def _round(dist: IsotropicMixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means, dim = _host(dist.means), x.shape[1]
    squares = np.square(x).sum(axis=1)[:, None] + np.square(means).sum(axis=1) - 2 * x @ means.T
    log_scale = np.broadcast_to(_host(dist.log_scale), len(means))
    squares = np.maximum(squares, 0.0) * np.exp(-2 * log_scale)
    heights = np.log(_host(dist.weights)) - dim * log_scale
    return heights - 0.5 * squares - 0.5 * dim * np.log(2 * np.pi), squares


def _student(dist: StudentT, x: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri_exp
    from scipy.stats import t

    u = np.abs(x - _host(dist.loc)) * np.exp(-_host(dist.log_scale))
    return np.square(ndtri_exp(t.logsf(u, _host(dist.df)))).sum(axis=1)


def _count(dist: AbstractDistribution | Frozen) -> int:
    """The number of normal laws in a density."""
    if isinstance(dist, Frozen):
        return _count(dist.value)
    if isinstance(dist, Flow):
        return _count(dist._base)
    if isinstance(dist, Mixture) and isinstance(dist.components, tuple):
        return sum(_count(part) for part in dist.components)
    return dist.logits.size if isinstance(dist, GaussianMixture | IsotropicMixture) else 1


def _host(values) -> np.ndarray:
    return np.asarray(jnp.asarray(values), np.float64)
