"""The contract of every bijection: one compiled function per case and precision."""

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
from cases import CASES

from laminar import io
from laminar.testing import check_bijection

EVERY = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])
    for case in CASES
]


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", EVERY)
def test_contract(case):
    keeps_the_contract(case, float64=not case.long)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.long], ids=lambda case: case.name)
def test_contract_in_both_precisions(case):
    keeps_the_contract(case, float64=True)


def keeps_the_contract(case, float64):
    key, other_key, check_key = jr.split(jr.key(0), 3)
    report = check_bijection(
        case.make(key),
        key=check_key,
        other=case.make(other_key),
        domain=case.domain,
        image=case.image,
        edges=case.edges,
        slack=case.slack,
        float64=float64,
    )
    assert report.passed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_save_and_load(case, tmp_path):
    bijection = case.make(jr.key(1))
    io.save(tmp_path / "map.lam", bijection)
    loaded = io.load(tmp_path / "map.lam")
    assert jtu.tree_structure(loaded) == jtu.tree_structure(bijection)
    for a, b in zip(jtu.tree_leaves(loaded), jtu.tree_leaves(bijection), strict=True):
        if isinstance(b, jax.Array):
            assert a.dtype == b.dtype
            assert bool(jnp.array_equal(a, b))
        else:
            assert a == b
