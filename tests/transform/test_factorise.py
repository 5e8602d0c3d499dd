"""Factorising dense residual networks."""

import functools
import itertools
from typing import Any

import chex
import jax
import numpy as np
import pytest

from paramshare import FilterBasis, Plan, Rule, Shared, Soft, share
from paramshare.models import ResNet
from paramshare.transform import factorise as module
from paramshare.transform.batch_statistics import reestimate
from paramshare.transform.conversion import ConversionError, bake
from paramshare.transform.factorise import factorise, shared_filters

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
X = np.random.default_rng(0).normal(size=(6, 6, 6, 3)).astype(np.float32)
SITES = [(block, n) for block in (2, 3) for n in (1, 2)]  # in the order of the bank


def resnet(rank: int = 0, **options: Any) -> ResNet:
    """One stage of three blocks, eight channels wide: 3x3x8 filters, four layers that share."""
    return ResNet(
        (3,), (8,), num_classes=3, stem="cifar", stem_width=8, shortcut="pad", rank=rank, **options
    )


@functools.cache
def factored(s: int, u: int = 0, bases: int = 1, **options: Any) -> Shared:
    return share(
        resnet(s + u, **options),
        Plan(
            Rule(
                r"(stage\d)/block[23]/basis\d/kernel",
                FilterBasis(s, u, bases, initial="paper"),
                bank="stage1",
            )
        ),
        X,
    )


@functools.cache
def perturbed(bias: bool = False) -> Any:
    variables = jax.device_get(jax.jit(resnet(bias=bias).init)(KEY, X))
    return jax.tree.map(lambda leaf: leaf + 0.1 * np.sin(10 * leaf) + 0.01, variables)


def dense(bias: bool = False) -> Any:
    """As after training: a copy, because tests change it."""
    return jax.tree.map(np.copy, perturbed(bias))


def filters(variables: Any) -> list[np.ndarray]:
    """Filters of every layer that shares, (P, T), in float64."""
    blocks = variables["params"]["stage1"]
    return [
        np.asarray(blocks[f"block{b}"][f"conv{n}"]["kernel"], np.float64).reshape(72, 8)
        for b, n in SITES
    ]


def products(converted: Any) -> list[np.ndarray]:
    """Basis times coefficients of every layer, (P, T)."""
    blocks: Any = jax.device_get(bake(converted.shared, converted.variables))["params"]["stage1"]
    pairs = [
        (
            blocks[f"block{b}"][f"basis{n}"]["kernel"],
            blocks[f"block{b}"][f"coefficients{n}"]["kernel"],
        )
        for b, n in SITES
    ]
    return [
        np.reshape(basis, (72, -1)).astype(np.float64) @ np.asarray(a[0, 0], np.float64)
        for basis, a in pairs
    ]


def logits(model: Any, variables: Any, train: bool = False) -> np.ndarray:
    return np.asarray(compiled(model, train)(variables))


@functools.cache
def compiled(model: Any, train: bool) -> Any:
    if train:
        return jax.jit(
            lambda variables: model.apply(variables, X, train=True, mutable=["batch_stats"])[0]
        )
    return jax.jit(lambda variables: model.apply(variables, X))


def specs(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize(("s", "bases"), [(4, 1), (16, 1), (31, 1), (5, 2), (15, 2)])
def test_without_unique_filters_errors_are_tails_of_singular_values(s, bases):
    """Eckart & Young, 1936, for all filters of a basis side by side.

    With `bases=2` there is a basis for each position in a block.
    """
    variables = dense()
    converted = factorise(factored(s, bases=bases), variables)
    squares = [
        np.linalg.svd(np.concatenate(filters(variables)[i::bases], axis=1), compute_uv=False)[s:]
        ** 2
        for i in range(bases)
    ]
    tail, whole = (
        sum(np.sum(square) for square in squares),
        sum(np.sum(layer**2) for layer in filters(variables)),
    )
    (bank,) = converted.banks
    assert bank.kernel_error == pytest.approx(
        np.sqrt(tail / whole), rel=1e-6
    )  # float32 rounds orthogonally to what is left out
    fitted = products(converted)
    assert sum(
        np.sum((a - b) ** 2) for a, b in zip(fitted, filters(variables), strict=True)
    ) == pytest.approx(tail, rel=1e-5)
    errors = [
        np.linalg.norm(a - b) / np.linalg.norm(b)
        for a, b in zip(fitted, filters(variables), strict=True)
    ]
    assert bank.worst == pytest.approx(max(errors), rel=1e-5)
    assert bank.worst_layer == "stage1/block{}/basis{}".format(*SITES[int(np.argmax(errors))])


@pytest.mark.parametrize(("s", "u", "bases"), [(6, 2, 1), (10, 4, 1), (4, 3, 2)])
def test_unique_filters(s, u, bases):
    """They lower the error, but not below that of s + u filters for each layer; all orthonormal."""
    variables = dense()
    converted, without = (
        factorise(factored(s, u, bases), variables),
        factorise(factored(s, 0, bases), variables),
    )
    whole = sum(np.sum(layer**2) for layer in filters(variables))
    alone = sum(
        np.sum(np.linalg.svd(layer, compute_uv=False)[s + u :] ** 2) for layer in filters(variables)
    )
    assert np.sqrt(alone / whole) <= converted.banks[0].kernel_error < without.banks[0].kernel_error
    errors = [
        np.linalg.norm(a - b) for a, b in zip(products(converted), filters(variables), strict=True)
    ]
    assert converted.banks[0].kernel_error == pytest.approx(
        np.linalg.norm(errors) / np.sqrt(whole), rel=1e-6
    )
    blocks: Any = jax.device_get(bake(converted.shared, converted.variables))["params"]["stage1"]
    for b, n in SITES:
        basis = np.reshape(blocks[f"block{b}"][f"basis{n}"]["kernel"], (72, u + s)).astype(
            np.float64
        )
        np.testing.assert_allclose(basis.T @ basis, np.eye(u + s), atol=1e-6)


def test_no_round_of_fitting_is_worse_than_the_one_before(monkeypatch):
    errors = []
    for rounds in range(1, 6):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        shared, unique = shared_filters(filters(dense()), 6, 3)
        bases = [np.concatenate([shared, basis], axis=1) for basis in unique]
        errors.append(
            sum(
                np.linalg.lstsq(basis, layer)[1].sum()
                for basis, layer in zip(bases, filters(dense()), strict=True)
            )
        )
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]  # or the rounds would be for nothing


def test_filters_that_are_shared_are_recovered():
    """Four filters that all layers are made of come back exactly."""
    rng = np.random.default_rng(1)
    common = np.linalg.qr(rng.normal(size=(72, 4)))[0]
    layers = [common @ rng.normal(size=(4, 8)) for _ in range(4)]
    shared, _ = shared_filters(layers, 4, 0)
    np.testing.assert_allclose(shared @ shared.T, common @ common.T, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("images", [None, X], ids=["unmeasured", "measured"])
def test_enough_filters_are_the_dense_network(images, bias):
    """32 filters, eight per layer, are exact. All other variables are copied.

    The variables have the structure that `init` gives.
    """
    shared, variables = factored(32, bias=bias), dense(bias)
    converted = factorise(shared, variables, images)
    assert specs(converted.variables) == specs(jax.eval_shape(shared.init, KEY, X))
    expected = logits(resnet(bias=bias), variables)
    # float32: a 3x3, a batch norm that is the identity and a 1x1 replace a 3x3, in four layers.
    np.testing.assert_allclose(
        logits(shared, converted.variables),
        expected,
        rtol=2e-5,
        atol=2e-5 * float(np.abs(expected).max()),
    )
    assert (converted.output_change is None) == (images is None)
    if converted.output_change is not None:
        assert converted.output_change < 1e-5
    params = converted.variables["params"]["model"]
    for name in ("stem", "bn", "classifier"):
        chex.assert_trees_all_equal(params[name], variables["params"][name])
    chex.assert_trees_all_equal(params["stage1"]["block1"], variables["params"]["stage1"]["block1"])
    for b, n in SITES:
        chex.assert_trees_all_equal(
            params["stage1"][f"block{b}"][f"bn{n}"],
            variables["params"]["stage1"][f"block{b}"][f"bn{n}"],
        )


def test_measured_batch_norms_are_the_identity_in_training_mode_too():
    """Where running and batch statistics agree, a dense network gives the same in both modes."""
    model, shared = resnet(), factored(32)
    variables = reestimate(model, dense(), [X])
    expected = logits(model, variables)
    np.testing.assert_allclose(logits(model, variables, train=True), expected, rtol=1e-4, atol=1e-4)
    tolerance = 1e-4 * float(np.abs(expected).max())  # ten float32 variances in a row
    measured = factorise(shared, variables, X).variables
    np.testing.assert_allclose(logits(shared, measured, train=True), expected, atol=tolerance)
    # Without images the inner norms divide by the deviations of the batch.
    unmeasured = factorise(shared, variables).variables
    assert np.abs(logits(shared, unmeasured, train=True) - expected).max() > 10 * tolerance


def test_moments_are_those_of_the_basis_outputs():
    converted = factorise(factored(5, 2), dense(), X)
    plain: Any = converted.shared.model
    apply = jax.jit(
        lambda variables: plain.apply(
            variables, X, capture_intermediates=True, mutable=["intermediates"]
        )[1]
    )
    state = apply(bake(converted.shared, converted.variables))
    for b, n in SITES:
        (y,) = state["intermediates"]["stage1"][f"block{b}"][f"basis{n}"]["__call__"]
        y = np.asarray(y, np.float64).reshape(-1, 7)
        (after,) = state["intermediates"]["stage1"][f"block{b}"][f"basis_bn{n}"]["__call__"]
        statistics = converted.variables["batch_stats"]["model"]["stage1"][f"block{b}"][
            f"basis_bn{n}"
        ]
        np.testing.assert_allclose(statistics["mean"], y.mean(0), atol=1e-5)
        np.testing.assert_allclose(statistics["var"], y.var(0), rtol=1e-4)
        np.testing.assert_allclose(np.reshape(after, y.shape), y, atol=1e-5)


@pytest.mark.parametrize(("s", "u", "bases"), [(5, 2, 1), (6, 0, 2)])
def test_what_is_saved_is_what_the_networks_count(s, u, bases):
    converted = factorise(factored(s, u, bases), dense())
    plain = sum(leaf.size for leaf in jax.tree.leaves(dense()["params"]))
    assert converted.saved == plain - converted.shared.layout.trainable
    assert str(converted.shared.layout["stage1"].scheme) in str(converted)


def change_to(variables: Any, leaf: Any, *path: str) -> Any:
    *scopes, last = path
    node = variables
    for name in scopes:
        node = node[name]
    if leaf is None:
        del node[last]
    else:
        node[last] = leaf
    return variables


@pytest.mark.parametrize(
    ("leaf", "path", "words"),
    [
        (
            None,
            ("params", "stage1", "block2", "conv1"),
            r"no variable 'params/stage1/block2/conv1/kernel'.*\(3, 3, 8, 8\)",
        ),
        (
            np.ones((3, 3, 8, 4), np.float32),
            ("params", "stage1", "block3", "conv2", "kernel"),
            r"must have shape \(3, 3, 8, 8\).*got \(3, 3, 8, 4\)",
        ),
        (None, ("params", "stem"), "no variable 'params/stem/kernel'"),
        (None, ("batch_stats", "bn", "mean"), "no variable 'batch_stats/bn/mean'"),
        (
            np.full((3, 3, 8, 8), np.nan, np.float32),
            ("params", "stage1", "block2", "conv1", "kernel"),
            "bank 'stage1'.*not finite",
        ),
    ],
)
def test_variables_that_do_not_fit(leaf, path, words):
    with pytest.raises(ConversionError, match=words):
        factorise(factored(4), change_to(dense(), leaf, *path))


def test_networks_that_are_not_factored():
    variables = dense()
    plan = Plan(Rule(r"stage1/block[23]/conv\d/kernel", Soft(2, initial="paper")))
    for other in (share(resnet(), plan, X), resnet(4), resnet()):
        with pytest.raises(
            ConversionError,
            match=r"factorise takes a shared network of factored blocks.*got ResNet",
        ):
            factorise(other, variables)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConversionError, match="inner_norm=True"):
        factorise(factored(4, inner_norm=False), variables)
    part = share(
        resnet(4), Plan(Rule(r"stage1/block[23]/basis1/kernel", FilterBasis(4, initial="paper"))), X
    )
    with pytest.raises(ConversionError, match="check stage1/block2/basis2/kernel"):
        factorise(part, variables)
    soft = share(
        resnet(4), Plan(Rule(r"stage1/block[23]/basis\d/kernel", Soft(2, initial="paper"))), X
    )
    with pytest.raises(ConversionError, match=r"under Soft\(templates=2"):
        factorise(soft, variables)
