"""Which layers of the papers' networks share which bank, and how the banks start."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Shared
from paramshare.schemes import FilterBasis, Soft, Tied


def layout(network, name: str, **options):
    model = network(name, **options).model
    assert isinstance(model, Shared)
    return model.layout


def test_one_bank_per_stage_of_a_wide_network_without_first_blocks(network):
    banks = layout(network, "swrn-28-10-2")
    assert list(banks) == ["stage1", "stage2", "stage3"]
    for stage in banks:
        assert [str(site) for site in banks[stage].sites] == [
            f"{stage}/block{block}/conv{conv}/kernel" for block in (2, 3, 4) for conv in (1, 2)
        ]


def test_three_banks_per_stage_of_bottlenecks_with_at_most_a_template_per_layer(network):
    banks = layout(network, "swrn-50-2-3")
    assert {bank.name: (bank.scheme, len(bank.sites)) for bank in banks.banks} == {
        f"stage{stage}-conv{conv}": (Soft(min(3, layers), initial="paper"), layers)
        for stage, layers in enumerate((2, 3, 5, 2), 1)
        for conv in (1, 2, 3)
    }


def test_filter_bases(network):
    single = layout(network, "resnet34-s32u1").banks
    assert [(bank.name, bank.scheme) for bank in single] == [
        (f"stage{g + 1}", FilterBasis(32 * 2**g, 2**g, initial="paper")) for g in range(4)
    ]
    for bank, blocks in zip(single, (3, 4, 6, 3), strict=True):
        assert [site.path for site in bank.sites] == [
            f"{bank.name}/block{b}/basis{i}/kernel" for b in range(2, blocks + 1) for i in (1, 2)
        ]
    double = layout(network, "resnet34-s32u1-double").banks
    assert [bank.scheme for bank in double] == [
        FilterBasis(32 * 2**g, 2**g, bases=2, initial="paper") for g in range(4)
    ]
    assert [bank.sites for bank in double] == [bank.sites for bank in single]


def test_which_stages_of_a_mobilenet_share(network):
    one, two = (layout(network, f"mobilenetv2-{kind}") for kind in ("shared", "sharedpp"))
    assert list(one) == [f"stage{g}-expand" for g in (3, 4, 5, 6)]
    assert set(two) == {f"stage{g}-{conv}" for g in (3, 4, 5, 6) for conv in ("expand", "project")}
    assert [len(bank.sites) for bank in one.banks] == [2, 3, 2, 2]


def test_filter_bases_start_orthonormal():
    model: Any = paramshare.create_model("resnet14-s16u1")

    @jax.jit
    def penalties(key):
        banks, params = model.layout.init(key)
        variables = {"banks": banks, "params": params}
        return [paramshare.orthogonality(model, variables, unique=u) for u in (False, True)]

    shared, unique = penalties(jax.random.key(0))
    assert shared < 1e-10
    assert unique > 1e-3  # unique filters start as those of any convolution


def test_least_penalty_where_filters_outnumber_their_weights(network):
    """There orthonormal columns are the optimum, and the penalty is not 0."""

    def penalty(name: str, *pools: str) -> float:
        model = network(name).model
        scheme = Tied(orthonormal=True, initial="paper")  # MobileNets start otherwise

        @jax.jit
        def compute(key):
            banks = {
                bank.name: scheme.init(key, bank.sites).bank
                for bank in model.layout.banks
                if any(re.fullmatch(pool, bank.name) for pool in pools)
            }
            return paramshare.orthogonality(model, {"banks": banks, "params": {}}, *pools)

        return float(compute(jax.random.key(0)))

    bottlenecks = penalty("resnet50-sharedpp", "stage.-conv2", "stage.-conv3")
    assert bottlenecks == pytest.approx(5.17004e-4, rel=2e-6)
    assert penalty("mobilenetv2-shared", ".*") == pytest.approx(1.224181e-3, rel=2e-6)


def test_shared_and_plain_networks_compute_the_same_function():
    shared, plain = map(paramshare.create_model, ("swrn-16-0.125-1", "wrn-16-0.125"))
    assert isinstance(shared, Shared)
    assert plain == shared.model
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    shapes = jax.eval_shape(lambda x: shared.init(jax.random.key(0), x), x)
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.abs(rng.normal(size=leaf.shape)) / np.sqrt(leaf.size)
        return jnp.asarray(values, leaf.dtype)

    variables = jax.tree.map(draw, shapes)
    expanded = jax.jit(lambda v: plain.apply(shared.expand(v), x))(variables)
    # Float32 rounding of a dozen layers: the same sums, fused differently.
    assert jnp.allclose(jax.jit(shared.apply)(variables, x), expanded, rtol=1e-4, atol=1e-5)
