"""`Shared` is an ordinary Flax module: collections, random keys, methods, transformations."""

import copy
import dataclasses
import functools
import pickle
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramshare
from paramshare import FilterBasis, Plan, PlanError, Repeat, Ring, Rule, Shared, Soft, Tied

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
X = jax.random.normal(jax.random.key(1), (4, 8))
PLAN = Plan(Rule(r"(.*/)?(dense|layer)\d/kernel", Soft(2, initial="paper")))
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # float32 rounding of sums of eight terms around 1


class Net(nn.Module):
    """Batch statistics, dropout, sown values, and a parameter named like one of our collections."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        for i in range(4):
            x = dense(8, dtype=self.dtype, param_dtype=self.param_dtype, name=f"dense{i}")(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
            self.sow("intermediates", "hidden", x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(
            x.astype(jnp.float32)
        )
        return x * self.param("coefficients", nn.initializers.ones, (1, 8))


class Coder(nn.Module):
    def setup(self):
        self.layer1, self.layer2, self.layer3 = nn.Dense(8), nn.Dense(8), nn.Dense(8)

    def encode(self, x):
        return self.layer2(self.layer1(x))

    def decode(self, z):
        return self.layer3(z)

    def __call__(self, x):
        return self.decode(self.encode(x))


@functools.cache
def shared_net(**options) -> tuple[Shared, dict]:
    shared = paramshare.share(Net(**options), PLAN, X)
    return shared, dict(jax.jit(shared.init)(KEY, X))


def trainable(variables):
    return {name: variables[name] for name in ("banks", "params")}


def test_variables_have_the_documented_structure():
    _, variables = shared_net()
    assert set(variables) == {"banks", "params", "batch_stats"}
    assert set(variables["banks"]) == {"shared"}
    assert [leaf.shape for leaf in jax.tree.leaves(variables["banks"])] == [(2, 64)]
    assert set(variables["params"]) == {"coefficients", "model"}
    assert jax.tree.map(jnp.shape, variables["params"]["coefficients"]) == {
        "shared": {f"dense{i}.kernel": (2,) for i in range(4)}
    }
    assert {
        name: set(node)
        for name, node in variables["params"]["model"].items()
        if name.startswith("dense")
    } == {f"dense{i}": {"bias"} for i in range(4)}
    assert paramshare.count(variables) == {
        "banks": 128,
        "coefficients": 8,
        "private": 32 + 16 + 8,
        "trainable": 192,
    }


def test_whole_weights_of_single_sites_are_own_parameters():
    basis = FilterBasis(shared=6, unique=2, initial="paper")
    shared = paramshare.share(Coder(), Plan(Rule(r".*/kernel", basis, "basis")), X)
    variables = jax.eval_shape(shared.init, KEY, X)
    assert set(variables["params"]) == {"own", "model"}
    own = variables["params"]["own"]
    assert {name: leaf.shape for name, leaf in own["basis"].items()} == {
        f"layer{i}.kernel": (8, 2) for i in (1, 2, 3)
    }
    counts = {"banks": 8 * 6, "coefficients": 0, "private": 3 * 8 * 2 + 3 * 8, "trainable": 120}
    assert paramshare.count(variables) == counts
    assert all(jax.tree.leaves(paramshare.decay_mask(variables)))


class Ordered(nn.Module):
    """Three equal layers, called in a given order."""

    order: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for name in self.order:
            x = nn.Dense(8, name=name)(x)
        return x


IN_ANY_ORDER = [
    Soft(2),
    Tied(groups=(0, 1, 0), scaled=True),
    FilterBasis(2, 6, bases=2),
    *[Ring(100, mode) for mode in ("ring", "hash")],
    Repeat(base=(4, 4)),
    Repeat(source="b/kernel"),
]


@pytest.mark.parametrize("scheme", IN_ANY_ORDER, ids=str)
def test_the_order_of_calls_does_not_change_what_stored_variables_mean(scheme):
    plan = Plan(Rule(".*/kernel", dataclasses.replace(scheme, initial="paper")))
    first, second = (paramshare.share(Ordered(tuple(o)), plan, X) for o in ("abc", "cab"))
    assert [site.path[0] for site in second.layout["shared"].sites] == ["c", "a", "b"]
    shapes = jax.eval_shape(first.init, KEY, X)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), shapes
    )
    dense = first.expand(variables)
    chex.assert_trees_all_close(second.expand(variables), dense, **CLOSE)
    fitted = [
        shared.layout["shared"].scheme.from_dense(
            shared.layout.read(dense["params"])["shared"], shared.layout["shared"].sites
        )
        for shared in (first, second)
    ]
    chex.assert_trees_all_close(*fitted, **CLOSE)


def test_the_method_that_is_traced_does_not_change_what_stored_variables_mean():
    class There(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(8), nn.Dense(8)

        def __call__(self, x):
            return self.second(self.first(x))

        def backward(self, x):
            return self.first(self.second(x))

    plan = Plan(Rule(".*/kernel", Ring(100, initial="paper")))
    shared, other = (
        paramshare.share(There(), plan, X, method=name) for name in ("__call__", "backward")
    )
    variables = shared.init(KEY, X)
    chex.assert_trees_all_equal(shared.expand(variables), other.expand(variables))


def test_init_with_output_and_eval_shape_agree_with_init():
    shared, variables = shared_net()
    output, again = shared.init_with_output(KEY, X)
    chex.assert_trees_all_close(dict(again), variables, **CLOSE)
    chex.assert_trees_all_close(output, shared.apply(variables, X), **CLOSE)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(shared.init, KEY, X), variables)


def test_collections_pass_through():
    shared, variables = shared_net()
    plain = shared.expand(variables)
    chex.assert_trees_all_equal_structs(plain["params"], Net().init(KEY, X)["params"])
    for batch in (X, 2 * X):
        _, updated = shared.apply(
            variables, batch, True, mutable=["batch_stats"], rngs={"dropout": KEY}
        )
        assert set(updated) == {"batch_stats"}
        variables = {**variables, **updated}
    assert np.any(np.asarray(variables["batch_stats"]["model"]["norm"]["mean"]) != 0)
    chex.assert_trees_all_close(
        shared.apply(variables, X), Net().apply(shared.expand(variables), X), **CLOSE
    )
    with pytest.raises(Exception, match="immutable"):
        shared.apply(variables, X, True, rngs={"dropout": KEY})


def test_dropout_follows_its_key():
    shared, variables = shared_net()
    run = jax.jit(
        lambda seed: shared.apply(
            variables,
            X,
            True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(seed, impl="rbg")},
        )[0]
    )
    np.testing.assert_array_equal(run(1), run(1))
    assert not np.allclose(run(1), run(2))


def test_sown_and_captured_intermediates():
    shared, variables = shared_net()
    _, state = shared.apply(
        variables,
        X,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
    )
    _, plain = Net().apply(
        shared.expand(variables),
        X,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
    )
    assert len(plain["intermediates"]["hidden"]) == 4
    assert set(plain["intermediates"]) == {"hidden", "dense0", "dense1", "dense2", "dense3"}
    chex.assert_trees_all_close(state["intermediates"]["model"], plain["intermediates"], **CLOSE)


def test_methods_by_name_and_on_a_bound_module():
    shared = paramshare.share(Coder(), PLAN, X)
    variables = shared.init(KEY, X)
    plain = shared.expand(variables)
    assert len(shared.layout["shared"].sites) == 3
    z = Coder().apply(plain, X, method="encode")
    bound = shared.bind(variables)
    for encoded in (
        shared.apply(variables, X, method="encode"),
        bound.encode(X),
        shared.apply(variables, X, method=lambda m, x: m.encode(x)),
    ):
        chex.assert_trees_all_close(encoded, z, **CLOSE)
    chex.assert_trees_all_close(bound.decode(bound.encode(X)), Coder().apply(plain, X), **CLOSE)
    with pytest.raises(AttributeError):
        bound.transcode  # noqa: B018


def test_init_through_one_method_makes_all_banks():
    shared = paramshare.share(Coder(), PLAN, X)
    variables = shared.init(KEY, X, method="encode")
    assert set(variables["params"]["coefficients"]["shared"]) == {
        f"layer{i}.kernel" for i in (1, 2, 3)
    }
    assert [leaf.shape for leaf in jax.tree.leaves(variables["banks"])] == [(2, 64)]
    chex.assert_trees_all_equal(variables["banks"], shared.init(KEY, X)["banks"])
    assert set(variables["params"]["model"]) == {"layer1", "layer2"}


def test_sharing_only_what_one_method_calls():
    shared = paramshare.share(Coder(), PLAN, X, method="encode")
    assert [str(site) for site in shared.layout["shared"].sites] == [
        "layer1/kernel",
        "layer2/kernel",
    ]


class Outer(nn.Module):
    """Two shared models: one built here, one passed as an attribute and called twice."""

    passed: Shared

    @nn.compact
    def __call__(self, x):
        built = Shared(Coder(), PLAN.resolve(Coder(), x), name="built")
        return nn.Dense(8, name="top")(self.passed(self.passed(built.decode(built.encode(x)))))


def test_nested_in_a_larger_module():
    outer = Outer(paramshare.share(Coder(), PLAN, X))
    output, variables = outer.init_with_output(KEY, X)
    assert set(variables["params"]) == {"built", "passed", "top"}
    for name in ("built", "passed"):
        assert set(variables["params"][name]) == {"coefficients", "model"}
    chex.assert_trees_all_close(outer.apply(variables, X), output, **CLOSE)
    assert paramshare.count(variables) == {
        "banks": 256,
        "coefficients": 12,
        "private": 2 * 24 + 72,
        "trainable": 388,
    }
    mask = paramshare.decay_mask(variables)
    chex.assert_trees_all_equal_structs(mask, trainable(variables))
    for name in ("built", "passed"):
        assert not any(jax.tree.leaves(mask["params"][name]["coefficients"]))
    assert sum(not decays for decays in jax.tree.leaves(mask)) == 2 * 3
    # Both shared models and the plain layer, by hand.
    part = lambda name: {c: variables[c][name] for c in ("banks", "params")}  # noqa: E731
    built, passed = (outer.passed.expand(part(name)) for name in ("built", "passed"))
    y = Coder().apply(passed, Coder().apply(passed, Coder().apply(built, X)))
    chex.assert_trees_all_close(
        nn.Dense(8).apply({"params": variables["params"]["top"]}, y), output, rtol=1e-5, atol=1e-5
    )


def test_a_parameter_of_the_model_named_coefficients_is_private():
    _, variables = shared_net()
    mask = paramshare.decay_mask(variables)
    assert mask["params"]["model"]["coefficients"] is True
    assert not any(jax.tree.leaves(mask["params"]["coefficients"]))
    plain = Net().init(KEY, X)
    assert all(jax.tree.leaves(paramshare.decay_mask(plain)))
    assert paramshare.count(plain)["coefficients"] == 0


def test_weight_decay_by_the_mask_leaves_coefficients_alone():
    _, variables = shared_net()
    weights = trainable(variables)
    decay = optax.masked(optax.add_decayed_weights(1.0), paramshare.decay_mask)
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, weights), decay.init(weights), weights)
    expected = jax.tree.map(
        lambda w, decays: w if decays else 0 * w, weights, paramshare.decay_mask(variables)
    )
    chex.assert_trees_all_close(updates, expected)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_are_the_plain_models_through_expand(remat):
    shared, variables = shared_net(remat=remat)

    def through_banks(weights):
        output: Any = shared.apply({**variables, **weights}, X)
        return jnp.sum(output**2)

    def plain(weights):
        output: Any = Net().apply(shared.expand({**variables, **weights}), X)
        return jnp.sum(output**2)

    gradients, expected = (
        jax.jit(jax.grad(through_banks))(trainable(variables)),
        jax.jit(jax.grad(plain))(trainable(variables)),
    )
    chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-5)
    for part in (gradients["banks"], gradients["params"]["coefficients"]):
        assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(part))


def test_jit_vmap_and_pmap():
    shared, variables = shared_net()
    expected = shared.apply(variables, X)
    chex.assert_trees_all_close(jax.jit(shared.apply)(variables, X), expected, **CLOSE)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), variables)
    chex.assert_trees_all_close(jax.vmap(shared.apply, (0, None))(both, X)[0], expected, **CLOSE)
    if jax.device_count() >= 4:
        each = jax.pmap(shared.apply, in_axes=(None, 0))(variables, X[:, None])
        chex.assert_trees_all_close(np.asarray(each)[:, 0], np.asarray(expected), **CLOSE)


def test_missing_banks_are_errors():
    shared, variables = shared_net()
    for broken in (
        {**variables, "banks": {}},
        {k: v for k, v in variables.items() if k != "banks"},
    ):
        for attempt in (lambda v: shared.apply(v, X), shared.expand):
            with pytest.raises(PlanError, match=r"no entry for bank 'shared' in 'banks'"):
                attempt(broken)
    with pytest.raises(PlanError, match="params/coefficients"):
        shared.apply({**variables, "params": {"model": variables["params"]["model"]}}, X)


def test_models_that_cannot_be_shared_are_refused():
    shared, _ = shared_net()
    with pytest.raises(PlanError, match="already shared"):
        paramshare.share(shared, PLAN, X)
    with pytest.raises(PlanError, match="Flax linen module"):
        paramshare.share(Net, PLAN, X)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.clone()],
)
def test_copies_are_equal_and_work(duplicate):
    shared, variables = shared_net()
    other = duplicate(shared)
    assert (other, hash(other)) == (shared, hash(shared))
    chex.assert_trees_all_equal(other.apply(variables, X), shared.apply(variables, X))


def test_tabulate_shows_layers_and_coefficients():
    shared, _ = shared_net()
    text = shared.tabulate(KEY, X, console_kwargs={"width": 200})
    assert "dense3" in text
    assert "coefficients" in text
