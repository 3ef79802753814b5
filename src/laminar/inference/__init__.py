"""Bayesian inference: targets, posteriors, and the bridges to NumPyro and ArviZ.

A `Target` is a log density in unconstrained space, made by `as_target` from a JAX function with
declared supports or from a NumPyro model. Needs the extra ``laminar[inference]``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laminar.inference.arviz import loo as loo
    from laminar.inference.arviz import predictive as predictive
    from laminar.inference.arviz import psis as psis
    from laminar.inference.arviz import to_arviz as to_arviz
    from laminar.inference.arviz import waic as waic
    from laminar.inference.assessment import Assessment as Assessment
    from laminar.inference.assessment import Verdict as Verdict
    from laminar.inference.fitting import fit_posterior as fit_posterior
    from laminar.inference.numpyro import AutoFlow as AutoFlow
    from laminar.inference.numpyro import FlowDistribution as FlowDistribution
    from laminar.inference.numpyro import FlowTransform as FlowTransform
    from laminar.inference.numpyro import neutra as neutra
    from laminar.inference.posterior import Posterior as Posterior
    from laminar.inference.target import Target as Target
    from laminar.inference.target import as_target as as_target

_HOMES = {
    "Assessment": "assessment",
    "Posterior": "posterior",
    "Verdict": "assessment",
    "fit_posterior": "fitting",
    "AutoFlow": "numpyro",
    "FlowDistribution": "numpyro",
    "FlowTransform": "numpyro",
    "Target": "target",
    "as_target": "target",
    "loo": "arviz",
    "neutra": "numpyro",
    "predictive": "arviz",
    "psis": "arviz",
    "to_arviz": "arviz",
    "waic": "arviz",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'laminar.inference' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"laminar.inference.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
