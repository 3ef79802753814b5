"""For the whole suite: no silent promotion of dtypes or ranks, no warnings, no cache at home."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


_QUICK = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)


def pytest_configure(config):
    """Keep compiled programs on disk: most of a run is compilation, and others need the same.

    The short run compiles by XLA's older emitters and without optimisations, in a quarter of the
    time, to programs that are slower and round otherwise; the long one compiles as users do.
    """
    if config.option.markexpr == "not slow" and jax.config.jax_platforms in (None, "cpu"):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([flags, *_QUICK]).strip()
    kept = config.rootpath / ".pytest_cache" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """Commands keep compiled programs in a folder of this run, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINAR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _seeds(request):
    """The state in which a module's generators begin."""
    made = (v for v in vars(request.module).values() if isinstance(v, np.random.Generator))
    return [(generator, generator.bit_generator.state) for generator in made]


@pytest.fixture(autouse=True)
def _same_draws(_seeds):
    """A test draws the same numbers whichever tests ran before it, on whichever worker."""
    for generator, state in _seeds:
        generator.bit_generator.state = state


_TESTS_BETWEEN = 3
_MANY_MAPS = 30_000
_DONE = pytest.StashKey[int]()


@pytest.fixture(autouse=True, scope="module")
def _bounded_caches():
    """What the next module shares it reads from disk; the rest would only take memory."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _bounded_maps(request):
    """Every program takes memory maps, of which Linux grants a process 65,530 by default."""
    yield
    done = request.session.stash.get(_DONE, 0) + 1
    request.session.stash[_DONE] = done
    if done % _TESTS_BETWEEN == 0 and _maps() > _MANY_MAPS:
        jax.clear_caches()


def _maps() -> int:
    """Memory maps of this process; none are counted where the system does not tell."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0
