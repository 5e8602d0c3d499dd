"""Export: a network as a folder that runs with JAX and NumPy alone, its program in one file and its variables in another."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from paramshare.analysis.folders import written_whole
from paramshare.shared import Shared

PROGRAM, VARIABLES, ABOUT, RUN = "program.jaxexport", "variables.npz", "about.json", "run.py"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
RUN_SOURCE = '''"""%s. Needs jax, flatbuffers, numpy."""

import pathlib
import sys

import jax
import numpy as np
from jax import export

if len(sys.argv) != %d:
    sys.exit(__doc__)
folder = pathlib.Path(__file__).parent
program = export.deserialize(bytearray((folder / "program.jaxexport").read_bytes()))
variables = dict(np.load(folder / "variables.npz"))
images = np.load(sys.argv[1])
wanted = program.in_avals[-1]
if images.shape[1:] != wanted.shape[1:] or images.dtype != wanted.dtype:
    sys.exit(f"images must be {wanted.dtype} of shape {wanted.shape}, got {images.dtype} of shape {images.shape}")
logits = jax.jit(program.call)(variables, images)
%s
'''
RUN_CLASSES = (
    "Prints the class of every image in an .npy file: python run.py images.npy",
    2,
    'print(*np.argmax(logits, axis=-1), sep="\\n")',
)
RUN_LOGITS = (
    "Writes the logits of every image in an .npy file into another: python run.py images.npy logits.npy",
    3,
    "np.save(sys.argv[2], logits)",
)


class ExportError(ValueError):
    """A network cannot be exported as asked, or a file of variables cannot be read."""


def export(
    model: nn.Module, variables: Mapping[str, Any], folder: str | os.PathLike, input_shape: Sequence[int], **options: Any
) -> pathlib.Path:
    """Writes a folder that runs a network where neither paramshare nor Flax is installed.

    * `program.jaxexport`: `export_program`'s, to be called as `jax.export.deserialize(...).call(variables, images)`;
    * `variables.npz`: `save_variables`'s, small where the model is shared: the program makes the kernels;
    * `about.json`: input, output, names, shapes and dtypes of the variables, platforms, versions, SHA-256 of the two files;
    * `run.py`: a dozen lines that print the classes of the images in an .npy file; of a network whose logits are not (batch, classes),
      a number a cell say, it writes the logits into an .npy file.

    The folder is written whole or not at all. Reading the program takes `jax`, `numpy` and `flatbuffers` (which `jax.export` is written
    with). JAX promises to run it in releases up to 6 months younger than the one that exported it, and up to 3 weeks older; the
    variables are in NumPy's format, and stay readable.

    Args:
      model: a plain model (a baked or looped one, say), or a `Shared`.
      variables: its variables.
      folder: to be made; it must not exist, or be empty.
      input_shape: (height, width, channels) of an image.
      **options: of `export_program`.

    Returns:
      The folder.

    Raises:
      ExportError: if the folder holds anything or cannot be written, or the network cannot be exported.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExportError(f"{folder} is there already; an export goes into a new folder")
    program = export_program(model, variables, input_shape, **options)
    with written_whole(folder, ExportError) as fresh:
        (fresh / PROGRAM).write_bytes(program)
        save_variables(variables, fresh / VARIABLES)
        about = _about(model, program, options)
        (fresh / RUN).write_text(RUN_SOURCE % (RUN_CLASSES if "classes" in about else RUN_LOGITS))
        sums = {name: hashlib.sha256((fresh / name).read_bytes()).hexdigest() for name in (PROGRAM, VARIABLES)}
        (fresh / ABOUT).write_text(json.dumps(about | {"sha256": sums}, indent=2) + "\n")
    return folder


def export_program(
    model: nn.Module,
    variables: Mapping[str, Any],
    input_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    dtype: str = "uint8",
    **options: Any,
) -> bytes:
    """A network's forward pass as a serialised `jax.export` program, `f(variables, images) -> logits`, for batches of any size.

    The weights are no part of it: `variables` is a flat dictionary of arrays by path, as `save_variables` stores it. Logits are
    float32, (batch, classes) or of any other shape that starts with the batch. The program names no files of the machine it was made on.

    Args:
      model: a plain model, or a `Shared`: then the program makes the kernels.
      variables: its variables; only shapes and dtypes count.
      input_shape: (height, width, channels) of an image.
      mean: a number a channel, on the 0..255 scale, which uint8 images are normalised with.
      std: likewise.
      platforms: on which the program is to run: "cpu", "cuda", "rocm", "tpu".
      dtype: of the images: "uint8", as data sets give them, to be normalised by the program; or "float32", normalised already.
      **options: further arguments of the model's call, such as `train=False`.

    Returns:
      The bytes that `jax.export.deserialize` takes (as a `bytearray`).

    Raises:
      ExportError: if the model does not run on such images and variables at every batch size, does not return one array
        (batch, ...) of logits, or an argument is not a legal one.

    Example:
      >>> import jax, numpy as np, paramshare
      >>> from paramshare.analysis.export import export_program, flat
      >>> model = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
      >>> program = export_program(model, variables, (8, 8, 3), mean=(127,) * 3, std=(60,) * 3)
      >>> jax.export.deserialize(bytearray(program)).call(flat(variables), np.zeros((5, 8, 8, 3), np.uint8)).shape
      (5, 10)
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"a Flax linen module is exported, got {type(model).__name__}")
    shape = _check_shape(input_shape)
    normalise = _normalisation(dtype, mean, std, shape[-1])
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms or isinstance(platforms, str):
        raise ExportError(f"platforms={platforms!r}; name one or more of {', '.join(PLATFORMS)}")
    wanted, tree = {name: leaf.dtype for name, leaf in _leaves(variables).items()}, jax.tree.structure(variables)

    def forward(variables, images):
        leaves = [variables[name].astype(dtype) for name, dtype in wanted.items()]
        logits: Any = model.apply(jax.tree.unflatten(tree, leaves), normalise(images), **options)
        sizes = logits.shape if isinstance(logits, jax.Array) else ()
        if sizes[:1] != images.shape[:1] or not all(isinstance(size, int) for size in sizes[1:]):
            raise ExportError(
                f"logits are one array, (batch, ...) with the other sizes fixed; {type(model).__name__} returned "
                f"{jax.tree.map(jnp.shape, logits)}"
            )
        return logits.astype(jnp.float32)

    batch = jax_export.symbolic_shape("batch")
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _stored(leaf.dtype)), _leaves(variables))
    try:
        with _without_locations():
            exported = jax_export.export(jax.jit(forward), platforms=tuple(platforms))(
                arguments, jax.ShapeDtypeStruct((*batch, *shape), dtype)
            )
        return bytes(exported.serialize())
    except ExportError:
        raise
    except ImportError as error:
        raise ExportError(f"jax.export needs the package flatbuffers to write a program ({error}); pip install flatbuffers") from None
    except Exception as error:  # whatever a model, JAX or Flax raise while they trace
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"{type(model).__name__} cannot be exported for {dtype} images of shape {shape} and a batch of any size, with these variables "
            f"({type(error).__name__}: {reason})"
        ) from error


def flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables by their paths, joined by slashes, as NumPy arrays: what `save_variables` stores, and an exported program takes.

    What NumPy has no name for, bfloat16 and the float8s, is given in float32, exactly; an exported program turns it back.

    Raises:
      ExportError: if a name has a slash in it, or an array is not of numbers.
    """
    return {name: np.asarray(leaf).astype(_stored(leaf.dtype)) for name, leaf in _leaves(variables).items()}


def save_variables(variables: Mapping[str, Any], file: str | os.PathLike) -> None:
    """Writes variables to an .npz file, an array a path ("params/model/stem/kernel"), without pickle: `numpy.load` reads it anywhere.

    bfloat16 and the float8s are stored as float32, exactly. Equal variables give equal files.

    Raises:
      ExportError: as `flat`, or if the file cannot be written.
    """
    arrays: Any = flat(variables)
    try:
        with open(file, "wb") as stream:  # given a name, NumPy would add an ending to it
            np.savez(stream, **arrays)
    except OSError as error:
        raise ExportError(f"{file} cannot be written: {error}") from None


def load_variables(file: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_variables` wrote, as a model's `apply` takes it: nested dictionaries of NumPy arrays.

    Raises:
      ExportError: if the file is not there, or is no .npz file of plain arrays.
    """
    nested: dict[str, Any] = {}
    try:
        with np.load(file, allow_pickle=False) as stored:
            for name in stored.files:
                *scopes, last = name.split("/")
                node = nested
                for scope in scopes:
                    node = node.setdefault(scope, {})
                node[last] = stored[name]
    except (OSError, ValueError, EOFError, AttributeError, IndexError, TypeError, zipfile.BadZipFile) as error:
        raise ExportError(f"{file} cannot be read as an .npz file of variables: {error}") from None
    return nested


def _leaves(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays, or shapes, by path, in the order of the tree's leaves."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        names = [str(getattr(key, "key", key)) for key in path]
        slashed = [name for name in names if "/" in name]
        if slashed:
            raise ExportError(f"the name {slashed[0]!r} has a slash in it, which paths are joined by; rename the module or the bank")
        name = "/".join(names)
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.number) and leaf.dtype != bool:
            raise ExportError(f"{name!r} is of dtype {leaf.dtype}, which is no array of numbers; leave it out of the variables")
        found[name] = leaf
    return found


def _stored(dtype: Any) -> np.dtype:
    """The dtype under which numbers are stored: NumPy's own, of a width that JAX has."""
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    return dtype if dtype.kind in "biufc" else np.dtype(np.float32)


def _check_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ExportError(f"input_shape={input_shape!r}; give (height, width, channels) of an image, each 1 or more")
    return shape


def _normalisation(dtype: str, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> Any:
    if dtype not in ("uint8", "float32"):
        raise ExportError(f"dtype={dtype!r}; images are 'uint8', to be normalised by the program, or 'float32', normalised already")
    if dtype == "float32":
        if mean is not None or std is not None:
            raise ExportError("float32 images are normalised already; leave out mean and std, or export for dtype='uint8'")
        return lambda images: images
    found = [None if numbers is None else len(numbers) for numbers in (mean, std)]
    if mean is None or std is None or found != [channels, channels]:
        raise ExportError(
            f"uint8 images of {channels} channels are normalised by mean and std, {channels} numbers each; got {found} of them"
        )
    mean_C, std_C = (np.asarray(numbers, np.float32).reshape(1, 1, 1, channels) for numbers in (mean, std))
    if not (np.isfinite(mean_C).all() and np.isfinite(std_C).all() and (std_C > 0).all()):
        raise ExportError(f"mean={tuple(mean)} and std={tuple(std)}; both are finite, std positive, on the 0..255 scale")
    return lambda images: (images.astype(jnp.float32) - mean_C) / std_C


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Programs traced inside carry no paths of source files."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _about(model: nn.Module, program: bytes, options: dict[str, Any]) -> dict[str, Any]:
    exported = jax_export.deserialize(bytearray(program))
    (arguments, images), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    (logits,) = exported.out_avals
    _, *sizes = logits.shape
    plain = model.model if isinstance(model, Shared) else model
    try:
        version = importlib.metadata.version("paramshare")
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        version = "unknown"
    return {
        "model": type(plain).__name__,
        "shared": isinstance(model, Shared),
        "input": {"shape": [str(images.shape[0]), *images.shape[1:]], "dtype": str(images.dtype)}
        | {name: [float(number) for number in options[name]] for name in ("mean", "std") if options.get(name) is not None},
        "output": {"shape": [str(logits.shape[0]), *sizes], "dtype": str(logits.dtype)},
        **({"classes": sizes[0]} if len(sizes) == 1 else {}),
        "variables": {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in arguments.items()},
        "platforms": list(exported.platforms),
        "versions": {"jax": jax.__version__, "paramshare": version, "calling_convention": exported.calling_convention_version},
    }
