"""The posterior that variational inference gives: draws, densities, evidence, and a verdict."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from laminar._errors import InputError
from laminar._typing import Array, PRNGKeyArray, PyTree, Shape
from laminar.density import AbstractDistribution, Estimate
from laminar.inference.assessment import Assessment, Verdict
from laminar.inference.target import Target
from laminar.inference.warmstart import Gaussians

_QUANTILES = (0.05, 0.5, 0.95)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """A flow over the unconstrained space of a target, with what its importance weights say.

    ``print(posterior)`` shows the summary and the verdict. Values are those of the user's own
    space: a dictionary by site for a NumPyro model, or a tree like the `example`.

    Attributes:
        target: The target.
        flow: The density q over unconstrained vectors ``(D,)``: a `laminar.Flow`, or a mixture of
            such. Its path, its parts and `laminar.save` are all there.
        own: Draws of the flow with their densities.
        proposal: What weighted draws are drawn from: the flow, or a mixture of it with the same
            spread wider, where that makes the weights' tail lighter (Owen & Zhou 2000).
        assessment: Draws of the proposal with their densities; the weights are theirs.
        verdict: Whether it can be trusted, in words.
        places: The normal laws that optimisation found.
        remarks: What was odd about the target at its starting points.
        seconds: How long the fit took, compilation included.
    """

    target: Target
    flow: AbstractDistribution
    own: Assessment
    proposal: AbstractDistribution
    assessment: Assessment
    verdict: Verdict
    places: Gaussians
    remarks: tuple[str, ...]
    seconds: float

    @property
    def k_hat(self) -> float:
        """The Pareto shape k̂ of the importance weights' tail; see `Assessment.k_hat`."""
        return self.assessment.k_hat

    @property
    def ess(self) -> float:
        """The effective number of the assessed draws after weighting."""
        return self.assessment.ess

    @property
    def elbo(self) -> Estimate:
        """The flow's evidence lower bound E_q[ln p̃ − ln q], with its standard error, in nats."""
        return self.own.elbo

    @property
    def log_evidence(self) -> Estimate:
        """Ln ∫ p̃ by importance sampling, with its standard error; doubtful where k̂ is high."""
        return self.assessment.log_evidence

    def sample(self, key: PRNGKeyArray, shape: Shape = ()) -> PyTree:
        """Draws of the approximation itself, in the user's space, with leading axes `shape`."""
        return self.target.constrain(self.flow.sample(key, shape))

    def log_prob(self, values: PyTree) -> Array:
        """The approximation's log density of constrained values, with any leading axes.

            ln q(θ) = ln q(z(θ)) − ln |dθ/dz|

        The measure is stated in `laminar.inference.target`.

        Raises:
            InputError: If the values have another structure than the target's.
            ShapeError: If their shapes do not fit.
        """
        z = self.target.unconstrain(values)
        jacobian = jax.vmap(self.target.log_jacobian)(z.reshape(-1, self.target.dim))
        return self.flow.log_prob(z) - jacobian.reshape(z.shape[:-1])

    def resample(self, key: PRNGKeyArray, shape: int | Shape) -> PyTree:
        """Draws that follow the target as far as the weights correct, with leading axes `shape`.

        The assessed draws are drawn from with replacement by their smoothed weights, so there are
        repetitions where their number is not small beside `ess`.

        Raises:
            InputError: If no draw has any weight.
        """
        axes = (shape,) if isinstance(shape, int) else tuple(shape)
        z = self.unconstrained(key, math.prod(axes))
        return self.target.constrain(z.reshape(*axes, self.target.dim))

    def unconstrained(self, key: PRNGKeyArray, n: int) -> Array:
        """Like `resample`, n draws, as unconstrained vectors ``(n, D)``."""
        return jnp.asarray(self.assessment.z[self._chosen(key, n)])

    def _chosen(self, key: PRNGKeyArray, n: int) -> np.ndarray:
        weights = self.assessment.weights
        if not weights.sum() > 0:
            raise InputError("No draw has any weight under the target, so none can be resampled.")
        # One uniform number places n equidistant pointers, which has less noise than n numbers.
        start, order = jr.split(key)
        at = (np.arange(n) + float(jr.uniform(start))) / n
        found = np.searchsorted(np.cumsum(weights / weights.sum()), at)
        found = np.minimum(found, len(weights) - 1)
        return found[np.asarray(jr.permutation(order, n))]

    @functools.cached_property
    def draws(self) -> PyTree:
        """The proposal's draws in the user's space, ``(N, …)``, to be used with `weights`."""
        return self.target.constrain(jnp.asarray(self.assessment.z))

    @property
    def weights(self) -> np.ndarray:
        """Normalised smoothed weights of `draws`, ``(N,)``."""
        return self.assessment.weights

    def mean(self, function: Any = None) -> PyTree:
        """The weighted posterior mean of values, or of a function of one set of values.

        Args:
            function: ``values -> tree of arrays``; by default the values themselves.
        """
        draws = self.draws if function is None else jax.vmap(function)(self.draws)
        weights = self._weights_or_equal()
        # What has no weight may be infinite, of which zero times is NaN.
        alive = weights > 0

        def mean(x):
            x = np.asarray(x)[alive]
            return np.tensordot(weights[alive], x.astype(np.result_type(x, np.float64)), 1)

        return jtu.tree_map(mean, draws)

    def _weights_or_equal(self) -> np.ndarray:
        weights = self.weights
        return weights if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))

    def summary(self, weighted: bool = True) -> list[dict[str, Any]]:
        """Mean, standard deviation and quantiles of every scalar of the user's values.

        Args:
            weighted: Weigh the proposal's draws; or take the flow's own as they are.

        Returns:
            One dictionary for each scalar: ``name``, ``mean``, ``sd``, ``5%``, ``50%``, ``95%``.
        """
        columns = self.columns(weighted)
        count = len(columns)
        weights = self._weights_or_equal() if weighted else np.full(count, 1 / count)
        alive = weights > 0
        columns, weights, count = columns[alive], weights[alive], int(alive.sum())
        rows = []
        for name, column in zip(self.target.names, columns.T, strict=True):
            mean = float(weights @ column)
            order = np.argsort(column)
            at = np.searchsorted(np.cumsum(weights[order]), _QUANTILES)
            quantiles = column[order][np.minimum(at, count - 1)]
            row = {"name": name, "mean": mean}
            row["sd"] = float(np.sqrt(weights @ (column - mean) ** 2))
            row.update({f"{q:.0%}": float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)})
            rows.append(row)
        return rows

    def columns(self, weighted: bool = True) -> np.ndarray:
        """All scalars of the draws, ``(N, scalars)``, named by ``target.names``.

        Args:
            weighted: Of the proposal's draws, whose `weights` go with them; or of the flow's own.
        """
        values = self.draws if weighted else self.target.constrain(jnp.asarray(self.own.z))
        arrays = self.target.named(values).values()
        return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in arrays], 1)

    def to_dict(self) -> dict[str, Any]:
        """The figures and the verdict as plain values, for JSON; None for what is not finite."""
        figures = {
            "elbo": self.elbo.value,
            "elbo_error": self.elbo.error,
            "log_evidence": self.log_evidence.value,
            "log_evidence_error": self.log_evidence.error,
            "k_hat": self.k_hat,
            "k_hat_own": self.own.k_hat,
            "ess": self.ess,
        }
        return {
            "verdict": self.verdict.grade,
            "reasons": list(self.verdict.reasons),
            "caveat": self.verdict.caveat,
            "remarks": list(self.remarks),
            **{k: float(v) if np.isfinite(v) else None for k, v in figures.items()},
            "draws": len(self.assessment.z),
            "seconds": self.seconds,
            "summary": self.summary(),
        }

    def __repr__(self) -> str:
        """The summary table, the figures and the verdict."""
        table = [
            f"{row['name']:<20.20} " + " ".join(f"{row[c]:>10.4g}" for c in COLUMNS)
            for row in self.summary()
        ]
        head = f"{'':<20} " + " ".join(f"{c:>10}" for c in COLUMNS)
        return "\n".join([head, *table, "", self.figures(), str(self.verdict), *self.remarks])

    def figures(self) -> str:
        """Evidence, bound, k̂, effective draws and seconds in one line."""
        evidence, elbo = self.log_evidence, self.elbo
        return (
            f"log evidence {float(evidence.value):.3f} ± {float(evidence.error):.3f}   "
            f"ELBO {float(elbo.value):.3f} ± {float(elbo.error):.3f}   "
            f"k̂ {self.k_hat:.2f}   effective draws {self.ess:,.0f} of {len(self.weights):,}   "
            f"{self.seconds:.1f} s"
        )

    def predictive(self, key: PRNGKeyArray, n: int = 1_000, *args: Any, **kwargs: Any) -> dict:
        """Draws of the model's observed sites (and deterministic ones) under the posterior.

        Args:
            key: Random key.
            n: How many, from resampled posterior draws.
            *args: Arguments for the model in place of its own, as covariates of new rows.
            **kwargs: Likewise.

        Raises:
            InputError: If the target is no NumPyro model.
        """
        from laminar.inference import arviz

        draw_key, model_key = jr.split(key)
        values = self.resample(draw_key, n)
        return arviz.predictive(self.target, values, model_key, *args, **kwargs)

    def to_arviz(self, key: PRNGKeyArray, n: int = 1_000) -> Any:
        """An ``arviz.InferenceData`` of n resampled draws, as one chain.

        For a NumPyro model with ``log_likelihood``, ``posterior_predictive`` and ``observed_data``.
        """
        from laminar.inference import arviz

        draw_key, model_key = jr.split(key)
        return arviz.to_arviz(self.target, self.resample(draw_key, n), model_key)

    def loo(self, key: PRNGKeyArray, n: int = 1_000) -> Any:
        """Leave-one-out cross-validation of a NumPyro model's observations, by ArviZ."""
        from laminar.inference import arviz

        return arviz.loo(self.to_arviz(key, n))

    def waic(self, key: PRNGKeyArray, n: int = 1_000) -> Any:
        """The widely applicable information criterion of a NumPyro model, by ArviZ."""
        from laminar.inference import arviz

        return arviz.waic(self.to_arviz(key, n))


COLUMNS = ("mean", "sd", "5%", "50%", "95%")
