"""Quantile maps: knots, tails, digits, units, and what may be trained."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from laminar._errors import InputError, ShapeError
from laminar._params import partition
from laminar.bijections.quantile import QuantileMap


def _column(z, x, slope):
    return QuantileMap(*(jnp.asarray(v)[:, None] for v in (z, x, slope)))


def test_knots_and_slopes_are_met():
    z, x, slope = jnp.array([-1.0, 0.0, 2.0]), jnp.array([-3.0, 0.5, 1.0]), jnp.array([2.0, 1, 0.1])
    quantiles = _column(z, x, slope)
    y, log_det = quantiles.forward(z[None])
    np.testing.assert_allclose(y[0], x, rtol=1e-6)
    np.testing.assert_allclose(log_det, jnp.log(slope), atol=1e-6)
    back, log_det = quantiles.inverse(x[None])
    np.testing.assert_allclose(back[0], z, atol=1e-6)
    np.testing.assert_allclose(log_det, -jnp.log(slope), atol=1e-6)


def test_tails_are_lines():
    quantiles = _column([-1.0, 1.0], [-1.0, 1.0], [0.5, 3.0])
    y, log_det = quantiles.forward(jnp.array([[-3.0, 2.0]]))
    np.testing.assert_allclose(y[0], [-2, 4])
    np.testing.assert_allclose(log_det, jnp.log(jnp.array([0.5, 3.0])), atol=1e-6)
    np.testing.assert_allclose(quantiles.inverse(y)[0][0], [-3, 2], rtol=1e-6)


@pytest.mark.parametrize("flat", [1e-2, 1e-3, 1e-4])
def test_inverse_keeps_its_digits_at_a_flat_knot(flat):
    """The inverse is steep there; float32 must lose no more than the knots' rounding."""
    knots, slope = [-1.0, 0.0, 1.0], [1.0, flat, 1.0]
    y = np.concatenate([-np.logspace(-12, -0.1, 200), np.logspace(-12, -0.1, 200)])
    y = y.astype(np.float32)[None]
    narrow = _column(*(jnp.array(v, "float32") for v in (knots, knots, slope)))
    x, log_det = narrow.inverse(jnp.asarray(y))
    with jax.enable_x64(True):
        wide = jtu.tree_map(lambda v: jnp.asarray(v, "float64"), narrow)
        exact_x, exact_log_det = wide.inverse(jnp.asarray(y, "float64"))
    # The share of a bin is known to a rounding of one, hence at best to eps / flat in its slope.
    np.testing.assert_allclose(x, exact_x, atol=2e-7 / flat)
    np.testing.assert_allclose(log_det, exact_log_det, atol=1e-5)


def test_units_do_not_matter():
    z, x, slope = jnp.array([-1.0, 0.0, 1.0]), jnp.array([-1.0, 0.2, 1.0]), jnp.array([1.0, 2, 1])
    points = jnp.array([[-0.9, 0.1, 0.7, 1.4]])
    y, log_det = _column(z, x, slope).forward(points)
    for unit in (1e-25, 1e25):
        scaled = _column(z, unit * x, unit * slope)
        y_unit, log_det_unit = scaled.forward(points)
        np.testing.assert_allclose(y_unit / unit, y, rtol=1e-5)
        np.testing.assert_allclose(log_det_unit - np.log(unit), log_det, atol=2e-5)
        np.testing.assert_allclose(scaled.inverse(y_unit)[0], points, rtol=1e-4)


def test_nothing_is_trained():
    trained, _ = partition(_column([-1.0, 1.0], [-1.0, 1.0], [0.5, 3.0]))
    assert not jtu.tree_leaves(trained)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (InputError, ([0.0, 0.0], [0.0, 1.0], [1.0, 1.0])),
        (InputError, ([0.0, 1.0], [1.0, 0.0], [1.0, 1.0])),
        (InputError, ([0.0, 1.0], [0.0, 1.0], [1.0, 0.0])),
        (ShapeError, ([0.0], [0.0], [1.0])),
        (ShapeError, ([0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 1.0])),
    ],
)
def test_bad_knots(error, arguments):
    with pytest.raises(error):
        _column(*arguments)
