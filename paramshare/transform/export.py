"""Export a network as a folder that runs with JAX and NumPy alone."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from paramshare.errors import ParamshareError
from paramshare.shared import Shared
from paramshare.storage import is_new, local_path, written_whole
from paramshare.transform import unpacking
from paramshare.transform.packing import PACKED, pack, save_packed
from paramshare.transform.variables_file import (
    ExportError,
    leaves_by_path,
    save_variables,
    stored_dtype,
)

PROGRAM, VARIABLES, ABOUT, RUN = "program.jaxexport", "variables.npz", "about.json", "run.py"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
INPUT, OUTPUT = "input", "output"  # the name of a single array in about.json and in run.py's files
RUN_SOURCE = '''"""%s. Needs jax, flatbuffers, numpy."""

import pathlib
import sys

import jax
import numpy as np
from jax import export
%s
if len(sys.argv) != %d:
    sys.exit(__doc__)
folder = pathlib.Path(__file__).parent
program = export.deserialize(bytearray((folder / "program.jaxexport").read_bytes()))
variables = %s
inputs = np.load(sys.argv[1])
inputs = inputs if isinstance(inputs, np.ndarray) else dict(inputs)
describe = lambda array: f"{array.dtype} (batch, {', '.join(map(str, array.shape[1:]))})"
expected = jax.tree.map(describe, jax.tree.unflatten(program.in_tree, program.in_avals)[0][1])
if jax.tree.map(describe, inputs) != expected:
    sys.exit(f"inputs must be {expected}, got {jax.tree.map(describe, inputs)}")
outputs = jax.jit(program.call)(variables, inputs)
outputs = outputs if isinstance(outputs, dict) else {"output": outputs}
%s
'''
READ = "", 'dict(np.load(folder / "variables.npz"))'
READ_PACKED = (
    "from unpacking import read_packed\n",
    'read_packed((folder / "variables.pack").read_bytes())',
)
RUN_CLASSES = (
    "Prints the class of every example in a file of inputs: python run.py inputs.{ending}",
    2,
    'print(*np.argmax(*outputs.values(), axis=-1), sep="\\n")',
)
RUN_OUTPUTS = (
    "Writes the outputs for a file of inputs: python run.py inputs.{ending} outputs.npz",
    3,
    "np.savez(sys.argv[2], **outputs)",
)


def export(
    model: nn.Module,
    variables: Mapping[str, Any],
    folder: str | os.PathLike,
    inputs: Any,
    *,
    packed: bool = False,
    **options: Any,
) -> pathlib.Path:
    """Writes a folder that runs a network where neither paramshare nor Flax is installed.

    * `program.jaxexport`: the program of `export_program`; call it as
      `jax.export.deserialize(...).call(variables, inputs)`.
    * `variables.npz`: the variables, see `save_variables`. Small for a shared model, because the
      program expands the banks.
    * `about.json`: shape and dtype of every input, output and variable by path, platforms,
      versions, and the SHA-256 of the two files. A single array is called "input" or "output".
    * `run.py`: a short script that reads the inputs from an .npy file (.npz if there are several
      arrays). It prints the classes if the only output is (batch, classes), and otherwise writes
      every output into an .npz file.

    The folder is written completely or not at all. Reading the program takes `jax`, `numpy` and
    `flatbuffers`. JAX guarantees that it runs in releases up to 6 months newer and up to 3 weeks
    older than the one that exported it. The variables are in NumPy's format and stay readable.

    Args:
      model: a plain model (baked or looped, for example), or a `Shared`.
      variables: its variables.
      folder: the folder to write; it must not exist, or be empty.
      inputs: as of `export_program`.
      packed: write the variables as `variables.pack`, see `paramshare.transform.packing`, and
        `unpacking.py`, which reads it with NumPy, instead of `variables.npz`.
      **options: as of `export_program`.

    Returns:
      The folder.

    Raises:
      ExportError: if the folder is not empty, or if the network cannot be exported.
      StorageError: if the folder cannot be written.
    """
    folder = local_path(folder).absolute()
    if not is_new(folder):
        raise ExportError(f"{folder} already exists; export to a new folder")
    program = export_program(model, variables, inputs, **options)
    with written_whole(folder) as scratch:
        (scratch / PROGRAM).write_bytes(program)
        if packed:
            save_packed(pack(variables), scratch / PACKED)
            shutil.copyfile(unpacking.__file__, scratch / "unpacking.py")
        else:
            save_variables(variables, scratch / VARIABLES)
        about = _about(model, program, options)
        (scratch / RUN).write_text(_run_source(about, packed))
        sums = {
            name: hashlib.sha256((scratch / name).read_bytes()).hexdigest()
            for name in (PROGRAM, PACKED if packed else VARIABLES)
        }
        (scratch / ABOUT).write_text(json.dumps(about | {"sha256": sums}, indent=2) + "\n")
    return folder


def export_program(
    model: nn.Module,
    variables: Mapping[str, Any],
    inputs: Any,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    dtype: str = "uint8",
    predict: Callable[[Any], Any] | None = None,
    batch: int | None = None,
    **options: Any,
) -> bytes:
    """The forward pass as a serialised `jax.export` program, for batches of any size.

    The program is a function `(variables, inputs) -> outputs`. It contains no weights: `variables`
    is a flat dictionary of arrays by path, as `save_variables` stores it. `inputs` and `outputs`
    are an array each, or flat dictionaries of arrays by path ("tokens", "boxes/0") where the model
    takes or returns any other pytree. Floating-point outputs are float32. The program contains no
    names of files.

    With `mean` and `std` the program normalises the input to (input - mean) / std in float32. If
    the input is not a single array, it normalises the images, which are arrays of dtype uint8 and
    shape (batch, height, width, channels), and passes all others on as they are.

    Args:
      model: a plain model, or a `Shared`; the program then expands the banks.
      variables: its variables; only shapes and dtypes matter.
      inputs: (height, width, channels), if the input is one array of images; otherwise example
        inputs with the batch first: any pytree of arrays or `jax.ShapeDtypeStruct`s, of which only
        shapes and dtypes matter. A tuple is passed as several arguments.
      mean: the mean of each channel, on the scale of the input (0..255 for uint8 images).
      std: likewise.
      platforms: where the program can run: "cpu", "cuda", "rocm", "tpu".
      dtype: the dtype of the images if `inputs` is (height, width, channels): "uint8" or, for
        images that are normalised already, "float32".
      predict: a function of the model's outputs, whose result the program returns instead, such as
        boxes.
      batch: the only batch size, for models that depend on it; outputs can then have any shape. A
        decoding step takes its cache with the variables, and `mutable=["cache"]` returns it.
      **options: further arguments of the model's call, such as `train=False`.

    Returns:
      Bytes for `jax.export.deserialize` (as a `bytearray`).

    Raises:
      ExportError: if an argument is invalid, if the model does not run on such inputs and variables
        at every batch size, or if an output is not an array with the batch first.

    Example:
      >>> import jax, numpy as np, paramshare
      >>> from paramshare.transform.export import export_program
      >>> from paramshare.transform.variables_file import flat
      >>> model = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))
      >>> x = np.zeros((1, 8, 8, 3), np.float32)
      >>> variables = jax.jit(model.init)(jax.random.key(0), x)
      >>> program = export_program(model, variables, (8, 8, 3), mean=(127,) * 3, std=(60,) * 3)
      >>> images = np.zeros((5, 8, 8, 3), np.uint8)
      >>> jax.export.deserialize(bytearray(program)).call(flat(variables), images).shape
      (5, 10)
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"model must be a Flax linen module, got {type(model).__name__}")
    unsupported = [name for name in platforms if name not in PLATFORMS]
    if unsupported or not platforms or isinstance(platforms, str):
        raise ExportError(
            f"platforms={platforms!r}; give a tuple of one or more of {', '.join(PLATFORMS)}"
        )
    size = jax_export.symbolic_shape("batch")[0] if batch is None else batch
    example = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype),
        _example(inputs, dtype, mean, std),
    )
    normalise = _normalisation(example, mean, std)
    leaves, tree = leaves_by_path(variables), jax.tree.structure(variables)

    def forward(stored: dict[str, jax.Array], inputs: Any) -> Any:
        arrays = (
            [inputs] if _is_array(example) else [inputs[name] for name in leaves_by_path(example)]
        )
        inputs = jax.tree.unflatten(jax.tree.structure(example), map(normalise, arrays))
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        weights = [stored[name].astype(leaf.dtype) for name, leaf in leaves.items()]
        outputs: Any = model.apply(jax.tree.unflatten(tree, weights), *args, **options)
        outputs = outputs if predict is None else predict(outputs)
        if batch is None:
            _check_outputs(model, outputs, size)
        return _flat_unless_array(jax.tree.map(_as_float32, outputs))

    stored = {
        name: jax.ShapeDtypeStruct(leaf.shape, stored_dtype(leaf.dtype))
        for name, leaf in leaves.items()
    }
    try:
        with _without_locations():
            exported = jax_export.export(jax.jit(forward), platforms=tuple(platforms))(
                stored, _flat_unless_array(example)
            )
        return bytes(exported.serialize())
    except ParamshareError:  # a task may not have predictions
        raise
    except ImportError as error:
        raise ExportError(
            f"jax.export needs the package flatbuffers ({error}); pip install flatbuffers"
        ) from None
    except Exception as error:  # a model, JAX and Flax raise anything while they trace
        reason = " ".join(str(error).split())[:300]
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype} {leaf.shape}", example)
        raise ExportError(
            f"{type(model).__name__} cannot be exported for inputs {shapes} of "
            f"{'any batch size' if batch is None else f'batch size {batch}'} "
            f"with these variables ({type(error).__name__}: {reason})"
        ) from error


def _is_array(tree: Any) -> bool:
    return hasattr(tree, "dtype")


def _flat_unless_array(tree: Any) -> Any:
    return tree if _is_array(tree) else leaves_by_path(tree)


def _as_float32(array: jax.Array) -> jax.Array:
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(jnp.float32) if floating else array


def _example(inputs: Any, dtype: str, mean: Any, std: Any) -> Any:
    """Inputs as a pytree of arrays or shapes."""
    shape = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if all(isinstance(size, int | float) for size in shape):
        if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ExportError(
                f"inputs={inputs!r}; give (height, width, channels) of an image, each at least 1, "
                "or example inputs with the batch first"
            )
        if dtype not in ("uint8", "float32"):
            raise ExportError(
                f"dtype={dtype!r}; images must be 'uint8', or 'float32' if normalised already"
            )
        if dtype == "uint8" and (mean is None or std is None):
            raise ExportError(
                f"mean={mean}, std={std}: the program normalises uint8 images; give both, one "
                "value for each channel, or export for dtype='float32'"
            )
        if dtype == "float32" and (mean is not None or std is not None):
            raise ExportError(
                f"mean={mean}, std={std}: float32 images are normalised already; remove both, or "
                "export for dtype='uint8'"
            )
        return jax.ShapeDtypeStruct((1, *shape), dtype)
    leaves = leaves_by_path(inputs)
    for name, leaf in leaves.items():
        if not leaf.shape:
            raise ExportError(f"input {name!r} is a scalar; every input must have the batch first")
    if not leaves:
        raise ExportError(f"inputs={inputs!r} contains no arrays; give example inputs of the model")
    return jax.tree.unflatten(
        jax.tree.structure(inputs),
        [
            jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
            for leaf in leaves.values()
        ],
    )


def _is_normalised(inputs: Any, array: Any) -> bool:
    """Whether `mean` and `std` are for this array of the inputs."""
    return _is_array(inputs) or (array.dtype == jnp.uint8 and len(array.shape) == 4)


def _normalisation(
    example: Any, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Callable[[jax.Array], jax.Array]:
    """Normalises an array of the inputs where `mean` and `std` are for it."""
    if mean is None and std is None:
        return lambda array: array
    arrays = [leaf for leaf in jax.tree.leaves(example) if _is_normalised(example, leaf)]
    if not arrays:
        raise ExportError(
            f"mean={mean}, std={std}: there are no uint8 images among the inputs; "
            "remove mean and std"
        )
    channels = sorted({array.shape[-1] for array in arrays}, key=str)
    sizes = [None if values is None else len(values) for values in (mean, std)]
    if mean is None or std is None or sizes != channels * 2:
        raise ExportError(
            "mean and std must both have one value for each channel; the inputs have "
            f"{channels} channels, mean and std have {sizes} values"
        )
    mean_C, std_C = (np.asarray(values, np.float32) for values in (mean, std))
    if not (np.isfinite(mean_C).all() and np.isfinite(std_C).all() and (std_C > 0).all()):
        raise ExportError(f"mean={mean}, std={std}; mean must be finite and std positive")

    def normalise(array: jax.Array) -> jax.Array:
        if not _is_normalised(example, array):
            return array
        shape = (1,) * (array.ndim - 1) + mean_C.shape  # rank promotion may be an error
        return (array.astype(jnp.float32) - mean_C.reshape(shape)) / std_C.reshape(shape)

    return normalise


def _check_outputs(model: nn.Module, outputs: Any, batch: Any) -> None:
    leaves = jax.tree.leaves(outputs)
    shapes = [leaf.shape if isinstance(leaf, jax.Array) else () for leaf in leaves]
    fixed = all(isinstance(size, int) for shape in shapes for size in shape[1:])
    if not leaves or not fixed or any(shape[:1] != (batch,) for shape in shapes):
        raise ExportError(
            "every output must be an array (batch, ...) whose other axes have a fixed size; "
            f"{type(model).__name__} returned {jax.tree.map(jnp.shape, outputs)}"
        )


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Programs traced inside contain no paths of source files."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _run_source(about: dict[str, Any], packed: bool) -> str:
    """A script that prints classes if the only output is (batch, classes)."""
    outputs = list(about["outputs"].values())
    classes = len(outputs) == 1 and len(outputs[0]["shape"]) == 2
    text, arguments, ending = RUN_CLASSES if classes else RUN_OUTPUTS
    array = list(about["inputs"]) == [INPUT]
    usage, read = text.format(ending="npy" if array else "npz"), READ_PACKED if packed else READ
    return RUN_SOURCE % (usage, read[0], arguments, read[1], ending)


def _about(model: nn.Module, program: bytes, options: dict[str, Any]) -> dict[str, Any]:
    exported = jax_export.deserialize(bytearray(program))
    (variables, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    normalisation = [name for name in ("mean", "std") if options.get(name) is not None]

    def described(arrays: Any, single: str) -> dict[str, Any]:
        arrays = {single: arrays} if _is_array(arrays) else arrays
        return {
            name: {
                "shape": [size if isinstance(size, int) else str(size) for size in array.shape],
                "dtype": str(array.dtype),
            }
            | {
                option: [float(value) for value in options[option]]
                for option in normalisation
                if single == INPUT and _is_normalised(inputs, array)
            }
            for name, array in arrays.items()
        }

    try:
        version = importlib.metadata.version("paramshare")
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        version = "unknown"
    return {
        "model": type(model.model if isinstance(model, Shared) else model).__name__,
        "shared": isinstance(model, Shared),
        "inputs": described(inputs, INPUT),
        "outputs": described(outputs, OUTPUT),
        "variables": described(variables, ""),
        "platforms": list(exported.platforms),
        "versions": {
            "jax": jax.__version__,
            "paramshare": version,
            "calling_convention": exported.calling_convention_version,
        },
    }
