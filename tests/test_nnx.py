"""A shared NNX transformer trains as its dense form does; a call leaves no weights behind."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paramshare
import paramshare.nnx
from paramshare import Plan, PlanError, Rule, Soft, Tied
from paramshare.nnx import Bank, Coefficient, Own

WIDTH, HEADS, TOKENS = 8, 2, 11


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            num_heads=HEADS, in_features=WIDTH, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x_BxTxD, decode: bool = False):
        length = x_BxTxD.shape[1]
        mask = None if decode else nnx.make_causal_mask(jnp.ones((1, length)))
        x_BxTxD = x_BxTxD + self.attention(self.norm1(x_BxTxD), mask=mask, decode=decode)
        hidden = nnx.gelu(self.up(self.norm2(x_BxTxD)))
        return x_BxTxD + self.dropout(self.down(hidden))


class Transformer(nnx.Module):
    """Three blocks between an embedding and a head that refers to the same weight."""

    scale = 2.0

    def __init__(self, rngs: nnx.Rngs, rate: float = 0.0):
        self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, rate) for _ in range(3)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.table = self.embed.embedding
        self.depth = 3

    @property
    def first_kernel(self):
        return self.blocks[0].up.kernel[...]

    def encode(self, ids, decode: bool = False):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, decode)
        return self.norm(x)

    def __call__(self, ids, decode: bool = False):
        return self.encode(ids, decode) @ self.table.T

    def init_cache(self, shape: tuple[int, int]):
        for block in self.blocks:
            block.attention.init_cache((*shape, WIDTH))


IDS = jax.random.randint(jax.random.key(0), (2, 5), 0, TOKENS)
NAMES = ("query", "key", "value", "out")
ATTENTION = r"blocks/\d/attention/(?P<name>\w+)/kernel"
MLP = r"blocks/\d/(?P<name>up|down)/kernel"


SOFT = Soft(2)
SGD = optax.sgd(0.3, momentum=0.9)  # one, so that steps are compiled once


def plan(scheme: Any = SOFT) -> Plan:
    return Plan(Rule(ATTENTION, scheme, "{name}"), Rule(MLP, scheme, "{name}"))


def model(rate: float = 0.0) -> Transformer:
    return Transformer(nnx.Rngs(0), rate)


def loss(module: Any, ids: jax.Array) -> jax.Array:
    logits = module(ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@nnx.jit
def step(module: Any, optimizer: nnx.Optimizer, ids: jax.Array) -> jax.Array:
    value, gradients = nnx.value_and_grad(loss)(module, ids)
    optimizer.update(module, gradients)
    return value


@nnx.jit
def run(module: Any) -> jax.Array:
    return module(IDS)


gradient = nnx.jit(nnx.grad(loss))


def flat(module: Any, kind: Any = nnx.Param) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(module, kind))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in state}


def assert_close(actual: Any, expected: Any, **tolerances: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), actual, expected)


def assert_empty(shared: Any) -> None:
    """No shared weight is in the state."""
    assert not shared.layout.paths & {path.removeprefix("model/") for path in flat(shared)}


def test_a_call_equals_the_baked_modules():
    shared = paramshare.nnx.share(model(rate=0.5), plan(), rngs=1)
    plain = paramshare.nnx.bake(shared)
    assert type(plain) is Transformer
    assert plain.table is plain.embed.embedding
    # Dropout draws from the streams of the module, which both have.
    assert_close(run(shared), run(plain), rtol=1e-5, atol=1e-5)
    assert_close(run(shared), run(plain), rtol=1e-5, atol=1e-5)
    shared.eval()
    plain.eval()
    assert_close(run(shared), run(plain), rtol=1e-5, atol=1e-5)
    assert_close(shared(IDS), run(plain), rtol=1e-5, atol=1e-5)
    assert_empty(shared)


def test_tied_weights_train_as_the_dense_module_with_summed_gradients():
    shared = paramshare.nnx.share(model(), plan(Tied()))
    dense: Any = paramshare.nnx.bake(shared)
    optimizer = nnx.Optimizer(shared, SGD, wrt=nnx.Param)
    reference = nnx.Optimizer(dense, SGD, wrt=nnx.Param)

    def summed(gradients: Any) -> Any:
        """Every tied weight gets the sum of the gradients of the weights it is tied with."""
        of_path = dict(nnx.to_flat_state(gradients))
        for name in (*(f"attention/{name}" for name in NAMES), "up", "down"):
            paths = [("blocks", i, *name.split("/"), "kernel") for i in range(3)]
            total = sum(of_path[path].get_value() for path in paths)
            for path in paths:
                of_path[path].set_value(total)
        return gradients

    dense_step = nnx.jit(nnx.value_and_grad(loss))
    for _ in range(3):
        value, gradients = dense_step(dense, IDS)
        reference.update(dense, summed(gradients))
        assert step(shared, optimizer, IDS) == pytest.approx(float(value), rel=1e-5)
    assert_empty(shared)
    assert_close(flat(paramshare.nnx.bake(shared)), flat(dense), rtol=1e-4, atol=1e-5)


def test_soft_sharing_trains_as_its_expansion_does():
    shared = paramshare.nnx.share(model(), plan())
    graph, params, others = nnx.split(paramshare.nnx.bake(shared), nnx.Param, ...)
    optimizer = nnx.Optimizer(shared, SGD, wrt=nnx.Param)

    def expanded(variables: Any) -> jax.Array:
        kernels = shared.layout.expand(variables)
        private = dict(nnx.to_flat_state(nnx.State(variables["params"]["model"])))
        state = [
            (path, p.replace(kernels.get("/".join(map(str, path)), private.get(path))))
            for path, p in nnx.to_flat_state(params)
        ]
        return loss(nnx.merge(graph, nnx.from_flat_state(state), others), IDS)

    variables = shared.variables()
    state = SGD.init(variables)
    reference = jax.jit(jax.value_and_grad(expanded))
    for _ in range(3):
        value, gradients = reference(variables)
        updates, state = SGD.update(gradients, state)
        variables = optax.apply_updates(variables, updates)
        assert step(shared, optimizer, IDS) == pytest.approx(float(value), rel=1e-5)
    assert_close(shared.variables(), variables, rtol=1e-3, atol=1e-4)


def test_the_given_module_is_not_changed():
    module = model()
    before, kernel = flat(module), module.blocks[0].up.kernel
    shared = paramshare.nnx.share(module, plan())
    optimizer = nnx.Optimizer(shared, SGD, wrt=nnx.Param)
    step(shared, optimizer, IDS)
    paramshare.nnx.convert(module, plan(Tied()))
    assert module.blocks[0].up.kernel is kernel
    assert_close(flat(module), before, rtol=0)


def test_variables_are_params_of_three_kinds():
    shared = paramshare.nnx.share(model(), plan())
    assert {path.split("/")[0] for path in flat(shared)} == {"banks", "coefficients", "model"}
    assert set(flat(shared, Bank)) == {f"banks/{name}/templates" for name in shared.layout}
    assert len(flat(shared, Coefficient)) == 18
    assert flat(shared, Own) == {}
    rule = Rule(r"blocks/./down/kernel", paramshare.FilterBasis(shared=5, unique=3), "down")
    shared = paramshare.nnx.share(model(), Plan(rule))
    assert len(flat(shared, Own)) == 3
    # A gradient with respect to banks alone.
    of_banks = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, Bank)))
    assert set(of_banks(shared, IDS)) == {"banks"}


def test_a_call_that_fails_leaves_the_module_as_it_was():
    shared = paramshare.nnx.share(model(), plan())
    before = flat(shared)
    with pytest.raises(TypeError):
        shared(IDS, wrong=True)
    with pytest.raises(Exception, match=r"."):
        shared(jnp.ones((2, 5)))  # the embedding takes integers
    assert_close(flat(shared), before, rtol=0)
    assert shared(IDS).shape == (2, 5, TOKENS)


def test_copies_are_independent_and_equal():
    shared = paramshare.nnx.share(model(), plan())
    expected = run(shared)
    copy = nnx.clone(shared)
    # These two refer to the same variables.
    others: list[Any] = [nnx.merge(*nnx.split(shared)), nnx.view(shared, deterministic=True)]
    optimizer = nnx.Optimizer(shared, SGD, wrt=nnx.Param)
    step(shared, optimizer, IDS)
    assert_close(run(copy), expected, rtol=1e-5, atol=1e-5)
    trained = run(shared)
    assert not np.allclose(trained, expected)
    for other in others:
        assert_close(run(other), trained, rtol=1e-5, atol=1e-5)
    assert others[1].model.blocks[0].dropout.deterministic
    nnx.update(shared, nnx.state(copy))
    assert_close(run(shared), expected, rtol=1e-5, atol=1e-5)


def test_transformations_of_jax_and_nnx():
    module = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3)))
    shared = paramshare.nnx.share(module, Plan(Rule(".*kernel", SOFT)))
    x = jnp.arange(8.0).reshape(2, 4)

    def total(module: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(module(x) ** 2)

    expected, gradients = nnx.jit(nnx.value_and_grad(total))(shared, x)
    # As a captured constant, outside of the trace that calls it.
    _, totals = jax.lax.scan(lambda carry, x: (carry, total(shared, x)), 0, x[:, None])
    assert totals.sum() == pytest.approx(float(expected), rel=1e-5)
    remat = nnx.jit(nnx.grad(nnx.remat(total)))
    assert_close(remat(shared, x), gradients, rtol=1e-4, atol=1e-6)
    mapped = nnx.vmap(total, in_axes=(None, 0))(shared, x[:, None])
    assert_close(mapped, totals, rtol=1e-5)
    # As a pytree.
    assert jax.jit(total)(shared, x) == pytest.approx(float(expected), rel=1e-5)
    assert_close(nnx.state(jax.grad(total)(shared, x), nnx.Param), gradients, rtol=1e-4)
    assert_empty(shared)


def test_methods_properties_and_attributes_of_the_module():
    shared = paramshare.nnx.share(model(), plan())
    plain: Any = paramshare.nnx.bake(shared)
    encode = nnx.jit(lambda module: module.encode(IDS))
    assert_close(encode(shared), encode(plain), rtol=1e-5, atol=1e-5)
    assert_close(shared.first_kernel, plain.first_kernel, rtol=1e-6)
    assert (shared.depth, shared.scale) == (3, 2.0)
    assert shared.embed is shared.model.embed
    with pytest.raises(AttributeError, match="no method or attribute 'decoder'"):
        _ = shared.decoder
    assert not hasattr(shared, "decoder")


def test_parts_of_the_module_are_called_while_it_is_filled():
    shared = paramshare.nnx.share(model(), plan())
    plain: Any = paramshare.nnx.bake(shared)
    x = jnp.ones((1, WIDTH))
    with shared.filled() as module:
        assert_close(module.blocks[1].up(x), plain.blocks[1].up(x), rtol=1e-6)
        assert shared.encode(IDS).shape == (2, 5, WIDTH)  # within it
        copy = nnx.clone(shared)
        assert_close(module.blocks[1].up(x), plain.blocks[1].up(x), rtol=1e-6)
    # A copy made meanwhile has weights, but does not use them.
    copy.banks["up"]["templates"][...] *= 0
    assert not np.allclose(copy(IDS), shared(IDS))
    for part in (shared.blocks[1].up, shared.blocks[1].attention):
        with pytest.raises(PlanError, match=r"'blocks/1/.*/kernel' is generated.*filled\(\)"):
            part(x[None])
    assert not hasattr(shared.blocks[1].up.kernel, "shape")


def test_decoding_with_a_cache():
    shared = paramshare.nnx.share(model(), plan())
    expected = run(shared)
    shared.init_cache(IDS.shape)
    decode = nnx.jit(lambda module, ids: module(ids, decode=True))
    logits = [decode(shared, IDS[:, i : i + 1]) for i in range(IDS.shape[1])]
    assert_close(jnp.concatenate(logits, axis=1), expected, rtol=1e-4, atol=1e-5)
    assert int(shared.blocks[2].attention.cache_index[...]) == IDS.shape[1]


class Tying(nnx.Module):
    """An embedding that is the head too."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.table = self.embed.embedding

    def __call__(self, ids):
        return self.embed(ids) @ self.table.T


def test_a_weight_in_two_places_is_one_weight():
    rule = Rule("embed/embedding", paramshare.Ring(40), bank="ring")
    shared = paramshare.nnx.share(Tying(nnx.Rngs(0)), Plan(rule))
    assert shared.layout.plain == TOKENS * WIDTH
    assert set(flat(shared)) == {"banks/ring/ring"}
    plain: Any = paramshare.nnx.bake(shared)
    assert plain.table is plain.embed.embedding
    assert_close(run(shared), run(plain), rtol=1e-5, atol=1e-5)
    with shared.filled() as module:
        assert module.table is module.embed.embedding
    # The ring's gradient is the sum over both uses.
    dense = gradient(plain, IDS)["embed"]["embedding"].get_value()
    pull = jax.vjp(shared.layout.expand, shared.variables())[1]
    (expected,) = pull({"embed/embedding": dense})
    actual = gradient(shared, IDS)["banks"]["ring"]["ring"].get_value()
    assert_close(actual, expected["banks"]["ring"]["ring"], rtol=1e-4, atol=1e-6)


def test_weight_decay_spares_coefficients():
    shared = paramshare.nnx.share(model(), plan())
    mask = paramshare.nnx.decay_mask(shared)
    transform = optax.chain(optax.add_decayed_weights(0.5, mask=mask), optax.sgd(1.0))
    optimizer = nnx.Optimizer(shared, transform, wrt=nnx.Param)
    before = flat(shared)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(shared, nnx.Param))
    nnx.jit(lambda module, optimizer: optimizer.update(module, zeros))(shared, optimizer)
    for path, value in flat(shared).items():
        factor = 1 if path.startswith("coefficients") else 0.5
        assert_close(value, factor * before[path], rtol=1e-6)


def test_counts_are_those_of_the_layout_and_of_the_variables():
    shared = paramshare.nnx.share(model(), plan())
    counts = paramshare.nnx.count(shared)
    assert counts == paramshare.count(shared.variables())
    assert counts["trainable"] == shared.layout.trainable
    assert paramshare.nnx.count(model()) == {
        "banks": 0,
        "coefficients": 0,
        "private": shared.layout.plain,
        "trainable": shared.layout.plain,
    }
    assert (
        repr(shared) == "Shared(Transformer, 18 weights from 6 banks, 1,428 trainable parameters)"
    )
    assert shared.describe() == shared.layout.describe()


def test_threads_wait_for_each_other():
    """None computes with the weights, or the tracers, of another one."""
    shared = paramshare.nnx.share(model(), plan())
    expected, results = run(shared), []

    def call(jit: bool) -> None:
        function = jax.jit(lambda ids: shared(ids)) if jit else shared
        results.extend(np.asarray(function(IDS)) for _ in range(2))

    threads = [threading.Thread(target=call, args=(i % 2 == 0,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    assert_empty(shared)
