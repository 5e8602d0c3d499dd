"""The whole suite runs on four host devices, with rank promotion and implicit dtype promotion as errors."""

import atexit
import gc
import os
import shutil
import tempfile

# Many tests compile the same step, in processes of their own: the first one's work is kept for the others, until the suite ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    place = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="paramshare-tests-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices; its threads would fight over cores that two workers share

# Before JAX starts its backends. An accelerator is used on request: JAX_PLATFORMS=cuda pytest.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Tracing makes a great many objects that live on; looking through all of them again and again for garbage was a good part of the time.
gc.freeze()
gc.set_threshold(200_000, 50, 100)


@pytest.fixture
def quick_compilation():
    """What is compiled for minutes of training is not worth its optimisation where it runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
