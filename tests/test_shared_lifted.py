"""`Shared` under Flax's lifted transforms, and around models that other modules build.

All parameters must stay in the scope of the `Shared`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Plan, PlanError, Rule, Shared, Soft, count, share

X = jnp.linspace(-1, 1, 12, dtype=jnp.float32).reshape(3, 4)
PLAN = Plan(Rule(r".*kernel", Soft(1, initial="paper")))


class Wrapped(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.tanh(self.layer(x))


def built_inside(kind):
    """A module that builds and shares a model, with modules as attributes, in `__call__`."""

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            if kind == "sequential":
                model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(4)])
            elif kind == "nested attribute":
                model = nn.Sequential([Wrapped(Wrapped(nn.Dense(4))), Wrapped(nn.Dense(4))])
            else:
                layer = nn.Dense(4)
                model = nn.Sequential([layer, layer, nn.Dense(4)])
            return share(model, PLAN, x)(x)

    return Outer()


@pytest.mark.parametrize("kind", ["sequential", "nested attribute", "the same layer twice"])
def test_modules_among_the_attributes_stay_in_scope(kind):
    outer: Any = built_inside(kind)
    variables = outer.init(jax.random.key(0), X)
    paths = [
        "/".join(str(key.key) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])
    ]
    assert not [path for path in paths if path.endswith("/kernel")]
    assert all(path.startswith("Shared_0/") for path in paths)
    assert count(variables) == {"banks": 16, "coefficients": 2, "private": 8, "trainable": 26}
    gradient = jax.grad(lambda v: jnp.sum(outer.apply(v, X) ** 2))(variables)
    (bank,) = jax.tree.leaves(gradient["banks"]["Shared_0"]["shared"])
    assert float(jnp.abs(bank).min()) > 0


def test_initializers_are_measured_where_share_is_called_inside_a_trace():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return share(plain(), Plan(Rule(".*kernel", Soft(1))), x)(x)

    sites = share(plain(), Plan(Rule(".*kernel", Soft(1))), X).layout["shared"].sites
    assert all(site.std is not None for site in sites)
    measured = Outer().init(jax.random.key(0), X)
    traced = jax.jit(Outer().init)(jax.random.key(0), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), measured, traced)


def test_a_model_of_another_module_is_copied_or_refused():
    class Passed(nn.Module):
        inner: nn.Module

        def setup(self):
            self.twice = share(self.inner, PLAN, X)

        def __call__(self, x):
            return self.twice(x) + self.twice(x)

    variables = Passed(plain()).init(jax.random.key(0), X)
    assert set(variables["params"]) == {"twice"} and count(variables)["private"] == 8

    class Taken(nn.Module):
        @nn.compact
        def __call__(self, x):
            first = share(plain(), PLAN, x)
            return Shared(first.model, first.layout)(x)

    with pytest.raises(PlanError, match="already belongs to another module"):
        Taken().init(jax.random.key(0), X)


def plain():
    return nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(4)])


@pytest.mark.parametrize("lift", [nn.remat, nn.jit], ids=["remat", "jit"])
@pytest.mark.parametrize("nested", [False, True])
def test_remat_and_jit_of_a_shared_module(lift, nested):
    shared: Any = share(plain(), PLAN, X)

    class Outer(nn.Module):
        lifted: bool

        @nn.compact
        def __call__(self, x):
            kind = lift(Shared) if self.lifted else Shared
            return kind(shared.model, shared.layout, name="inner")(x)

    direct, lifted = (
        (Outer(False), Outer(True))
        if nested
        else (shared, lift(Shared)(shared.model, shared.layout))
    )
    variables = direct.init(jax.random.key(0), X)
    assert jax.tree.structure(variables) == jax.tree.structure(lifted.init(jax.random.key(0), X))

    def loss(module):
        return jax.value_and_grad(lambda v: jnp.sum(module.apply(v, X) ** 2))(variables)

    (a, gradient_a), (b, gradient_b) = loss(direct), loss(lifted)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), gradient_a, gradient_b
    )


def test_vmap_of_a_shared_module_gives_each_copy_a_bank():
    shared: Any = share(plain(), PLAN, X)
    lift: Any = nn.vmap
    many = lift(
        Shared,
        variable_axes={"banks": 0, "params": 0},
        split_rngs={"params": True},
        axis_size=3,
        in_axes=None,
    )(shared.model, shared.layout)
    variables = many.init(jax.random.key(0), X)
    assert [leaf.shape for leaf in jax.tree.leaves(variables["banks"])] == [(3, 1, 16)]
    outputs = many.apply(variables, X)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        np.testing.assert_allclose(outputs[i], shared.apply(one, X), rtol=1e-6, atol=1e-7)


def test_a_model_that_contains_a_shared_model_can_be_shared():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = share(plain(), PLAN, x)(x)
            return nn.Dense(4, name="b")(nn.Dense(4, name="a")(x))

    shared: Any = share(Outer(), Plan(Rule("[ab]/kernel", Soft(1), bank="outer")), X)
    variables = shared.init(jax.random.key(0), X)
    assert set(variables["banks"]) == {"outer", "model"}
    plain_model: Any = Outer()
    np.testing.assert_allclose(
        plain_model.apply(shared.expand(variables), X), shared.apply(variables, X), rtol=1e-6
    )
    assert count(variables)["coefficients"] == 4


@pytest.mark.parametrize(
    "change", ["one more site", "one site less", "another number of templates", "other kernels"]
)
def test_variables_of_another_plan_are_refused(change):
    shared: Any = share(plain(), PLAN, X)
    bank = jnp.ones((1, 9 if change == "other kernels" else 16))
    rows = {
        f"layers_{i}.kernel": jnp.ones(2 if change == "another number of templates" else 1)
        for i in {"one more site": (0, 2, 4), "one site less": (0,)}.get(change, (0, 2))
    }
    variables = {
        "banks": jax.tree.map(lambda _: bank, shared.init(jax.random.key(0), X)["banks"]),
        "params": {
            "coefficients": {"shared": rows},
            "model": {f"layers_{i}": {"bias": jnp.zeros(4)} for i in (0, 2)},
        },
    }
    with pytest.raises(PlanError, match="pass the variables of a model shared by this same plan"):
        shared.apply(variables, X)


def test_models_that_call_unbound_modules_resolve():
    class Helper(nn.Module):
        def half(self, x):
            return x / 2

    class Model(nn.Module):
        def __post_init__(self):
            super().__post_init__()
            Helper(parent=None).half(1.0)

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.Dense(4)(Helper(parent=None).half(x)))

    assert len(share(Model(), PLAN, X).layout["shared"].sites) == 2


def test_invalid_arguments_are_refused():
    with pytest.raises(PlanError, match="share takes a plan"):
        share(plain(), Rule(".*", Soft(1)), X)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="share takes a Flax linen module"):
        share(3, PLAN, X)  # pyright: ignore[reportArgumentType]
    shared: Any = share(plain(), PLAN, X)
    with pytest.raises(AttributeError, match="no method or attribute 'layer', and neither"):
        shared.apply(shared.init(jax.random.key(0), X), X, method=lambda module, x: module.layer(x))
