"""Every way in which a repetition can be wrong: its arguments, its sites, the plan it stands in, the arrays it is given."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Plan, PlanError, Repeat, Rule, SchemeError, Site

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
X = jnp.ones((2, 6, 6, 2))


class Net(nn.Module):
    """Two convolutions and two dense layers, wider or one layer deeper on request."""

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
    "base of more outputs": (
        Repeat(base=(3, 3, 4, 9)),
        (CONV,),
        r"base \(3, 3, 4, 9\) of conv/kernel is larger than its target \(3, 3, 4, 8\)",
    ),
    "base of more inputs": (Repeat(base=(3, 3, 5, 8)), (CONV,), r"base \(3, 3, 5, 8\) of conv/kernel is larger than its target"),
    "source of more inputs": (Repeat(source="conv/kernel"), (CONV, SMALL), r"base \(3, 3, 4, 8\) of small/kernel is larger than"),
    "another spatial size": (
        Repeat(base=(1, 1, 2, 2)),
        (CONV,),
        r"conv/kernel is \(3, 3, 4, 8\) and its base \(1, 1, 2, 2\); all axes but",
    ),
    "fewer axes": (Repeat(base=(2, 2)), (CONV,), r"conv/kernel is \(3, 3, 4, 8\) and its base \(2, 2\)"),
    "a source that is no site": (Repeat(source="stem/kernel"), (CONV, SMALL), r"source is not among the sites \(conv/kernel, ...\)"),
    "a source that comes later": (Repeat(source="small/kernel"), (CONV, SMALL), r"calls conv/kernel before its source"),
    "a source of one axis": (
        Repeat(source="bias"),
        (Site("bias", (8,)), Site("c", (8,))),
        r"bias is \(8,\); repetition needs two axes or more",
    ),
    "like, not bound": (Repeat(like=Net()), (CONV,), "no parameter 'conv/kernel' to repeat; a plan binds"),
}


@pytest.mark.parametrize("case", SITES)
def test_impossible_sites(case):
    scheme, sites, said = SITES[case]
    for attempt in (scheme.check, lambda sites: scheme.init(KEY, sites)):
        with pytest.raises(SchemeError, match=said) as caught:
            attempt(sites)
        assert "\n" not in str(caught.value)


PLANS = {
    "like lacks a path": (
        Rule("extra/kernel", Repeat(like=Net())),
        r"bank 'shared': .*small model has no parameter 'extra/kernel' to repeat$",
    ),
    "like is larger": (
        Rule("conv/kernel", Repeat(like=Net(2))),
        r"base \(3, 3, 4, 6\) of conv/kernel is larger than its target \(3, 3, 4, 3\)",
    ),
    "like, a vector": (Rule("hidden/bias", Repeat(like=Net())), r"hidden/bias is \(4,\)"),
    "source later": (
        Rule("(conv|stem)/kernel", Repeat(source="conv/kernel")),
        "calls stem/kernel before its source.*make stem/kernel the source",
    ),
    "source not matched": (Rule("conv/kernel", Repeat(source="stem/kernel")), "not among the sites .*let the rule match it too"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_do_not_fit(case):
    rule, said = PLANS[case]
    with pytest.raises(PlanError, match=said):
        Plan(rule).resolve(Net(deeper=True), X)


ARGUMENTS = {
    "none": ({}, "takes one of .*, got none of them"),
    "like and base": ({"like": Net(), "base": (2, 2)}, "got like and base"),
    "base and source": ({"base": (2, 2), "source": "a"}, "got base and source"),
    "all three": ({"like": Net(), "base": (2, 2), "source": "a"}, "got like and base and source"),
    "no such transform": ({"base": (2, 2), "transform": "sigmoid"}, r"transform='sigmoid'.*'swish', 'linear', 'fourier'"),
    "no transform": ({"base": (2, 2), "transform": None}, "transform=None"),
    "base of one axis": ({"base": (8,)}, r"Repeat\(base=\(8,\)\): a base is a shape of two axes or more"),
    "base of no axis": ({"base": ()}, r"Repeat\(base=\(\)\)"),
    "base without inputs": ({"base": (3, 3, 0, 2)}, "base=0.*1 or more"),
    "base of fractions": ({"base": (3, 3, 2.0, 2)}, "base=2.0.*integer, 1 or more"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_cannot_be(case):
    arguments, said = ARGUMENTS[case]
    with pytest.raises(SchemeError, match=said):
        Repeat(**arguments)


@pytest.mark.parametrize("base", [8, (True, 2)])
def test_bases_are_checked_as_other_numbers_are(base):
    with pytest.raises(SchemeError, match="base="):
        Repeat(base=base)


def test_numpy_integers_are_integers():
    assert Repeat(base=(np.int64(3), 2)) == Repeat(base=(3, 2))  # type: ignore[arg-type]


def test_foreign_arrays_are_told():
    scheme, sites = Repeat(base=(3, 3, 2, 3)), (CONV,)
    bank, own = scheme.init(KEY, sites)
    with pytest.raises(SchemeError, match=r"wants a bank of shapes .*\(3, 3, 2, 3\)"):
        scheme.expand({"conv.kernel": jnp.ones((3, 3, 4, 8))}, own, sites)
    with pytest.raises(SchemeError, match="wants coefficients of shapes"):
        scheme.expand(bank, {}, sites)
    with pytest.raises(SchemeError, match="wants coefficients of shapes"):  # of a model that repeats without learning
        Repeat(base=(3, 3, 2, 3), transform="linear").expand(bank, own, sites)
