r"""Whether a density is calibrated: its probability integral transforms, and its regions.

**Latent.** A flow takes a row to the base, z = f⁻¹(x), and where the model is right the entries
u_d = F_0(z_d) of its base's distribution functions are independent and uniform on (0, 1)
(Rosenblatt 1952; Diebold, Gunther & Tay 1998). A mixture has a latent for each part; with the part
drawn from its posterior p(k | x) the transform is exact again, because (k, x) then has the joint
law of the mixture.

**Regions.** Of all sets that hold a share α of the model's probability, the smallest is where the
density exceeds some level. The share of rows inside should be α, for every α (Hyndman 1996); this
judges all columns together.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from laminar._params import Frozen
from laminar._typing import ArrayLike
from laminar.conditional import ConditionalMixture
from laminar.density import encode_rows
from laminar.distributions import Logistic, MultivariateNormal, Normal, StudentT, Uniform
from laminar.flow import Flow
from laminar.mixed import AutoregressiveDistribution
from laminar.mixtures import GaussianMixture, IsotropicMixture, Mixture, assemble_factors
from laminar.report.axes import lowered
from laminar.scores.conformal import holm
from laminar.scores.twosample import ks_test, uniform_test

CONFIDENCE = 0.95


class NoLatentError(Exception):
    """A distribution whose latents are not independent uniforms that one can compute."""


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Transforms that are uniform where the model is right.

    Attributes:
        names: What each is called.
        u: (N, D), in [0, 1].
        distance: The Kolmogorov–Smirnov distance from uniform of each, (D,).
        p_value: Likewise, adjusted for their number after Holm.
    """

    names: list[str]
    u: np.ndarray
    distance: np.ndarray
    p_value: np.ndarray


def transforms(u: np.ndarray, names: Sequence[str] | None = None) -> Transforms:
    """The transforms (N, D) with their tests; they are called u₁, …, u_D unless they have names."""
    called = [f"u{lowered(d + 1)}" for d in range(u.shape[1])] if names is None else list(names)
    tests = [uniform_test(column) for column in u.T]
    p = np.array([test.p_value for test in tests])
    return Transforms(called, u, np.array([test.statistic for test in tests]), holm(p))


def chance_band(rows: int, bins: int) -> tuple[float, float]:
    """Counts between which all bins of a uniform histogram lie with 95% confidence.

    Each bin has its binomial interval at the level 0.05 / bins (Bonferroni).
    """
    from scipy.stats import binom

    tail = (1 - CONFIDENCE) / (2 * bins)
    low, high = binom.ppf([tail, 1 - tail], rows, 1 / bins)
    return float(low), float(high)


def histogram_bins(rows: int) -> int:
    """Bins for so many transforms: about ten rows in each, from 5 to 20."""
    return int(np.clip(rows // 10, 5, 20))


# ------------------------------------------------------------------------------------- regions


@dataclasses.dataclass(frozen=True)
class Regions:
    """How often rows lie in the regions of highest density.

    Attributes:
        content: The probability that the model gives to all places at least as dense as each row,
            (N,): uniform where the model is right.
        band: How far the share of rows within a region may lie from its content by chance, at 95%
            for all regions together.
        distance: The largest difference that there is.
        p_value: How often chance alone gives as much (Kolmogorov–Smirnov, two samples).
    """

    content: np.ndarray
    band: float
    distance: float
    p_value: float

    def inside(self, share: float) -> float:
        """The share of rows within the region of so much probability."""
        return float((self.content <= share).mean())


def regions(log_p: np.ndarray, drawn: np.ndarray) -> Regions:
    """Compare log-densities of rows, (N,), with those of the model's own samples, (M,)."""
    test = ks_test(log_p, drawn)
    order = np.sort(drawn)
    # The middle of a tie: a level that samples share counts half of them.
    below = np.searchsorted(order, log_p, "left") + np.searchsorted(order, log_p, "right")
    content = 1.0 - below / (2.0 * len(order))
    band = np.sqrt(-0.5 * np.log((1 - CONFIDENCE) / 2) * (1 / len(log_p) + 1 / len(drawn)))
    return Regions(content, float(band), test.statistic, test.p_value)


# ------------------------------------------------------------------------------------- latents


def latent_uniforms(
    model: Any, x: ArrayLike, condition: ArrayLike | None, rng: np.random.Generator
) -> np.ndarray:
    """The transforms u = F_0(f⁻¹(x)) of events, float64 of shape (N, D).

    Of rows of mixed columns they are u_d = F(x_d | x_<d), spread over the probability that a state
    or a cell has (the randomised transform of Brockwell 2007).

    Args:
        model: A flow, a mixture or a base, of vectors or of rows of mixed columns.
        x: Events (N, D), or (N, 2, D) of mixed columns.
        condition: Conditions (N, …), or None.
        rng: Draws the parts of mixtures.

    Raises:
        NoLatentError: If the model ends in a base without independent entries.
    """
    model = _bare(model)
    if model.cond_shape is None:
        condition = None
    if isinstance(model, Flow):
        inner = condition
        if model.embed is not None and condition is not None:
            shapes = model.cond_shape
            inner = encode_rows(model.embed, condition, shapes, (len(np.asarray(x)),), None)
        return latent_uniforms(model._base, model.to_latent(x, condition), inner, rng)
    if isinstance(model, Mixture):
        parts = model.parts()
        log_p = np.stack([_log_prob(part, x, condition) for part in parts], axis=1)
        chosen = _draw(log_p + np.log(np.asarray(model.weights, np.float64)), rng)
        u = np.empty((len(chosen), model.shape[-1]))
        for k in np.unique(chosen):
            rows = chosen == k
            some = None if condition is None else np.asarray(condition)[rows]
            u[rows] = latent_uniforms(parts[k], np.asarray(x)[rows], some, rng)
        return u
    if isinstance(model, AutoregressiveDistribution):
        below, at = (np.asarray(p, np.float64) for p in model.cumulative(x, condition))
        return np.clip(below + rng.uniform(size=at.shape) * at, 0.0, 1.0)
    x = np.asarray(x, np.float64)
    if isinstance(model, GaussianMixture | ConditionalMixture):
        return _of_gaussians(model, x, condition, rng)
    if isinstance(model, IsotropicMixture):
        return _of_kernels(model, x, rng)
    return _of_base(model, x)


def _of_base(base: Any, x: np.ndarray) -> np.ndarray:
    from scipy import stats

    if isinstance(base, Uniform):
        low, high = (np.asarray(v.value, np.float64) for v in (base.lo, base.hi))
        return np.clip((x - low) / (high - low), 0.0, 1.0)
    if isinstance(base, MultivariateNormal):
        factor = np.asarray(base.cholesky, np.float64)
        return stats.norm.cdf(np.linalg.solve(factor, (x - np.asarray(base.loc)).T).T)
    if isinstance(base, Normal | Logistic | StudentT):
        z = (x - np.asarray(base.loc, np.float64)) / np.exp(np.asarray(base.log_scale, np.float64))
        if isinstance(base, StudentT):
            return stats.t.cdf(z, np.asarray(base.df, np.float64))
        return (stats.logistic if isinstance(base, Logistic) else stats.norm).cdf(z)
    raise NoLatentError(f"{base.name} has no independent entries with a distribution function.")


def _of_gaussians(
    model: GaussianMixture | ConditionalMixture,
    x: np.ndarray,
    condition: ArrayLike | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Whiten each row by a component drawn from its posterior; with conditions, those in front."""
    from scipy.stats import norm

    both = x if condition is None else np.concatenate([np.asarray(condition, float), x], axis=1)
    factors = np.asarray(assemble_factors(model.lower, model.log_diagonal), np.float64)
    means = np.asarray(model.means, np.float64)
    heights = np.asarray(model.logits, np.float64) + np.asarray(model.log_diagonal).sum(1)
    z = [(both - mean) @ factor.T for mean, factor in zip(means, factors, strict=True)]
    log_p = np.stack([h - 0.5 * (own**2).sum(1) for h, own in zip(heights, z, strict=True)], axis=1)
    chosen = _draw(log_p, rng)
    dim = x.shape[1]
    return norm.cdf(np.stack([z[k][row, -dim:] for row, k in enumerate(chosen)]))


def _of_kernels(model: IsotropicMixture, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from scipy.spatial.distance import cdist
    from scipy.stats import norm

    means = np.asarray(model.means, np.float64)
    log_scale = np.broadcast_to(np.asarray(model.log_scale, np.float64), (len(means),))
    scale = np.exp(log_scale)
    heights = np.asarray(model.logits, np.float64) - x.shape[1] * log_scale
    chosen = _draw(heights - 0.5 * cdist(x, means, "sqeuclidean") / scale**2, rng)
    return norm.cdf((x - means[chosen]) / scale[chosen, None])


def _draw(log_weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column of each row, with probabilities proportional to e to its entries (N, K)."""
    return np.argmax(log_weights + rng.gumbel(size=log_weights.shape), axis=1)


def _log_prob(part: Any, x: ArrayLike, condition: ArrayLike | None) -> np.ndarray:
    given = condition if part.cond_shape is not None else None
    return np.asarray(part.log_prob(x, given), np.float64)


def _bare(part: Any) -> Any:
    return part.value if isinstance(part, Frozen) else part
