"""Splines: identity at zero, knots, tails, derivatives, and what is compiled."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laminar._errors import InputError
from laminar.bijections.splines import (
    Linear,
    RationalQuadratic,
    rational_place,
    rational_share,
)

TAILS = ["identity", "linear", None]
KINDS = [RationalQuadratic, Linear]


def _random(template, key, batch=()):
    count = template.params.shape[0]
    return jr.normal(key, (count, *batch))


@eqx.filter_jit
def _run(template, kernel, params, x):
    """A compiled kernel: one by one, its hundred operations compile slowly."""
    return getattr(template, kernel)(params, x)


def _slow_rational_quadratic(params, x, bins, interval, floor):
    """Durkan et al. (2019) by the book, one float64 point at a time."""
    lo, hi = interval

    def knots(raw):
        share = np.exp(raw - raw.max())
        sizes = floor + (1 - bins * floor) * share / share.sum()
        return lo + (hi - lo) * np.concatenate([[0], np.cumsum(sizes)])

    xs, ys = knots(params[:bins]), knots(params[bins : 2 * bins])
    slopes = floor + (1 - floor) * np.log1p(np.exp(params[2 * bins :]) * (np.e - 1))
    slopes = np.concatenate([[1], slopes, [1]])
    k = int(np.searchsorted(xs, x, side="right")) - 1
    width, height = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, t = height / width, (x - xs[k]) / width
    top = height * (s * t * t + slopes[k] * t * (1 - t))
    return ys[k] + top / (s + (slopes[k] + slopes[k + 1] - 2 * s) * t * (1 - t))


def test_values_are_those_of_the_paper():
    with jax.enable_x64(True):
        template = RationalQuadratic(6)
        params = _random(template, jr.key(0))
        x = jnp.linspace(-4.9, 4.9, 40)
        y, _ = _run(template, "forward_kernel", params[:, None], x)
        expected = [
            _slow_rational_quadratic(np.asarray(params), v, 6, (-5, 5), 1e-3) for v in x.tolist()
        ]
        np.testing.assert_allclose(y, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tails", TAILS)
def test_zero_parameters_are_the_identity(kind, tails):
    template = kind(8, (1,), tails=tails)
    x = jnp.linspace(-5.0, 5.0, 101)[None]
    y, log_det = eqx.filter_jit(template.forward)(x)
    np.testing.assert_allclose(y, x, atol=2e-6)
    np.testing.assert_allclose(log_det, 0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_interval_is_mapped_onto_itself(kind):
    template = kind(5, tails=None, interval=(-1.0, 2.0))
    params = _random(template, jr.key(1))
    y, _ = _run(template, "forward_kernel", params[:, None], jnp.array([-1.0, 2.0]))
    np.testing.assert_allclose(y, [-1, 2], atol=1e-6)


def test_linear_tails_continue_the_end_slopes():
    template = RationalQuadratic(5, tails="linear")
    params = _random(template, jr.key(2))
    x = jnp.array([-7.0, -5.0, 5.0, 8.0])
    y, log_det = _run(template, "forward_kernel", params[:, None], x)
    np.testing.assert_allclose(log_det[0], log_det[1], atol=1e-5)
    np.testing.assert_allclose(log_det[3], log_det[2], atol=1e-5)
    np.testing.assert_allclose((y[3] - y[2]) / 3, jnp.exp(log_det[3]), rtol=1e-5)
    back, _ = _run(template, "inverse_kernel", params[:, None], y)
    np.testing.assert_allclose(back, x, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["forward_kernel", "inverse_kernel"])
@pytest.mark.parametrize("tails", ["identity", "linear"])
def test_derivatives_against_differences(kind, search, tails):
    """Every bin is visited, since the bin's number takes part in the derivative rule."""
    with jax.enable_x64(True):
        template = kind(7, tails=tails)
        kernel = getattr(template, search)
        x = jnp.linspace(-4.8, 4.8, 29)
        params = _random(template, jr.key(3), x.shape)

        def total(params, x):
            y, log_det = kernel(params, x)
            return (jnp.cos(x) * y + jnp.sin(x) * log_det).sum()

        def per_point(params):
            y, log_det = kernel(params, x)
            return jnp.cos(x) * y + jnp.sin(x) * log_det

        by_reverse = jax.jit(jax.grad(total))(params, x)
        h = 1e-6

        def difference(direction):
            direction = direction[:, None] * jnp.ones_like(params)
            up, down = per_point(params + h * direction), per_point(params - h * direction)
            return (up - down) / (2 * h)

        expected = jax.jit(jax.vmap(difference))(jnp.eye(len(params)))
        np.testing.assert_allclose(by_reverse, expected, atol=1e-6)
        tangent = jr.normal(jr.key(4), params.shape)
        by_forward = jax.jit(lambda p, t: jax.jvp(lambda p: total(p, x), (p,), (t,))[1])(
            params, tangent
        )
        np.testing.assert_allclose(by_forward, (by_reverse * tangent).sum(), rtol=1e-9)


def test_hessian_is_symmetric_and_right():
    with jax.enable_x64(True):
        template = RationalQuadratic(4)
        params = _random(template, jr.key(5))

        def f(params):
            y, log_det = template.forward_kernel(params, jnp.asarray(0.7))
            return y + log_det

        hessian = jax.jit(jax.hessian(f))(params)
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-10)
        step = 1e-5 * jnp.ones_like(params)
        slope = jax.jit(jax.grad(f))
        change = (slope(params + step) - slope(params - step)) / 2e-5
        np.testing.assert_allclose(hessian.sum(1), change, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tails", TAILS)
def test_gradients_are_finite_at_knots_and_far_outside(kind, tails):
    template = kind(4, tails=tails)  # at zero parameters the knots are −5, −2.5, 0, 2.5, 5
    edges = jnp.array([-5.0, -2.5, 0.0, 2.5, 5.0, 1e-30, -1e-30, 1e6, -1e6, 5.1])
    params = jnp.broadcast_to(template.params[:, None], (len(template.params), len(edges)))
    for kernel in (template.forward_kernel, template.inverse_kernel):

        def total(params, x, kernel=kernel):
            y, log_det = kernel(params, x)
            return y.sum() + jnp.where(jnp.isfinite(log_det), log_det, 0.0).sum()

        grads = jax.jit(jax.grad(total, argnums=(0, 1)))(params, edges)
        assert all(bool(jnp.isfinite(g).all()) for g in grads)


_TEMPLATE = RationalQuadratic(5)


@jax.jit
def _round_trip(params, x):
    y, log_det = _TEMPLATE.forward_kernel(params, x)
    back, log_det_back = _TEMPLATE.inverse_kernel(params, y)
    return y, back, log_det, log_det_back


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 1.0, 10.0, 1e3, 1e6]),
    x=st.floats(-10, 10, width=32),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_extreme_parameters(seed, scale, x):
    params = scale * _random(_TEMPLATE, jr.key(seed))
    y, back, log_det, log_det_back = _round_trip(params, jnp.float32(x))
    assert all(bool(jnp.isfinite(v)) for v in (y, back, log_det, log_det_back))
    if scale <= 1:
        np.testing.assert_allclose(back, x, atol=2e-3)
        np.testing.assert_allclose(log_det + log_det_back, 0, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan(kind):
    y, _ = kind(4).forward(jnp.float32(jnp.nan))
    assert bool(jnp.isnan(y))


def test_float32_error():
    template = RationalQuadratic(8)
    with jax.enable_x64(True):
        params = _random(template, jr.key(6), (4000,)).astype("float32")
        x = (2 * jr.normal(jr.key(7), (4000,))).astype("float32")
        double = params.astype("float64"), x.astype("float64")
        _, wide = _run(template, "forward_kernel", *double)
        _, narrow = _run(template, "forward_kernel", params, x)
        error = np.abs(np.asarray(narrow, np.float64) - np.asarray(wide))
    assert np.median(error) < 1e-6
    assert np.quantile(error, 0.99) < 1e-5
    assert error.max() < 1e-3


@pytest.mark.parametrize(("scale", "worst"), [(2.0, 2e-3), (5.0, 1e-2), (3.0, 1e-2), (20.0, 1e-2)])
def test_inverse_in_float32_at_steep_slopes(scale, worst):
    """What remains is the rounding of the knots' positions."""
    template = RationalQuadratic(8)
    with jax.enable_x64(True):
        params = (scale * _random(template, jr.key(0), (20000,))).astype("float32")
        y = (2 * jr.normal(jr.key(1), (20000,))).astype("float32")
        kernel = jax.jit(lambda params, y: template.inverse_kernel(params, y)[1])
        wide = kernel(params.astype("float64"), y.astype("float64"))
        error = np.abs(np.asarray(kernel(params, y), np.float64) - np.asarray(wide))
    assert np.quantile(error, 0.999) < 3e-4
    assert error.max() < worst


@pytest.mark.parametrize("ends", [(1e-3, 1e-3), (1e-6, 50.0), (50.0, 1e-6), (50.0, 50.0)])
@pytest.mark.parametrize("near", [0.0, 1e-6, 0.3, 0.5])
def test_both_readings_of_a_bin_agree(ends, near):
    """In float32, close to either knot, where one of the end slopes is far from the secant."""
    left, right = (jnp.float32(v) for v in ends)
    one, near = jnp.float32(1), jnp.float32(near)
    for theta, rest in ((near, 1 - near), (1 - near, near)):
        with jax.enable_x64(True):
            wide = [jnp.asarray(v, "float64") for v in (theta, rest, one, left, right)]
            share, log_slope = rational_share(*wide)
            inverse = [jnp.float32(v) for v in (share, 1 - share)]
        place, back = rational_place(*inverse, one, left, right)
        slope = float(jnp.exp(log_slope))
        np.testing.assert_allclose(place, theta, atol=1e-6 * max(1, 1 / slope), rtol=1e-5)
        grad = jax.grad(lambda *a: sum(rational_place(*a)), argnums=(0, 1, 2, 3, 4))
        assert all(bool(jnp.isfinite(g)) for g in grad(*inverse, one, left, right))
        assert bool(jnp.isfinite(back))


@pytest.mark.parametrize("kernel", ["forward_kernel", "inverse_kernel"])
def test_derivative_at_knots_and_in_the_middle_of_a_bin_is_one_for_the_identity(kernel):
    template = RationalQuadratic(4)
    x = jnp.array([-6.0, -5.0, -3.75, -2.5, -1.25, 0.0, 2.5, 3.75, 5.0, 7.0])
    run = getattr(template, kernel)
    slopes = jax.grad(lambda x: run(template.params[:, None], x)[0].sum())(x)
    np.testing.assert_allclose(slopes, 1, atol=1e-5)


@pytest.mark.parametrize("kernel", ["forward_kernel", "inverse_kernel"])
@pytest.mark.parametrize("tails", TAILS)
def test_the_derivative_of_a_linear_spline_at_its_knots_is_what_its_log_det_says(kernel, tails):
    template = Linear(4, tails=tails)
    x = jnp.array([-5.0, -2.5, 0.0, 2.5, 5.0])
    run = getattr(template, kernel)
    slopes = jax.grad(lambda x: run(template.params[:, None], x)[0].sum())(x)
    np.testing.assert_allclose(slopes, jnp.exp(run(template.params[:, None], x)[1]), atol=1e-5)


def test_raw_slopes_beyond_the_limit_are_drawn_back():
    template = RationalQuadratic(2)
    params = template.params.at[-1].set(60.0)
    grad = jax.grad(lambda p: template.forward_kernel(p, jnp.float32(0.0))[1])(params)
    assert float(grad[-1]) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["forward_kernel", "inverse_kernel"])
@pytest.mark.parametrize("gradient", [False, True])
def test_compiled_without_gather_or_sort(kind, search, gradient):
    """A count of operations, not a time: the point of the layout."""
    template = kind(8)
    kernel = getattr(template, search)

    def run(params, x):
        return kernel(params, x)

    def total(params, x):
        y, log_det = kernel(params, x)
        return (y + log_det).sum()

    f = jax.grad(total, argnums=(0, 1)) if gradient else run
    params = jnp.zeros((len(template.params), 100))
    text = jax.jit(f).lower(params, jnp.zeros(100)).compile().as_text()
    operations = set(re.findall(r"= [^=]*? ([a-z\-]+)\(", text))
    assert "fusion" in operations
    banned = {"gather", "scatter", "sort", "dynamic-slice", "dynamic-update-slice", "while"}
    assert not operations & banned


@pytest.mark.parametrize(
    "make",
    [
        lambda: RationalQuadratic(1),
        lambda: RationalQuadratic(interval=(1.0, 1.0)),
        lambda: RationalQuadratic(interval=(0.0, float("inf"))),
        lambda: RationalQuadratic(tails="flat"),
        lambda: RationalQuadratic(8, min_width=0.2),
        lambda: RationalQuadratic(min_slope=0.0),
        lambda: Linear(8, min_height=0.0),
    ],
)
def test_bad_options(make):
    with pytest.raises(InputError):
        make()


def test_parameter_counts():
    assert RationalQuadratic(8).params.shape == (23,)
    assert RationalQuadratic(8, (2,), tails="linear").params.shape == (25, 2)
    assert Linear(8).params.shape == (16,)
    assert eqx.tree_equal(RationalQuadratic(8), RationalQuadratic(8))


def test_a_circular_spline_closes_smoothly_and_turns():
    with jax.enable_x64(True):
        edge = float(np.pi)
        spline = RationalQuadratic(5, interval=(-edge, edge), tails="circular")
        assert spline.params.shape == (16,)
        params = _random(spline, jr.key(0)).at[-1].set(0)[:, None]
        x = jnp.asarray([-edge, -1.0, 0.0, 2.0, edge])
        y, log_slope = _run(spline, "forward_kernel", params, x)
        np.testing.assert_allclose(log_slope[0], log_slope[-1], rtol=1e-12)
        np.testing.assert_allclose(jnp.cos(y[jnp.asarray([0, -1])]), -1)  # one point
        for angle in (1.0, -2.5, 20.0):
            turned, log_turned = _run(spline, "forward_kernel", params.at[-1].set(angle), x)
            gap = (turned - y - angle) / (2 * edge)
            np.testing.assert_allclose(gap, jnp.round(gap), atol=1e-12)
            assert bool(((turned >= -edge) & (turned <= edge)).all())
            np.testing.assert_allclose(log_turned, log_slope, rtol=1e-12)
            back, _ = _run(spline, "inverse_kernel", params.at[-1].set(angle), turned)
            np.testing.assert_allclose(jnp.cos(back), jnp.cos(x), atol=1e-10)
        zero = jnp.zeros((16, 1))
        np.testing.assert_allclose(
            _run(spline, "forward_kernel", zero, x[1:-1])[0], x[1:-1], atol=1e-15
        )


def test_only_the_rational_quadratic_closes_on_a_circle():
    with pytest.raises(InputError, match="tails must be 'identity', 'linear' or None"):
        Linear(4, tails="circular")
