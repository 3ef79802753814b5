"""The energies have the masses they should, and the report tells what failed and what got worse."""

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def figure3(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield __import__("figure3")
    for name in ("_common", "_energies", "figure3"):
        sys.modules.pop(name, None)


def test_the_energies_are_proper_and_their_mass_is_known(figure3):
    for name in figure3.NAMES:
        fine, coarse = figure3.log_normaliser(name), figure3.log_normaliser(name, 401)
        assert abs(fine - coarse) < 1e-9
    # A ridge of constant width along the window, and half a normal law beyond each end.
    width = math.sqrt(2 * math.pi) * 0.4
    assert figure3.log_normaliser("U2") == pytest.approx(math.log(width * (8 + width)), abs=1e-12)


def test_the_energies_have_finite_gradients(figure3):
    points = jnp.array([[0.0, 0.0], [1e-30, 0.0], [-4.0, 7.0], [1e4, -1e4]])
    for name in figure3.NAMES:
        grads = jax.vmap(jax.grad(figure3.Energy(name)))(points)
        assert bool(jnp.isfinite(grads).all())


def test_the_report_names_failures_and_what_more_layers_made_worse(figure3):
    def record(layers, kl, **more):
        found = {"kl": kl, "kl_error": 0.001, "kl_forward": 2 * kl, "seconds": 1.0}
        cell = {"seed": 0, "flow": "planar", "layers": layers, "target": "U1"}
        settings = {"laminar": "0", "jax": "0", "steps": 10, "samples": 4}
        return cell | settings | (more or found)

    good = [record(2, 0.3), record(8, 0.1)]
    assert "More layers are better for every flow" in figure3.report(good)
    text = figure3.report([*good, record(32, 0.2), record(32, 0, error="it stays non-finite")])
    assert "except: planar 32 after 8 on U1 (0.2000 after 0.1000)" in text
    assert "U1, planar 32, seed 0: it stays non-finite" in text
    assert figure3.report([record(2, 0, error="no")]).startswith("There are no results.")


def test_the_limit_of_volume_preserving_maps_is_that_of_sorted_densities(figure3):
    # The value found from the same sums over a grid of half as many points a side.
    assert figure3.volume_preserving_limit("U2") == pytest.approx(0.04493, abs=2e-5)
    assert 0 < figure3.volume_preserving_limit("U1") < 0.02


def test_a_normal_density_is_measured_exactly(figure3):
    flow = figure3.FLOWS["base alone"][2](jax.random.key(0), 0)
    energy = figure3.Energy("U2")
    found = figure3.measure(flow, energy, figure3.log_normaliser("U2"), jax.random.key(1), 20_000)
    points = figure3.grid(801)
    log_q = -0.5 * (points**2).sum(-1) - math.log(2 * math.pi)
    with jax.enable_x64(True):
        log_p = np.asarray(jax.vmap(jax.vmap(energy))(jnp.asarray(points)))
    area = 0.02**2
    exact = (np.exp(log_q) * (log_q - log_p)).sum() * area + figure3.log_normaliser("U2")
    assert abs(found["kl"] - exact) < 4 * found["kl_error"]
    assert found["mass_on_grid"] == pytest.approx(1, abs=1e-5)
