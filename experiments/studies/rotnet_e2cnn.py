"""Steerable kernels and `rotnet-c4` against e2cnn, the library of the paper's code.

    pip install torch scipy sympy && pip install --no-deps e2cnn
    python experiments/studies/rotnet_e2cnn.py [--store FILE]

None of them is a dependency of this project. Compared are the spaces that the kernels of one pair
of fields span, and the pooled features of the network with e2cnn's kernels, in training mode.
--store writes a few random kernels of e2cnn to an .npz file; the tests read one.
"""

import argparse
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from e2cnn import gspaces  # pyright: ignore[reportMissingImports]
from e2cnn import nn as enn  # pyright: ignore[reportMissingImports]

import paramshare
from paramshare import Site, Steerable
from paramshare.models.rot_net import CONVOLUTIONS, POOLED
from paramshare.schemes import Weights
from paramshare.zoo.rotation import FIELDS

# As in the paper's code.
FREQUENCIES = {7: (0, 2, 3, 2), 5: (0, 2, 2)}
WIDTHS = {7: [0.6, 0.6, 0.6, 0.4], 5: [0.6, 0.6, 0.4]}
CASES = [(order, size, lifting) for order in (4, 8, 16) for size, lifting in ((7, 1), (5, 0))]


def convolution(inputs: Any, outputs: Any, size: int, padding: int = 0) -> Any:
    """A steerable convolution of the paper's code."""
    return enn.R2Conv(
        inputs,
        outputs,
        size,
        padding=padding,
        bias=False,
        sigma=WIDTHS[size],
        frequencies_cutoff=lambda r: FREQUENCIES[size][int(r)],
        rings=list(range(size // 2 + 1)),
    )


def kernel_of(layer: Any, weights: Any) -> np.ndarray:
    """Its kernel (out, in, size, size) for these weights."""
    kernel = layer.basisexpansion(weights).detach().numpy()
    return kernel.reshape(layer.out_type.size, layer.in_type.size, *[layer.kernel_size] * 2)


def one_field(order: int, size: int, lifting: int) -> Any:
    """A convolution to one field, from one field or from a gray image."""
    space = gspaces.Rot2dOnR2(N=order)
    regular = enn.FieldType(space, [space.regular_repr])
    inputs = enn.FieldType(space, [space.trivial_repr]) if lifting else regular
    return convolution(inputs, regular, size)


def smallest_cosine(order: int, size: int, lifting: int) -> tuple[int, float]:
    """The dimension of both spaces, and the smallest cosine between them; 1 if they are equal."""
    layer = one_field(order, size, lifting)
    count = layer.weights.numel()
    theirs = np.stack([kernel_of(layer, row) for row in torch.eye(count)])
    theirs = theirs.transpose(0, 3, 4, 2, 1).reshape(count, -1).astype(np.float64)
    site = Site("conv/kernel", (size, size, 1 if lifting else order, order), "float64", std=1.0)
    scheme = Steerable(order, lifting=bool(lifting))
    with jax.enable_x64(True):
        shape = scheme.shapes((site,)).bank[site.key].shape
    assert np.prod(shape) == count

    def kernel(one: jax.Array) -> jax.Array:
        return scheme.expand(Weights({site.key: one.reshape(shape)}), (site,))[0].ravel()

    with jax.enable_x64(True):
        ours = np.asarray(jax.vmap(kernel)(jnp.eye(count)))
    bases = [np.linalg.qr(matrix.T)[0] for matrix in (theirs, ours)]
    return count, float(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).min())


def difference_of_features() -> tuple[float, float]:
    """The largest difference of pooled features on random images, and the largest feature."""
    space, order = gspaces.Rot2dOnR2(N=4), 4
    fields, kernels = enn.FieldType(space, [space.trivial_repr]), {}
    image = torch.randn(8, 1, 29, 29)
    x = enn.GeometricTensor(image, fields)
    for number, (size, padding) in enumerate(CONVOLUTIONS, start=1):
        outputs = enn.FieldType(space, FIELDS[number - 1] * [space.regular_repr])
        layers = [convolution(fields, outputs, size, padding), enn.InnerBatchNorm(outputs)]
        layers += [enn.ELU(outputs)]
        if number in POOLED:
            layers.append(enn.PointwiseMaxPool(outputs, kernel_size=2, stride=2))
        kernels[f"conv{number}"] = kernel_of(layers[0], layers[0].weights).transpose(2, 3, 1, 0)
        for layer in layers:
            x = layer.train()(x)
        fields = outputs
    theirs = x.tensor.mean((2, 3)).reshape(len(image), -1, order).max(-1).values.detach().numpy()

    model: Any = paramshare.create_model("rotnet-c4")
    inputs = jnp.asarray(image.numpy().transpose(0, 2, 3, 1))
    dense: Any = model.expand(jax.jit(model.init)(jax.random.key(0), inputs))
    for name, kernel in kernels.items():
        dense["params"][name]["kernel"] = jnp.asarray(kernel)
    converted = paramshare.convert(model, dense).variables
    _, state = model.apply(
        converted,
        inputs,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name == "norm6",
    )
    (last,) = jax.tree.leaves(state["intermediates"])
    pooled = jnp.mean(jax.nn.elu(last), axis=(1, 2)).reshape(len(inputs), -1, order)
    return float(np.abs(jnp.max(pooled, axis=-1) - theirs).max()), float(np.abs(theirs).max())


def main() -> None:
    """Compares and prints; stores kernels if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", metavar="FILE")
    args = parser.parse_args()
    torch.manual_seed(0)
    for case in CASES:
        count, cosine = smallest_cosine(*case)
        order, size, lifting = case
        what = "image to field" if lifting else "field to field"
        print(f"C{order}, {size}x{size}, {what}: {count} functions, cosine 1 - {1 - cosine:.0e}")
    difference, largest = difference_of_features()
    print(f"features of rotnet-c4: largest {largest:.2f}, largest difference {difference:.0e}")
    if args.store:
        arrays: dict[str, Any] = {"version": importlib.metadata.version("e2cnn")}
        for case in CASES[:-1]:  # the last is large
            layer, name = one_field(*case), "-".join(map(str, ("kernel", *case)))
            arrays[name] = kernel_of(layer, layer.weights)
            arrays[f"weights-{name}"] = layer.weights.numel()
        np.savez_compressed(args.store, **arrays)


if __name__ == "__main__":
    main()
