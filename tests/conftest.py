"""The suite runs on four host devices; rank promotion and dtype promotion are errors."""

import atexit
import contextlib
import gc
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile

# Many tests compile the same step in different processes; they share one compilation cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    place = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="paramshare-tests-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Matrices are small; the threads of OpenBLAS would fight over cores that two workers share.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Before JAX starts its backends. Use an accelerator on request: JAX_PLATFORMS=cuda pytest.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Tracing creates many long-lived objects; frequent garbage collection took a fifth of the time.
gc.freeze()
gc.set_threshold(200_000, 50, 100)


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
    """Compiled programs would pile up to several gigabytes over the suite."""
    yield
    if resident_bytes() > 2**30:
        jax.clear_caches()
        gc.collect()


def resident_bytes() -> int:
    statm = pathlib.Path("/proc/self/statm")  # elsewhere programs are always released
    return (
        int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 2**40
    )


@contextlib.contextmanager
def without_optimizations():
    """Compiles quickly, for programs that run a few times."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def quick_compilation():
    """A test compiles quickly."""
    with without_optimizations():
        yield


@pytest.fixture(autouse=True, scope="module")
def _quick_modules(request):
    """The tests of training compile quickly, with their shared runs."""
    quick = {"training", "test_experiments", "test_composition"}
    quick = bool(quick & set(request.path.with_suffix("").parts))
    with without_optimizations() if quick else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def ragged():
    """The module `tests/tasks/ragged.py`: a task with ragged labels, its data and its network."""
    path = pathlib.Path(__file__).parent / "tasks" / "ragged.py"
    spec = importlib.util.spec_from_file_location("ragged", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["ragged"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
