"""The contract asks what maps compute, not how fast: its programs are compiled in less time."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick_to_compile(request):
    """The short run compiles without XLA's optimisations; the long one as users do."""
    plain = request.config.option.markexpr == "not slow"
    before = jax.config.jax_disable_most_optimizations
    jax.config.update("jax_disable_most_optimizations", plain)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
