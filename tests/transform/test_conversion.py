"""Conversion of dense networks to shared ones and back."""

import dataclasses
import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

from paramshare import FilterBasis, Plan, Repeat, Ring, Rule, Shared, Soft, Tied, share
from paramshare.schemes import Scheme, Weights
from paramshare.transform.conversion import ConversionError, bake, convert

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
X = jax.random.normal(jax.random.key(1), (4, 5, 5, 2))


class Net(nn.Module):
    """A stem, five 3x3 convolutions with batch norm, a classifier."""

    @nn.compact
    def __call__(self, x_BxHxWxC, train: bool = False):
        x = nn.Conv(6, (3, 3), name="stem")(x_BxHxWxC)
        for i in range(5):
            x = nn.Conv(6, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"bn{i}")(x))
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


@functools.cache
def network(scheme: Any) -> Shared:
    if hasattr(scheme, "initial"):  # the default would compile the model's initializers
        scheme = dataclasses.replace(scheme, initial="paper")
    return share(Net(), Plan(Rule(r"conv\d/kernel", scheme, bank="convs")), X)


def trained(model: nn.Module) -> Any:
    """Variables as after training: none is at its initial value, variances are positive."""
    return jax.tree.map(lambda leaf: leaf, perturbed(model))  # new dicts: tests change them


@functools.cache
def perturbed(model: nn.Module) -> Any:
    return jax.jit(
        lambda: jax.tree.map(
            lambda leaf: leaf + 0.1 * jnp.sin(10 * leaf) + 0.01, model.init(KEY, X)
        )
    )()


@jax.jit
def logits(variables: Any) -> Any:
    return Net().apply(variables, X)


def specs(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def stack(variables: Any) -> np.ndarray:
    """(L, P), in double precision."""
    return np.stack(
        [
            np.asarray(variables["params"][f"conv{i}"]["kernel"], np.float64).ravel()
            for i in range(5)
        ]
    )


SCHEMES = [  # what they fit is tested with the schemes
    Soft(3),
    Tied(groups=(0, 1, 0, 1, 0), scaled=True),
    Ring(500),
    FilterBasis(4, 2, bases=2),
    Repeat(base=(3, 3, 3, 2), transform="linear"),
    Repeat(source="conv0/kernel"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_baked_network_converts_back_to_itself(scheme):
    """Kernels come back, private parameters are copied bit by bit.

    The variables have the structure that `init` gives.
    """
    shared = network(scheme)
    variables = trained(shared)
    dense = bake(shared, variables)
    converted = convert(shared, dense, X)
    assert specs(converted.variables) == specs(variables)
    again = bake(shared, converted.variables)
    # The conformance test's bound for a float32 decomposition, relative to the norm.
    np.testing.assert_allclose(
        stack(again), stack(dense), atol=2e-6 * float(np.linalg.norm(stack(dense)))
    )
    for name in ("stem", "classifier", *(f"bn{i}" for i in range(5))):
        chex.assert_trees_all_equal(again["params"][name], dense["params"][name])
    chex.assert_trees_all_equal(again["batch_stats"], dense["batch_stats"])
    assert converted.banks[0].kernel_error < 2e-6
    assert converted.output_change is not None
    assert converted.output_change < 5e-6  # accumulated over five layers


def test_a_baked_network_is_the_plain_model():
    shared = network(Soft(2))
    variables = trained(shared)
    dense = bake(shared, variables)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(dense))
    assert specs(dense) == specs(jax.eval_shape(Net().init, KEY, X))
    # float32 sums of 6 x 9 products, in different orders.
    np.testing.assert_allclose(
        logits(dense), jax.jit(shared.apply)(variables, X), rtol=1e-5, atol=1e-5
    )
    chex.assert_trees_all_equal(bake(shared, freeze(variables)), dense)


@pytest.mark.parametrize("k", range(1, 7))
def test_soft_errors_are_the_tail_of_the_singular_values(k):
    dense = trained(Net())
    rows_LxP = stack(dense)
    converted = convert(network(Soft(k)), dense)
    (bank,) = converted.banks
    tail = np.linalg.svd(rows_LxP, compute_uv=False)[k:]
    # An exact fit leaves the rounding of a float32 decomposition.
    assert bank.kernel_error == pytest.approx(
        np.linalg.norm(tail) / np.linalg.norm(rows_LxP), rel=1e-5, abs=1e-6
    )
    kernels = stack(bake(converted.shared, converted.variables))
    errors = np.linalg.norm(kernels - rows_LxP, axis=1) / np.linalg.norm(rows_LxP, axis=1)
    if k < 5:
        assert bank.worst_layer == f"conv{errors.argmax()}"
    assert bank.worst == pytest.approx(errors.max(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "scheme",
    [Soft(1), Soft(5), Tied(groups=(0, 0, 1, 1, 1), scaled=True), Ring(100), FilterBasis(5, 1)],
    ids=str,
)
def test_what_is_saved_is_what_the_layout_counts(scheme):
    converted = convert(network(scheme), trained(Net()))
    layout = converted.shared.layout
    assert converted.saved == layout.plain - layout.trainable
    assert [(bank.layers, bank.before, bank.after) for bank in converted.banks] == [
        (5, 5 * 9 * 36, sum(layout["convs"].trainable))
    ]


def test_the_report_by_hand():
    """Kernels of ones, times 1, 1, 1, 1 and 6: the mean is 2, off by 1 of 1 each and by 4 of 6."""
    dense = trained(Net())
    for i, factor in enumerate((1, 1, 1, 1, 6)):
        dense["params"][f"conv{i}"]["kernel"] = jnp.full((3, 3, 6, 6), float(factor))
    converted = convert(network(Tied()), dense, X)
    (bank,) = converted.banks
    assert bank.kernel_error == pytest.approx(np.sqrt((4 * 1 + 16) / (4 * 1 + 36)), rel=1e-6)
    assert (bank.worst, bank.worst_layer) == (pytest.approx(1, rel=1e-6), "conv0")
    text = str(converted)
    assert re.search(r"convs\s+Tied\(\)\s+5\s+1,620\s+324\s+7.07e-01\s+1.00e\+00\s+conv0\n", text)
    plain = sum(leaf.size for leaf in jax.tree.leaves(dense["params"]))
    assert f"trainable      {plain - 1620 + 324:,}, 1,296 fewer than before\noutput change " in text
    assert ", 25 more than before" in str(convert(network(Soft(5)), dense))


def test_the_change_of_outputs():
    dense = trained(Net())
    converted = convert(network(Soft(2)), dense, X, train=False)
    before, after = logits(dense), logits(bake(converted.shared, converted.variables))
    assert converted.output_change == pytest.approx(
        np.linalg.norm(np.subtract(after, before)) / np.linalg.norm(before), rel=1e-4
    )
    assert convert(network(Soft(2)), dense).output_change is None


@pytest.mark.parametrize("scheme", [Soft(2), Ring(400)], ids=str)
def test_a_converted_network_trains(scheme):
    """In a step of gradient descent the loss falls, and no gradient of a bank is zero."""
    converted = convert(network(scheme), trained(Net()))
    shared, optimizer = converted.shared, optax.sgd(1e-3)
    trainable = {name: converted.variables[name] for name in ("banks", "params")}

    @jax.jit
    def loss(trainable, stats):
        y, stats = shared.apply(
            {**trainable, "batch_stats": stats}, X, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(
            y, jnp.array([0, 1, 2, 0])
        ).mean(), stats["batch_stats"]

    (before, stats), gradient = jax.value_and_grad(loss, has_aux=True)(
        trainable, converted.variables["batch_stats"]
    )
    updates, _ = optimizer.update(gradient, optimizer.init(trainable))
    moved: Any = optax.apply_updates(trainable, updates)
    assert loss(moved, stats)[0] < before
    for leaf in jax.tree.leaves(
        (gradient["banks"], {x: gradient["params"].get(x) for x in ("coefficients", "own")})
    ):
        assert np.all(np.isfinite(leaf))
        assert np.any(np.asarray(leaf) != 0)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4, name="dense")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(Step, {"params": 1}, split_rngs={"params": True}, length=4)(name="layers")(
            x, None
        )[0]


def test_layers_stacked_in_one_parameter():
    x = jnp.ones((1, 4))
    shared = share(Scanned(), Plan(Rule(".*/kernel", Soft(4), stack_axis=1)), x)
    dense = jax.jit(Scanned().init)(KEY, x)
    converted = convert(shared, dense, x)
    chex.assert_trees_all_close(bake(shared, converted.variables), dense, atol=1e-6)
    assert converted.banks[0].layers == 4


def without(variables: Any, *path: str) -> Any:
    *scopes, last = path
    node = variables
    for name in scopes:
        node = node[name]
    del node[last]
    return variables


def with_leaf(variables: Any, leaf: Any, *path: str) -> Any:
    *scopes, last = path
    node = variables
    for name in scopes:
        node = node[name]
    node[last] = leaf
    return variables


@pytest.mark.parametrize("inputs", [(), (X,)], ids=["unchecked", "checked"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: without(v, "params", "conv2", "kernel"), "conv2/kernel"),
        (
            lambda v: with_leaf(v, jnp.ones((3, 3, 6, 7)), "params", "conv2", "kernel"),
            r"conv2/kernel.*\(3, 3, 6, 7\)",
        ),
        (
            lambda v: with_leaf(v, jnp.full((3, 3, 6, 6), jnp.nan), "params", "conv2", "kernel"),
            "'convs'.*not finite",
        ),
    ],
)
def test_kernels_that_do_not_fit(inputs, change, words):
    with pytest.raises(ConversionError, match=words):
        convert(network(Soft(2)), change(trained(Net())), *inputs)


@pytest.mark.parametrize(
    ("change", "named", "counted"),
    [
        (
            lambda v: without(v, "params", "classifier", "bias"),
            r"no variable 'params/classifier/bias'.*\(3,\)",
            r"1,812.*1,815",
        ),
        (
            lambda v: with_leaf(v, jnp.ones(4), "params", "classifier", "bias"),
            r"classifier/bias' must have shape \(3,\).*got \(4,\)",
            "1,816",
        ),
        (
            lambda v: with_leaf(v, jnp.ones(7), "params", "bn0", "more"),
            r"unknown variable 'params/bn0/more' of shape \(7,\)",
            "1,822",
        ),
        (
            lambda v: without(v, "batch_stats", "bn1", "var"),
            r"no variable 'batch_stats/bn1/var'.*\(6,\)",
            None,
        ),
    ],
)
def test_private_parameters_that_do_not_fit(change, named, counted):
    """Checked by name with example inputs, by their number without."""
    dense = change(trained(Net()))
    with pytest.raises(ConversionError, match=named):
        convert(network(Soft(2)), dense, X)
    if counted:
        with pytest.raises(ConversionError, match=counted):
            convert(network(Soft(2)), dense)


def test_what_is_shared_already():
    shared = network(Soft(2))
    with pytest.raises(
        ConversionError, match=r"those of a shared model, with banks \['convs'\].*`bake`"
    ):
        convert(shared, trained(shared))
    for function in (bake, convert):
        with pytest.raises(ConversionError, match=f"{function.__name__} takes a Shared.*got Net"):
            function(Net(), trained(Net()))  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class OneWay(Scheme):
    """A scheme that cannot be fitted to kernels."""

    def _init(self, key, sites):
        return Weights(jnp.ones(()))

    def _expand(self, weights, sites):
        return tuple(jnp.full(site.shape, weights.bank) for site in sites)


def test_a_scheme_without_from_dense():
    with pytest.raises(ConversionError, match=r"bank 'convs': .*OneWay\(\)"):
        convert(network(OneWay()), trained(Net()))
