"""Packed files: nothing is lost, and they are as small as they say."""

import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paramshare.schemes.compressed import uniform_grid
from paramshare.transform import unpacking
from paramshare.transform.packing import load_packed, pack, save_packed, unpack
from paramshare.transform.variables_file import ExportError


def same(a, b) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@example(size=500, levels=9, zeros=0.5, dtype="float32", seed=0)
@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(0, 700),
    levels=st.integers(1, 300),
    zeros=st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from(["float32", "float16", "int32", "uint8", "bool"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_array_comes_back_bit_for_bit(size, levels, zeros, dtype, seed):
    rng = np.random.default_rng(seed)
    special = np.array([-0.0, np.nan, np.inf, -np.inf, 1e-45])
    table = np.concatenate([rng.normal(size=levels) * 50, special])[-levels:]
    with np.errstate(invalid="ignore", over="ignore"):
        table = (np.nan_to_num(table) if dtype in ("int32", "uint8") else table).astype(dtype)
    array = table[rng.integers(0, levels, size)]
    array[rng.random(size) < zeros] = 0
    packed = pack({"banks": {"x": array}, "params": {"y": array[:1].reshape(1, -1, 1)}})
    arrays = unpacking.read_packed(packed.content)
    assert same(arrays["banks/x"], array)
    assert same(arrays["params/y"], array[:1].reshape(1, -1, 1))
    assert packed.banks <= array.nbytes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("method", ["uniform", "kmeans"])
def test_sizes_are_those_of_the_codes(bits, zeros, method):
    """Codes of `bits` bits, a bitmap if anything is 0, and a step or a list of levels."""
    rng, size = np.random.default_rng(bits), 20_001
    levels = np.asarray(uniform_grid(jnp.float32(0.0123), bits)[0])
    levels = levels if method == "uniform" else rng.normal(size=2**bits).astype(np.float32)
    array = levels[np.arange(size) % 2**bits]  # the first numbers take every level
    array[1000 + rng.permutation(size - 1000)[: int(zeros * size)]] = 0
    packed = pack({"banks": {"b": array}})
    assert same(unpack(packed.content)["banks"]["b"], array)
    kept = np.count_nonzero(array)
    assert kept == size - int(zeros * size)
    table = 4 if method == "uniform" else 4 * 2**bits
    bitmap = -(-size // 8) if zeros else 0
    assert packed.banks == -(-kept * bits // 8) + bitmap + table
    assert packed.float_banks == 4 * size


def test_zeros_take_a_code_of_their_own_where_that_is_smaller():
    """A few zeros among three other numbers: two bits for each are less than a bitmap."""
    array = np.array([0, 1, 2, 7], np.float32)[np.random.default_rng(0).integers(0, 4, 8000)]
    array[:6000] = np.array([1, 2, 7], np.float32)[np.random.default_rng(0).integers(0, 3, 6000)]
    assert pack({"banks": {"b": array}}).banks == 8000 * 2 // 8 + 4 * 4
    assert pack({"banks": {"b": np.zeros(100, np.float32)}}).banks <= 13
    assert pack({"banks": {"b": np.full(100, 3, np.float32)}}).banks == 4


def test_a_file_is_as_large_as_it_says_and_rest_and_banks_add_up(tmp_path):
    rng = np.random.default_rng(0)
    variables = {
        "banks": {"ring": {"ring": np.array([0, 1, 2, 3], np.float32)[rng.integers(0, 4, 1000)]}},
        "params": {"model": {"kernel": rng.normal(size=(3, 5)).astype(np.float32)}},
        "batch_stats": {"model": {"mean": jnp.zeros(7, jnp.bfloat16)}},
    }
    packed = pack(variables)
    save_packed(packed, tmp_path / "variables.pack")
    sizes = packed.as_json()
    assert (tmp_path / "variables.pack").stat().st_size == sizes["packed"]["total"]
    parts = [sizes["packed"][part] for part in ("banks", "rest", "header")]
    assert sum(parts) == sizes["packed"]["total"] and parts[0] == 250 + 16 and parts[1] >= 60
    assert sizes["arrays"] == {"banks": 4000, "rest": 60 + 28, "total": 4088}
    stored = load_packed(tmp_path / "variables.pack")
    assert same(stored["banks"]["ring"]["ring"], variables["banks"]["ring"]["ring"])
    assert stored["batch_stats"]["model"]["mean"].dtype == np.float32


def test_it_is_read_with_numpy_alone(tmp_path):
    array = np.array([0, 0, 1, 2], np.float32)
    save_packed(pack({"banks": {"b": array}}), tmp_path / "file")
    code = (
        "import sys, runpy; read = runpy.run_path(sys.argv[1])['read_packed'];"
        "print(read(open(sys.argv[2], 'rb').read())['banks/b'].tolist(), 'jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, unpacking.__file__, str(tmp_path / "file")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[0.0, 0.0, 1.0, 2.0] False"


def test_damaged_files(tmp_path):
    content = pack({"banks": {"b": np.arange(9.0)}}).content
    for damaged in (b"", b"PK", content[:-1], content[:40] + b"x" + content[41:], content + b"x"):
        with pytest.raises(ExportError, match="damaged"):
            unpack(damaged)
    with pytest.raises(ExportError, match="cannot be read as a packed file"):
        load_packed(pathlib.Path(tmp_path / "none"))
