"""Rows of mixed columns: their law sums to one, is drawn from, and can be asked in part."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar import io
from laminar._errors import InputError, ShapeError
from laminar.bijections.elementwise import Affine
from laminar.mixed import (
    WITHHELD,
    AutoregressiveDistribution,
    ColumnLaw,
    autoregressive_distribution,
    features_of,
    logits_of,
)
from laminar.nn.masked import MaskedMLP
from laminar.objectives import Batch, WithheldNLL, nll

DISCRETE = (
    ColumnLaw(3, None),
    ColumnLaw(1, "cells", 0.7, 0.1, 0.1, 0.1 + 0.7 * 4),
    ColumnLaw(2, None, gap=True),
    ColumnLaw(3, "cells", 0.5, 0.0, -6.0, 6.0, gap=True, heavy=0.4),
)
MIXED = (
    ColumnLaw(1, "density"),
    ColumnLaw(4, None),
    ColumnLaw(3, "density", gap=True),
    ColumnLaw(1, "cells", 0.3, 0.0, 0.0, None),
    ColumnLaw(2, "density", heavy=0.4),
)


def dist(laws, order=None, cond_dim=0, seed=0):
    """A law with random weights, so that every column depends on those before it."""
    made = autoregressive_distribution(
        laws, key=jr.key(seed), width=24, depth=1, bins=4, cond_dim=cond_dim, order=order
    )
    keys = jr.split(jr.key(seed + 1))
    where = lambda d: (d.net.head, d.net.head_bias)  # noqa: E731
    shapes = [leaf.shape for leaf in where(made)]
    new = [0.15 * jr.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    return eqx.tree_at(where, made, tuple(new))


def every_row(laws):
    """All rows that columns without densities can be, (N, 2, D)."""
    rows = [[]]
    for law in laws:
        points = []
        if law.value == "cells":
            count = round((law.high - law.low) / law.width) + 1
            points = [(law.low + k * law.width, 0) for k in range(count)]
        points += [(0.0, s) for s in range(bool(law.value), law.states)]
        rows = [[*row, point] for row in rows for point in points]
    return np.moveaxis(np.array(rows), 2, 1)


@pytest.mark.parametrize("order", [None, jnp.array([2, 0, 3, 1])])
def test_probabilities_sum_to_one(order):
    law = dist(DISCRETE, order)
    with jax.enable_x64():
        law = jax.tree_util.tree_map(
            lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, law
        )
        total = np.exp(np.asarray(law.log_prob(every_row(DISCRETE)))).sum()
    assert total == pytest.approx(1, abs=1e-12)


def test_a_density_integrates_to_one_beside_states():
    laws = (ColumnLaw(2, None), ColumnLaw(3, "density", gap=True))
    law = dist(laws)
    z = np.linspace(-60, 60, 60_001)
    rows = [
        np.stack([np.stack([0 * z, z], -1), np.stack([0 * z + s, 0 * z], -1)], 1) for s in (0, 1)
    ]
    mass = sum(float(np.trapezoid(np.exp(np.asarray(law.log_prob(r))), z)) for r in rows)
    points = [[[0, 0], [s, t]] for s in (0, 1) for t in (1, 2)]
    mass += float(jnp.exp(law.log_prob(np.array(points, float))).sum())
    assert mass == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("cond_dim", [0, 2])
@pytest.mark.parametrize("order", [None, jnp.array([4, 1, 0, 3, 2])])
def test_draws_have_the_density_that_is_scored(order, cond_dim):
    law = dist(MIXED, order, cond_dim)
    condition = jr.normal(jr.key(5), (50, 2)) if cond_dim else None
    x, log_p = law.sample_and_log_prob(jr.key(1), (20,), condition)
    np.testing.assert_allclose(law.log_prob(x, condition), log_p, rtol=1e-3, atol=1e-3)
    state = np.asarray(x[..., 1, :])
    assert (state >= 0).all()
    assert (state < [law.states for law in MIXED]).all()
    assert (np.asarray(x[..., 0, :])[state > 0] == 0).all()


def test_draws_have_the_frequencies_of_the_law():
    law = dist(DISCRETE[:3])
    rows = every_row(DISCRETE[:3])
    expected = np.exp(np.asarray(law.log_prob(rows), np.float64))
    drawn = np.asarray(law.sample(jr.key(2), (20_000,)))
    same = (np.abs(drawn[:, None] - rows[None]) < 1e-3).all((2, 3))
    assert same.any(1).all()
    observed = same.sum(0)
    chi = ((observed - 20_000 * expected) ** 2 / (20_000 * expected)).sum()
    assert chi < len(rows) + 5 * np.sqrt(2 * len(rows))


def test_columns_see_only_those_before_them():
    law = dist(MIXED, jnp.array([4, 1, 0, 3, 2]))
    x = law.sample(jr.key(3), ())

    def terms(value):
        return law._complete(jr.key(0), x.at[0].set(value))[1]

    slopes = np.asarray(jax.jacobian(terms)(x[0]))
    before = np.asarray(law.net.order)[:, None] < np.asarray(law.net.order)[None]
    assert (slopes[before] == 0).all()
    assert np.isfinite(slopes).all()


def test_what_is_withheld_is_summed_out_by_completing():
    law = dist(DISCRETE)
    x = law.sample(jr.key(4), (2,)).at[:, :, 1].set(jnp.array([0.0, WITHHELD]))
    drawn, log_w = law.complete(jr.key(5), x, (20_000,))
    estimate = jax.nn.logsumexp(log_w, axis=0) - np.log(20_000)
    points = every_row(DISCRETE[1:2])[:, 0, 0]
    filled = jnp.stack([x.at[:, 0, 1].set(p).at[:, 1, 1].set(0) for p in points])
    exact = jax.nn.logsumexp(law.log_prob(filled), axis=0)
    np.testing.assert_allclose(estimate, exact, atol=0.02)
    # Weighted draws have the frequencies of the conditional law.
    w = np.exp(np.asarray(log_w) - np.asarray(log_w).max(0))
    at = np.abs(np.asarray(drawn)[:, :, 0, 1][..., None] - points) < 1e-3
    shares = (w[..., None] * at).sum(0) / w.sum(0)[:, None]
    np.testing.assert_allclose(
        shares, np.exp(np.asarray(law.log_prob(filled) - exact[None])).T, atol=0.02
    )


def test_rows_without_gaps_are_those_given_that_there_are_none():
    law = dist(DISCRETE)
    rows = every_row(DISCRETE)
    whole = (rows[:, 1, 2] == 0) & (rows[:, 1, 3] < 2)
    total = np.exp(np.asarray(law.without_gaps().log_prob(rows), np.float64))
    assert (total[~whole] == 0).all()
    assert total[whole].sum() == pytest.approx(1, abs=1e-4)
    drawn = law.without_gaps().sample(jr.key(0), (200,))
    assert (drawn[:, 1, 2] == 0).all()


def test_what_cannot_be_has_no_probability_and_nan_stays():
    law = dist(DISCRETE)
    row = law.sample(jr.key(0), ())
    assert law.log_prob(row.at[1, 0].set(3)) == -np.inf
    assert law.log_prob(row.at[1, 0].set(0.5)) == -np.inf
    assert law.log_prob(row.at[0, 1].set(-0.7)) == -np.inf
    assert law.log_prob(row.at[0, 1].set(3.7)) == -np.inf
    assert np.isnan(law.log_prob(row.at[0, 1].set(np.nan)))
    assert np.isnan(law.log_prob(row.at[1, 0].set(np.nan)))


@pytest.mark.parametrize("value", [0.0, 1e-30, 30.0, 1e4, -1e4])
def test_gradients_are_finite_far_outside(value):
    law = dist(MIXED)
    row = law.sample(jr.key(0), ())
    row = row.at[1, 2].set(0).at[0].set(jnp.array([value, 0, value, abs(value), value]))

    def loss(params, row):
        return eqx.combine(params, static).log_prob(row)

    params, static = eqx.partition(law, eqx.is_inexact_array)
    assert np.isfinite(law.log_prob(row))
    for leaf in jax.tree_util.tree_leaves(jax.grad(loss)(params, row)):
        assert np.isfinite(leaf).all()
    assert np.isfinite(jax.grad(loss, 1)(params, row)[0]).all()


def test_small_cells_keep_their_digits():
    """A cell of a hundred-thousandth of the scale is a density times its width."""
    width = 1e-4
    laws = (ColumnLaw(1, "cells", width, 0.0), ColumnLaw(1, "density"))
    with jax.enable_x64():
        law = autoregressive_distribution(laws, key=jr.key(0), width=8, depth=1)
        x = np.array([[[0.3, 0.3], [0, 0]], [[8.0, 8.0], [0, 0]]])
        cells = law.log_prob(np.where([[[False, False], [False, True]]], WITHHELD, x))
        dense = law.log_prob(np.where([[[False, False], [True, False]]], WITHHELD, x))
    np.testing.assert_allclose(cells, np.asarray(dense) + np.log(width), atol=1e-6)


def test_heavy_tails_fall_as_powers():
    """A density and cells whose logarithm falls with the logarithm, and that sum to one."""
    unit = 0.4
    laws = (ColumnLaw(1, "density", heavy=unit), ColumnLaw(1, "cells", 0.5, 0.0, heavy=unit))
    with jax.enable_x64():
        law = autoregressive_distribution(laws, key=jr.key(0), width=8, depth=1)
        t = np.linspace(-30, 30, 60_001)
        beyond = np.maximum(np.abs(t) - 4, 0)
        x = unit * np.sign(t) * (np.minimum(np.abs(t), 4) + np.expm1(beyond))
        rows = np.zeros((len(t), 2, 2))
        rows[:, 0], rows[:, 1] = x[:, None], [0, WITHHELD]
        mass = np.exp(law.log_prob(rows) + beyond).sum() * unit * (t[1] - t[0])
        assert mass == pytest.approx(1, abs=1e-6)
        far = np.array([[[0.0, v], [WITHHELD, 0]] for v in (1e3, 1e6)])
        near, further = np.asarray(law.log_prob(far))
        exponent = (further - near) / (np.log(1e6) - np.log(1e3))
        assert -1 - 1.1 * np.pi / np.sqrt(3) < exponent < -1
        drawn, log_p = law.sample_and_log_prob(jr.key(1), (500,))
        np.testing.assert_allclose(law.log_prob(drawn), log_p, rtol=1e-9)
    # In single precision the cells far out have lost their own ends.
    single = autoregressive_distribution(laws, key=jr.key(0), width=8, depth=1)
    np.testing.assert_allclose(single.log_prob(far), [near, further], rtol=1e-3)


def test_what_is_probable_below_agrees_with_the_density():
    law = dist(DISCRETE)
    rows = every_row(DISCRETE)
    below, at = (np.asarray(p) for p in law.cumulative(rows))
    # Each cell's own probability, and all below it, of the columns one after the other.
    np.testing.assert_allclose(np.log(at).sum(1), law.log_prob(rows), atol=1e-4)
    assert (below + at < 1 + 1e-5).all()
    first = {tuple(r[:, 0]): (b, a) for r, b, a in zip(rows, below[:, 0], at[:, 0], strict=True)}
    ends = np.array(sorted(first.values()))
    np.testing.assert_allclose(ends[:, 0], np.r_[0, np.cumsum(ends[:-1, 1])], atol=1e-5)
    # Outside the support, where a number is lost, and where nothing is said.
    outside = np.zeros((3, 2, 4))
    outside[0, 0, 1], outside[1, 0, 1], outside[2, 1] = 50.0, np.nan, WITHHELD
    below, at = (np.asarray(p) for p in law.cumulative(outside))
    assert below[0, 1] == pytest.approx(1)
    assert at[0, 1] == 0
    assert np.isnan(at[1, 1])
    np.testing.assert_array_equal([below[2], at[2]], [[0] * 4, [1] * 4])


def test_withholding_trains_every_part_and_compares_whole_rows():
    law = dist(MIXED)
    x = law.sample(jr.key(0), (64,))
    objective = WithheldNLL()
    whole = nll(law, Batch(x), jr.key(1))[0]
    assert objective(law, Batch(x), jr.key(1))[0] == whole
    trained = objective(law, Batch(x), jr.key(1), step=3)[0]
    assert np.isfinite(trained)
    assert trained < whole  # fewer cells count


def test_saved_and_loaded(tmp_path):
    law = dist(MIXED)
    io.save(tmp_path / "law", law)
    x = law.sample(jr.key(0), (5,))
    np.testing.assert_array_equal(io.load(tmp_path / "law").log_prob(x), law.log_prob(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="width"):
        ColumnLaw(1, "cells")
    with pytest.raises(InputError, match="state"):
        ColumnLaw(1, "density", gap=True)
    net = MaskedMLP(2, logits_of(MIXED[:2]) + 2, width=8, depth=1, features=(1, 1), key=jr.key(0))
    with pytest.raises(ShapeError, match="features"):
        AutoregressiveDistribution(MIXED[:2], net, Affine())
    with pytest.raises(InputError, match="features"):
        MaskedMLP(2, 3, width=8, depth=1, features=(1, 1), periodic=True, key=jr.key(0))
    assert features_of(MIXED) == (2, 4, 4, 2, 3)


def test_the_incremental_pass_costs_about_one_dense_pass():
    laws = tuple(ColumnLaw(1 + i % 3, "density") for i in range(24))
    law = autoregressive_distribution(laws, key=jr.key(0), width=96, depth=2)
    x = jnp.zeros((2, 24, 64))

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    dense = flops(lambda x: law._log_prob(x), x)
    step = flops(lambda x: law._complete(jr.key(0), x)[0], x)
    # The analysis counts the body of a loop once.
    assert step * 24 < 4 * dense
