"""Exported networks run where neither paramshare nor Flax can be imported."""

import functools
import hashlib
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

import paramshare
from paramshare.analysis import export as exporting
from paramshare.analysis.conversion import bake
from paramshare.analysis.export import ExportError, export, export_program, flat, load_variables, save_variables
from paramshare.cli import main
from paramshare.training.config import Config, Data, Model
from paramshare.training.data import Curriculum
from paramshare.training.derive import begin
from paramshare.training.run import prepare

SHAPE = (8, 8, 3)
MEAN, STD = (120.0, 110.5, 100.0), (60.0, 61.0, 62.5)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, *SHAPE)).astype(np.uint8)

ELSEWHERE = """
import json, pathlib, runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("paramshare", "flax", "optax"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
for name in ("paramshare", "flax"):
    try:
        __import__(name)
    except ImportError as error:
        assert "blocked" in str(error)
    else:
        raise AssertionError(name + " can be imported")
import jax, numpy as np
from jax import export
images, *folders = map(pathlib.Path, sys.argv[1:])
x = np.load(images)
for folder in folders:
    program = export.deserialize(bytearray((folder / "program.jaxexport").read_bytes()))
    variables = dict(np.load(folder / "variables.npz"))
    for size in (1, 5):
        np.save(folder / f"logits{size}.npy", jax.jit(program.call)(variables, x[:size]))
    sys.argv = ["run.py", str(images)]
    runpy.run_path(str(folder / "run.py"), run_name="__main__")
"""


class Small(nn.Module):
    """A stem, convolutions with batch norm, a classifier."""

    convolutions: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC, train: bool = False):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), dtype=jnp.float32, param_dtype=self.dtype)
        x = conv(8, name="stem")(x_BxHxWxC)
        for i in range(self.convolutions):
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"bn{i}")(conv(8, use_bias=False, name=f"conv{i}")(x)))
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


def trained(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Any:
    variables = jax.device_get(jax.jit(lambda: model.init(jax.random.key(0, impl="rbg"), jnp.zeros((1, *shape))))())
    return jax.tree.map(lambda leaf: (leaf + 0.1 * np.sin(10 * leaf.astype(np.float32)) + 0.01).astype(leaf.dtype), variables)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Any]:
    return Small(), trained(Small())


@pytest.fixture(scope="module")
def network() -> tuple[paramshare.Shared, Any]:
    """Six convolutions out of one template."""
    plan = paramshare.Plan(paramshare.Rule(r"conv\d/kernel", paramshare.Soft(1)))
    shared = paramshare.share(Small(6), plan, jnp.zeros((1, *SHAPE)))
    return shared, trained(shared)


def bytes_of(network: tuple[Any, Any], shape: Any = SHAPE, **options: Any) -> bytes:
    model, variables = network
    return export_program(model, variables, shape, **{"mean": MEAN, "std": STD, **options})


def program_of(network: tuple[Any, Any], **options: Any) -> Any:
    return jax_export.deserialize(bytearray(bytes_of(network, **options)))


def folder_of(network: tuple[Any, Any], folder: pathlib.Path) -> pathlib.Path:
    model, variables = network
    return export(model, variables, folder, SHAPE, mean=MEAN, std=STD)


def test_it_runs_without_paramshare_and_flax(network, tmp_path):
    shared, variables = network
    dense = bake(shared, variables)
    plain: Any = shared.model
    for name, model, its in (("shared", shared, variables), ("baked", plain, dense)):
        export(model, its, tmp_path / name, SHAPE, mean=MEAN, std=STD)
    np.save(tmp_path / "images.npy", IMAGES)
    folders = [str(tmp_path / name) for name in ("shared", "baked")]
    done = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path / "images.npy"), *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mean, std = (np.asarray(numbers, np.float32).reshape(1, 1, 1, 3) for numbers in (MEAN, STD))
    logits = {}
    for name, model, its in (("shared", shared, variables), ("baked", plain, dense)):
        apply: Any = jax.jit(lambda v, x, model=model: model.apply(v, (x.astype(jnp.float32) - mean) / std))
        for size in (1, 5):
            found = logits[name] = np.load(tmp_path / name / f"logits{size}.npy")
            assert found.dtype == np.float32
            # The same operations, compiled by the same compiler for the same processor.
            np.testing.assert_array_equal(found, apply(its, IMAGES[:size]))
    # float32 sums of 72 products, eight layers deep, in two programs.
    np.testing.assert_allclose(logits["shared"], logits["baked"], rtol=1e-5, atol=1e-5 * np.abs(logits["baked"]).max())
    wanted = [str(label) for name in ("shared", "baked") for label in np.argmax(logits[name], axis=-1)]
    assert done.stdout.split() == wanted


def test_the_folder_says_what_is_in_it(network, tmp_path):
    shared, variables = network
    folder = export(shared, variables, tmp_path / "deep" / "out", SHAPE, mean=MEAN, std=STD, platforms=("cpu", "tpu"))
    assert folder == tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "program.jaxexport", "run.py", "variables.npz"]
    assert list(folder.parent.iterdir()) == [folder]
    about = json.loads((folder / "about.json").read_text())
    assert about["sha256"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("program.jaxexport", "variables.npz")
    }
    assert (about["model"], about["shared"], about["classes"], about["platforms"]) == ("Small", True, 3, ["cpu", "tpu"])
    assert about["input"] == {"shape": ["batch", *SHAPE], "dtype": "uint8", "mean": list(MEAN), "std": list(STD)}
    assert about["output"] == {"shape": ["batch", 3], "dtype": "float32"}
    assert about["versions"]["jax"] == jax.__version__
    shapes = {name: {"shape": list(leaf.shape), "dtype": "float32"} for name, leaf in flat(variables).items()}
    assert about["variables"] == shapes
    stored = sum(int(np.prod(leaf["shape"])) for leaf in about["variables"].values())
    assert (folder / "variables.npz").stat().st_size < 4 * stored + 500 * len(shapes)  # the weights, and their names: no kernels
    assert (folder / "program.jaxexport").stat().st_size < 50_000  # no weights
    assert oct(folder.stat().st_mode)[-3:] == "755"


def test_the_program_names_no_files_and_is_the_same_every_time(small):
    program = bytes_of(small)
    assert b".py" not in program
    assert str(pathlib.Path(paramshare.__file__).parent).encode() not in program
    assert program == bytes_of(small)
    assert jax.config.values["jax_traceback_in_locations_limit"] != 0


def test_float32_images_come_normalised(small):
    x = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32)
    program = program_of(small, dtype="float32", mean=None, std=None)
    model, variables = small
    np.testing.assert_array_equal(jax.jit(program.call)(flat(variables), x), jax.jit(model.apply)(variables, x))


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, scale: float = 1.0):
        return scale * nn.Dense(2)(x.mean((1, 2)))


def test_options_reach_the_model():
    variables = trained(Scaled())
    one, three = (program_of((Scaled(), variables), scale=scale).call(flat(variables), IMAGES) for scale in (1.0, 3.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_images_of_another_kind_are_refused_when_run(small, tmp_path):
    folder = folder_of(small, tmp_path / "out")
    np.save(tmp_path / "images.npy", IMAGES[:, :4].astype(np.float32))
    done = subprocess.run([sys.executable, folder / "run.py", tmp_path / "images.npy"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "images must be uint8 of shape (batch, 8, 8, 3), got float32 of shape (5, 4, 8, 3)\n"


class Regresses(nn.Module):
    def __call__(self, x):
        return x.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("model", "sizes"),
    [(paramshare.create_model("spathnet-2-2-1", input_shape=(6, 5, 2)), (6, 5)), (Regresses(), ())],
    ids=["cells", "one"],
)
def test_logits_of_any_shape_behind_the_batch(model, sizes, tmp_path, monkeypatch):
    """A number a cell, as path nets give, or a number an image: the folder says so, and its script writes what the network gives."""
    images = np.random.default_rng(2).integers(0, 2, (5, 6, 5, 2)).astype(np.uint8)
    x = images.astype(np.float32)
    variables = trained(model, (6, 5, 2))
    folder = export(model, variables, tmp_path / "out", (6, 5, 2), mean=(0, 0), std=(1, 1))
    about = json.loads((folder / "about.json").read_text())
    assert about["output"] == {"shape": ["batch", *sizes], "dtype": "float32"} and "classes" not in about
    np.save(tmp_path / "images.npy", images)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "images.npy")])
    with pytest.raises(SystemExit, match=r"^Writes the logits .*: python run\.py images\.npy logits\.npy\."):
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
    sys.argv.append(str(tmp_path / "logits.npy"))
    runpy.run_path(str(folder / "run.py"), run_name="__main__")
    found = np.load(tmp_path / "logits.npy")
    assert found.shape == (5, *sizes) and found.dtype == np.float32 and np.ptp(found) > 0
    np.testing.assert_array_equal(found, jax.jit(model.apply)(variables, x))  # the same operations, by the same compiler


@pytest.mark.usefixtures("quick_compilation")
def test_the_command_exports_networks_for_grids(tmp_path, capsys):
    data = Data("grids", curriculum=Curriculum(6, 0.1, (3,), 4, 5, far_windows=(), far_sizes=(), far_densities=()))
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules multiply integer steps with floats
        run = prepare(Config(model=Model("pathnet-2-2"), data=data), devices=jax.devices()[:1])
        variables = trained(run.model, (6, 6, 2))
        begin(run, variables, tmp_path / "run", {})
        assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "takes uint8 images of 6x6x2, gives 6x6 logits, one a cell\n" in said and "run.py IMAGES.npy LOGITS.npy (" in said
    program = jax_export.deserialize(bytearray((tmp_path / "out" / "program.jaxexport").read_bytes()))
    test: Any = run.data.test
    found = jax.jit(program.call)(dict(np.load(tmp_path / "out" / "variables.npz")), test.image)
    np.testing.assert_array_equal(found, jax.jit(run.model.apply)(variables, test.image.astype(np.float32)))


def test_variables_round_trip(network, tmp_path):
    _, variables = network
    save_variables(variables, tmp_path / "v.npz")
    chex.assert_trees_all_equal(load_variables(tmp_path / "v.npz"), jax.device_get(variables))
    with np.load(tmp_path / "v.npz", allow_pickle=False) as plain:
        assert sorted(plain.files) == sorted(flat(variables))
        assert "params/model/bn5/scale" in plain.files
    save_variables(jax.tree.map(np.asarray, variables), tmp_path / "again")  # no ending is added
    assert (tmp_path / "again").read_bytes() == (tmp_path / "v.npz").read_bytes()


def test_dtypes(tmp_path):
    tree = {"a": {"half": jnp.float16(0.1), "eight": jnp.arange(3, dtype=jnp.uint8), "flag": np.array([True]), "number": 3.0}}
    save_variables(tree, tmp_path / "v.npz")
    found = load_variables(tmp_path / "v.npz")["a"]
    assert {name: str(leaf.dtype) for name, leaf in found.items()} == {
        "half": "float16", "eight": "uint8", "flag": "bool", "number": "float32"
    }  # fmt: skip
    odd = jnp.asarray([1.0, 0.1, -3e38], jnp.bfloat16)
    save_variables({"a": odd}, tmp_path / "odd.npz")
    stored = load_variables(tmp_path / "odd.npz")["a"]
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(jnp.asarray(stored).astype(jnp.bfloat16), odd)
    with pytest.raises(ExportError, match=r"'params/key' is of dtype key<fry>"):
        save_variables({"params": {"key": jax.random.key(0)}}, tmp_path / "no.npz")
    with pytest.raises(ExportError, match=r"'a' is of dtype object"):
        save_variables({"a": np.array([None])}, tmp_path / "no.npz")
    assert not (tmp_path / "no.npz").exists()


def test_bfloat16_parameters_are_the_models_own_again():
    model = Small(dtype=jnp.bfloat16)
    variables = trained(model)
    assert variables["params"]["stem"]["kernel"].dtype == jnp.bfloat16
    program = program_of((model, variables), dtype="float32", mean=None, std=None)
    assert {str(aval.dtype) for aval in program.in_avals} == {"float32"}
    x = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(program.call)(flat(variables), x), jax.jit(model.apply)(variables, x))


@pytest.mark.parametrize("content", [b"", b"no archive", None, "pickle", "an array where there are others"])
def test_files_that_are_no_variables(tmp_path, content):
    file = tmp_path / "v.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "pickle":
        np.savez(file, a=np.array([{}], object))
    elif content:
        np.savez(file, **{"a": np.zeros(3), "a/b": np.zeros(1)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ExportError, match=r"v\.npz cannot be read as an \.npz file of variables"):
        load_variables(file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": None}, r"uint8 images of 3 channels are normalised by mean and std, 3 numbers each; got \[None, 3\]"),
        ({"std": (1.0,)}, r"got \[3, 1\]"),
        ({"std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"dtype": "float32"}, "normalised already; leave out mean and std"),
        ({"dtype": "int8"}, "dtype='int8'; images are 'uint8'"),
        ({"platforms": ("cpu", "gpu")}, r"platforms=\('cpu', 'gpu'\); name one or more of cpu, cuda, rocm, tpu"),
        ({"platforms": ()}, r"platforms=\(\)"),
        ({"platforms": "cpu"}, "platforms='cpu'"),
    ],
)
def test_options_that_do_not_fit(small, options, words):
    with pytest.raises(ExportError, match=words):
        program_of(small, **options)


@pytest.mark.parametrize("shape", [(8, 8), (8, 0, 3), (8, 8, 3.0), 8])
def test_input_shapes_that_are_none(small, shape):
    with pytest.raises(ExportError, match=r"input_shape=.*give \(height, width, channels\)"):
        bytes_of(small, shape)


class Reshapes(nn.Module):
    def __call__(self, x):
        return x.reshape(7, -1)


class ForgetsTheBatch(nn.Module):
    def __call__(self, x):
        return x.mean(0)


class Compares(nn.Module):
    def __call__(self, x):
        return jnp.einsum("ahwc,bhwc->ab", x, x)


class Twice(nn.Module):
    def __call__(self, x):
        return x.mean((1, 2)), x


def test_models_that_cannot_be_exported(small):
    model, variables = small
    with pytest.raises(ExportError, match="a Flax linen module is exported, got dict"):
        program_of((variables, variables))
    with pytest.raises(ExportError, match=r"Reshapes cannot be exported for uint8 images of shape \(8, 8, 3\) and a batch of any size"):
        program_of((Reshapes(), {}))
    for other, shapes in ((Twice, "((batch, 3), (batch, 8, 8, 3))"), (ForgetsTheBatch, "(8, 8, 3)"), (Compares, "(batch, batch)")):
        words = f"logits are one array, (batch, ...) with the other sizes fixed; {other.__name__} returned {shapes}"
        with pytest.raises(ExportError, match=re.escape(words)):
            program_of((other(), {}))
    with pytest.raises(ExportError, match=r"Small cannot be exported.*with these variables.*classifier"):
        program_of((model, {**variables, "params": {"stem": variables["params"]["stem"]}}))
    with pytest.raises(ExportError, match="'a/b' has a slash in it"):
        flat({"params": {"a/b": jnp.ones(1)}})


def test_a_folder_that_is_there_is_left_alone(small, tmp_path):
    (tmp_path / "out").mkdir()
    folder_of(small, tmp_path / "out")  # an empty one is taken
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(ExportError, match=f"{name} is there already; an export goes into a new folder"):
            folder_of(small, tmp_path / name)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ExportError, match="cannot be written"):
        folder_of(small, tmp_path / "file" / "below")


def test_the_folder_is_written_whole_or_not_at_all(small, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_variables", full)
    with pytest.raises(ExportError, match=r"out cannot be written: .*No space left"):
        folder_of(small, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_without_flatbuffers(small, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ExportError, match="pip install flatbuffers"):
        program_of(small)
