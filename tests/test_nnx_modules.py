"""NNX modules of many kinds are shared unmodified: stacks, containers, statistics, errors."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paramshare
import paramshare.nnx
from paramshare import Layout, Plan, PlanError, Repeat, Rule, Soft, Tied
from paramshare.nnx import Bank, share

X = jax.random.normal(jax.random.key(0), (4, 8))


class MLP(nnx.Module):
    """Layers that are called in another order than they are defined in."""

    def __init__(self, rngs: nnx.Rngs, width: int = 8):
        self.b, self.a = nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.c = nnx.Linear(width, 8, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return self.b(nnx.relu(self.a(self.c(x)))) * scale

    def reversed(self, x):
        return self.c(self.b(self.a(x)))


def kernels(scheme: Any, **options: Any) -> Plan:
    return Plan(Rule(r".*kernel", scheme, **options))


def paths(layout: Layout, bank: str = "shared") -> list[str]:
    return [str(site) for site in layout[bank].sites]


def check(shared: Any, *inputs: Any) -> Any:
    """A call equals the baked module's, and leaves nothing behind; the gradient is finite."""
    before = jax.tree.structure(nnx.state(shared))
    plain = paramshare.nnx.bake(nnx.clone(shared))
    call = nnx.jit(lambda module, inputs: module(*inputs))
    value = call(shared, inputs)
    np.testing.assert_allclose(value, call(plain, inputs), rtol=1e-5, atol=1e-5)
    gradients = nnx.jit(nnx.grad(lambda module, inputs: module(*inputs).sum()))(shared, inputs)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert jax.tree.structure(nnx.state(shared)) == before
    return value


class Stacked(nnx.Module):
    """Five layers made by `nnx.vmap` and run by `nnx.scan`, with a dropout and a batch norm."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs):
            return Layer(rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return nnx.remat(Layer.__call__)(layer, x)

        return run(self.layers, x)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.norm(self.linear(x).reshape(x.shape)))


def test_stacked_layers_are_sites():
    module = Stacked(nnx.Rngs(0))
    plan = kernels(Soft(2), stack_axis=0)
    layout = plan.resolve(module)
    assert paths(layout) == [f"layers/linear/kernel[{i}]" for i in range(5)]
    assert all(site.axes == ((), (0,), (1, 2)) for site in layout["shared"].sites)
    shared = share(module, plan)
    mean = shared.layers.norm.mean[...]
    check(shared, X)
    assert not np.allclose(shared.layers.norm.mean[...], mean)  # two calls have updated it
    tied = paramshare.nnx.bake(share(module, kernels(Tied(), stack_axis=0)))
    stack: Any = tied
    stack = stack.layers.linear.kernel[...]
    assert stack.shape == (5, 8, 2, 4)
    assert (stack == stack[:1]).all()


class Network(nnx.Module):
    """Convolutions with batch norm, in a list."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs = nnx.List([nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 4, (2, 2), transpose_kernel=True, rngs=rngs)
        self.mix = nnx.Einsum("bhwc,dc->bhwd", (4, 4), rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = self.norm(conv(x))
        return self.mix(self.up(x))


def test_batch_statistics_are_updated_as_the_plain_modules():
    shared = share(Network(nnx.Rngs(0)), Plan(Rule(r"convs/\d/kernel", Tied())))
    plain: Any = paramshare.nnx.bake(shared)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    optimizer = nnx.Optimizer(shared, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x):
        gradients = nnx.grad(lambda module: jnp.mean(module(x) ** 2))(module)
        optimizer.update(module, gradients)

    step(shared, optimizer, x)
    nnx.jit(lambda module: module(x))(plain)
    np.testing.assert_allclose(shared.norm.mean[...], plain.norm.mean[...], rtol=1e-5)
    np.testing.assert_allclose(shared.norm.var[...], plain.norm.var[...], rtol=1e-5)
    shared.eval()
    statistics = shared.norm.mean[...]
    shared(x)
    assert (shared.norm.mean[...] == statistics).all()


def test_input_and_output_axes_are_known():
    layout = Plan(
        Rule("(up|mix)/kernel", Tied(), "{shape}"), Rule("convs/./(kernel|bias)", Tied(), "{shape}")
    ).resolve(Network(nnx.Rngs(0)))
    axes = {site.path: site.axes for bank in layout.banks for site in bank.sites}
    assert axes["up/kernel"] == ((0, 1), (3,), (2,))
    assert axes["mix/kernel"] == ((), (1,), (0,))
    assert axes["convs/0/kernel"] == ((0, 1), (2,), (3,))
    attention = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)
    layout = Plan(Rule("(?P<n>query|out)/(?P<k>kernel|bias)", Tied(), "{n}.{k}")).resolve(attention)
    axes = {bank.name: bank.sites[0].axes for bank in layout.banks}
    assert axes["query.kernel"] == ((), (0,), (1, 2))
    assert axes["out.kernel"] == ((), (0, 1), (2,))
    assert axes["query.bias"] == ((), (), (0, 1))


def test_sites_are_in_the_order_of_definition_or_of_calls():
    module = MLP(nnx.Rngs(0))
    assert paths(kernels(Tied()).resolve(module)) == ["b/kernel", "a/kernel", "c/kernel"]
    layout = kernels(Tied()).resolve(module, X)
    assert paths(layout) == ["c/kernel", "a/kernel", "b/kernel"]
    assert layout == kernels(Tied()).resolve(module, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert paths(share(module, kernels(Tied()), X, scale=2.0).layout) == paths(layout)
    layout = share(module, kernels(Tied()), X, method="reversed").layout
    assert paths(layout) == ["a/kernel", "b/kernel", "c/kernel"]

    class Jitted(nnx.Module):
        def __init__(self):
            self.inner = module

        def __call__(self, x):
            return nnx.jit(MLP.__call__)(self.inner, x)

    layout = kernels(Tied()).resolve(Jitted(), X)
    assert paths(layout) == ["inner/c/kernel", "inner/a/kernel", "inner/b/kernel"]
    # What is stored does not depend on the order.
    one, two = (share(module, kernels(Soft(2)), *inputs) for inputs in ((), (X,)))
    assert jax.tree.structure(nnx.state(one)) == jax.tree.structure(nnx.state(two))
    np.testing.assert_allclose(one(X), two(X), rtol=1e-6)


def test_blocks_and_sites_find_what_recurs():
    module = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3)))
    assert "layers/*/kernel  8x8    Linear       3      192" in str(paramshare.sites(module))
    plan = Plan.blocks(module, scheme=Soft(2))
    assert list(share(module, plan).layout) == ["layers.kernel"]


def test_kernels_start_as_the_modules_own():
    """At the standard deviation of the arrays; constants are constant."""

    class Weights(nnx.Module):
        def __init__(self):
            def draw(i, std):
                return nnx.Param(std * jax.random.normal(jax.random.key(i), (64, 64)))

            self.small, self.large = draw(0, 0.02), draw(1, 3.0)
            self.ones1, self.ones2 = (nnx.Param(jnp.full(5, 0.1)) for _ in range(2))

    plan = Plan(Rule("small|large", Soft(2)), Rule("ones.", Tied(), "ones"))
    layout = plan.resolve(Weights())
    sites = {site.path: site for bank in layout.banks for site in bank.sites}
    # The mean is zero within five standard errors, the standard deviation that of 4096 entries.
    assert [sites[name].mean for name in ("small", "large")] == [0, 0]
    assert sites["small"].std == pytest.approx(0.02, rel=0.05)
    assert sites["large"].std == pytest.approx(3.0, rel=0.05)
    assert (sites["ones1"].mean, sites["ones1"].std) == (0.1, 0)
    made: Any = paramshare.nnx.bake(share(Weights(), plan))
    assert (made.ones1[...] == jnp.float32(0.1)).all()
    assert float(made.large[...].std()) == pytest.approx(3.0, rel=0.1)
    with pytest.raises(PlanError, match=r"ones1 starts with mean 0\.1 and standard deviation 0"):
        Plan(Rule("ones.", Soft(2))).resolve(Weights())


class Containers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def draw():
            return nnx.Param(rngs.params.normal((8, 8)))

        self.dict = nnx.Dict({"w": nnx.Linear(8, 8, rngs=rngs), "v": draw()})
        self.weights = nnx.List([draw(), draw()])
        self.plain = nnx.data({"w": draw(), "list": [draw()]})

    def __call__(self, x):
        weights = [self.dict["v"], *self.weights, self.plain["w"], self.plain["list"][0]]
        for weight in weights:
            x = x @ weight[...]
        return nnx.jit(Containers.last)(self, x)

    def last(self, x):  # `nnx.jit` puts another dictionary in the place of `plain`
        return self.dict["w"](x)


def test_containers():
    shared = share(Containers(nnx.Rngs(0)), Plan(Rule(r"(?!.*bias).*", Soft(2))))
    expected = {"dict/w/kernel", "dict/v", "weights/0", "weights/1", "plain/w", "plain/list/0"}
    assert set(paths(shared.layout)) == expected
    check(shared, X)
    with shared.filled() as module:
        assert len(module.weights) == 2
        assert module.plain["list"][0].shape == (8, 8)

    class Tuple(nnx.Module):
        def __init__(self):
            self.weights = nnx.data((nnx.Param(X), nnx.Param(X)))

    with pytest.raises(PlanError, match=r"'weights/0' is in a tuple.*use nnx\.List"):
        share(Tuple(), Plan(Rule("weights/.", Soft(1, initial="paper"))))


def test_the_kind_and_the_metadata_of_variables_are_kept():
    class Weight(nnx.Param):
        pass

    class Module(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            named = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.one, self.two = (nnx.Linear(8, 8, kernel_init=named, rngs=rngs) for _ in "ab")
            self.three = Weight(X, note="of its own")

        def __call__(self, x):
            kinds.append((type(self.one.kernel), self.one.kernel.get_metadata("out_sharding")))
            kinds.append((type(self.three), self.three.get_metadata("note")))
            return self.two(self.one(x))

    kinds: list[Any] = []
    with jax.set_mesh(jax.make_mesh((4,), ("model",), (jax.sharding.AxisType.Auto,))):
        module = Module(nnx.Rngs(0))
        shared = share(module, Plan(Rule("one/kernel|three", Soft(1), "{shape}")))
        check(shared, X)
    assert kinds[:2] == [(nnx.Param, (None, "model")), (Weight, "of its own")]
    private: Any = nnx.state(shared)["model"]["two"]["kernel"]
    assert private.get_metadata() == module.two.kernel.get_metadata()
    assert private.get_value().sharding.spec == jax.P(None, "model")
    made: Any = paramshare.nnx.bake(shared)
    assert made.one.kernel.get_metadata() == module.one.kernel.get_metadata()


def test_abstract_modules_give_abstract_shared_ones():
    abstract = nnx.eval_shape(lambda: MLP(nnx.Rngs(0)))
    real, shared = (share(module, kernels(Soft(2))) for module in (MLP(nnx.Rngs(0)), abstract))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(nnx.state(real)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(nnx.state(shared))) == shapes
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(shared)))
    # To restore a checkpoint into, for instance.
    nnx.update(shared, nnx.state(real))
    np.testing.assert_allclose(shared(X), real(X), rtol=1e-6)


def test_a_layout_from_outside_serves_inside_a_transformation():
    plan = kernels(Soft(2))
    layout = plan.resolve(MLP(nnx.Rngs(0)))

    def create():
        return paramshare.nnx.Shared(MLP(nnx.Rngs(0)), layout, rngs=3)

    expected = share(MLP(nnx.Rngs(0)), plan, rngs=3)
    np.testing.assert_allclose(nnx.jit(create)()(X), expected(X), rtol=1e-5, atol=1e-5)
    with pytest.raises(PlanError, match=r"inside nnx\.jit .*layout = plan\.resolve\(module\)"):
        nnx.jit(lambda: share(MLP(nnx.Rngs(0)), plan))()
    # Nothing is measured for the initialization of the papers.
    nnx.eval_shape(lambda: share(MLP(nnx.Rngs(0)), kernels(Soft(2, initial="paper"))))


def test_banks_are_drawn_from_rngs():
    module, plan = MLP(nnx.Rngs(0)), kernels(Soft(2))

    def bank(**options):
        return share(module, plan, **options).banks["shared"]["templates"][...]

    assert (bank() == bank(rngs=0)).all()
    assert (bank(rngs=5) == bank(rngs=nnx.Rngs(5))).all()
    assert (bank(rngs=5) == bank(rngs=jax.random.key(5))).all()
    assert (bank(rngs=nnx.Rngs(0, params=5)) == bank(rngs=5)).all()
    rngs = nnx.Rngs(5)
    assert not np.allclose(bank(rngs=rngs), bank(rngs=rngs))


def test_a_small_module_to_repeat():
    module, small = MLP(nnx.Rngs(0), width=8), MLP(nnx.Rngs(0), width=4)
    shared = share(module, Plan(Rule(".*kernel", Repeat(like=small), "{shape}")))
    assert shared.layout.trainable < shared.layout.plain
    check(shared, X)


def test_modules_that_refer_to_each_other():
    class Part(nnx.Module):
        def __init__(self, whole: Any, rngs: nnx.Rngs):
            self.whole, self.linear = whole, nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.linear(x) * self.whole.scale

    class Whole(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.scale = nnx.Param(jnp.full((), 2.0))
            self.first, self.second = Part(self, rngs), Part(self, rngs)
            self.third = self.first

        def __call__(self, x):
            return self.third(self.second(self.first(x)))

    shared = share(Whole(nnx.Rngs(0)), kernels(Soft(2)))
    assert paths(shared.layout) == ["first/linear/kernel", "second/linear/kernel"]
    np.testing.assert_allclose(shared(X), paramshare.nnx.bake(shared)(X), rtol=1e-6)


def test_a_linen_module_behind_the_bridge():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.Dense(8)(x)
            return x

    module: Any = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init(X)
    shared = share(module, kernels(Soft(2)))
    assert len(shared.layout["shared"].sites) == 3
    check(shared, X)


def test_a_shared_module_inside_a_larger_one():
    class Larger(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.body = share(MLP(rngs), kernels(Soft(1)), rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.body(x))

    module = Larger(nnx.Rngs(0))
    assert nnx.jit(lambda module: module(X))(module).shape == (4, 2)
    assert paramshare.nnx.count(module)["banks"] == 64
    assert list(nnx.state(module, Bank)["body"]) == ["banks"]
    outer = share(module, Plan(Rule("head/kernel", Soft(1))))  # by another plan
    check(outer, X)


@pytest.mark.parametrize(
    ("module", "plan", "message"),
    [
        (nn.Dense(3), kernels(Tied()), r"Dense is a linen module; use paramshare\.share"),
        (MLP, kernels(Tied()), "takes an NNX module, got the class MLP; pass an instance"),
        (3, kernels(Tied()), "takes an NNX module, got int"),
        (MLP(nnx.Rngs(0)), Rule(".*", Tied()), "share takes a plan"),
        (MLP(nnx.Rngs(0)), Plan(Rule("a/kernl", Tied())), "nearest: 'a/kernel'"),
        (MLP(nnx.Rngs(0)), Plan(Rule(paths=("d/kernel",), scheme=Tied())), "no parameter 'd/"),
        (MLP(nnx.Rngs(0)), Plan(Rule(".*", Tied())), "needs sites of one shape"),
        (nnx.Dropout(0.5), kernels(Tied()), "Dropout has no parameters"),
        (share(MLP(nnx.Rngs(0)), kernels(Tied())), kernels(Tied()), "already shared"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(module, plan, message):
    with pytest.raises(PlanError, match=message) as caught:
        share(module, plan)
    assert "\n" not in str(caught.value)


def test_a_layout_of_another_module_is_refused():
    layout = kernels(Tied()).resolve(MLP(nnx.Rngs(0)))
    with pytest.raises(PlanError, match=r"no parameter '[abc]/kernel'"):
        paramshare.nnx.Shared(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), layout)
    layout = kernels(Tied(), bank="{shape}").resolve(MLP(nnx.Rngs(0), width=4))
    with pytest.raises(PlanError, match=r"must have shape"):
        paramshare.nnx.Shared(MLP(nnx.Rngs(0)), layout)
    with pytest.raises(PlanError, match="takes a layout"):
        paramshare.nnx.Shared(MLP(nnx.Rngs(0)), kernels(Tied()))  # pyright: ignore
