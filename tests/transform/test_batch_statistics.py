"""Re-estimated batch statistics are the means over batches, whatever the momenta."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare.transform.batch_statistics import StatisticsError, reestimate

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
RNG = np.random.default_rng(0)
BATCHES = [(2 * RNG.normal(size=(16, 4)) + np.arange(4)).astype(np.float32) for _ in range(3)]


class Two(nn.Module):
    """Two batch norms of different momenta around a dense layer, and a frozen one if asked."""

    momenta: tuple[float, float] = (0.9, 0.5)
    frozen: bool = False

    @nn.compact
    def __call__(self, x_BxC, train: bool = False):
        x = nn.BatchNorm(not train, momentum=self.momenta[0], name="first")(x_BxC)
        if self.frozen:
            x = nn.BatchNorm(True, name="frozen")(x)
        x = nn.Dense(5, name="dense")(x)
        return nn.BatchNorm(not train, momentum=self.momenta[1], name="second")(nn.relu(x))


def trained(model: nn.Module) -> Any:
    return jax.tree.map(lambda leaf: leaf + 0.5, jax.jit(model.init)(KEY, BATCHES[0]))


def by_hand(variables: Any, batches: list[np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Means over batches of the batch's mean and (biased) variance at both norms, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    moments: dict[str, list[Any]] = {"first": [], "second": []}
    for batch in batches:
        x = batch.astype(np.float64)
        moments["first"].append((x.mean(0), x.var(0)))
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * params["first"]["scale"] + params["first"][
            "bias"
        ]
        if "frozen" in params:
            statistics = jax.tree.map(
                lambda leaf: np.asarray(leaf, np.float64), variables["batch_stats"]["frozen"]
            )
            x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * params["frozen"][
                "scale"
            ] + params["frozen"]["bias"]
        x = np.maximum(x @ params["dense"]["kernel"] + params["dense"]["bias"], 0)
        moments["second"].append((x.mean(0), x.var(0)))
    return {
        name: {
            "mean": np.mean([mean for mean, _ in pairs], 0),
            "var": np.mean([var for _, var in pairs], 0),
        }
        for name, pairs in moments.items()
    }


@pytest.mark.parametrize(
    ("momenta", "count"),
    [((0.9, 0.5), 1), ((0.99, 0.9), 3), ((0.0, 0.97), 3), ((0.987654321, 0.1), 3)],
)
def test_statistics_are_means_over_batches(momenta, count):
    model = Two(momenta)
    variables = trained(model)
    actual = reestimate(model, variables, BATCHES[:count])
    # float32 moments of 16 values. A momentum of many digits is measured to 1e-7, which is one part
    # in 1e5 of 1 - m = 0.0123.
    tolerance = 2e-5 if momenta[0] == 0.987654321 else 2e-6
    chex.assert_trees_all_close(
        actual["batch_stats"], by_hand(variables, BATCHES[:count]), rtol=tolerance, atol=1e-6
    )
    chex.assert_trees_all_equal(actual["params"], variables["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, variables)


def test_old_statistics_do_not_matter():
    model, variables = Two(), trained(Two())
    once = reestimate(model, variables, BATCHES)
    wild = {
        **variables,
        "batch_stats": jax.tree.map(lambda leaf: 1e6 * leaf, variables["batch_stats"]),
    }
    for start in (once, wild):
        chex.assert_trees_all_close(reestimate(model, start, BATCHES), once, rtol=1e-6)


def test_batches_may_differ_in_size_and_count_the_same():
    model = nn.BatchNorm(momentum=0.9)
    variables = model.init(KEY, BATCHES[0], use_running_average=False)
    batches = [BATCHES[0], BATCHES[1][:5]]
    actual = reestimate(model, variables, iter(batches), use_running_average=False)["batch_stats"]
    np.testing.assert_allclose(
        actual["mean"], np.mean([batch.mean(0) for batch in batches], 0), rtol=1e-5
    )
    np.testing.assert_allclose(
        actual["var"], np.mean([batch.var(0) for batch in batches], 0), rtol=1e-5
    )


def test_frozen_statistics_stay_and_are_used():
    model = Two(frozen=True)
    variables = trained(model)
    actual = reestimate(model, variables, BATCHES)
    chex.assert_trees_all_equal(actual["batch_stats"]["frozen"], variables["batch_stats"]["frozen"])
    expected = by_hand(variables, BATCHES)
    chex.assert_trees_all_close(
        {name: actual["batch_stats"][name] for name in expected}, expected, rtol=2e-6, atol=1e-6
    )


def test_a_shared_network():
    model = Two()
    shared = paramshare.share(
        model,
        paramshare.Plan(paramshare.Rule("dense/kernel", paramshare.Soft(2, initial="paper"))),
        BATCHES[0],
    )
    variables = trained(shared)
    actual = reestimate(shared, variables, BATCHES)
    chex.assert_trees_all_close(
        actual["batch_stats"]["model"],
        by_hand(shared.expand(variables), BATCHES),
        rtol=2e-6,
        atol=1e-6,
    )
    assert list(actual) == list(variables)


TRACES: list[int] = []


class Counting(nn.Module):
    """Two inputs, dropout and another collection that it writes to; counts its traces."""

    @nn.compact
    def __call__(self, x, y, train: bool = False):
        TRACES.append(1)
        seen = self.variable("seen", "count", lambda: jnp.zeros(()))
        seen.value = seen.value + 1
        x = nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(not train)(x + y))
        return nn.BatchNorm(not train)(x)


def test_compiled_once_with_several_inputs_and_keys():
    model = Counting()
    variables = model.init(KEY, BATCHES[0], BATCHES[0])
    TRACES.clear()
    pairs = [(a, b) for a in BATCHES for b in BATCHES]
    actual = reestimate(model, variables, pairs, train=True, rngs={"dropout": jax.random.key(1)})
    assert len(TRACES) == 1
    np.testing.assert_allclose(
        actual["batch_stats"]["BatchNorm_0"]["mean"],
        np.mean([(a + b).mean(0) for a, b in pairs], 0),
        rtol=1e-5,
    )
    assert actual["seen"] == variables["seen"]


def test_a_network_without_batch_norm_is_unchanged():
    model = nn.Dense(2)
    variables = model.init(KEY, BATCHES[0])
    chex.assert_trees_all_equal(reestimate(model, variables, BATCHES), variables)


class Counter(nn.Module):
    """Its statistic is a number of calls or a growing norm, not an average."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        kept = self.variable("batch_stats", "kept", lambda: jnp.zeros(x.shape[-1]))
        kept.value = jnp.hypot(kept.value, x.max(0)) if self.norm else kept.value + 1
        return x


def test_errors():
    variables = trained(Two())
    with pytest.raises(StatisticsError, match="no batches"):
        reestimate(Two(), variables, [])
    for norm in (False, True):
        with pytest.raises(StatisticsError, match="batch_stats/kept is not a running average"):
            reestimate(Counter(norm), Counter(norm).init(KEY, BATCHES[0]), BATCHES)
    for bad in ([BATCHES[0] * np.nan], [BATCHES[0], BATCHES[0] * np.inf]):
        with pytest.raises(StatisticsError, match=r"batch_stats/first/mean is not finite"):
            reestimate(Two(), variables, bad)
