"""Strict numerics for every test; warnings are errors by pyproject.toml."""

import os

# Before jax and matplotlib are imported; what the caller has set wins.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share one accelerator
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("jaxattn", deadline=None)  # a first example compiles
settings.load_profile("jaxattn")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs beside pytest's own cache, so that a second run compiles little.

    jax keys them by program, compiler options, XLA_FLAGS and version.
    """
    if getattr(config, "cache", None) is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def _let_programs_go():
    """Programs compiled for one module serve no other, and the kernel counts their memory maps."""
    yield
    jax.clear_caches()
