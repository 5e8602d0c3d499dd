"""All schemes in one plan: five kinds of banks in one small network, from init to training."""

import math
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
from paramshare import FilterBasis, Plan, Repeat, Ring, Rule, Shared, Soft, Tied

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
X = jax.random.normal(jax.random.key(1, impl="rbg"), (8, 8, 8, 3))
LABELS = jnp.arange(8) % 4


class Net(nn.Module):
    """Three stages of 3x3 convolutions, of 4, 8 and 16 channels."""

    @nn.compact
    def __call__(self, x_BxHxWxC, train: bool = False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(x_BxHxWxC)
        for stage, (width, convs) in enumerate([(4, 3), (8, 3), (16, 5)], start=1):
            for i in range(convs):
                stride = 2 if stage > 1 and i == 0 else 1
                x = nn.Conv(
                    width, (3, 3), (stride, stride), use_bias=False, name=f"stage{stage}_conv{i}"
                )(x)
                x = nn.relu(nn.BatchNorm(not train, momentum=0.5, name=f"stage{stage}_bn{i}")(x))
        return nn.Dense(4, name="classifier")(x.mean((1, 2)))


BASIS = FilterBasis(shared=12, unique=4, initial="paper")
REPEAT = Repeat(source="stage2_conv0/kernel", initial="paper")
PLAN = Plan(
    Rule(r"stage1_conv\d/kernel", Soft(2, initial="paper"), bank="soft"),
    Rule(r"stage2_conv[12]/kernel", Ring(700, initial="paper"), bank="ring"),
    Rule(r"stage3_conv[12]/kernel", BASIS, bank="basis"),
    Rule(r"stage3_conv[34]/kernel", Tied(orthonormal=True, initial="paper"), bank="tied"),
    Rule(r"stage[23]_conv0/kernel", REPEAT, bank="repeat"),
)
BANKS = {
    "soft": 2 * 144,
    "ring": 700,
    "basis": 9 * 16 * 12,
    "tied": 9 * 16 * 16,
    "repeat": 9 * 4 * 8,
}
DENSE = {
    "soft": 9 * 3 * 16,
    "ring": 9 * 2 * 64,
    "basis": 9 * 2 * 256,
    "tied": 9 * 2 * 256,
    "repeat": 9 * (4 * 8 + 8 * 16),
}  # without sharing
COEFFICIENTS = {
    "soft": 3 * 2,
    "repeat": 2 * 2 * 2,
}  # a tile's alpha and beta: (4, 8) to (8, 16)
UNIQUE = 2 * 9 * 16 * 4
PRIVATE = 9 * 3 * 4 + 2 * (3 * 4 + 3 * 8 + 5 * 16) + 16 * 4 + 4  # stem, batch norm, classifier


@pytest.fixture(scope="module")
def shared() -> Shared:
    return paramshare.share(Net(), PLAN, X)


@pytest.fixture(scope="module")
def variables(shared) -> dict[str, Any]:
    return dict(jax.jit(shared.init)(KEY, X))


def weights(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: variables[name] for name in ("banks", "params")}


@pytest.fixture(scope="module")
def value_and_grad(shared):
    """Of the cross entropy with running statistics, so that it is a mean over images."""

    def loss(trained, variables, x, labels):
        return cross_entropy(shared.apply({**variables, **trained}, x), labels)

    return jax.value_and_grad(loss)


@pytest.fixture(scope="module")
def whole(variables, value_and_grad):
    """Loss and gradient of the whole batch."""
    return jax.jit(value_and_grad)(weights(variables), variables, X, LABELS)


def cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def test_every_bank_exists(shared, variables):
    assert list(shared.layout) == list(BANKS)
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(bank))
        for name, bank in variables["banks"].items()
    }
    assert sizes == BANKS
    assert set(variables["params"]) == {"coefficients", "own", "model"}
    coefficients, own = (variables["params"][name] for name in ("coefficients", "own"))
    assert set(coefficients) == {"soft", "repeat"}
    assert set(coefficients["soft"]) == {f"stage1_conv{i}.kernel" for i in range(3)}
    assert set(coefficients["repeat"]) == {"stage3_conv0.kernel"}  # the first is the base itself
    assert set(own) == {"basis"}
    assert set(own["basis"]) == {f"stage3_conv{i}.kernel" for i in (1, 2)}
    sites = {site.path for bank in shared.layout.banks for site in bank.sites}
    assert len(sites) == 3 + 2 + 2 + 2 + 2


def test_counts_add_up(shared, variables):
    banks, coefficients, private = sum(BANKS.values()), sum(COEFFICIENTS.values()), UNIQUE + PRIVATE
    total = banks + coefficients + private
    assert paramshare.count(variables) == {
        "banks": banks,
        "coefficients": coefficients,
        "private": private,
        "trainable": total,
    }
    assert shared.layout.trainable == total
    plain = jax.eval_shape(Net().init, KEY, X)
    assert shared.layout.plain == paramshare.count(plain)["trainable"]
    assert shared.layout.plain == PRIVATE + sum(DENSE.values())


def test_the_description_adds_up(shared):
    lines = shared.describe().splitlines()
    columns = [line.replace(",", "").split() for line in lines[2 : 2 + len(BANKS)]]
    trained, saved = ({row[0]: int(row[column]) for row in columns} for column in (-2, -1))
    others = COEFFICIENTS | {"basis": UNIQUE}
    assert trained == {name: size + others.get(name, 0) for name, size in BANKS.items()}
    assert {name: trained[name] + saved[name] for name in BANKS} == DENSE
    for name, bank in zip(shared.layout, shared.layout.banks, strict=True):
        (row,) = [line for line in lines if line.startswith(name + " ")]
        assert str(bank.scheme) in row
        head = lines.index(f"{name}:")
        assert lines[head + 1 : head + 1 + len(bank.sites)] == [f"  {site}" for site in bank.sites]
    (total,) = [line.split() for line in lines if line.startswith("total ")]
    everything = sum(trained.values()) + PRIVATE
    assert total[1:] == ["11", f"{everything:,}", f"{shared.layout.plain - everything:,}"]


def test_it_computes_the_same_as_the_plain_model(shared, variables):
    plain = jax.jit(shared.expand)(variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, dict(jax.eval_shape(Net().init, KEY, X)))
    results = [
        jax.jit(
            lambda v, model=model: (
                model.apply(v, X),
                model.apply(v, X, True, mutable=["batch_stats"]),
            )
        )(v)
        for model, v in ((shared, variables), (Net(), plain))
    ]
    (ours, (ours_training, ours_updated)), (theirs, (theirs_training, theirs_updated)) = results
    # The order of sums may differ between the two programs: float32 roundings of 11 layers.
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(ours_training, theirs_training, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(
        ours_updated["batch_stats"]["model"], theirs_updated["batch_stats"], rtol=1e-4, atol=1e-5
    )


def test_every_kernel_is_made_from_its_bank(shared, variables):
    """Where one bank changes, only the kernels of its sites do."""
    expand = jax.jit(shared.expand)
    before = expand(variables)["params"]
    for bank in shared.layout.banks:
        halved = {
            **variables,
            "banks": {
                **variables["banks"],
                bank.name: jax.tree.map(lambda x: x / 2, variables["banks"][bank.name]),
            },
        }
        after = expand(halved)["params"]
        changed = {
            f"{layer}/kernel"
            for layer in before
            if "kernel" in before[layer]
            and np.any(before[layer]["kernel"] != after[layer]["kernel"])
        }
        assert changed == {site.path for site in bank.sites}


def test_weight_decay_exempts_only_coefficients(variables):
    mask = paramshare.decay_mask(variables)
    chex.assert_trees_all_equal_structs(mask, weights(variables))
    assert not any(jax.tree.leaves(mask["params"]["coefficients"]))
    assert all(jax.tree.leaves((mask["banks"], mask["params"]["own"], mask["params"]["model"])))


def test_gradients_reach_every_parameter(variables, whole):
    _, gradient = whole
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, weights(variables))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)
        assert np.all(np.isfinite(np.asarray(leaf))), jax.tree_util.keystr(path)


def test_pmap_averages_to_the_whole_batchs_gradient(variables, value_and_grad, whole):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")

    def step(x, labels):
        return jax.lax.pmean(value_and_grad(weights(variables), variables, x, labels), "device")

    each = jax.pmap(step, "device")(X.reshape(4, 2, 8, 8, 3), LABELS.reshape(4, 2))
    for device in range(4):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, d=device: np.asarray(leaf[d]), each),
            jax.device_get(whole),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_few_steps_of_training_lower_the_loss(shared, variables):
    """With the recipe of filter bases and their penalty at the paper's weight, 10."""
    optimizer = optax.chain(
        optax.masked(optax.add_decayed_weights(5e-4), paramshare.decay_mask),
        optax.sgd(0.05, momentum=0.9),
    )

    def loss(trained, state):
        logits, updated = shared.apply(
            {**trained, "batch_stats": state}, X, True, mutable=["batch_stats"]
        )
        penalty = paramshare.orthogonality(shared, trained, "basis", "tied")
        error = cross_entropy(logits, LABELS)
        return error + 10 * penalty, (error, penalty, updated["batch_stats"])

    @jax.jit
    def step(trained, moments, state):
        (_, (error, penalty, state)), gradient = jax.value_and_grad(loss, has_aux=True)(
            trained, state
        )
        updates, moments = optimizer.update(gradient, moments, trained)
        return optax.apply_updates(trained, updates), moments, state, (error, penalty)

    trained, state = weights(variables), variables["batch_stats"]
    moments, history = optimizer.init(trained), []
    for _ in range(20):
        trained, moments, state, measured = step(trained, moments, state)
        history.append([float(value) for value in measured])
    errors, penalties = np.array(history).T
    assert abs(errors[0] - math.log(4)) < 1.5  # near chance
    assert errors[-1] < 0.5 * errors[0]
    assert penalties[0] < 1e-12
    assert penalties[-1] < 1e-2  # filters of length 0 would give 1 / n
    for name, bank in trained["banks"].items():
        for leaf, before in zip(
            jax.tree.leaves(bank), jax.tree.leaves(variables["banks"][name]), strict=True
        ):
            assert float(jnp.max(jnp.abs(leaf - before))) > 1e-3, name


def test_layouts_can_be_pickled_and_are_static_arguments(shared, variables):
    again = pickle.loads(pickle.dumps(shared))
    assert (again, hash(again)) == (shared, hash(shared))
    assert (again.layout, hash(again.layout)) == (shared.layout, hash(shared.layout))
    resolved = PLAN.resolve(Net(), X)
    assert (resolved, hash(resolved)) == (shared.layout, hash(shared.layout))
    traces = []

    def expand(layout, variables):
        traces.append(layout)
        return layout.expand(variables)

    jitted = jax.jit(expand, static_argnums=0)
    first, second = (jitted(layout, variables) for layout in (shared.layout, again.layout))
    chex.assert_trees_all_equal(first, second)
    assert len(traces) == 1
