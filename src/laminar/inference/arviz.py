"""Posterior draws in ArviZ: smoothed importance weights, an InferenceData, LOO and WAIC."""

import math
import warnings
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from laminar._errors import InputError, MissingExtraError, ShapeError
from laminar._typing import ArrayLike, PRNGKeyArray, PyTree, Shape
from laminar.inference.supports import load_numpyro, permissive
from laminar.inference.target import Target

_LEAST_TAIL = 5
"""Fewer weights than this in the tail and nothing can be said of its shape."""


def load_arviz() -> Any:
    """The package ArviZ, or a `MissingExtraError` that says how to get it."""
    try:
        with warnings.catch_warnings():
            # Once a day it announces a version that the extra does not ask for.
            warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
            import arviz
    except ImportError as error:
        raise MissingExtraError("arviz", "inference", "This summary of a posterior") from error
    return arviz


def psis(log_weights: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed importance weights and the shape k̂ of their tail (Vehtari et al. 2024).

    The weights are those of draws x_i from q, up to one factor: ln w_i = ln p̃(x_i) − ln q(x_i).
    The largest ones are replaced by quantiles of a generalised Pareto distribution fitted to them.
    Below k̂ = 0.5 the weights have a finite variance, below 0.7 smoothed estimates can be used, and
    above that neither they nor q can be trusted.

    Args:
        log_weights: ``(..., N)``, one set of weights along the last axis; computed in float64.

    Returns:
        Smoothed log-weights whose exponentials sum to one, ``(..., N)``, and k̂, ``(...)``. Where
        the largest weight is shared by the whole tail, as when q = p̃ exactly, there is no tail to
        fit: the weights stay as they are, and k̂ is 0. With too few weights, under 25, to tell, k̂ is
        +∞. A NaN or +∞ among the weights, and nothing but −∞, give NaN for both.
    """
    log_w = np.asarray(log_weights, np.float64)
    if log_w.ndim == 0 or log_w.shape[-1] == 0:
        raise ShapeError(
            f"psis: log_weights have shape {log_w.shape}; one axis of draws is needed."
        )
    flat = log_w.reshape(-1, log_w.shape[-1])
    pairs = [_psis_one(row) for row in flat]
    smoothed = np.stack([row for row, _ in pairs]).reshape(log_w.shape)
    return smoothed, np.asarray([k for _, k in pairs]).reshape(log_w.shape[:-1])


def _psis_one(log_w: np.ndarray) -> tuple[np.ndarray, float]:
    top = log_w.max()
    if not np.isfinite(top):
        # NaN and +∞ have no order, and with −∞ alone there is no draw under the target at all.
        return np.full_like(log_w, np.nan), math.nan
    tail = math.ceil(min(log_w.size / 5, 3 * math.sqrt(log_w.size)))
    plain = log_w - top
    plain -= math.log(np.exp(plain).sum())
    if tail < _LEAST_TAIL:
        return plain, math.inf
    if np.partition(log_w, -tail - 1)[-tail - 1] == top:
        return plain, 0.0
    # Quantiles of a hopeless tail overflow; smoothed weights never exceed the largest raw one.
    with np.errstate(over="ignore"):
        smoothed, k_hat = load_arviz().psislw(log_w - top)
    return np.asarray(smoothed), float(k_hat)


def to_arviz(
    target: Target,
    values: PyTree,
    key: PRNGKeyArray | None = None,
    *,
    log_likelihood: bool = True,
) -> Any:
    """Draws as an ``arviz.InferenceData``, which ArviZ's summaries and plots take.

    Args:
        target: What the draws are of.
        values: Constrained values as ``target.constrain`` gives them, with leading axes
            ``(chain, draw)``, or ``(draw,)``, which becomes one chain.
        key: Draws the posterior predictive of a model; without a key there is none.
        log_likelihood: Whether to compute each observation's log likelihood.

    Returns:
        The groups ``posterior`` (a model's deterministic sites included) and, for a model with
        observations, ``log_likelihood``, ``posterior_predictive`` and ``observed_data``.

    Raises:
        InputError: If the values have another structure than the target's.
        ShapeError: If they have not one or two leading axes.
        MissingExtraError: If ArviZ is not installed.
    """
    az = load_arviz()
    named, batch = _chains(target, values)
    groups: dict[str, Any] = {"posterior": dict(named)}
    if target.model is not None:
        trace = _run(target, named)
        seen = {k: np.asarray(s["value"]) for k, s in trace.items() if _is_data(s)}
        fixed = [k for k, s in trace.items() if s["type"] == "deterministic"]
        if fixed:
            groups["posterior"] |= _predict(target, named, batch, jr.key(0), fixed, free=False)
        if seen:
            groups["observed_data"] = seen
            if log_likelihood:
                groups["log_likelihood"] = _log_likelihood(target, named, seen)
            if key is not None:
                drawn = _predict(target, named, batch, key, list(seen), free=True)
                groups["posterior_predictive"] = drawn
    return az.from_dict(**groups)


def predictive(
    target: Target, values: PyTree, key: PRNGKeyArray, *args: Any, **kwargs: Any
) -> dict[str, np.ndarray]:
    """Draws of a model's observed and deterministic sites, one for each posterior draw.

    Args:
        target: The target of a NumPyro model.
        values: Posterior draws as ``target.constrain`` gives them, with leading axes ``(draw,)`` or
            ``(chain, draw)``.
        key: Random key.
        *args: Arguments for the model in place of its own, such as covariates of new rows; what it
            observes is ignored.
        **kwargs: Likewise. With neither, the model's own arguments serve.

    Returns:
        Arrays by site, with the leading axes of the values.

    Raises:
        InputError: If the target is no NumPyro model.
    """
    if target.model is None:
        raise InputError("A posterior predictive needs a NumPyro model, and this is a log density.")
    named, batch = _chains(target, values, keep=True)
    given = (args, kwargs) if args or kwargs else (target.args, target.kwargs)
    latent = {leaf.name for leaf in target.leaves}
    sites = [
        name
        for name, site in _run(target, named, len(batch), *given).items()
        if _is_data(site)
        or site["type"] == "deterministic"
        # New arguments may leave out the observations, which are then drawn like all else.
        or (site["type"] == "sample" and not site["is_observed"] and name not in latent)
    ]
    return _predict(target, named, batch, key, sites, True, *given)


def loo(data: Any, var_name: str | None = None, **options: Any) -> Any:
    """Pareto-smoothed leave-one-out cross-validation of an InferenceData, by ArviZ.

    Args:
        data: What `to_arviz` gave.
        var_name: Which observed site, where there are several.
        **options: Passed on to ``arviz.loo``, as ``pointwise=True``.

    Returns:
        ArviZ's ``ELPDData``.

    Raises:
        InputError: If there is no log likelihood, or more than one and none is named.
    """
    return load_arviz().loo(data, var_name=_one_site(data, var_name), **options)


def waic(data: Any, var_name: str | None = None, **options: Any) -> Any:
    """The widely applicable information criterion of an InferenceData, by ArviZ; see `loo`."""
    return load_arviz().waic(data, var_name=_one_site(data, var_name), **options)


def _one_site(data: Any, var_name: str | None) -> str:
    if "log_likelihood" not in data.groups():
        raise InputError(
            "The draws have no log likelihood; it takes a NumPyro model that observes something."
        )
    sites = list(data.log_likelihood.data_vars)
    if var_name is None and len(sites) > 1:
        raise InputError(f"The model observes {', '.join(sites)}; name one by var_name=….")
    if var_name is not None and var_name not in sites:
        raise InputError(f"The model observes {', '.join(sites)}, and not {var_name!r}.")
    return sites[0] if var_name is None else var_name


def _chains(
    target: Target, values: PyTree, keep: bool = False
) -> tuple[dict[str, np.ndarray], Shape]:
    """Named arrays with axes (chain, draw) in front, or as given with `keep`, and those axes."""
    named = {name: np.asarray(x) for name, x in target.named(values).items()}
    batches = {leaf.name: named[leaf.name].shape[: _split(leaf, named)] for leaf in target.leaves}
    batch = next(iter(batches.values()))
    if any(found != batch for found in batches.values()) or len(batch) not in (1, 2):
        raise ShapeError(
            f"Draws have leading axes {batches}; all must have the same, (draw,) or (chain, draw)."
        )
    if keep or len(batch) == 2:
        return named, batch
    return {name: x[None] for name, x in named.items()}, (1, *batch)


def _split(leaf, named) -> int:
    return max(named[leaf.name].ndim - len(leaf.shape), 0)


def _is_data(site: dict[str, Any]) -> bool:
    """Whether a site is an observation, and no factor, which NumPyro observes too."""
    unit = load_numpyro().distributions.Unit
    return site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], unit)


def _run(target: Target, named, axes: int = 2, args: Any = None, kwargs: Any = None) -> dict:
    """The sites of one run of the model at the first draw."""
    handlers = load_numpyro().handlers
    first = {name: jnp.asarray(x[(0,) * axes]) for name, x in named.items()}
    args, kwargs = (target.args, target.kwargs) if args is None else (args, kwargs)
    with permissive():
        seeded = handlers.seed(handlers.substitute(target.model, data=first), jr.key(0))
        return handlers.trace(seeded).get_trace(*args, **kwargs)


def _predict(
    target: Target, named, batch, key, sites, free: bool, args: Any = None, kwargs: Any = None
) -> dict[str, np.ndarray]:
    """Values of some sites at every draw, with what is observed drawn anew if `free`."""
    numpyro = load_numpyro()
    model = _unconditioned(target.model) if free else target.model
    args, kwargs = (target.args, target.kwargs) if args is None else (args, kwargs)
    draws = {name: jnp.asarray(x) for name, x in named.items()}
    with permissive():
        drawer = numpyro.infer.Predictive(
            model,
            posterior_samples=draws,
            return_sites=sites,
            batch_ndims=len(batch),
            parallel=True,
        )
        return {name: np.asarray(x) for name, x in drawer(key, *args, **kwargs).items()}


def _unconditioned(model: Any) -> Any:
    """The model with its observations drawn, each of the shape that it has."""
    numpyro = load_numpyro()

    class Unconditioned(numpyro.handlers.uncondition):
        def process_message(self, msg):
            if msg["type"] != "sample" or not msg["is_observed"]:
                return
            fn, shape = msg["fn"], np.shape(msg["value"])
            # Rows are often observed under one distribution, with no plate to tell how many.
            batch = np.broadcast_shapes(shape[: len(shape) - fn.event_dim], fn.batch_shape)
            if batch != fn.batch_shape and not isinstance(fn, numpyro.distributions.Unit):
                msg["fn"] = fn.expand(batch)
            super().process_message(msg)

    return Unconditioned(model)


def _log_likelihood(target: Target, named, seen) -> dict[str, np.ndarray]:
    """The log likelihood of every observation at every draw."""
    numpyro = load_numpyro()
    draws = {name: jnp.asarray(x) for name, x in named.items()}

    def seeded(*args, **kwargs):
        return numpyro.handlers.seed(target.model, jr.key(0))(*args, **kwargs)

    with permissive():
        found: Any = numpyro.infer.util.log_likelihood(
            seeded, draws, *target.args, batch_ndims=2, **target.kwargs
        )
    return {name: np.asarray(x) for name, x in found.items() if name in seen}
