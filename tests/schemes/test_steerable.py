"""Steerable kernels: equivariant convolutions, and nothing but them."""

import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import SchemeError, Site, Steerable
from paramshare.schemes.harmonics import harmonics, highest_frequencies


def drawn(scheme: Steerable, *shape: int) -> jax.Array:
    sites = (Site("conv/kernel", shape, std=1.0),)
    return scheme.expand(scheme.init(jax.random.key(1), sites), sites)[0]


def conv(x: Any, kernel: Any, padding: int = 0) -> np.ndarray:
    return np.asarray(
        jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
    )


def turned_features(x: np.ndarray, order: int, quarters: int) -> np.ndarray:
    """Turned by quarter turns in space, and by as much in the channels of every field."""
    x = np.rot90(x, quarters, axes=(1, 2))
    fields = x.reshape(*x.shape[:-1], -1, order)
    return np.roll(fields, quarters * order // 4, axis=-1).reshape(x.shape)


@pytest.mark.parametrize("order", [4, 8, 16])
@pytest.mark.parametrize("size", [9, 12])
def test_quarter_turns_of_the_input_turn_the_features_and_permute_them(order, size):
    image = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    lifted = drawn(Steerable(order, lifting=True), 7, 7, 3, 2 * order)
    kernel = drawn(Steerable(order), 5, 5, 2 * order, 3 * order)
    features = conv(conv(image, lifted, 3), kernel, 2)
    for quarters in (1, 2, 3):
        turned = np.rot90(image, quarters, axes=(1, 2))
        expected = turned_features(features, order, quarters)
        actual = conv(conv(turned, lifted, 3), kernel, 2)
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    plain = conv(image, np.asarray(lifted)[..., ::-1], 3)
    assert not np.allclose(plain, conv(image, lifted, 3))  # the order of channels matters


@pytest.mark.parametrize(("order", "tolerance"), [(8, 0.02), (16, 0.02)])
def test_smooth_images_turned_by_any_angle_of_the_group(order, tolerance):
    """At the centre of a turned image each field has moved on by one channel.

    Kernels are sampled on pixels, so that this holds as far as sums over pixels are integrals: to
    2% of the largest feature for blobs with a standard deviation of 2.5 pixels.
    """
    kernel = drawn(Steerable(order, lifting=True), 7, 7, 1, 4 * order)
    y, x = -(np.mgrid[:7, :7][0] - 3.0), np.mgrid[:7, :7][1] - 3.0

    def image(angle: float) -> np.ndarray:
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        blobs = [(2.0, 1.0, 1.0), (-1.5, 2.0, -1.0), (0.5, -2.5, 0.7)]
        values: Any = sum(
            c * np.exp(-((u - a) ** 2 + (v - b) ** 2) / (2 * 2.5**2)) for a, b, c in blobs
        )
        return values[None, ..., None].astype(np.float32)

    features = conv(image(0.0), kernel).reshape(4, order)
    for step in range(1, order):
        turned = conv(image(2 * np.pi * step / order), kernel).reshape(4, order)
        error = np.abs(turned - np.roll(features, step, axis=1)).max()
        assert error < tolerance * np.abs(features).max()
    assert np.ptp(features, axis=1).max() > 0.1 * np.abs(features).max()


@pytest.mark.parametrize(("order", "tolerance"), [(8, 0.08), (16, 0.08)])
def test_layers_one_after_the_other_turn_smooth_images_too(order, tolerance):
    """Lifting, ELU and two regular layers: by 45 or 22.5 degrees to 8% of the largest feature.

    That of quarter turns is rounding. A roll the wrong way would be off by more than the features.
    """
    y, x = -(np.mgrid[:15, :15][0] - 7.0), np.mgrid[:15, :15][1] - 7.0
    kernels = [drawn(Steerable(order, lifting=True), 7, 7, 1, 2 * order)]
    kernels += [drawn(Steerable(order), 5, 5, 2 * order, 2 * order)] * 2

    def features(angle: float) -> np.ndarray:
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        h: Any = np.exp(-((u - 3) ** 2 + (v - 1) ** 2) / 18) - np.exp(-((u + 2) ** 2 + v**2) / 18)
        h = h[None, ..., None].astype(np.float32)
        for kernel in kernels:
            h = np.asarray(nn.elu(conv(h, kernel) / 10))
        return h.reshape(2, order)

    upright = features(0.0)
    errors = [
        np.abs(features(2 * np.pi * step / order) - np.roll(upright, step, axis=1)).max()
        for step in range(order)
    ]
    assert max(errors) < tolerance * np.abs(upright).max()
    assert max(errors[:: order // 4]) < 1e-4 * np.abs(upright).max()
    assert np.ptp(upright, axis=1).max() > 0.5 * np.abs(upright).max()


def test_kernels_of_e2cnn_are_kernels_of_ours():
    """Random ones, stored by experiments/studies/rotnet_e2cnn.py with the version they are of."""
    with np.load(pathlib.Path(__file__).parent / "stored" / "e2cnn.npz") as stored:
        for name in (name for name in stored.files if name.startswith("kernel")):
            order, _, lifting = map(int, name.split("-")[1:])
            kernel = stored[name].transpose(2, 3, 1, 0)
            scheme = Steerable(order, lifting=bool(lifting))
            site = Site("conv/kernel", kernel.shape, std=1.0)
            weights = scheme.from_dense((jnp.asarray(kernel),), (site,))
            assert weights.bank["conv.kernel"].size == stored[f"weights-{name}"]
            made = scheme.expand(weights, (site,))[0]
            np.testing.assert_allclose(made, kernel, atol=2e-6 * np.abs(kernel).max())


def test_the_basis_is_everybodys_and_cannot_be_written():
    basis = harmonics(5, 4, [0, 2, 2])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="read-only"):
        basis[:] = 0
    with pytest.raises(SchemeError, match="the size must be odd"):
        harmonics(4, 4, (0, 2))


def test_projecting_an_equivariant_kernel_changes_nothing_and_any_other_one_is_made_equivariant():
    site = Site("conv/kernel", (5, 5, 4, 8), std=1.0)
    scheme = Steerable(4)
    other = np.random.default_rng(0).normal(size=site.shape).astype(np.float32)
    weights = scheme.from_dense((jnp.asarray(other),), (site,))
    kernel = scheme.expand(weights, (site,))[0]
    again = scheme.from_dense((kernel,), (site,))
    np.testing.assert_allclose(
        again.bank["conv.kernel"], weights.bank["conv.kernel"], rtol=1e-5, atol=1e-5
    )
    image = np.random.default_rng(1).normal(size=(1, 7, 7, 4)).astype(np.float32)
    features = conv(image, kernel)
    turned = conv(turned_features(image, 4, 1), kernel)
    np.testing.assert_allclose(turned, turned_features(features, 4, 1), atol=1e-4)


def test_a_network_of_steerable_layers_is_an_ordinary_one():
    """Any Flax convolution with the right numbers of channels takes the scheme."""
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
    model = nn.Sequential([conv(8), nn.elu, conv(4), nn.elu])
    plan = paramshare.Plan(
        paramshare.Rule("layers_0/kernel", Steerable(4, lifting=True), bank="lifting"),
        paramshare.Rule("layers_2/kernel", Steerable(4)),
    )
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 2))
    shared: Any = paramshare.share(model, plan, x)
    variables = shared.init(jax.random.key(1), x)
    assert paramshare.count(variables)["banks"] == 6 * (2 * 2 + 4 * 2)
    features = shared.apply(variables, x)
    turned = shared.apply(variables, jnp.rot90(x, axes=(1, 2)))
    np.testing.assert_allclose(turned, turned_features(np.asarray(features), 4, 1), atol=1e-5)


def test_frequencies_are_those_that_pixels_can_tell_apart():
    assert highest_frequencies(1) == (0,)
    assert highest_frequencies(3) == (0, 2)
    assert highest_frequencies(9) == (0, 2, 3, 6, 2)
    for size in (1, 3, 5, 7, 9):
        basis = harmonics(size, 4, highest_frequencies(size))
        flat = basis.reshape(-1, basis.shape[-1])
        assert np.linalg.matrix_rank(flat) == flat.shape[1]
        np.testing.assert_allclose(np.sum(flat**2, axis=0), 4)


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (Steerable(4), (4, 4, 8, 8), "with odd k"),
        (Steerable(4), (3, 5, 8, 8), "square convolutions"),
        (Steerable(4), (8, 8), "square convolutions"),
        (Steerable(4), (3, 3, 3, 8), "has 3 input channels; .*fields of 4.*pass lifting=True"),
        (
            Steerable(4, lifting=True),
            (3, 3, 3, 6),
            "has 6 output channels; .*fields of 4 channels$",
        ),
        (Steerable(4, frequencies=(0, 1)), (5, 5, 4, 4), "has 3 rings; .*must have 3 numbers"),
        (Steerable(4, frequencies=(4, 4)), (3, 3, 4, 4), r"cannot tell.*for example to \(0, 2\)"),
        (Steerable(4, frequencies=(1,)), (1, 1, 4, 4), r"cannot tell.*for example to \(0,\)"),
    ],
)
def test_kernels_that_cannot_be_steerable_are_refused(scheme, shape, message):
    with pytest.raises(SchemeError, match=message):
        drawn(scheme, *shape)


@pytest.mark.parametrize(
    "options",
    [
        {"order": 0},
        {"order": 4, "frequencies": ()},
        {"order": 4, "frequencies": 2},
        {"order": 4, "frequencies": (0, -1)},
        {"order": 4, "lifting": 1},
        {"order": 4, "initial": "he"},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(options):
    with pytest.raises(SchemeError, match=r"Steerable\("):
        Steerable(**options)
