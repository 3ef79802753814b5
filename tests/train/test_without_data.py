"""Training of objectives that make their own draws, and of those that want the step."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from laminar._errors import InputError, TrainingError
from laminar.distributions import Normal
from laminar.objectives import linear_annealing, nll, reverse_kl
from laminar.train import fit
from laminar.zoo import nsf

X = np.random.default_rng(0).normal(size=(120, 2)) * np.array([2.0, 0.5]) + np.array([1.0, -3.0])


def normal():
    return Normal((2,))


def without_data(steps, log_density=lambda x: -0.5 * ((x - 1.0) ** 2 / 0.25).sum(), **options):
    flow = nsf(2, key=jr.key(0), layers=2, width=8, bins=4)
    objective = reverse_kl(log_density, 64, anneal=linear_annealing(0.1, 100))
    return fit(jr.key(1), flow, objective=objective, steps=steps, progress=False, **options)


def test_without_data_an_objective_makes_its_own_draws():
    _, history = without_data(300)
    assert history.best_loss == pytest.approx(-np.log(2 * np.pi * 0.25), abs=0.1)
    assert len(history.validation) > 10
    # Under the same keys a state always has the same loss, and validation is not annealed.
    assert history.validation[-1] == pytest.approx(history.best_loss, abs=0.1)
    _, history = without_data(20, validation=None)
    assert len(history.validation) == 0


def test_without_data_what_belongs_to_data_is_refused():
    for options, match in (
        ({"objective": nll}, "nll needs data"),
        ({"weights": np.ones(3)}, "belong to data"),
        ({"devices": 1, "condition": np.ones((3, 1))}, "belong to data"),
    ):
        with pytest.raises(InputError, match=match):
            fit(
                jr.key(1), normal(), **{"objective": reverse_kl(lambda x: -(x**2).sum()), **options}
            )


@pytest.mark.slow
def test_without_data_a_target_that_is_nan_is_named():
    with pytest.raises(TrainingError, match="every layer is finite, for draws of its own"):
        without_data(50, lambda x: jnp.log(x).sum())


def test_an_objective_of_ones_own_may_ask_for_the_step():
    def objective(flow, batch, key, step=None):
        assert batch.x.shape == (8, 2)
        weight = 1.0 if step is None else jnp.where(step < 5, 0.0, 1.0)
        return weight * nll(flow, batch, key)[0], {}

    _, history = fit(
        jr.key(0), normal(), X, objective=objective, steps=10, batch_size=8, validation=None
    )
    assert (history.loss[:5] == 0).all()
    assert (history.loss[5:] > 0).all()
