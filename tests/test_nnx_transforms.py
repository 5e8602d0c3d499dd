"""Transformations and measures of NNX modules give what those of linen modules give."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paramshare
import paramshare.nnx
from paramshare import ConversionError, FilterBasis, FoldError, Plan, PlanError, Rule, Soft, Tied
from paramshare.nnx import convert, share

X = jax.random.normal(jax.random.key(0), (4, 8))


class Module(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.a, self.b, self.c, self.d = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x, train=False):
        for layer in (self.a, self.b, self.c, self.d):
            x = x + nnx.relu(layer(x))
        return self.norm(x, use_running_average=not train)


class Linen(nn.Module):
    """The same network, with the same paths."""

    @nn.compact
    def __call__(self, x, train=False):
        for name in "abcd":
            x = x + nn.relu(nn.Dense(8, name=name)(x))
        return nn.BatchNorm(not train, name="norm")(x)


def plan(scheme: Any) -> Plan:
    return Plan(Rule("./kernel", scheme))


def pair(scheme: Any) -> tuple[Any, Any, Any]:
    """The shared NNX module, the shared linen module, and the variables of both."""
    shared = share(Module(nnx.Rngs(0)), plan(scheme), X)
    linen = paramshare.share(Linen(), plan(scheme), X)
    assert linen.layout == shared.layout
    statistics = nnx.to_pure_dict(nnx.state(shared.model, nnx.BatchStat))
    return shared, linen, shared.variables() | {"batch_stats": {"model": statistics}}


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Equal reports and arrays, up to rounding."""
    if dataclasses.is_dataclass(actual):
        assert type(actual) is type(expected)
        actual, expected = ({**vars(x)} for x in (actual, expected))
        for report in (actual, expected):
            report.pop("shared", None)
            report.pop("variables", None)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            assert_same(value, expected[name], tolerance)
    elif isinstance(actual, tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(actual, str | None):
        assert actual == expected
    else:
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


SOFT = Soft(2, initial="paper")
BASIS = FilterBasis(shared=5, unique=3, initial="paper")


@pytest.mark.parametrize("scheme", [SOFT, BASIS, paramshare.Ring(100, initial="paper")], ids=str)
def test_one_layout_and_the_same_variables_give_the_same_network(scheme):
    shared, linen, variables = pair(scheme)
    assert_same(shared(X), linen.apply(variables, X), 1e-5)
    assert paramshare.nnx.count(shared) == paramshare.count(variables)
    dense = paramshare.bake(linen, variables)
    baked = nnx.to_pure_dict(nnx.state(paramshare.nnx.bake(shared), nnx.Param))
    assert_same(baked, dense["params"])
    for by in ("coefficients", "weights"):
        expected = paramshare.similarity(linen, variables, by=by)
        assert_same(paramshare.nnx.similarity(shared, by=by), expected)


def test_penalties():
    shared, linen, variables = pair(SOFT)
    assert_same(paramshare.nnx.recurrence(shared), paramshare.recurrence(linen, variables))
    gradients = nnx.grad(paramshare.nnx.recurrence)(shared)
    expected = jax.grad(lambda v: paramshare.recurrence(linen, v))(variables)
    assert_same(nnx.to_pure_dict(gradients)["coefficients"], expected["params"]["coefficients"])
    assert jnp.any(jax.tree.leaves(gradients["coefficients"])[0] != 0)
    shared, linen, variables = pair(BASIS)
    for options in ({}, {"unique": True}):
        actual = paramshare.nnx.orthogonality(shared, "shared", **options)
        assert_same(actual, paramshare.orthogonality(linen, variables, "shared", **options))
    with pytest.raises(paramshare.PenaltyError, match="matches no bank"):
        paramshare.nnx.orthogonality(shared, "none")


@pytest.mark.parametrize("scheme", [SOFT, Tied(initial="paper")], ids=str)
def test_conversion(scheme):
    module = Module(nnx.Rngs(0))
    dense = {
        "params": nnx.to_pure_dict(nnx.state(module, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)),
    }
    linen = paramshare.share(Linen(), plan(scheme), X)
    expected = paramshare.convert(linen, dense, X)
    for accepted in (plan(scheme), linen.layout, share(module, plan(scheme), X)):
        actual = convert(module, accepted, X)
        assert_same(actual, expected, 1e-5)
        assert actual.shared.layout == linen.layout
        for collection in ("banks", "params"):
            assert_same(actual.variables[collection], expected.variables[collection], 1e-5)


def test_conversion_needs_no_initial_statistics():
    """Trained kernels need not be centred at zero, as initial ones must be."""
    module = Module(nnx.Rngs(0))
    for layer in (module.a, module.b, module.c, module.d):
        layer.kernel[...] += 1
    with pytest.raises(PlanError, match="starts with mean"):
        share(module, plan(Soft(4)))
    converted = convert(module, plan(Soft(4)), X)
    assert converted.output_change is not None
    assert converted.output_change < 1e-5
    assert convert(module, plan(Soft(4))).output_change is None
    # Measuring it in training mode updates no statistics.
    converted = convert(module, plan(Soft(4)), X, train=True)
    assert (module.norm.mean[...] == 0).all()
    assert (converted.shared.norm.mean[...] == 0).all()


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"groups": {"shared": (0, 1, 0, 1)}}])
def test_folding(options):
    shared, linen, variables = pair(Soft(4, initial="paper"))
    shared.coefficients["shared"]["c.kernel"][...] = -2 * shared.coefficients["shared"]["a.kernel"]
    variables = variables | shared.variables()
    before = shared(X)
    expected = paramshare.fold(linen, variables, X, **options)
    folded = paramshare.nnx.fold(shared, X, **options)
    assert expected.changed
    assert_same(folded, expected, 1e-5)
    assert folded.shared.layout == expected.shared.layout
    assert_same(folded.variables["banks"], expected.variables["banks"], 1e-5)
    assert_same(folded.shared(X), expected.shared.apply(expected.variables, X), 1e-5)
    assert_same(shared(X), before)
    assert paramshare.nnx.count(folded.shared)["trainable"] == folded.shared.layout.trainable
    assert "trainable" in str(folded)


def test_wrong_arguments():
    shared, module = share(Module(nnx.Rngs(0)), plan(SOFT)), Module(nnx.Rngs(0))
    linen: Any = paramshare.share(Linen(), plan(SOFT), X)
    for function, error in (
        (paramshare.nnx.bake, ConversionError),
        (paramshare.nnx.fold, FoldError),
        (paramshare.nnx.similarity, paramshare.ParamshareError),
        (paramshare.nnx.recurrence, paramshare.PenaltyError),
    ):
        wrong: Any
        for wrong in (module, linen):
            with pytest.raises(error, match=rf"nnx\.{function.__name__} takes a Shared.* got"):
                function(wrong)
    other: Any = shared
    with pytest.raises(FoldError, match=r"got the NNX module Shared; use paramshare\.nnx"):
        paramshare.fold(other, {})
    with pytest.raises(ConversionError, match="already shared"):
        convert(shared, plan(SOFT))
    with pytest.raises(ConversionError, match="no parameter 'a/kernel'"):
        convert(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), shared)
    with pytest.raises(ConversionError, match="takes a plan"):
        convert(module, Rule(".*", SOFT))  # pyright: ignore[reportArgumentType]
    with pytest.raises(FoldError, match="threshold=2"):
        paramshare.nnx.fold(shared, threshold=2)
    with pytest.raises(paramshare.ParamshareError, match="by='kernels'"):
        paramshare.nnx.similarity(shared, by="kernels")  # pyright: ignore[reportArgumentType]
