"""The integral of a density at one condition, and its samples compared with it."""

import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._typing import Array, Condition, PRNGKeyArray
from laminar.density import AbstractDistribution
from laminar.diagnose import integrate, probes
from laminar.diagnose.integrate import Integral, Proposal, Scale
from laminar.diagnose.report import Line
from laminar.distributions import MultivariateNormal, Normal
from laminar.flow import Flow
from laminar.mixtures import GaussianMixture

_QUADRATURE = {1: 1e-3, 2: 3e-3, 3: 1e-2}
_Z_SCORE = 5.5
_FEWEST_EFFECTIVE = 100  # points of a manifold, for its integral
_CHUNK = 8192
_ENOUGH = 0.2  # effective share at which no other proposal is tried
_MAX_KERNEL = 12  # dimensions
NAMES = ("density integrates to one", "samples follow the density")


def badness(line: Line) -> tuple[bool, float]:
    """A sort key: failures last, and within a verdict the one closest to its budget."""
    if line.passed is None:
        return False, -1.0
    excess = line.value - line.budget
    return not line.passed, math.inf if math.isnan(excess) else excess


class Measure:
    """The integral of the density at one condition, and samples compared with it.

    Args:
        flow: The distribution, exact.
        condition: One condition, or None.
        key: Random key.
    """

    def __init__(self, flow: AbstractDistribution, condition: Condition, key: PRNGKeyArray):
        self.flow, self.condition = flow, condition
        self.dim = max(1, math.prod(flow.shape))
        sample_key, seed_key = jr.split(key)
        self.rng = np.random.default_rng(np.asarray(jr.key_data(seed_key)))
        count = min(4096, max(512, 2**22 // self.dim))
        self.nan_at: np.ndarray | None = None
        drawn = self.flow.sample(sample_key, (count,), self.condition)
        self.samples = np.asarray(drawn, np.float64).reshape(count, self.dim)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """The flow's log-density at flat points, in chunks of one size."""

        def one(chunk):
            points = chunk.reshape((len(chunk), *self.flow.shape))
            return self.flow.log_prob(points, self.condition, batch_size=_CHUNK)

        log_p = self.chunked(one, x)[0]
        lost = np.flatnonzero(np.isnan(log_p))
        if self.nan_at is None and len(lost):
            # The point nearest to the origin says most.
            self.nan_at = x[lost[np.argmin(np.abs(x[lost]).max(1))]]
        return log_p

    def chunked(self, fn, x: np.ndarray) -> list[np.ndarray]:
        """Apply a compiled function to rows in padded chunks, so that it is compiled once."""
        parts = []
        for start in range(0, len(x), _CHUNK):
            chunk = x[start : start + _CHUNK]
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], _CHUNK - len(chunk), axis=0)])
            out = fn(jnp.asarray(padded.astype(self.flow.dtype)))
            out = out if isinstance(out, tuple) else (out,)
            parts.append([np.asarray(o, np.float64)[: len(chunk)] for o in out])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def lines(self) -> tuple[Line, Line]:
        """The two lines."""
        if not np.isfinite(self.samples).all():
            bad = int((~np.isfinite(self.samples)).any(1).sum())
            failed = [Line(n, math.inf, 0.0, False, f"{bad} samples are not finite") for n in NAMES]
            return failed[0], failed[1]
        found, budget, how = self.integrate()
        if self.nan_at is not None:
            at = ", ".join(f"{v:.3g}" for v in self.nan_at[:4])
            how = f"log_prob is NaN at ({at}{', …' if len(self.nan_at) > 4 else ''})"
        if found is None:
            skipped = [Line(n, math.nan, math.nan, None, how) for n in NAMES]
            return skipped[0], skipped[1]
        distance = abs(found.value - 1)
        first = Line(NAMES[0], distance, budget, bool(distance <= budget), how)
        score, which = self.compare(found)
        second = Line(NAMES[1], score, _Z_SCORE, bool(score <= _Z_SCORE), which)
        return first, second

    def integrate(self) -> tuple[Integral | None, float, str]:
        """The best integral there is, its budget, and how it was found."""
        if self.flow.space is not None:
            found = integrate.on_manifold(
                self.flow.space, self.log_density, Scale.of(self.samples), self.rng
            )
            if found.error > 0.05 or found.effective * found.evaluations < _FEWEST_EFFECTIVE:
                return None, 0.0, "the density is too narrow for uniform points"
            how = f"{found.value:.4f} ± {found.error:.4f} by {found.evaluations} uniform points"
            return found, 2e-3 + 4 * found.error, how
        if self.dim <= 3:
            found = integrate.quadrature(self.log_density, self.samples)
            tolerance = _QUADRATURE[self.dim]
            if not found.error > tolerance:  # NaN passes on, to fail
                how = f"{found.value:.4f} by cubature, {found.evaluations} points"
                return found, tolerance + found.error, how
        n = max(2000, min(20_000, 20_000 * 64 // self.dim))
        best: tuple[str, Proposal] | None = None
        most = -1.0
        for space, make in self.candidates():
            candidate = (space, make())
            pilot = self.importance(candidate, 1000)
            if not math.isfinite(pilot.value):
                return pilot, 0.0, "the density is not finite somewhere"
            if pilot.effective > most:
                best, most = candidate, pilot.effective
            if most > _ENOUGH:
                break
        if best is None:
            return None, 0.0, "there is no proposal"
        found = self.importance(best, n)
        if found.effective * n < 100 or not found.error < 0.05:
            return None, 0.0, f"no proposal is close enough in {self.dim} dimensions"
        how = f"{found.value:.4f} ± {found.error:.4f} by importance sampling"
        return found, 2e-3 + 4 * found.error, how

    def candidates(self) -> Iterator[tuple[str, Callable[[], Proposal]]]:
        """Proposals in latent space, through the flow, and in data space; the cheap ones first."""
        drawn = isinstance(self.flow, Flow) and probes.draws(self.flow._map, self.flow.dtype)
        if isinstance(self.flow, Flow) and not drawn:
            base = self.flow._base
            z = np.asarray(self.flow.to_latent(self.reshaped(), self.condition), np.float64)
            z = z.reshape(len(z), -1)
            z = z[np.isfinite(z).all(1)]
            known = _known_proposal(base)
            if known is not None:
                yield "latent", lambda: known
            elif len(z) > 2 * self.dim and z.shape[1] == self.dim:
                yield "latent", lambda: integrate.fitted(z)
        yield "data", lambda: integrate.fitted(self.samples)
        if self.dim <= _MAX_KERNEL:
            yield "data", lambda: integrate.kernels(self.rng, self.samples)

    def reshaped(self) -> Array:
        """The samples as events."""
        return jnp.asarray(self.samples, self.flow.dtype).reshape((-1, *self.flow.shape))

    def importance(self, candidate: tuple[str, Proposal], n: int) -> Integral:
        """The estimate from one proposal."""
        space, proposal = candidate
        target = self.through_the_flow if space == "latent" else self.directly
        return integrate.importance(target, proposal, Scale.of(self.samples), self.rng, n)

    def directly(self, x: np.ndarray):
        """Draws in data space."""
        return x, self.log_density(x), np.zeros(len(x))

    def through_the_flow(self, draws: np.ndarray):
        """Draws in latent space, carried to the data by the map and its log-det."""
        inner, condition = probes.encode(self.flow, self.condition, ())
        shape = inner._map.in_shape

        def one(z):
            x, log_det = probes.push(
                inner, jnp.moveaxis(z.reshape((len(z), *shape)), 0, -1), condition
            )
            return jnp.moveaxis(x, -1, 0).reshape(len(log_det), -1), log_det

        x, log_det = self.chunked(one, draws)
        return x, self.log_density(x), log_det

    def compare(self, found: Integral) -> tuple[float, str]:
        """The worst difference of a mean between samples and density, in standard errors."""
        scale = Scale.of(self.samples)
        phi = scale.statistics(self.samples, self.log_density(self.samples))
        noise = phi.var(0, ddof=1) / len(phi)
        # Float32 and the cubature leave something that more samples would not remove.
        floor = (2e-3 * phi.std(0)) ** 2 + 1e-12
        score = np.abs(phi.mean(0) - found.means)
        score = score / np.sqrt(noise + found.mean_errors**2 + floor)
        worst = int(np.argmax(np.where(np.isnan(score), np.inf, score)))
        names = [
            "log-density",
            *(f"{k}coordinate {i}" for k in ("", "spread of ") for i in range(self.dim)),
        ]
        return float(score[worst]), f"worst in {names[worst]}"


def _known_proposal(base: AbstractDistribution) -> Proposal | None:
    """The base itself, widened, where it is normal or a mixture of normals."""
    if isinstance(base, Normal):
        deviation = np.exp(np.asarray(base.log_scale, np.float64)).reshape(-1)
        loc = np.asarray(base.loc, np.float64).reshape(1, -1)
        return integrate.widened(np.ones(1), loc, np.diag(deviation**2)[None])
    if isinstance(base, MultivariateNormal):
        loc = np.asarray(base.loc, np.float64)[None]
        return integrate.widened(np.ones(1), loc, np.asarray(base.covariance, np.float64)[None])
    if isinstance(base, GaussianMixture):
        factors = np.linalg.inv(np.asarray(base._factors(), np.float64))
        weights = np.asarray(base.weights, np.float64)
        covariances = factors @ np.swapaxes(factors, 1, 2)
        means = np.asarray(base.means, np.float64)
        return integrate.widened(weights / weights.sum(), means, covariances)
    return None
