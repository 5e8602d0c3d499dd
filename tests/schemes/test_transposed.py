"""One table for an embedding and an output layer, and other weights that are transposed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Plan, PlanError, Rule, SchemeError, Site, Soft, Tied, Transposed


class Language(nn.Module):
    """Embedding, attention and an output layer."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(11, use_bias=False, name="head")(x)


def test_embedding_and_head_are_one_table_that_trains():
    tokens = jnp.arange(6).reshape(2, 3)
    plan = Plan(Rule("embed/embedding|head/kernel", Transposed(Tied()), "table"))
    shared = paramshare.share(Language(), plan, tokens)
    variables = shared.init(jax.random.key(0), tokens)
    assert shared.layout["table"].trainable == (88, 0, 0)
    dense = shared.expand(variables)["params"]
    np.testing.assert_array_equal(dense["embed"]["embedding"], dense["head"]["kernel"].T)
    gradient = jax.grad(lambda v: jnp.sum(shared.apply(v, tokens) ** 2))(variables)

    def unshared(params):
        return jnp.sum(Language().apply({"params": params}, tokens) ** 2)  # pyright: ignore

    parts = jax.grad(unshared)(dense)
    expected = parts["embed"]["embedding"] + parts["head"]["kernel"].T
    (actual,) = jax.tree.leaves(gradient["banks"]["table"])
    np.testing.assert_allclose(actual.reshape(11, 8), expected, rtol=2e-5, atol=1e-5)


def test_heads_are_matrices():
    """Of query (D, H, K) and out (H, K, D); square, so that the rule says which is transposed."""
    tokens = jnp.arange(6).reshape(2, 3)

    def share(**options):
        scheme = Transposed(Soft(1), **options)
        rule = Rule("attention/(query|out)/kernel", scheme)
        return paramshare.share(Language(), Plan(rule), tokens)

    shared = share(transposed=".*/out/.*")
    dense = shared.expand(shared.init(jax.random.key(0), tokens))["params"]["attention"]
    query, out = dense["query"]["kernel"].reshape(8, 8), dense["out"]["kernel"].reshape(8, 8)
    ratio = query / out.T
    np.testing.assert_allclose(ratio, np.full((8, 8), ratio[0, 0]), rtol=1e-5)
    with pytest.raises(PlanError, match=r"none of the sites is transposed: .*pass a regular"):
        share()


def test_each_has_its_scale():
    """The wrapped scheme sees two sites, each with the standard deviation of its own."""
    sites = Site("embed/embedding", (50, 8), std=1.0), Site("head/kernel", (8, 50), std=0.02)
    scheme = Transposed(Soft(1))
    embedding, head = scheme.expand(scheme.init(jax.random.key(0), sites), sites)
    assert np.std(embedding) / np.std(head) == pytest.approx(50, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transposed(Tied(), transposed="("), "not a regular expression"),
        (lambda: Transposed(Tied(), **{"transposed": 1}), "must be a regular expression, got 1"),  # pyright: ignore
        (lambda: Transposed(*["tied"]), "the first argument must be a sharing scheme"),  # pyright: ignore
        (
            lambda: Transposed(Tied()).check((Site("a", (3,)), Site("b", (2, 3)))),
            r"a is a vector, of shape \(3,\)",
        ),
        (
            lambda: Transposed(Tied()).check(
                (Site("a", (2, 3)), Site("b", (3, 4)), Site("c", (3, 2)))
            ),
            "needs sites of one shape",
        ),
    ],
)
def test_bad_arguments_and_sites(make, message):
    with pytest.raises(SchemeError, match=message):
        make()
