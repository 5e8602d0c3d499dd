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
from paramshare.storage import StorageError
from paramshare.transform import export as exporting
from paramshare.transform.conversion import bake
from paramshare.transform.export import export, export_program
from paramshare.transform.variables_file import (
    ExportError,
    flat,
    load_variables,
    save_variables,
)

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
        conv = functools.partial(
            nn.Conv, kernel_size=(3, 3), dtype=jnp.float32, param_dtype=self.dtype
        )
        x = conv(8, name="stem")(x_BxHxWxC)
        for i in range(self.convolutions):
            x = nn.relu(
                nn.BatchNorm(use_running_average=not train, name=f"bn{i}")(
                    conv(8, use_bias=False, name=f"conv{i}")(x)
                )
            )
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


def trained(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Any:
    variables = jax.device_get(
        jax.jit(lambda: model.init(jax.random.key(0, impl="rbg"), jnp.zeros((1, *shape))))()
    )
    return jax.tree.map(
        lambda leaf: (leaf + 0.1 * np.sin(10 * leaf.astype(np.float32)) + 0.01).astype(leaf.dtype),
        variables,
    )


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Any]:
    return Small(), trained(Small())


@pytest.fixture(scope="module")
def network() -> tuple[paramshare.Shared, Any]:
    """Three convolutions from one template."""
    plan = paramshare.Plan(paramshare.Rule(r"conv\d/kernel", paramshare.Soft(1, initial="paper")))
    shared = paramshare.share(Small(3), plan, jnp.zeros((1, *SHAPE)))
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
    for name, model, network_variables in (("shared", shared, variables), ("baked", plain, dense)):
        export(model, network_variables, tmp_path / name, SHAPE, mean=MEAN, std=STD)
    np.save(tmp_path / "images.npy", IMAGES)
    folders = [str(tmp_path / name) for name in ("shared", "baked")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path / "images.npy"), *folders],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    mean, std = (np.asarray(numbers, np.float32).reshape(1, 1, 1, 3) for numbers in (MEAN, STD))
    logits = {}
    for name, model, network_variables in (("shared", shared, variables), ("baked", plain, dense)):
        apply: Any = jax.jit(
            lambda v, x, model=model: model.apply(v, (x.astype(jnp.float32) - mean) / std)
        )
        for size in (1, 5):
            actual = logits[name] = np.load(tmp_path / name / f"logits{size}.npy")
            assert actual.dtype == np.float32
            # The same operations, compiled by the same compiler for the same processor.
            np.testing.assert_array_equal(actual, apply(network_variables, IMAGES[:size]))
    # float32 sums of 72 products, five layers deep, in two programs.
    np.testing.assert_allclose(
        logits["shared"], logits["baked"], rtol=1e-5, atol=1e-5 * np.abs(logits["baked"]).max()
    )
    expected = [
        str(label) for name in ("shared", "baked") for label in np.argmax(logits[name], axis=-1)
    ]
    assert done.stdout.split() == expected


def test_the_folder_says_what_is_in_it(network, tmp_path):
    shared, variables = network
    folder = export(
        shared,
        variables,
        tmp_path / "deep" / "out",
        SHAPE,
        mean=MEAN,
        std=STD,
        platforms=("cpu", "tpu"),
    )
    assert folder == tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "about.json",
        "program.jaxexport",
        "run.py",
        "variables.npz",
    ]
    assert list(folder.parent.iterdir()) == [folder]
    about = json.loads((folder / "about.json").read_text())
    assert about["sha256"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("program.jaxexport", "variables.npz")
    }
    assert (about["model"], about["shared"], about["platforms"]) == ("Small", True, ["cpu", "tpu"])
    image = {"shape": ["batch", *SHAPE], "dtype": "uint8", "mean": list(MEAN), "std": list(STD)}
    assert about["inputs"] == {"input": image}
    assert about["outputs"] == {"output": {"shape": ["batch", 3], "dtype": "float32"}}
    assert about["versions"]["jax"] == jax.__version__
    shapes = {
        name: {"shape": list(leaf.shape), "dtype": "float32"}
        for name, leaf in flat(variables).items()
    }
    assert about["variables"] == shapes
    stored = sum(int(np.prod(leaf["shape"])) for leaf in about["variables"].values())
    assert (folder / "variables.npz").stat().st_size < 4 * stored + 500 * len(
        shapes
    )  # the weights, and their names: no kernels
    assert (folder / "program.jaxexport").stat().st_size < 50_000  # no weights
    assert oct(folder.stat().st_mode)[-3:] == "755"


@pytest.fixture
def locations():
    """Programs hold the locations of their lines, as they do outside the tests."""
    limit = "jax_traceback_in_locations_limit"
    before = jax.config.values[limit]
    jax.config.update(limit, 10)
    yield limit
    jax.config.update(limit, before)


def test_the_program_names_no_files_and_is_the_same_every_time(small, locations):
    program = bytes_of(small)
    assert b".py" not in program
    assert str(pathlib.Path(paramshare.__file__).parent).encode() not in program
    assert program == bytes_of(small)
    assert jax.config.values[locations] == 10


def test_float32_images_come_normalised(small):
    x = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32)
    program = program_of(small, dtype="float32", mean=None, std=None)
    model, variables = small
    np.testing.assert_array_equal(
        jax.jit(program.call)(flat(variables), x), jax.jit(model.apply)(variables, x)
    )


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, scale: float = 1.0):
        return scale * nn.Dense(2)(x.mean((1, 2)))


def test_options_reach_the_model():
    variables = trained(Scaled())
    one, three = (
        program_of((Scaled(), variables), scale=scale).call(flat(variables), IMAGES)
        for scale in (1.0, 3.0)
    )
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def run(folder: pathlib.Path, *args: Any) -> None:
    """The exported folder's script, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", *map(str, args)])
        runpy.run_path(str(folder / "run.py"), run_name="__main__")


def test_images_of_another_kind_are_refused_when_run(small, tmp_path):
    folder = folder_of(small, tmp_path / "out")
    np.save(tmp_path / "images.npy", IMAGES[:, :4].astype(np.float32))
    message = "inputs must be uint8 (batch, 8, 8, 3), got float32 (batch, 4, 8, 3)"
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
        run(folder, tmp_path / "images.npy")


def arrays_of(file: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return dict(arrays)


class Regresses(nn.Module):
    def __call__(self, x):
        return x.mean((1, 2, 3))


class Cells(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)[..., 0]


@pytest.mark.parametrize(
    ("model", "sizes"), [(Cells(), (6, 5)), (Regresses(), ())], ids=["cells", "one"]
)
def test_outputs_of_any_shape(model, sizes, tmp_path):
    """One value per cell or per image: the script writes what the network returns."""
    images = np.random.default_rng(2).integers(0, 2, (5, 6, 5, 2)).astype(np.uint8)
    x = images.astype(np.float32)
    variables = trained(model, (6, 5, 2))
    folder = export(model, variables, tmp_path / "out", (6, 5, 2), mean=(0, 0), std=(1, 1))
    about = json.loads((folder / "about.json").read_text())
    assert about["outputs"] == {"output": {"shape": ["batch", *sizes], "dtype": "float32"}}
    np.save(tmp_path / "images.npy", images)
    with pytest.raises(SystemExit, match=r"^Writes .*: python run\.py inputs\.npy outputs\.npz\."):
        run(folder, tmp_path / "images.npy")
    run(folder, tmp_path / "images.npy", tmp_path / "outputs.npz")
    outputs = arrays_of(tmp_path / "outputs.npz")
    assert list(outputs) == ["output"]
    actual = outputs["output"]
    assert actual.shape == (5, *sizes) and actual.dtype == np.float32 and np.ptp(actual) > 0
    # The same operations, by the same compiler.
    np.testing.assert_array_equal(actual, jax.jit(model.apply)(variables, x))


class Detects(nn.Module):
    """Images and tokens to boxes in half precision, token numbers and a flag."""

    @nn.compact
    def __call__(self, inputs, train: bool = True):
        assert not train and inputs["image"].dtype == jnp.float32
        boxes = nn.Dense(8)(inputs["image"].mean((1, 2))).reshape(-1, 2, 4)
        (tokens,) = inputs["text"]
        embedded = nn.Embed(7, 4)(tokens).sum(1, keepdims=True)
        boxes = (boxes + embedded).astype(jnp.bfloat16)
        return {"boxes": [boxes, 2 * boxes], "next": tokens + 1, "any": tokens.max(1) > 3}


def test_inputs_and_outputs_of_any_structure(tmp_path):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 6, (5, 3)).astype(np.int32)
    inputs = {"image": IMAGES, "text": (tokens,)}
    scaled = (IMAGES.astype(np.float32) - np.asarray(MEAN, np.float32)) / np.asarray(
        STD, np.float32
    )
    model, plain = Detects(), {"image": scaled, "text": (tokens,)}
    init: Any = jax.jit(lambda: model.init(jax.random.key(0, impl="rbg"), plain, train=False))
    variables = init()
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    out = tmp_path / "out"
    for_images = {"mean": MEAN, "std": STD, "train": False}
    folder = export(model, variables, out, example, **for_images)
    about = json.loads((folder / "about.json").read_text())
    image = {"shape": ["batch", *SHAPE], "dtype": "uint8", "mean": list(MEAN), "std": list(STD)}
    text = {"shape": ["batch", 3], "dtype": "int32"}
    assert about["inputs"] == {"image": image, "text/0": text}
    box = {"shape": ["batch", 2, 4], "dtype": "float32"}
    flag = {"shape": ["batch"], "dtype": "bool"}
    assert about["outputs"] == {"any": flag, "boxes/0": box, "boxes/1": box, "next": text}
    np.savez(tmp_path / "inputs.npz", **{"text/0": tokens, "image": IMAGES})  # pyright: ignore[reportArgumentType]
    with pytest.raises(SystemExit, match=r"python run\.py inputs\.npz outputs\.npz"):
        run(folder)
    run(folder, tmp_path / "inputs.npz", tmp_path / "outputs.npz")
    outputs = arrays_of(tmp_path / "outputs.npz")
    expected: Any = jax.jit(functools.partial(model.apply, train=False))(variables, plain)
    assert sorted(outputs) == sorted(about["outputs"])
    for name, array in flat(expected).items():
        assert outputs[name].dtype == array.dtype
        # Rounded to bfloat16 in both; the mean over images is summed in the program's own order.
        np.testing.assert_allclose(outputs[name], array, rtol=0.01, atol=0.01)
    np.savez(tmp_path / "inputs.npz", image=IMAGES)
    with pytest.raises(SystemExit, match=r"inputs must be .*'text/0': 'int32 \(batch, 3\)'.*, got"):
        run(folder, tmp_path / "inputs.npz", tmp_path / "outputs.npz")


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (IMAGES, {}),
        (IMAGES.astype(np.float32), {"mean": MEAN, "std": STD}),
        (IMAGES[:, 0], {"mean": MEAN, "std": STD}),
    ],
    ids=["as they are", "float32", "three axes"],
)
def test_a_single_input_is_normalised_if_there_is_a_mean(images, options):
    class Doubles(nn.Module):
        def __call__(self, x):
            return x + x

    program = jax_export.deserialize(
        bytearray(export_program(Doubles(), {}, images[:1], **options))
    )
    expected = images + images
    if options:
        expected = (
            2
            * (images.astype(np.float32) - np.asarray(MEAN, np.float32))
            / np.asarray(STD, np.float32)
        )
    np.testing.assert_allclose(program.call({}, images), expected, rtol=1e-6)  # float32
    with pytest.raises(ExportError, match=r"the inputs have \[3\] channels, .*\[1, None\] values"):
        export_program(Doubles(), {}, images[:1], mean=(1,))
    with pytest.raises(ExportError, match="no uint8 images among the inputs"):
        export_program(Doubles(), {}, {"x": images[:1, 0]}, mean=(1,), std=(1,))


class Subtracts(nn.Module):
    def __call__(self, x, y):
        return {"classes": x - y}


def test_several_arguments(tmp_path, capsys):
    x, y = np.eye(4, dtype=np.float32)[[2, 0, 3]], np.zeros((3, 4), np.float32)
    folder = export(Subtracts(), {}, tmp_path / "out", (x[:1], y[:1]))
    np.savez(tmp_path / "inputs.npz", **{"0": x, "1": y})  # pyright: ignore[reportArgumentType]
    run(folder, tmp_path / "inputs.npz")
    assert capsys.readouterr().out.split() == ["2", "0", "3"]


def test_variables_round_trip(network, tmp_path):
    _, variables = network
    save_variables(variables, tmp_path / "v.npz")
    chex.assert_trees_all_equal(load_variables(tmp_path / "v.npz"), jax.device_get(variables))
    with np.load(tmp_path / "v.npz", allow_pickle=False) as plain:
        assert sorted(plain.files) == sorted(flat(variables))
        assert "params/model/bn2/scale" in plain.files
    save_variables(jax.tree.map(np.asarray, variables), tmp_path / "again")  # no ending is added
    assert (tmp_path / "again").read_bytes() == (tmp_path / "v.npz").read_bytes()


def test_dtypes(tmp_path):
    tree = {
        "a": {
            "half": jnp.float16(0.1),
            "eight": jnp.arange(3, dtype=jnp.uint8),
            "flag": np.array([True]),
            "number": 3.0,
        }
    }
    save_variables(tree, tmp_path / "v.npz")
    actual = load_variables(tmp_path / "v.npz")["a"]
    assert {name: str(leaf.dtype) for name, leaf in actual.items()} == {
        "half": "float16", "eight": "uint8", "flag": "bool", "number": "float32"
    }  # fmt: skip
    odd = jnp.asarray([1.0, 0.1, -3e38], jnp.bfloat16)
    save_variables({"a": odd}, tmp_path / "odd.npz")
    stored = load_variables(tmp_path / "odd.npz")["a"]
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(jnp.asarray(stored).astype(jnp.bfloat16), odd)
    with pytest.raises(ExportError, match=r"'params/key' has dtype key<fry>"):
        save_variables({"params": {"key": jax.random.key(0)}}, tmp_path / "no.npz")
    with pytest.raises(ExportError, match=r"'a' has dtype object"):
        save_variables({"a": np.array([None])}, tmp_path / "no.npz")
    assert not (tmp_path / "no.npz").exists()


def test_bfloat16_parameters_are_the_models_own_again():
    model = Small(dtype=jnp.bfloat16)
    variables = trained(model)
    assert variables["params"]["stem"]["kernel"].dtype == jnp.bfloat16
    program = program_of((model, variables), dtype="float32", mean=None, std=None)
    assert {str(aval.dtype) for aval in program.in_avals} == {"float32"}
    x = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    np.testing.assert_array_equal(
        jax.jit(program.call)(flat(variables), x), jax.jit(model.apply)(variables, x)
    )


@pytest.mark.parametrize(
    "content", [b"", b"no archive", None, "pickle", "an array where there are others"]
)
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
        (
            {"mean": None},
            "mean=None, std=.*: the program normalises uint8 images; give both",
        ),
        ({"std": (1.0,)}, r"have \[3, 1\] values"),
        ({"std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"dtype": "float32"}, "normalised already; remove both"),
        ({"dtype": "int8"}, "dtype='int8'; images must be 'uint8'"),
        (
            {"platforms": ("cpu", "gpu")},
            r"platforms=\('cpu', 'gpu'\); .* cpu, cuda, rocm, tpu",
        ),
        ({"platforms": ()}, r"platforms=\(\)"),
        ({"platforms": "cpu"}, "platforms='cpu'"),
    ],
)
def test_options_that_do_not_fit(small, options, words):
    with pytest.raises(ExportError, match=words):
        program_of(small, **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        *(
            (shape, r"give \(height, width, channels\)")
            for shape in [(8, 8), (8, 0, 3), (8, 8, 3.0), 8, ()]
        ),
        ({"a": np.zeros(3), "b": np.float32(1)}, "input 'b' is a scalar"),
        ({"a": np.array(["text"])}, "'a' has dtype <U4"),
        ({}, "contains no arrays"),
    ],
)
def test_inputs_that_cannot_be(small, inputs, message):
    with pytest.raises(ExportError, match=message):
        bytes_of(small, inputs)


class Reshapes(nn.Module):
    def __call__(self, x):
        return x.reshape(7, -1)


class ForgetsTheBatch(nn.Module):
    def __call__(self, x):
        return x.mean(0)


class Compares(nn.Module):
    def __call__(self, x):
        return jnp.einsum("ahwc,bhwc->ab", x, x)


class Nothing(nn.Module):
    def __call__(self, x):
        return {}


def test_models_that_cannot_be_exported(small):
    model, variables = small
    with pytest.raises(ExportError, match="must be a Flax linen module, got dict"):
        program_of((variables, variables))
    message = r"Reshapes cannot be exported for inputs uint8 \(batch, 8, 8, 3\) of any batch size"
    with pytest.raises(ExportError, match=message):
        program_of((Reshapes(), {}))
    for other, shapes in (
        (Nothing, "{}"),
        (ForgetsTheBatch, "(8, 8, 3)"),
        (Compares, "(batch, batch)"),
    ):
        with pytest.raises(ExportError, match=re.escape(f"{other.__name__} returned {shapes}")):
            program_of((other(), {}))
    missing = {**variables, "params": {"stem": variables["params"]["stem"]}}
    with pytest.raises(ExportError, match=r"Small cannot be exported.*classifier"):
        program_of((model, missing))
    with pytest.raises(ExportError, match="'a/b' contains a slash"):
        flat({"params": {"a/b": jnp.ones(1)}})


def test_a_folder_that_is_there_is_left_alone(small, tmp_path):
    (tmp_path / "out").mkdir()
    folder_of(small, tmp_path / "out")  # an empty one is taken
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(ExportError, match=f"{name} already exists; export to a new folder"):
            folder_of(small, tmp_path / name)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(StorageError, match="cannot be written"):
        folder_of(small, tmp_path / "file" / "below")


def test_the_folder_is_written_whole_or_not_at_all(small, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_variables", full)
    with pytest.raises(StorageError, match=r"out cannot be written \(No space left .*free some"):
        folder_of(small, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_without_flatbuffers(small, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ExportError, match="pip install flatbuffers"):
        program_of(small)
