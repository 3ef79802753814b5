"""Training of the ensemble: compiled once for fits of like size, and stopped by rows held out."""

import dataclasses

import numpy as np
from scipy.stats import norm

from laminar.estimators import response
from laminar.estimators.response import Sizes, fit_law, pad_condition

QUICK = Sizes(16, 1, 6, 60, 32, 3e-3, 1e-2, rounds=6, patience=3)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    c = rng.normal(size=(count, 3))
    r = c[:, 0] + np.exp(0.3 * c[:, 1]) * rng.normal(size=count)
    return r, c, np.ones(count), rng.permutation(count) % 3


def test_fits_of_like_size_compile_once():
    before = response._train._cached._cache_size()
    for count in (70, 75, 90):
        for rate in (1e-3, 3e-3):
            fitted = fit_law(0, *rows(count), dataclasses.replace(QUICK, learning_rate=rate))
            assert np.isfinite(fitted.held_out).all()
    assert response._train._cached._cache_size() - before == 1


def test_every_row_is_held_out_once_and_the_best_is_kept():
    r, c, w, folds = rows(400)
    fitted = fit_law(1, r, c, w, folds, dataclasses.replace(QUICK, steps=600, rounds=10))
    assert fitted.held_out.shape == (400,)
    losses, best = fitted.losses, fitted.best_round
    assert losses.shape == (3, 11)
    for fold in range(3):
        assert np.nanmin(losses[fold]) == losses[fold, best[fold]]
    # Better than the law of all rows together, which training begins with.
    assert np.nanmin(losses, 1).mean() < losses[:, 0].mean() - 0.2
    assert fitted.held_out.mean() > norm.logpdf(r, r.mean(), r.std()).mean() + 0.2


def test_training_ends_with_the_patience():
    r, c, w, folds = rows(60)
    # Noise alone: there is nothing to learn, and a high rate soon makes it worse.
    r = np.random.default_rng(5).normal(size=60)
    sizes = dataclasses.replace(QUICK, steps=4_000, rounds=40, learning_rate=3e-2)
    fitted = fit_law(2, r, c, w, folds, sizes)
    assert np.isnan(fitted.losses[:, -1]).all()


def test_conditions_are_padded_to_few_lengths():
    c = np.ones((4, 11))
    assert pad_condition(c).shape == (4, 16)
    assert pad_condition(c[:, :8]).shape == (4, 8)
    np.testing.assert_array_equal(pad_condition(c)[:, 11:], 0)
