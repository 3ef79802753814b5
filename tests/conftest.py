"""Strict modes for the whole suite: no silent promotion of dtypes or ranks, no warnings."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _bounded_caches():
    """Compiled programs of one module are of no use to the next and only take memory."""
    yield
    jax.clear_caches()
