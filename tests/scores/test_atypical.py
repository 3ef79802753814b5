"""Typicality, latent radius and contrast against what is known of normal laws."""

import numpy as np
import pytest
from scipy.stats import chi2, norm

from laminar._errors import InputError
from laminar.scores import (
    batch_typicality,
    chi_square_log_tail,
    contrast,
    latent_radius,
    typicality,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_mode_of_a_wide_normal_law_is_atypical():
    """In 200 dimensions the origin is the most probable point and unlike every draw."""
    z = rng().normal(size=(2_000, 200))
    log_p = norm.logpdf(z).sum(axis=1)
    origin = np.array([norm.logpdf(0) * 200])
    assert origin > log_p.max()
    assert typicality(origin, log_p) < typicality(log_p, log_p).min()
    assert np.isneginf(typicality(np.array([-np.inf]), log_p))
    assert np.isnan(typicality(np.array([np.nan]), log_p))
    with pytest.raises(InputError, match="finite"):
        typicality(log_p, np.array([-np.inf]))


def test_batches_show_what_no_row_does():
    generator = rng(1)
    calibration = norm.logpdf(generator.normal(size=20_000))
    same = [
        batch_typicality(norm.logpdf(generator.normal(size=100)), calibration, generator, 199)
        for _ in range(200)
    ]
    assert abs(np.mean([found.p_value <= 0.2 for found in same]) - 0.2) < 0.09
    wide = norm.logpdf(generator.normal(0, 1.2, size=1_000))
    assert batch_typicality(wide, calibration, generator).p_value < 0.01
    assert np.isnan(batch_typicality(np.array([np.nan]), calibration, generator).p_value)
    far = batch_typicality(np.array([-np.inf]), calibration, generator)
    assert far.statistic == np.inf
    assert far.p_value < 1 / 1000
    # Rows of density zero are as many on both sides.
    lost = np.where(generator.random((300, 1_000)) < 1e-3, -np.inf, 0.0)
    values = norm.logpdf(generator.normal(size=(300, 1_000))) + lost
    p = [batch_typicality(v, values[i - 1], generator, 199).p_value for i, v in enumerate(values)]
    assert np.mean(np.less_equal(p, 0.1)) < 0.15
    with pytest.raises(InputError, match="needs rows"):
        batch_typicality(np.array([]), calibration, generator)


@pytest.mark.parametrize("dim", [1, 2, 7, 100, 1_001])
def test_the_tail_of_chi_square_where_scipy_still_reaches_and_beyond(dim):
    squares = dim * np.array([0.0, 0.3, 1.0, 2.0, 3.0]) + np.array([0.0, 1, 2, 3, 400])
    expected = chi2.logsf(squares, dim)
    seen = expected > -600
    np.testing.assert_allclose(chi_square_log_tail(squares, dim)[seen], expected[seen], rtol=1e-9)
    # The derivative of the tail is minus the density, wherever the tail is.
    deep = dim * 4.0 + np.array([1_500.0, 1_500.5, 1_501.0])
    log_tail = chi_square_log_tail(deep, dim)
    assert (log_tail < -575).all()
    slope = (log_tail[2] - log_tail[0]) / 1.0
    hazard = -np.exp(chi2.logpdf(deep[1], dim) - log_tail[1])
    assert slope == pytest.approx(hazard, rel=1e-4)
    with pytest.raises(InputError, match="at least one"):
        chi_square_log_tail(squares, 0)


def test_the_radius_is_a_tail_probability():
    z = rng(2).normal(size=(4_000, 5))
    u = np.exp(latent_radius(z))
    for t in (0.1, 0.5, 0.9):
        assert (u <= t).mean() == pytest.approx(t, abs=0.03)
    far = latent_radius(np.array([[1e200] * 5, [np.nan] * 5, [0.0] * 5]))
    assert np.isneginf(far[0])
    assert np.isnan(far[1])
    assert far[2] == 0
    with pytest.raises(InputError, match="shape"):
        latent_radius(np.zeros(3))


def test_contrast_is_a_ratio_that_keeps_infinities_apart():
    p = np.array([1.0, -np.inf, -np.inf, 2.0, np.nan, 1.0])
    background = np.array([0.5, -np.inf, 3.0, -np.inf, 0.0, np.nan])
    found = contrast(p, background)
    np.testing.assert_array_equal(found[:4], [0.5, -np.inf, -np.inf, np.inf])
    assert np.isnan(found[4:]).all()
    with pytest.raises(InputError, match="shape"):
        contrast(p, background[:2])
