"""The suite runs on four host devices; rank promotion and dtype promotion are errors."""

import atexit
import ctypes
import gc
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from types import ModuleType

# Many tests and processes compile the same programs; they share one compilation cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    place = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="paramshare-tests-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Programs run a few times only, so that compiling them well, with locations for error messages,
# takes longer than running them. JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as usual.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Matrices are small; the threads of OpenBLAS would fight over cores that two workers share.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Use an accelerator on request: JAX_PLATFORMS=cuda pytest.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# Before JAX starts its backends. Two workers leave no core to compile parts of a program at once.
FLAGS = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and jax.__version_info__ < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # halves the time of compilation


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for a process with this many devices on the host."""
    return f"{FLAGS} --xla_force_host_platform_device_count={devices}"


os.environ["XLA_FLAGS"] = xla_flags(4)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Tracing creates many long-lived objects; frequent garbage collection took a fifth of the time.
gc.freeze()
gc.set_threshold(200_000, 50, 100)


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
    """Compiled programs would pile up to several gigabytes over the suite.

    A worker may use a quarter of the machine's memory: without its programs, tests are slower.
    """
    yield
    if resident_bytes() > os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES") / 4:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # glibc would keep the memory


def resident_bytes() -> int:
    statm = pathlib.Path("/proc/self/statm")  # elsewhere programs are always released
    return (
        int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 2**40
    )


@pytest.fixture(scope="session")
def environment() -> Callable[..., dict[str, str]]:
    """The environment of a process with `devices` devices, and further variables."""
    return lambda devices=1, **more: {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        **more,
    }


PROGRAMS: dict = {}
WITHOUT_EFFECT = re.compile("check|keep_|valid|log_|tensorboard|similarity")  # on the programs


@pytest.fixture(scope="module")
def equal_runs_share_programs():
    """Runs of equal networks, data and settings in this process are compiled once."""
    from paramshare.report import predictions
    from paramshare.training import derive, evaluation, loop

    def key(run):
        settings = {**vars(run.config)}
        used = [(x, repr(y)) for x, y in settings.items() if not WITHOUT_EFFECT.match(x)]
        kinds = tuple(type(x) for x in (run.data.train, run.optimizer, run.task))
        return run.model, tuple(used), run.data.digest, kinds, tuple(run.devices.devices)

    def kept(make, runs, *others):
        name = make, *map(key, runs)
        try:
            hash(name)
        except TypeError:  # a list is among the attributes of a network
            return make(*others)
        if name not in PROGRAMS:
            PROGRAMS[name] = make(*others)
        return PROGRAMS[name]

    train_function, make_evaluate = loop.train_function, evaluation.make_evaluate
    predictor = predictions.predictor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_function", lambda runs, x: kept(train_function, runs, runs, x))
        patch.setattr(predictions, "predictor", lambda run: kept(predictor, [run], run))
        for module in (derive, evaluation, loop):
            patch.setattr(module, "make_evaluate", lambda run: kept(make_evaluate, [run], run))
        yield
    PROGRAMS.clear()


def module(file: str) -> ModuleType:
    """A module in a folder of tests, which is no package."""
    path = pathlib.Path(__file__).parent / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def ragged():
    """The module `tests/tasks/ragged.py`: a task with ragged labels, its data and its network."""
    return module("tasks/ragged.py")


@pytest.fixture(scope="session")
def coco():
    """The module `tests/data/coco_folders.py`: small folders in the format of COCO."""
    return module("data/coco_folders.py")


@pytest.fixture(scope="session")
def battery():
    """The module `tests/battery/models.py`: models in the style of other projects."""
    return module("battery/models.py")
