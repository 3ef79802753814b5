"""Scores that say how strange rows are, and what may be concluded from them.

Arrays in, arrays out, on the host and in float64; tables have their own door in
`laminar.tables.anomaly` and `laminar.tables.drift`.
"""

from laminar.scores.atypical import (
    BatchTypicality,
    batch_typicality,
    chi_square_log_tail,
    contrast,
    latent_radius,
    typicality,
)
from laminar.scores.conformal import (
    benjamini_hochberg,
    conditional_p_values,
    conformal_p_values,
    holm,
    null_share,
)
from laminar.scores.memorisation import Memorisation, memorisation, nearest_distances
from laminar.scores.twosample import TwoSample, category_test, ks_test, mmd_test, uniform_test

__all__ = [
    "BatchTypicality",
    "Memorisation",
    "TwoSample",
    "batch_typicality",
    "benjamini_hochberg",
    "category_test",
    "chi_square_log_tail",
    "conditional_p_values",
    "conformal_p_values",
    "contrast",
    "holm",
    "ks_test",
    "latent_radius",
    "memorisation",
    "mmd_test",
    "nearest_distances",
    "null_share",
    "typicality",
    "uniform_test",
]
