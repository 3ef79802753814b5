"""A density from mixtures, kernels and marginal maps alone, weighted on held-out rows.

Candidates differ in the number of components, in the strength of the prior, and in whether the
columns are made normal first. None is chosen: cross-validated log-densities give each its weight
(stacking), which is never worse than the best of them by more than the noise of a few weights and
usually much better.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# SciPy is imported where it is used: that takes a quarter of a second, and `fit` needs none of it.
from laminar.train import mixtures
from laminar.train.mixtures import Components, Knots

TAIL_DF = 2.0
"""Degrees of freedom of the heavy-tailed candidate."""


class Tail(NamedTuple):
    """Independent Student-t entries behind a triangular map: x = mean + factor · t."""

    mean: np.ndarray
    factor: np.ndarray


class Spec(NamedTuple):
    """One candidate density.

    Attributes:
        kind: ``"mixture"`` in data space, ``"marginal"`` (a mixture behind quantile maps),
            ``"kernel"``, or the heavy ``"tail"``.
        components: Number of Gaussians.
        strength: Rows the prior is worth, or the width of kernels.
    """

    kind: str
    components: int = 1
    strength: float = 0.0

    @property
    def label(self) -> str:
        """How to call it in a report."""
        if self.kind == "tail":
            return "tail"
        if self.kind == "kernel":
            return f"kernel(width={self.strength:g})"
        return f"{self.kind}({self.components}, prior={self.strength:g})"


class Shallow(NamedTuple):
    """A weighted set of fitted candidates; all marginal ones share one `knots`.

    The first `given` columns of a row are its condition.
    """

    specs: tuple[Spec, ...]
    weights: np.ndarray
    parts: tuple
    knots: Knots | None
    given: int = 0

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """The log-density of each row (N, given + D)."""
        latent = None if self.knots is None else _latent(self.knots, x, self.given)
        both = zip(self.specs, self.parts, strict=True)
        logs = [_score(spec, part, x, latent, self.given) for spec, part in both]
        return mixtures.log_sum(np.stack(logs, 1) + np.log(self.weights))


def candidates(
    dim: int,
    counts: Sequence[int],
    widths: Sequence[float],
    priors: Sequence[float] | None = None,
) -> list[list[Spec]]:
    """Paths of candidates, each in the order of growing size; a path is left once it gets worse.

    Without `priors`, weak and strong ones are tried in data space, and middling ones behind
    quantile maps, which overfit more easily.
    """
    if priors is None:
        plain, behind = sorted({0.1, 1.0, dim / 2 + 1, 2.0 * dim + 2}), sorted({1.0, dim / 2 + 1})
    else:
        plain = behind = list(priors)
    near = [[Spec("mixture", count, prior) for count in counts] for prior in plain]
    behind_maps = [[Spec("marginal", count, prior) for count in counts] for prior in behind]
    # In turn, so that a search cut short by a time limit has tried both kinds: without quantile
    # maps one outlier can spoil a column.
    turns = itertools.chain.from_iterable(itertools.zip_longest(behind_maps, near))
    kernels = [[Spec("kernel", 0, width)] for width in widths]
    return [*(path for path in turns if path), *kernels, [Spec("tail")]]


def _latent(knots: Knots, x: np.ndarray, given: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with their columns, but not the condition, made normal, and ln |dz/dx|."""
    z, log_det = mixtures.apply_knots(knots, x[:, given:])
    return np.concatenate([x[:, :given], z], axis=1), log_det


def _fit(spec: Spec, x, weights, latent, seed, iterations, given):
    if spec.kind == "tail":
        x = x[:, given:]
        mean = x.mean(0) if weights is None else weights @ x / weights.sum()
        return Tail(mean, np.linalg.cholesky(mixtures.pooled_covariance(x, weights)))
    if spec.kind == "kernel":
        return mixtures.fit_kernels(x, spec.strength, diagonal=False, weights=weights)
    rows = x if spec.kind == "mixture" else latent[0]
    return mixtures.fit_components(
        rows, spec.components, spec.strength, seed=seed, weights=weights, iterations=iterations
    )


def _score(spec: Spec, part, x, latent, given) -> np.ndarray:
    if spec.kind == "tail":
        return _tail_log_prob(part, x[:, given:])
    if spec.kind == "kernel":
        return mixtures.kernel_log_prob(part, x)
    rows, log_det = (x, 0.0) if spec.kind == "mixture" else latent
    log_p = part.log_prob(rows) + log_det
    return log_p if given == 0 else log_p - part.marginal(given).log_prob(rows[:, :given])


def _tail_log_prob(tail: Tail, x: np.ndarray) -> np.ndarray:
    from scipy.linalg import solve_triangular
    from scipy.special import gammaln

    z = solve_triangular(tail.factor, (x - tail.mean).T, lower=True)
    half = 0.5 * (TAIL_DF + 1)
    constant = gammaln(half) - gammaln(0.5 * TAIL_DF) - 0.5 * np.log(TAIL_DF * np.pi)
    log_p = (constant - half * np.log1p(z**2 / TAIL_DF)).sum(0)
    return log_p - np.log(np.diag(tail.factor)).sum()


def search(
    x: np.ndarray,
    weights: np.ndarray | None,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    paths: Sequence[Sequence[Spec]],
    *,
    seed: int,
    given: int = 0,
    iterations: int = 60,
    drop: float = 1.0,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[list[Spec], np.ndarray, np.ndarray]:
    """Score the candidates on rows they were not fitted to.

    Args:
        x: Rows (N, given + D), float64: the condition first, if there is one.
        weights: Sample weights (N,), or None.
        folds: Pairs of row numbers, for fitting and for scoring.
        paths: From `candidates`.
        seed: For the starts of EM.
        given: How many columns are the condition; candidates are then scored as conditional
            densities. Kernels take none.
        iterations: Of EM, at most.
        drop: A path ends when its score is this many nats below its best.
        out_of_time: Asked between fits; the candidates scored so far are then all there is.

    Returns:
        The candidates, their held-out log-densities (rows of all folds, candidates), and the
        numbers of those rows.
    """
    held = np.concatenate([score for _, score in folds])
    w_held = None if weights is None else weights[held]
    latents = []
    for fit, score in folds:
        knots = mixtures.fit_knots(x[fit][:, given:], _at(weights, fit))
        latents.append([_latent(knots, x[rows], given) for rows in (fit, score)])
    specs, logs = [], []
    smallest = min(len(fit) for fit, _ in folds)
    for path in sorted(paths, key=len):
        best = -np.inf
        for spec in path:
            if spec.components > max(1, smallest // 4) or (specs and out_of_time()):
                break
            parts = [
                _score(
                    spec,
                    _fit(spec, x[fit], _at(weights, fit), latent[0], seed, iterations, given),
                    x[score],
                    latent[1],
                    given,
                )
                for (fit, score), latent in zip(folds, latents, strict=True)
            ]
            log_p = np.concatenate(parts)
            specs.append(spec)
            logs.append(log_p)
            mean = float(np.average(log_p, weights=w_held))
            best = max(best, mean)
            if mean < best - drop:
                break
    return specs, np.stack(logs, 1), held


def refit(
    specs: Sequence[Spec],
    shares: np.ndarray,
    x: np.ndarray,
    weights: np.ndarray | None,
    *,
    seed: int,
    given: int = 0,
    iterations: int = 100,
) -> Shallow:
    """Fit the chosen candidates to rows, with given weights in the mixture of them."""
    knots = None
    latent = None
    if any(spec.kind == "marginal" for spec in specs):
        knots = mixtures.fit_knots(x[:, given:], weights)
        latent = _latent(knots, x, given)
    parts = tuple(_fit(spec, x, weights, latent, seed, iterations, given) for spec in specs)
    return Shallow(tuple(specs), np.asarray(shares) / np.sum(shares), parts, knots, given)


def prune(
    specs: Sequence[Spec], logs: np.ndarray, weights: np.ndarray | None, most: int
) -> tuple[list[int], np.ndarray]:
    """Stack, keep the heaviest candidates and always the tail, and stack those again."""
    shares = mixtures.stack(logs, weights)
    order = list(np.argsort(-shares, kind="stable"))
    keep = [i for i in order if shares[i] > 0.01][:most]
    keep += [i for i, spec in enumerate(specs) if spec.kind == "tail" and i not in keep]
    return keep, mixtures.stack(logs[:, keep], weights)


def merge(shallow: Shallow, kind: str) -> tuple[float, Components] | None:
    """All candidates of one kind as a single mixture, with its weight, or None if there is none."""
    chosen = [
        (w, part)
        for spec, w, part in zip(shallow.specs, shallow.weights, shallow.parts, strict=True)
        if spec.kind == kind
    ]
    if not chosen:
        return None
    total = sum(w for w, _ in chosen)
    return float(total), Components(
        np.concatenate([w / total * part.weights for w, part in chosen]),
        np.concatenate([part.means for _, part in chosen]),
        np.concatenate([part.factors for _, part in chosen]),
    )


def _at(array, index):
    return None if array is None else array[index]
