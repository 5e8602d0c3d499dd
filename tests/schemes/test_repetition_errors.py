"""Errors of `Repeat`: invalid arguments, sites, plans and arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Plan, PlanError, Repeat, Rule, SchemeError, Site
from paramshare.schemes.interface import Weights

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
X = jnp.ones((2, 6, 6, 2))


class Net(nn.Module):
    """Two convolutions and a dense layer; `deeper` adds another dense layer."""

    width: int = 1
    deeper: bool = False

    @nn.compact
    def __call__(self, x_BxHxWxC):
        x = nn.Conv(4, (3, 3), name="stem")(x_BxHxWxC)
        x = nn.relu(nn.Conv(3 * self.width, (3, 3), name="conv")(x))
        x = nn.Dense(4, name="hidden")(x.mean((1, 2)))
        return nn.Dense(3, name="extra")(x) if self.deeper else x


CONV, SMALL = Site("conv/kernel", (3, 3, 4, 8)), Site("small/kernel", (3, 3, 2, 3))
SITES = {
    "no site": (Repeat(base=(2, 2)), (), "at least one site"),
    "base with more outputs": (
        Repeat(base=(3, 3, 4, 9)),
        (CONV,),
        r"base \(3, 3, 4, 9\) of conv/kernel is larger than its target \(3, 3, 4, 8\)",
    ),
    "base with more inputs": (Repeat(base=(3, 3, 5, 8)), (CONV,), "larger than its target"),
    "source with more inputs": (
        Repeat(source="conv/kernel"),
        (CONV, SMALL),
        "of small/kernel is larger",
    ),
    "another spatial size": (
        Repeat(base=(1, 1, 2, 2)),
        (CONV,),
        r"conv/kernel is \(3, 3, 4, 8\) and its base \(1, 1, 2, 2\); all axes but",
    ),
    "fewer axes": (Repeat(base=(2, 2)), (CONV,), r"its base \(2, 2\)"),
    "source not among the sites": (
        Repeat(source="stem/kernel"),
        (CONV, SMALL),
        "source is not among the sites",
    ),
    "source with one axis": (
        Repeat(source="bias"),
        (Site("bias", (8,)), Site("c", (8,))),
        r"bias is \(8,\); repetition needs two axes or more",
    ),
    "like without a plan": (Repeat(like=Net()), (CONV,), "no parameter 'conv/kernel'.*plan binds"),
}


@pytest.mark.parametrize("case", SITES)
def test_invalid_sites(case):
    scheme, sites, message = SITES[case]
    for method in (scheme.check, lambda sites: scheme.init(KEY, sites)):
        with pytest.raises(SchemeError, match=message) as caught:
            method(sites)
        assert "\n" not in str(caught.value)


PLANS = {
    "like lacks a path": (
        Rule("extra/kernel", Repeat(like=Net(), initial="paper")),
        "bank 'shared': .*no parameter 'extra/kernel' to repeat$",
    ),
    "like is larger": (
        Rule("conv/kernel", Repeat(like=Net(2), initial="paper")),
        "larger than its target",
    ),
    "like has a vector": (
        Rule("hidden/bias", Repeat(like=Net(), initial="paper")),
        r"hidden/bias is \(4,\)",
    ),
    "source not matched": (
        Rule("conv/kernel", Repeat(source="stem/kernel", initial="paper")),
        "rule must match it too",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_do_not_fit(case):
    rule, message = PLANS[case]
    with pytest.raises(PlanError, match=message):
        Plan(rule).resolve(Net(deeper=True), X)


ARGUMENTS = {
    "nothing": ({}, "exactly one of .*, got none of them"),
    "like and base": ({"like": Net(), "base": (2, 2)}, "got like and base"),
    "base and source": ({"base": (2, 2), "source": "a"}, "got base and source"),
    "all three": ({"like": Net(), "base": (2, 2), "source": "a"}, "got like and base and source"),
    "like is a name": ({"like": "resnet20"}, "like='resnet20'"),
    "source is no path": ({"source": 3}, "source=3"),
    "unknown transform": (
        {"base": (2, 2), "transform": "sigmoid"},
        "transform='sigmoid'.*'swish', 'linear', 'scale', 'fourier'",
    ),
    "no transform": ({"base": (2, 2), "transform": None}, "transform=None"),
    "unknown initial": ({"base": (2, 2), "initial": "xavier"}, "initial='xavier'"),
    "base is a number": ({"base": 8}, "base=8"),
    "base of one axis": ({"base": (8,)}, r"base=\(8,\)\): base must be a shape of two axes"),
    "base without axes": ({"base": ()}, r"base=\(\)"),
    "base without inputs": ({"base": (3, 3, 0, 2)}, "base=0"),
    "base with a fraction": ({"base": (3, 3, 2.0, 2)}, "base=2.0"),
    "base with a bool": ({"base": (True, 2)}, "base=True"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_invalid_arguments(case):
    arguments, message = ARGUMENTS[case]
    with pytest.raises(SchemeError, match=message):
        Repeat(**arguments)


def test_numpy_integers_are_integers():
    assert Repeat(base=(np.int64(3), 2)) == Repeat(base=(3, 2))  # type: ignore[arg-type]


def test_arrays_of_other_shapes():
    sites = (CONV,)
    scheme = Repeat(base=(3, 3, 2, 3), initial="paper")
    linear = Repeat(base=(3, 3, 2, 3), transform="linear", initial="paper")
    shapes = scheme.shapes(sites)
    weights = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    larger = Weights({"conv.kernel": jnp.ones((3, 3, 4, 8))}, weights.coefficients)
    with pytest.raises(SchemeError, match=r"bank/conv.kernel of shape \(3, 3, 2, 3\)"):
        scheme.expand(larger, sites)
    with pytest.raises(SchemeError, match=r"coefficients/conv.kernel/.* got None"):
        scheme.expand(Weights(weights.bank), sites)
    with pytest.raises(SchemeError, match=r"coefficients/conv.kernel/.* of shape None"):
        linear.expand(weights, sites)
